"""Upstream's own classes (the package MMSA) and ours on the same random input, side by side on the CPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from registry import Batch, DataInfo, TextEncoder, Training, TrainingData
from registry.data.batches import Group, Split
from registry.data.splits import SplitArrays
from registry.metrics import classification, regression
from registry.training import _Step, make_optimizer
from selfmm_plugin.heads import PredictionHead
from selfmm_plugin.network import SelfMM, SelfMMConfig
from selfmm_plugin.supervision import UlgmConfig, UlgmHook
from selfmm_plugin.ulgm import UnimodalLabelGenerator
from selfmm_plugin.upstream import network_from_state, translate
from tests.helpers import TINY_BERT, make_split, write_features

pytest.importorskip("MMSA", reason="MMSA, which these tests compare with, is not installed (extra `test`)")

from easydict import EasyDict
from MMSA.data_loader import MMDataLoader
from MMSA.models import AMIO
from MMSA.trains.multiTask.SELF_MM import SELF_MM
from MMSA.utils import MetricsTop
from transformers import BertConfig, BertModel, BertTokenizer

PARTS = {"fusion": "fusion", "text": "text", "audio": "audio", "vision": "video"}
"""Our names, and those in upstream's keys."""
TASKS = {"M": "fusion", "T": "text", "A": "audio", "V": "vision"}
BERT = {**TINY_BERT, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SIZES = {
    **{"a_lstm_hidden_size": 4, "v_lstm_hidden_size": 6, "audio_out": 5, "video_out": 7},
    **{"post_fusion_dim": 12, "post_text_dim": 8, "post_audio_dim": 4, "post_video_dim": 6},
}
# Attention's key bias has no gradient but rounding, which Adam makes as large as any other: with a text encoder's
# usual small learning rate it stays within the tolerance.
TRAINING = {
    **{f"post_{task}_dropout": 0.0 for task in ("fusion", "text", "audio", "video")},
    **{"learning_rate_bert": 5e-5, "learning_rate_audio": 5e-3, "learning_rate_video": 4e-3},
    **{"learning_rate_other": 1e-3, "weight_decay_bert": 1e-2, "weight_decay_audio": 1e-2},
    **{"weight_decay_video": 2e-2, "weight_decay_other": 1e-1, "batch_size": 4, "update_epochs": 2},
}
SHAKY = {**BERT, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.2}
DROPOUTS = {"post_fusion_dropout": 0.1, "post_text_dropout": 0.3, "post_audio_dropout": 0.2}
"""For the tests that are about dropout; the others compare without."""


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bert(tmp_path_factory.mktemp("bert"), BERT)


def write_bert(folder: Path, config: Mapping[str, Any]) -> Path:
    """Write a tiny random BERT that upstream loads as if it were pretrained."""
    BertModel(BertConfig(**config)).save_pretrained(folder)
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\ngood\nbad\n")
    BertTokenizer(str(vocabulary)).save_pretrained(folder)
    return folder


def arguments(**changes: Any) -> EasyDict:
    """What upstream's model, trainer and loader ask of their `args`."""
    fixed = {
        **{"model_name": "self_mm", "dataset_name": "mosi", "train_mode": "regression", "device": torch.device("cpu")},
        **{"transformers": "bert", "use_bert": True, "use_finetune": True, "text_out": BERT["hidden_size"]},
        **{"feature_T": "", "feature_A": "", "feature_V": "", "feature_dims": [16, 5, 3], "need_data_aligned": False},
        **{"a_lstm_layers": 1, "v_lstm_layers": 1, "a_lstm_dropout": 0.0, "v_lstm_dropout": 0.0},
        **{"H": 3.0, "excludeZero": True, "save_labels": False, "KeyEval": "Loss"},
    }
    return EasyDict(fixed, **SIZES, **{**TRAINING, **changes})


def upstream_model(bert: Path, seed: int, **changes: Any) -> AMIO:
    torch.manual_seed(seed)
    model = AMIO(arguments(pretrained=str(bert), **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # BERT starts so close to 0 that a slip in it would not show
            parameter.normal_(std=0.2)
    return model


# Metrics


def scored_by_upstream(mode: str, dataset: str, pred: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    return MetricsTop(mode).getMetics(dataset)(torch.from_numpy(pred), torch.from_numpy(truth))


@pytest.mark.parametrize("dataset", ["MOSI", "MOSEI", "SIMS"])
@pytest.mark.parametrize("grid", [0.2, 1 / 3, 0.1, None], ids=["fifths", "thirds", "tenths", "no grid"])
@pytest.mark.parametrize("n", [2, 7, 64, 301])
def test_regression_metrics(dataset: str, grid: float | None, n: int) -> None:
    bound = 1.0 if dataset == "SIMS" else 3.0
    for seed in range(5):
        rng = np.random.default_rng(seed)
        truth = rng.uniform(-bound, bound, n)
        truth = truth if grid is None else np.round(truth / grid) * grid
        truth[:2] = grid or 0.3, -(grid or 0.3)  # upstream has no answer where labels are all 0, or constant
        pred = truth + rng.normal(scale=bound / 2, size=n)
        pred[::2] = np.round(pred[::2], 1)  # on the edges of classes, and on halves
        pred, truth = pred.astype(np.float32), truth.astype(np.float32)
        ours = regression(pred, truth, "sims" if dataset == "SIMS" else "mosi")
        # Upstream rounds to 4 digits, and takes its MAE in float32.
        assert ours == pytest.approx(scored_by_upstream("regression", dataset, pred, truth), abs=5e-5 + 1e-6)


@pytest.mark.parametrize("dataset", ["MOSI", "MOSEI", "SIMS"])
@pytest.mark.parametrize("n", [2, 7, 64, 301])
def test_classification_metrics(dataset: str, n: int) -> None:
    for seed in range(5):
        rng = np.random.default_rng(seed)
        logits = rng.normal(size=(n, 3)).round(1).astype(np.float32)  # with ties
        classes = rng.integers(0, 3, n)
        classes[0] = 2  # upstream has no answer where every clip is neutral
        theirs = scored_by_upstream("classification", dataset, logits, classes)
        assert classification(logits, classes) == pytest.approx(theirs, abs=5e-5 + 1e-6)


# Network


def random_batch(seed: int, size: int, length: int, *, aligned: bool) -> Batch:
    """Clips of 1 to `length` tokens and steps, with rubbish behind each clip's end."""
    rng = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, BERT["vocab_size"], (size, length), generator=rng)
    lengths = torch.randint(1, length + 1, (3, size), generator=rng)
    lengths[:, 0] = length  # as in a loader that trims to the longest
    audio_lengths, vision_lengths = (lengths[0], lengths[0]) if aligned else lengths[1:]
    return Batch(
        index=torch.full((size,), -1),
        text_ids=tokens,
        text_mask=(torch.arange(length) < lengths[0][:, None]).long(),
        text_segments=torch.randint(0, 2, (size, length), generator=rng),
        audio=torch.randn(size, length, 5, generator=rng),
        audio_lengths=audio_lengths,
        vision=torch.randn(size, length, 3, generator=rng),
        vision_lengths=vision_lengths,
    )


def tokens(batch: Batch) -> Tensor:
    return torch.stack([batch.text_ids, batch.text_mask, batch.text_segments], dim=1).float()


def run_upstream(model: AMIO, batch: Batch) -> dict[str, Tensor]:
    return model(tokens(batch), (batch.audio, batch.audio_lengths), (batch.vision, batch.vision_lengths))


def encoded_by_upstream(model: AMIO, batch: Batch) -> dict[str, Tensor]:
    """What upstream's encoders hand to fusion and heads; it does not return it."""
    return {
        "text": model.Model.text_model(tokens(batch))[:, 0],
        "audio": model.Model.audio_model(batch.audio, batch.audio_lengths),
        "vision": model.Model.video_model(batch.vision, batch.vision_lengths),
    }


def assert_close(ours: Any, theirs: Any, atol: float = 1e-5) -> None:
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


@pytest.mark.parametrize("aligned", [False, True], ids=["unaligned", "aligned"])
@pytest.mark.parametrize(("seed", "size", "length"), [(0, 1, 1), (1, 1, 9), (2, 5, 4), (3, 16, 12), (4, 3, 30)])
# One layer each: upstream's LSTMs of more fail, as it takes the states of all of them for the last one's.
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.filterwarnings("ignore:dropout option adds dropout")
@torch.no_grad()
def test_network(bert: Path, seed: int, size: int, length: int, aligned: bool, dropout: float) -> None:
    options = {"need_data_aligned": aligned, "a_lstm_dropout": dropout, "v_lstm_dropout": dropout}
    model, batch = upstream_model(bert, seed, **options), random_batch(seed, size, length, aligned=aligned)
    expected = run_upstream(model, batch)
    output = network_from_state(model.state_dict(), BERT).eval()(batch)
    assert_close(output.prediction, expected["M"].view(-1))
    assert_close(output.features, {**encoded_by_upstream(model, batch), "fusion": expected["Feature_f"]})


@pytest.mark.parametrize("seed", range(3))
@torch.no_grad()
def test_unimodal_heads(bert: Path, seed: int) -> None:
    model, batch = upstream_model(bert, seed), random_batch(seed, 8, 10, aligned=False)
    expected = run_upstream(model, batch)
    features = network_from_state(model.state_dict(), BERT).eval()(batch).features
    weights = translate(model.state_dict()).heads
    for letter, name in {"T": "text", "A": "audio", "V": "vision"}.items():
        own = {key.removeprefix(f"{name}."): weight for key, weight in weights.items() if key.startswith(f"{name}.")}
        head = PredictionHead(features[name].shape[1], len(own["layer_1.bias"]))
        head.load_state_dict(own)
        # Upstream's `Feature_t` is the head's first layer, our features are what goes into it.
        assert_close(head(features[name]), (expected[letter].view(-1), expected[f"Feature_{letter.lower()}"]))


@torch.no_grad()
def test_dropout_has_upstream_s_distribution(tmp_path: Path) -> None:
    """Dropout draws other numbers here, so means and spreads over many draws of two clips are compared."""
    model, draws = upstream_model(write_bert(tmp_path, SHAKY), 0, **DROPOUTS), 20_000
    once = random_batch(0, 2, 6, aligned=False)
    batch = Batch(
        **{name: value.repeat_interleave(draws, dim=0) for name, value in vars(once).items() if torch.is_tensor(value)}
    )
    network, ulgm, _ = with_upstream_s_weights(model, as_ours(train_split()), SHAKY, H=3.0, **DROPOUTS)
    theirs = run_upstream(model.train(), batch)
    output = network.train()(batch)
    ours = {"fusion": output.prediction, **ulgm.supervision.train().predict(output.features)}
    for letter, name in TASKS.items():
        a, b = ours[name].view(2, draws), theirs[letter].view(2, draws)
        noise = (a.var(1) / draws + b.var(1) / draws).sqrt()
        assert a.std(1).min() > 0 or name == "vision", name  # which has no dropout
        assert ((a.mean(1) - b.mean(1)).abs() <= 4 * noise + 1e-6).all(), name
        torch.testing.assert_close(a.std(1), b.std(1), rtol=0.04, atol=1e-6, msg=name)


# ULGM


class Stream:
    """Upstream's trainer and our generator, fed with the same random features micro-batch by micro-batch."""

    def __init__(self, seed: int, label_range: float, exclude_zero: bool, dtype: torch.dtype) -> None:
        self.rng = torch.Generator().manual_seed(seed)
        self.dtype, self.label_range = dtype, label_range
        self.labels = ((2 * torch.rand(22, generator=self.rng) - 1) * label_range * 5).round() / 5
        self.labels[:5] = torch.tensor([0.0, 0.0, -0.0, 0.2, -0.2])
        self.trainer = SELF_MM(arguments(train_samples=22, H=label_range, excludeZero=exclude_zero))
        for maps in (self.trainer.feature_map, self.trainer.label_map):
            maps.update({name: values.to(dtype) for name, values in maps.items()})
        for rows in torch.arange(22).split(8):
            self.trainer.init_labels(rows, self.labels[rows].to(dtype))
        self.dims = {name: SIZES[f"post_{part}_dim"] for name, part in PARTS.items()}
        self.generator = UnimodalLabelGenerator(self.labels, self.dims, label_range, exclude_zero=exclude_zero)
        self.generator.to(dtype)
        self.tolerance = torch.full((22,), 5e-5)

    def features(self, index: Tensor) -> dict[str, Tensor]:
        """Features that follow the labels more or less, so that distances to the centres tell something."""
        noise = {name: torch.randn(len(index), d, generator=self.rng) for name, d in self.dims.items()}
        return {name: (0.3 * self.labels[index, None] + values).to(self.dtype).relu() for name, values in noise.items()}

    def micro_batches(self, epochs: int, size: int) -> Iterator[tuple[int, Tensor]]:
        for epoch in range(1, epochs + 1):
            for index in torch.randperm(22, generator=self.rng).split(size):
                yield epoch, index

    def feed(self, epoch: int, index: Tensor) -> None:
        features = self.features(index)
        ordered = [features[name] for name in TASKS.values()]
        if epoch > 1:
            pos, neg = self.trainer.center_map["fusion"]["pos"], self.trainer.center_map["fusion"]["neg"]
            positive, negative = (torch.linalg.vector_norm(ordered[0] - center, dim=1) for center in (pos, neg))
            ratio = ((negative - positive) / positive).abs().float()
            # A label is a quotient by δ_f, but no larger than the label range: rounding grows by 1/δ_f.
            self.tolerance[index] = self.tolerance[index].maximum(3e-7 * self.label_range / ratio)
            self.trainer.update_labels(*ordered, epoch, index, None)
        self.trainer.update_features(*ordered, index)
        self.trainer.update_centers()
        self.generator.update(features, index, epoch)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("exclude_zero", [True, False], ids=["zero excluded", "zero positive"])
@pytest.mark.parametrize("label_range", [1.0, 3.0])
@pytest.mark.parametrize(("seed", "size"), [(0, 1), (1, 5), (2, 8), (3, 22)])
def test_generated_labels(seed: int, size: int, label_range: float, exclude_zero: bool, dtype: torch.dtype) -> None:
    stream = Stream(seed, label_range, exclude_zero, dtype)
    for epoch, index in stream.micro_batches(5, size):
        stream.feed(epoch, index)
        for name in TASKS.values():
            difference = (stream.generator.labels[name] - stream.trainer.label_map[name]).abs()
            # In float64 a small δ_f amplifies nothing that would count.
            assert (difference <= (1e-9 if dtype == torch.float64 else stream.tolerance)).all(), (epoch, name)
            for ours, sign in zip(stream.generator.centers[name], ("pos", "neg"), strict=True):
                assert_close(ours, stream.trainer.center_map[name][sign])
    assert not torch.equal(stream.generator.labels["text"], stream.generator.labels["fusion"])


def test_loss_weights() -> None:
    stream = Stream(4, 3.0, True, torch.float64)
    for epoch, index in stream.micro_batches(3, 8):
        stream.feed(epoch, index)
        pred = torch.randn(len(index), generator=stream.rng, dtype=torch.float64)
        for name, weight in stream.generator.weights(index).items():
            theirs = stream.trainer.weighted_loss(pred, stream.trainer.label_map[name][index], index, name)
            ours = (weight * (pred - stream.generator.labels[name][index]).abs()).mean()
            assert_close(ours, theirs, atol=1e-9)


# A whole training


class ModelConfig(SelfMMConfig, Training):
    """Self-MM's keys and the training loop's, as the registry joins them."""


class Recorded:
    """A loader that writes down the rows of each micro-batch, by pass."""

    def __init__(self, loader: Any) -> None:
        self.loader, self.passes = loader, []

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        self.passes.append([])
        for batch in self.loader:
            self.passes[-1].append(batch["index"].view(-1))
            torch.manual_seed(seed_of(batch["index"].view(-1)))
            yield batch


def seed_of(rows: Tensor) -> int:
    """Return a seed for the dropout of a micro-batch."""
    return hash(tuple(rows.tolist())) % 2**32


class Seeded(Split):
    """Gives each micro-batch the dropout that `Recorded` gives it."""

    def batch(self, rows: Tensor) -> Batch:
        torch.manual_seed(seed_of(rows))
        return super().batch(rows)


class Snapshots(SELF_MM):
    """Upstream's trainer, which keeps the weights where it would validate, and stops as nothing gets better."""

    def do_test(self, model: AMIO, *_: Any, **__: Any) -> dict[str, float]:
        self.weights = [*getattr(self, "weights", []), {k: v.clone() for k, v in model.state_dict().items()}]
        return {"Loss": float("inf")}


def train_split() -> dict[str, Any]:
    """22 clips: 6 micro-batches of 4, the last one short; groups of 2 fit in, of groups of 4 the tail is dropped."""
    split = make_split(22, seed=3)
    split["text_bert"][:, 0] %= BERT["vocab_size"]
    split["regression_labels"][::6] = 0
    return split


def as_ours(split: Mapping[str, Any], made: type[Split] = Split) -> Split:
    arrays = {name: np.asarray(split[name]) for name in ("audio", "audio_lengths", "vision", "vision_lengths")}
    arrays = SplitArrays(ids=split["id"], labels={"M": split["regression_labels"]}, **arrays)
    return made(arrays, split["text_bert"], torch.device("cpu"), train=True)


def with_upstream_s_weights(
    model: AMIO, train: Split, bert: Mapping[str, Any] = BERT, **changes: Any
) -> tuple[SelfMM, UlgmHook, ModelConfig]:
    start, encoder = translate(model.state_dict()), TextEncoder.from_config(bert)
    config = ModelConfig(tail="drop", **SIZES, **{**TRAINING, **changes})
    data = DataInfo("upstream", start.dims, {}, len(train), config.label_range, ("M",), False, encoder)
    network = SelfMM(config, data)
    network.load_state_dict(start.network)
    ulgm = UlgmHook(UlgmConfig(**config.hook_values()), TrainingData(train.labels, data), network.feature_dims)
    ulgm.supervision.heads.load_state_dict(start.heads)
    return network, ulgm, config


@pytest.mark.parametrize("per_sample", [True, False], ids=["whole groups", "micro-batches"])
@pytest.mark.parametrize(("size", "exclude_zero", "label_range"), [(2, True, 3.0), (4, True, 3.0), (2, False, 1.0)])
def test_training(
    bert: Path, tmp_path: Path, size: int, exclude_zero: bool, label_range: float, per_sample: bool
) -> None:
    changes = {"update_epochs": size, "excludeZero": exclude_zero, "H": label_range}
    follow_upstream(train_split(), bert, BERT, tmp_path, per_sample, **changes)


def test_training_with_the_same_dropout(tmp_path: Path) -> None:
    """Where all clips are of one length, both sides draw the same dropout from the same seeds."""
    split = train_split()
    split["text_bert"][:, 1] = 1
    split["audio_lengths"], split["vision_lengths"] = [6] * 22, [4] * 22
    options = {"update_epochs": 2, "excludeZero": True, "H": 3.0, **DROPOUTS}
    follow_upstream(split, write_bert(tmp_path, SHAKY), SHAKY, tmp_path, False, **options)


def follow_upstream(
    split: dict[str, Any],
    bert: Path,
    config_of_bert: Mapping[str, Any],
    tmp_path: Path,
    per_sample: bool,
    **changes: Any,
) -> None:
    """Train both sides from the same weights, and compare after every epoch."""
    epochs, size = 3, changes["update_epochs"]
    file = write_features(tmp_path / "features.pkl", {"train": split, "valid": split, "test": split})
    model, train = upstream_model(bert, 0, **changes), as_ours(split, Seeded)
    network, ulgm, config = with_upstream_s_weights(model, train, config_of_bert, **changes)
    args = arguments(custom_feature=str(file), train_samples=len(train), early_stop=epochs, **changes)
    loaders = MMDataLoader(args, 0)
    order = loaders["train"] = Recorded(loaders["train"])
    trainer = Snapshots(args)
    trainer.do_train(model, loaders)

    step = _Step(network, [ulgm], config, train, make_optimizer(network, [ulgm], config), per_sample)
    for epoch in range(1, epochs + 1):
        rows = order.passes[epoch]  # the first pass only reads the labels
        for members in (rows[first : first + size] for first in range(0, len(rows), size)):
            step(Group(members, step=len(members) == size), epoch)
        expected = translate(trainer.weights[epoch - 1])
        assert_close(dict(network.state_dict()), expected.network)
        assert_close(dict(ulgm.supervision.heads.state_dict()), expected.heads)
    # Labels are quotients: where the divisor is small, rounding grows.
    assert_close(ulgm.supervision.generator.labels, trainer.label_map, atol=2e-4)
