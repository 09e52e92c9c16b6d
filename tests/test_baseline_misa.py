"""MISA against upstream's: outputs, features, auxiliary losses, and a whole epoch of training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from easydict import EasyDict
from MMSA.trains.singleTask.MISA import CMD, MISA, DiffLoss
from pydantic import create_model
from torch import Tensor, nn

from baselines_compat import misa
from registry.contract import Batch
from registry.data.batches import Group
from registry.testing import check_model
from registry.training import _Step, make_optimizer
from tests.baselines import (
    ALIGNED,
    DIMS,
    LENGTHS,
    as_upstream,
    assert_same,
    batch,
    configured,
    enlarge,
    give_weights,
    info,
    upstream,
)  # fmt: skip
from tests.helpers import TINY_BERT
from tests.test_against_upstream import write_bert

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor")

SIZES = {"hidden_size": 8, "diff_weight": 0.2, "sim_weight": 0.7, "recon_weight": 0.6, "reverse_grad_weight": 0.4}
FEATURES = {"text": "utt_t_orig", "audio": "utt_a_orig", "vision": "utt_v_orig", "fusion": "fused"}
INITIALS = {"text": "t", "vision": "v", "audio": "a"}
NAMES = {
    **{"text.encoder.model": "bertmodel.model", "shared.0": "shared.shared_1"},
    **{"attention": "transformer_encoder.layers.0"},
    **{"layer_1": "fusion.fusion_layer_1", "layer_2": "fusion.fusion_layer_3"},
    **{"discriminator.0": "discriminator.discriminator_layer_1"},
    **{"discriminator.3": "discriminator.discriminator_layer_2"},
}
for modality, x in INITIALS.items():
    NAMES |= {f"project.{modality}.0": f"project_{x}.project_{x}"}
    NAMES |= {f"project.{modality}.2": f"project_{x}.project_{x}_layer_norm"}
    NAMES |= {f"private.{modality}.0": f"private_{x}.private_{x}_{3 if x == 'a' else 1}"}
    NAMES |= {f"reconstruct.{modality}": f"recon_{x}.recon_{x}_1"}
    NAMES |= {f"sequences.{modality}.layer_{n}": f"{x}rnn{n}" for n in (1, 2)}
    NAMES |= {f"sequences.{modality}.norm": f"{x}layer_norm"}
UNUSED = ("tlayer_norm", "sp_discriminator", "bertmodel.model.pooler")


def frozen(spec):
    return replace(spec, config=create_model("frozen", __base__=spec.config, finetune_text=(bool, False)))


def without_dropout(theirs: nn.Module, ours: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Return both with dropout, which must be of the same rates, switched off."""
    assert dropout_rates(theirs) == dropout_rates(ours)
    for module in (*theirs.modules(), *ours.modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    return theirs, ours


def dropout_rates(model: nn.Module) -> list[float]:
    attention = [module.dropout for module in model.modules() if isinstance(module, nn.MultiheadAttention)]
    return sorted([module.p for module in model.modules() if isinstance(module, nn.Dropout)] + attention)


def tokens(data: Batch) -> Tensor:
    return torch.stack([data.text_ids, data.text_mask, data.text_segments], dim=1).float()


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return str(write_bert(tmp_path_factory.mktemp("bert"), TINY_BERT))


@pytest.fixture
def pair(bert):
    """Return upstream's model, and ours with its weights, given settings of both."""

    def make(preset: str = "mmsa", lengths: Mapping[str, int] = LENGTHS, **settings: Any):
        settings = {"rnncell": "lstm", "use_cmd_sim": True, "dropout": 0.3, **SIZES, **settings}
        of_bert = {"use_bert": True, "use_finetune": True, "transformers": "bert", "pretrained": bert}
        theirs = upstream("misa", lengths, **of_bert, **settings)
        theirs.Model.project_t[0] = nn.Linear(DIMS["text"], settings["hidden_size"])  # it is 768 there, whatever BERT
        enlarge(theirs.Model)
        ours = misa.SPEC.build(configured(misa.SPEC, preset, **settings), info(lengths)).eval()
        give_weights(ours, theirs.Model, NAMES, UNUSED)
        return without_dropout(theirs, ours)

    return make


@contextmanager
def all_vectors(theirs: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collect what upstream's model leaves on itself, and the first layer of its fusion head."""
    found: dict[str, Tensor] = {}
    with theirs.Model.fusion[0].register_forward_hook(lambda *call: found.update(fused=call[-1].relu())):
        yield found
    found |= {name: getattr(theirs.Model, name) for name in FEATURES.values() if name != "fused"}


def assert_equal(theirs: nn.Module, ours: nn.Module, data: Batch) -> None:
    with all_vectors(theirs) as found:
        found |= theirs(tokens(data), data.audio, data.vision)
    assert_same(ours(data), found, FEATURES)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("adversarial", [False, True], ids=["moments", "adversarial"])
def test_equals_upstream(pair, cell, adversarial):
    assert_equal(*pair(rnncell=cell, use_cmd_sim=not adversarial), batch())


def test_the_corrected_one_equals_upstream_on_aligned_data(pair):
    assert_equal(*pair("corrected", ALIGNED), batch(ALIGNED))


def trainer(theirs: nn.Module, **settings: Any) -> MISA:
    """Return upstream's trainer, with what its adversarial loss needs and it lacks."""
    fixed = {"train_mode": "regression", "dataset_name": "mosi", "use_cmd_sim": True, "KeyEval": "Loss"}
    made = MISA(EasyDict(fixed, **{**SIZES, **settings}))
    made.model, made.device, made.domain_loss_criterion = theirs, torch.device("cpu"), nn.CrossEntropyLoss()
    return made


@pytest.mark.parametrize("adversarial", [False, True], ids=["moments", "adversarial"])
def test_auxiliary_losses_equal_upstream_s(pair, adversarial):
    theirs, ours = (model.train() for model in pair(use_cmd_sim=not adversarial))
    made, data = trainer(theirs, use_cmd_sim=not adversarial), batch()
    theirs(tokens(data), data.audio, data.vision)
    similarity = made.get_domain_loss() if adversarial else made.get_cmd_loss()
    expected = {
        "difference": SIZES["diff_weight"] * made.get_diff_loss(),
        "similarity": SIZES["sim_weight"] * similarity,
        "reconstruction": SIZES["recon_weight"] * made.get_recon_loss(),
    }
    losses = ours(data).losses
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=1e-5)
    for loss, other in zip(losses.values(), expected.values(), strict=True):
        ours.zero_grad()
        theirs.zero_grad()
        loss.backward(retain_graph=True)
        other.backward(retain_graph=True)
        # For the adversarial loss it is the reversed one.
        torch.testing.assert_close(ours.shared[0].weight.grad, theirs.Model.shared[0].weight.grad, atol=1e-5, rtol=1e-4)


def test_no_losses_outside_training(pair):
    assert pair()[1](batch()).losses == {}


@pytest.mark.parametrize("seed", range(3))
def test_discrepancies(seed):
    g = torch.Generator().manual_seed(seed)
    first, second = torch.rand(2, 7, 5, generator=g)
    torch.testing.assert_close(misa.moment_discrepancy(first, second), CMD()(first, second, 5))
    torch.testing.assert_close(misa.overlap(first, second), DiffLoss()(first, second))
    assert misa.moment_discrepancy(first, first.flip(0)) < 1e-6
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    assert misa.overlap(signs[:, :1], signs[:, 1:]) < 1e-12


def silent() -> Batch:
    data = batch()
    return replace(data, audio=torch.zeros_like(data.audio), vision=torch.zeros_like(data.vision))


@pytest.mark.parametrize("adversarial", [False, True], ids=["moments", "adversarial"])
@pytest.mark.parametrize("data", [batch(clips=1), silent()], ids=["one clip", "silence"])
def test_trains_where_nothing_varies(data, adversarial):
    """Upstream's gradient is NaN: it takes roots of differences that are 0."""
    model = misa.SPEC.build(configured(misa.SPEC, use_cmd_sim=not adversarial), info())
    output = model(data)
    (output.prediction.sum() + sum(output.losses.values())).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


# --- training


class Clips:
    """A train split of random clips, as the training loop reads one."""

    device = torch.device("cpu")

    def __init__(self, data: Batch) -> None:
        self.data = data

    def batch(self, rows: Tensor) -> Batch:
        values = {f.name: getattr(self.data, f.name) for f in fields(Batch)}
        labels = {task: label[rows] for task, label in values.pop("labels").items()}
        return Batch(labels=labels, **{name: value[rows] for name, value in values.items() if value is not None})


def in_double(data: Batch) -> Batch:
    """Return clips in float64: in float32 Adam makes a step of the rounding where a gradient is 0."""
    return replace(
        data, audio=data.audio.double(), vision=data.vision.double(), labels={"M": data.labels["M"].double()}
    )


def train_both(trainer: Any, theirs: nn.Module, ours: nn.Module, config: Any, data: Batch) -> None:
    """Train both for an epoch of micro-batches of 4 clips, the last group not whole, in float64."""
    theirs.double()
    ours.double().train()
    clips = Clips(in_double(data))
    micro_batches = torch.arange(len(data)).split(4)
    loader = [clips.batch(rows) for rows in micro_batches]
    trainer.do_test = lambda *_, **__: {"Loss": float("inf")}
    trainer.args.early_stop = 1
    trainer.do_train(
        theirs,
        {
            "train": [
                {"text": tokens(part), "audio": part.audio, "vision": part.vision, "labels": part.labels}
                for part in loader
            ],
            "valid": None,
        },
    )
    step = _Step(ours, [], config, clips, make_optimizer(ours, [], config), per_sample=False)
    for start in range(0, len(micro_batches), config.update_epochs):
        members = micro_batches[start : start + config.update_epochs]
        step(Group(members, step=config.tail == "step" or len(members) == config.update_epochs), epoch=1)


def test_trains_as_upstream(pair):
    settings = {"learning_rate": 1e-2, "weight_decay": 0.1, "clip_value": 0.05, "update_epochs": 2}
    theirs, ours = pair()
    before = {name: tensor.double() for name, tensor in ours.state_dict().items()}
    config = configured(
        misa.SPEC, "mmsa", **SIZES, **{**settings, "weight_decay": 0.0}, learning_rate_bert=1e-2, batch_size=4
    )  # upstream does not use the decay that it is given
    made = trainer(theirs, **settings, grad_clip=0.05, device=torch.device("cpu"), model_name="misa", cur_seed=0)
    train_both(made, theirs, ours, config, batch(clips=20))
    expected = misa.SPEC.build(config, info()).double()
    give_weights(expected, theirs.Model, NAMES, UNUSED)
    torch.testing.assert_close(ours.state_dict(), expected.state_dict(), atol=1e-6, rtol=1e-6)
    still = [n for n, p in ours.named_parameters() if torch.allclose(p, before[n], atol=1e-4) and "key.bias" not in n]
    assert not still


@pytest.mark.parametrize("dataset", ["mosi", "mosei", "sims", "simsv2"])
def test_presets(dataset):
    config = configured(misa.SPEC, "corrected", dataset)
    assert (config.learning_rate_bert, config.weight_decay_bert) == (config.learning_rate, config.weight_decay)
    assert (config.criterion, config.update_epochs, config.tail) == ("mse", 2, "drop")
    assert configured(misa.SPEC, "mmsa", dataset).as_upstream
    if dataset == "mosi":
        defaults = misa.SPEC.config()
        assert {key: getattr(config, key) for key in misa.SPEC.config.model_fields} == defaults.model_dump()
        training = misa.SPEC.training
        assert (training.batch_size, training.clip_value) == (config.batch_size, config.clip_value)


def test_the_published_decay_counts_here_and_not_upstream():
    for preset, decays in (("corrected", [5e-5, 0.0, 5e-5]), ("mmsa", [0.0, 0.0, 0.0])):
        config = configured(misa.SPEC, preset, "sims")
        groups = misa.SPEC.build(config, info()).parameter_groups(config)
        assert [group["weight_decay"] for group in groups] == decays
        assert {group["lr"] for group in groups} == {1e-4}


# --- what is corrected, and the contract


def test_audio_counts_to_its_own_end():
    data = batch()
    object.__setattr__(data, "audio_lengths", data.audio_lengths.clamp(min=12))
    object.__setattr__(data, "audio", torch.randn(data.audio.shape))
    beyond_text = replace(data, audio=torch.cat([data.audio[:, :9], data.audio[:, 9:] + 1], dim=1))
    for preset, same in (("corrected", False), ("mmsa", True)):
        model = misa.SPEC.build(configured(misa.SPEC, preset, **SIZES), info()).eval()
        assert torch.equal(model(data).prediction, model(beyond_text).prediction) is same


def test_text_may_be_longer_than_audio_as_upstream():
    lengths = {"text": 9, "audio": 3, "vision": 4}
    model = misa.SPEC.build(configured(misa.SPEC, "mmsa", **SIZES), info(lengths)).eval()
    assert model(batch(lengths)).prediction.isfinite().all()


@pytest.mark.parametrize("change", [lambda spec: spec, frozen, as_upstream], ids=["fine-tuned", "frozen", "upstream"])
@pytest.mark.parametrize("adversarial", [False, True], ids=["moments", "adversarial"])
def test_keeps_the_contract(change, adversarial):
    spec = change(misa.SPEC)
    if adversarial:
        config = create_model("adversarial", __base__=spec.config, use_cmd_sim=(bool, False))
        spec = replace(spec, config=config, presets={})
    check_model(spec)
