"""The bridge to the installed package MMSA: its own models and trainers beside ours, on the same clips."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from easydict import EasyDict
from MMSA.data_loader import MMDataset
from MMSA.models.missingTask.TFR_NET.model import TFR_NET
from MMSA.models.singleTask.MCTN import MCTN
from MMSA.models.singleTask.MMIM import MMIM
from MMSA.models.subNets import BertTextEncoder
from MMSA.trains.singleTask import MMIM as MMIMTrainer  # noqa: N811
from torch import Tensor, nn
from torch.nn.functional import l1_loss, mse_loss, pad

from baselines_compat import mmsa_bridge as bridge
from registry import Batch, DataInfo, load_run, run
from registry.compare_models import _expand
from registry.data.batches import Split, predict
from registry.data.feature_file import read_feature_file
from registry.data.text import TextEncoder, find_text_encoder
from registry.errors import InputError
from registry.jobs import make_plan
from registry.plugins import Plugins
from registry.testing import check_model
from registry.training import Watcher, make_optimizer
from tests.baselines import DIMS, LENGTHS, batch, configured, enlarge, info
from tests.helpers import TINY_BERT, WORDS, feature_file, tiny_encoder
from tests.test_against_upstream import write_bert

SPECS = [bridge.MMIM, bridge.MCTN, bridge.TFR_NET]
STILL = {**TINY_BERT, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
"""A text encoder without dropout."""
CLIPS = 16


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bert(tmp_path_factory.mktemp("bert"), STILL)


def facts(**changes: Any) -> DataInfo:
    """Return facts of data whose text encoder has no dropout."""
    return replace(info(), **{"text_encoder": TextEncoder.from_config(STILL), **changes})


def tokens(data: Batch) -> Tensor:
    """Return text as upstream's loader gives it."""
    return torch.stack([data.text_ids, data.text_mask, data.text_segments], dim=1).float()


def give(ours: nn.Module, theirs: nn.Module, text: str = "bertmodel.") -> None:
    """Load a bare upstream model's weights into the one that the bridge has made."""
    state = {
        (name.replace(f"{text}model.", f"{text}model.model.", 1) if name.startswith(f"{text}model.") else name): tensor
        for name, tensor in theirs.state_dict().items()
        if not name.startswith(f"{text}model.pooler")
    }
    ours.load_state_dict(state)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Return an MMIM's weights under upstream's names."""
    return {name.replace("bertmodel.model.model.", "bertmodel.model."): w for name, w in model.state_dict().items()}


def draw(model: nn.Module) -> nn.Module:
    enlarge(model)
    return model


# --- all of them


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_keeps_the_contract(spec):
    check_model(spec)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_presets_have_every_key(spec):
    """Other keys are those of `Training`, and the ones that upstream publishes apart from the rest."""
    for dataset, values in spec.presets["mmsa"].items():
        configured(spec, dataset=dataset)
        assert spec.config.model_fields.keys() - values.keys() <= {"missing_rate", "missing_seed"}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_trains_and_is_loaded_again(spec, tmp_path, encoder):
    data = feature_file(tmp_path, sizes={"train": 20, "valid": 4, "test": 5})
    settings = {"batch_size": 7, "epochs": 2, "update_epochs": 1}
    result = run(spec.name, "mosi", data=data, text_encoder=encoder, config=settings, runs=tmp_path, device="cpu")
    (done,) = result.runs
    assert done.status == "ok", done.reason
    again = load_run(done.folder)
    assert len(again.history) == 2
    assert again.predictions["prediction"].nunique() > 1
    job = make_plan(spec.name, "mosi", config=settings).read(data, encoder, Watcher())
    found = predict(again.model, job.split("test", torch.device("cpu")))
    assert found.tolist() == pytest.approx(list(again.predictions["prediction"]), abs=1e-5)
    tuned = "frozen" if spec is bridge.MCTN else "fine-tuned"
    assert again.summary["protocol"]["text encoder"].endswith(tuned)


def test_other_text_encoders_than_bert(tmp_path):
    encoder = find_text_encoder(str(tiny_encoder(tmp_path / "distilbert", "distilbert")))
    for spec in (bridge.MMIM, bridge.TFR_NET):
        data = facts(text_encoder=encoder, dims={**DIMS, "text": encoder.width})
        model = spec.build(configured(spec), data).eval()
        known = replace(batch(), text_ids=batch().text_ids % len(WORDS))
        assert model(known).prediction.isfinite().all()


def test_upstream_is_as_it_was():
    """What stands in for upstream's parts while a model is built does not stay."""
    for spec in SPECS:
        spec.build(configured(spec), facts())
    for upstream in (MMIM, TFR_NET):
        assert sys.modules[upstream.__module__].BertTextEncoder is BertTextEncoder
    assert not issubclass(sys.modules[MCTN.__module__].Seq2Seq, bridge.Translation)


@pytest.mark.parametrize("spec", [bridge.MMIM, bridge.MCTN], ids=lambda spec: spec.name)
def test_gradients_are_clipped_to_a_norm(spec):
    norms = {}
    for limit in (1e-3, 1e6):
        torch.manual_seed(0)
        model = draw(spec.build(configured(spec, grad_clip=limit), facts())).train()
        output = model(batch())
        (output.prediction.sum() + sum(output.losses.values())).backward()
        norms[limit] = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    assert norms[1e-3] == pytest.approx(1e-3, rel=1e-3)
    assert norms[1e6] > 1e-2


# --- MMIM

SETTINGS = {"d_vh": 6, "d_ah": 5, "d_vout": 9, "d_aout": 8, "d_prjh": 12, "dropout_prj": 0.0, "grad_clip": 0.5}
RATES = {"learning_rate": 1e-3, "weight_decay": 1e-2, "learning_rate_bert": 1e-5, "lr_mmilb": 2e-3}


def bare_mmim(bert: Path, **changes: Any) -> Any:
    """Return upstream's model and what it was made from."""
    arguments = EasyDict(
        {
            **{**SETTINGS, "feature_dims": list(DIMS.values()), "need_data_aligned": False, "add_va": False},
            **{"n_layer": 1, "bidirectional": True, "cpc_layers": 1, "cpc_activation": "Tanh", "contrast": True},
            **{"mmilb_mid_activation": "ReLU", "mmilb_last_activation": "Tanh", "train_mode": "regression"},
            **{"use_bert": True, "use_finetune": True, "transformers": "bert", "pretrained": str(bert)},
            **{"dataset_name": "mosi", "device": "cpu", "mem_size": 1, "alpha": 0.1, "beta": 0.1},
            **changes,
        }
    )
    return draw(MMIM(arguments)), arguments


def upstream_trainer(bare: nn.Module, arguments: Any, rates: dict[str, float]) -> MMIMTrainer:
    """Return upstream's trainer with the optimisers that its `do_train` makes."""
    trainer = MMIMTrainer(arguments)
    trainer.model = bare
    named = [(f"Model.{name}", parameter) for name, parameter in bare.named_parameters()]
    text = [parameter for name, parameter in named if "bert" in name]
    bounds = [parameter for name, parameter in named if "bert" not in name and "mi" in name]
    others = [parameter for name, parameter in named if "bert" not in name and "mi" not in name]
    trainer.optimizer_mmilb = torch.optim.Adam(bounds, lr=rates["lr_mmilb"], weight_decay=1e-4)
    trainer.optimizer_main = torch.optim.Adam(
        [
            {"params": text, "lr": rates["learning_rate_bert"], "weight_decay": 1e-4},
            {"params": others, "lr": rates["learning_rate"], "weight_decay": rates["weight_decay"]},
        ]
    )
    return trainer


def of_loader(data: Batch) -> dict[str, Any]:
    """Return a batch as upstream's loader gives it."""
    lengths = {name: getattr(data, name) for name in ("audio_lengths", "vision_lengths")}
    return {"text": tokens(data), "audio": data.audio, "vision": data.vision, "labels": data.labels, **lengths}


@pytest.mark.parametrize("add_va", [False, True])
def test_mmim_equals_upstream(bert, add_va):
    bare, _ = bare_mmim(bert, add_va=add_va)
    ours = bridge.MMIM.build(configured(bridge.MMIM, **SETTINGS, add_va=add_va), facts())
    give(ours.network, bare)
    data = batch()
    theirs = bare.eval()(tokens(data), (data.audio, data.audio_lengths), (data.vision, data.vision_lengths))
    output = ours.eval()(data)
    torch.testing.assert_close(output.prediction, theirs["M"][:, 0], atol=1e-6, rtol=1e-6)
    for name, foreign in {
        "text": "Feature_t",
        "audio": "Feature_a",
        "vision": "Feature_v",
        "fusion": "Feature_f",
    }.items():
        torch.testing.assert_close(output.features[name], theirs[foreign], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("batches", "lr_mmilb", "mem_size"), [(1, 2e-3, 1), (5, 0.0, 1), (6, 0.0, 2)], ids=["both stages", "1", "2"]
)
def test_mmim_trains_as_upstream(bert, batches, lr_mmilb, mem_size):
    """With one batch an epoch the stages take turns as upstream; with more, the second stage does what upstream's does.

    The entropy counts from the third batch on.
    """
    rates = {**RATES, "lr_mmilb": lr_mmilb}
    clips = [batch(seed=seed, clips=CLIPS) for seed in range(batches)]
    bare, arguments = bare_mmim(bert, mem_size=mem_size, train_samples=batches * CLIPS)
    config = configured(bridge.MMIM, **SETTINGS, **rates, mem_size=mem_size)
    ours = bridge.MMIM.build(config, facts(n_train=batches * CLIPS)).train()
    give(ours.network, bare)
    trainer, optimizer = upstream_trainer(bare, arguments, rates), make_optimizer(ours, [], config)
    for _ in range(2):
        trainer.train_mmilb({"train": [of_loader(data) for data in clips]})
        trainer.train_others({"train": [of_loader(data) for data in clips]})
        for number, data in enumerate(clips):
            optimizer.zero_grad()
            output = ours(data)
            (l1_loss(output.prediction, data.labels["M"]) + sum(output.losses.values())).backward()
            optimizer.step()
            assert bool(output.losses["entropy"] != 0) == (number > mem_size)
        expected = weights(bare)
        for name, tensor in weights(ours.network).items():
            torch.testing.assert_close(tensor, expected[name], atol=2e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_mmim_bounds_see_half_of_mosei():
    for name, moved in (("mosi", [True, True, True]), ("mosei", [True, False, True])):
        model = bridge.MMIM.build(configured(bridge.MMIM), facts(name=name)).train()
        found = []
        for seed in range(3):
            before = model.bounds[0].mlp_mu[0].weight.detach().clone()
            model(batch(seed=seed))
            found.append(not torch.equal(before, model.bounds[0].mlp_mu[0].weight))
        assert found == moved


def test_mmim_keeps_gradients_that_wait_for_an_update():
    model = bridge.MMIM.build(configured(bridge.MMIM), facts()).train()
    before = {}
    for name, parameter in model.named_parameters():
        parameter.grad = before[name] = torch.full_like(parameter, 0.5)
    model(batch())
    assert all(torch.equal(parameter.grad, before[name]) for name, parameter in model.named_parameters())


def test_mmim_does_without_an_entropy_that_is_none():
    """A class without clips, vision that says nothing, a batch of one: upstream's loss is NaN, or it stops."""
    usual = [batch(seed=seed, clips=CLIPS) for seed in range(4)]
    positive = [replace(data, labels={"M": data.labels["M"].abs()}) for data in usual]
    silent = [replace(data, vision=0 * data.vision) for data in usual]
    for clips in (positive, silent, [batch(seed=seed, clips=1) for seed in range(4)]):
        model = bridge.MMIM.build(configured(bridge.MMIM), facts()).train()
        for data in clips:
            output = model(data)
            loss = l1_loss(output.prediction, data.labels["M"]) + sum(output.losses.values())
            loss.backward()
            assert loss.isfinite()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_mmim_forgets_at_the_end_of_an_epoch():
    model = bridge.MMIM.build(configured(bridge.MMIM, mem_size=3), facts(n_train=2 * CLIPS)).train()
    sizes = []
    for seed in range(5):
        model(batch(seed=seed, clips=CLIPS))
        sizes.append(len(model.memory))
    assert sizes == [1, 2, 1, 2, 1]


# --- MCTN


def bare_mctn(width: int) -> Any:
    bare = MCTN(EasyDict(hid_dim=6, output_dim=width, max_seq_len=8, use_bert=False))
    bare.seq2seq1.device = bare.seq2seq2.device = "cpu"  # upstream has "cuda" there
    return draw(bare)


def along_time(bare: Any, text: Tensor, audio: Tensor, vision: Tensor) -> tuple[Tensor, Tensor]:
    """Return predictions (B) and the loss of translation that upstream's parts give for sequences (L, B, d)."""
    joint, of_vision = bare.seq2seq1(text, vision)
    _, of_text = bare.seq2seq1(of_vision, text)
    joint, of_audio = bare.seq2seq2(joint, audio)
    states, _ = bare.regression.rnn(joint)
    attention = bare.regression.linear(states).tanh().softmax(0)
    prediction = bare.regression.linear2((attention * states).sum(0)).squeeze(-1)
    pairs = ((of_vision, vision), (of_text, text), (of_audio, audio))
    return prediction, 0.1 * sum(mse_loss(made, given) for made, given in pairs)


@pytest.mark.parametrize("clips", [6, 1])
def test_mctn_equals_upstream_along_time(clips):
    lengths = dict.fromkeys(LENGTHS, 9)
    bare, data = bare_mctn(DIMS["text"]), batch(lengths, clips=clips)
    ours = bridge.MCTN.build(configured(bridge.MCTN, hid_dim=6, max_seq_len=8), info(lengths)).train()
    ours.network.load_state_dict(bare.state_dict())
    output = ours(data)
    sequences = [getattr(data, name)[:, :8] for name in ("text", "audio", "vision")]
    wide = [pad(sequence, (0, DIMS["text"] - sequence.shape[2])).transpose(0, 1) for sequence in sequences]
    # Upstream stops at a batch of one; of two equal clips it makes the same twice.
    prediction, translation = along_time(bare, *(torch.cat([sequence] * 2, dim=1) for sequence in wide))
    torch.testing.assert_close(output.prediction, prediction[:clips], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.losses["translation"], translation, atol=1e-5, rtol=1e-5)


def test_upstream_s_mctn_predicts_by_the_clips_before():
    """Why time and batch are put right: upstream's prediction is not one of a clip."""
    bare = bare_mctn(DIMS["text"])
    text = batch(dict.fromkeys(LENGTHS, 9)).text
    labels = torch.zeros(len(text), 1)
    predictions = [bare(rows, rows, rows, labels, None)[1] for rows in (text, text.flip(0))]
    assert not torch.allclose(predictions[0], predictions[1].flip(0), atol=1e-3)


def test_mctn_where_audio_or_vision_is_the_widest():
    model = bridge.MCTN.build(configured(bridge.MCTN), facts(dims={**DIMS, "vision": 40}))
    output = model.train()(replace(batch(), vision=torch.randn(6, 11, 40)))
    assert output.prediction.isfinite().all()
    assert output.losses["translation"].isfinite()


# --- TFR-Net

WHOLE = {name: 0.0 for name in bridge.TFRNetConfig.model_fields if "drop" in name}
SMALL = {**WHOLE, "dst_feature_dim_nheads": (6, 2), "nlevels": 1, "num_temporal_head": 1, "fusion_gru_layers": 1}


def bare_tfr_net(bert: Path, monkeypatch: pytest.MonkeyPatch, config: Any, dims: Any, lengths: Any) -> nn.Module:
    """Return upstream's model with a text encoder from a folder; upstream always loads bert-base-uncased."""
    fixed = {
        **{"feature_dims": dims, "seq_lens": lengths, "device": "cpu", "without_generator": False},
        **{"alignmentModule": "crossmodal_attn", "generatorModule": "linear", "fusionModule": "c_gate"},
        **{"recloss_type": "combine", "use_bert_finetune": True},
    }
    with monkeypatch.context() as patch:
        module = sys.modules[TFR_NET.__module__]
        patch.setattr(module, "BertTextEncoder", partial(BertTextEncoder, pretrained=str(bert)))
        return draw(TFR_NET(EasyDict(config.model_dump(), **fixed)))


def test_tfr_net_equals_upstream_on_what_its_loader_gives(tmp_path, monkeypatch):
    """The same steps are missing as in upstream's loader; predictions and the loss of reconstruction are the same."""
    rates = {"missing_rate": (0.5, 0.4, 0.3), "missing_seed": (1, 2, 3)}
    config = configured(bridge.TFR_NET, **SMALL, **rates)
    place = feature_file(tmp_path, sizes={"train": 30, "valid": 4, "test": 4})
    loader = EasyDict(
        **{"custom_feature": str(place), "feature_T": "", "feature_A": "", "feature_V": "", "feature_dims": [0, 0, 0]},
        **{"dataset_name": "mosi", "use_bert": True, "need_data_aligned": False, "data_missing": True},
        **rates,
    )
    rows = torch.randperm(30)
    upstream_s = MMDataset(loader)
    loaded = torch.utils.data.default_collate([upstream_s[int(row)] for row in rows])
    given = [
        tuple(
            loaded[key].float() for key in (name, f"{name}_m", f"{name}_mask", f"{name}_missing_mask") if key in loaded
        )
        for name in ("text", "audio", "vision")
    ]
    encoder = {**STILL, "vocab_size": 4000}
    bare = bare_tfr_net(write_bert(tmp_path, encoder), monkeypatch, config, [16, 5, 3], [9, 6, 4])
    data = facts(
        n_train=30,
        dims={"text": 16, "audio": 5, "vision": 3},
        max_lengths={"text": 9, "audio": 6, "vision": 4},
        text_encoder=TextEncoder.from_config(encoder),
    )
    ours = bridge.TFR_NET.build(config, data).train()
    give(ours.network, bare, "text_model.")
    arrays = read_feature_file(place, label_range=3.0).splits["train"]
    split = Split(arrays, arrays.text_bert, torch.device("cpu"), train=True, needs=bridge.TFR_NET.needs)
    clips = split.batch(rows)
    made = ours._text(clips, True), ours._other(clips, "audio", True), ours._other(clips, "vision", True)
    for tensors, expected in zip(made, given, strict=True):
        assert all(torch.equal(tensor.float(), other) for tensor, other in zip(tensors, expected, strict=True))
    ours(clips)  # the first epoch, without reconstruction
    output = ours(clips)
    prediction, reconstruction = bare.train()(*given)
    torch.testing.assert_close(output.prediction, prediction[:, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.losses["reconstruction"], reconstruction[0], atol=1e-5, rtol=1e-5)


def test_tfr_net_rebuilds_from_the_second_epoch_on():
    model = bridge.TFR_NET.build(configured(bridge.TFR_NET, **SMALL), facts(n_train=12)).train()
    found = ["reconstruction" in model(batch(seed=seed)).losses for seed in range(4)]
    assert found == [False, False, True, True]


def test_tfr_net_is_tested_on_whole_clips():
    models = []
    for rate in (0.0, 0.9):
        torch.manual_seed(0)
        config = configured(bridge.TFR_NET, **SMALL, missing_rate=(rate,) * 3)
        models.append(bridge.TFR_NET.build(config, facts()))
    data = batch()
    whole, lacking = (model.eval()(data).prediction for model in models)
    assert torch.equal(whole, lacking)
    whole, lacking = (model.train()(data).prediction for model in models)
    assert not torch.allclose(whole, lacking)


def test_tfr_net_pads_to_what_its_heads_divide():
    model = bridge.TFR_NET.build(configured(bridge.TFR_NET, **{**SMALL, "num_temporal_head": 5}), facts()).eval()
    assert model.padded == {"text": 10, "audio": 15, "vision": 15}
    output = model(batch())
    assert {name: values.shape[1] for name, values in output.features.items()} == model.feature_dims


def test_tfr_net_hides_tokens_as_the_encoder_s_unknown(encoder):
    assert bridge._unknown(find_text_encoder(encoder)) == WORDS.index("[UNK]")


# --- without MMSA


@pytest.fixture
def no_mmsa(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "MMSA" or name == bridge.__name__]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "MMSA", None)


def test_without_mmsa_its_name_and_extra_are_told(no_mmsa, benchmark):
    for spec in SPECS:
        with pytest.raises(InputError, match=r'it needs the package MMSA .*: pip install "selfmm-plugin\[mmsa\]"$'):
            Plugins().load("model", spec.name)
    code, out, err = benchmark("list", "models", "--check", "--json")
    status = {row["name"]: row["status"] for row in json.loads(out)}
    assert code == 1
    assert {name for name, found in status.items() if found == "failed"} == {spec.name for spec in SPECS}
    assert err.count('pip install "selfmm-plugin[mmsa]"') == 3


def test_without_mmsa_they_are_listed_and_nothing_is_imported(no_mmsa, benchmark):
    code, out, _ = benchmark("list", "models", "--json")
    assert code == 0
    assert {spec.name for spec in SPECS} <= {row["name"] for row in json.loads(out)}
    assert bridge.__name__ not in sys.modules


def test_without_mmsa_all_is_the_others(no_mmsa):
    class Notes(Watcher):
        def __init__(self) -> None:
            self.notes: list[str] = []

        def note(self, text: str) -> None:
            self.notes.append(text)

    watcher = Notes()
    names = _expand(["all"], Plugins(), watcher)
    assert {"tfn", "self_mm"} <= set(names)
    assert not {spec.name for spec in SPECS} & set(names)
    assert len([note for note in watcher.notes if "mmsa_" in note]) == 3


def test_with_mmsa_the_check_is_passed(benchmark):
    _, out, _ = benchmark("list", "models", "--check", "--json")
    assert {row["status"] for row in json.loads(out) if row["name"].startswith("mmsa_")} == {"ok"}
