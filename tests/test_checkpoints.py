"""Upstream's checkpoints as run folders: the golden trace's last weights, saved as upstream saves them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from registry import InputError, load_run, predict
from registry.checkpoints import import_checkpoint
from registry.data.store import Store
from registry.plugins import Plugins
from selfmm_plugin.upstream import network_from_state
from tests.helpers import feature_file, write_features
from tests.test_golden import Trace


@pytest.fixture(scope="module")
def trace() -> Trace:
    return Trace("selfmm_unaligned")


@pytest.fixture
def state(trace) -> dict[str, torch.Tensor]:
    """Upstream's names, with the prefix that its wrapper gives them."""
    weights = trace.weights(f"epoch{trace.meta['epochs']}/params/")
    return {f"Model.{name}": tensor for name, tensor in weights.items()}


@pytest.fixture
def place(tmp_path, trace) -> dict:
    """Arguments for `import_checkpoint`: the trace's text encoder, a dataset plugin, its clips as a feature file."""
    encoder = tmp_path / "encoder"
    encoder.mkdir()
    size = trace.text_config["vocab_size"]
    (encoder / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(size - 5))])
    )
    BertTokenizerFast.from_pretrained(encoder).save_pretrained(encoder)
    BertModel(BertConfig(**trace.text_config)).save_pretrained(encoder)
    (tmp_path / "dataset.py").write_text(
        "from registry import DatasetSpec\n"
        f"TRACE = DatasetSpec(name='trace', summary='', label_range={trace.meta['H']}, "
        f"metrics='mosi', text_encoder={str(encoder)!r}, presets_of='mosi')"
    )
    keys = ("text_bert", "audio", "audio_lengths", "vision", "vision_lengths")
    arrays = {key: trace.arrays[key] for key in keys} | {"regression_labels": trace.arrays["labels"]}
    splits = {
        name: {**arrays, "id": [f"{name}{i}" for i in range(len(trace.labels))]} for name in ("train", "valid", "test")
    }
    data = write_features(tmp_path / "trace.pkl", splits)
    return {"data": data, "plugins": [str(tmp_path / "dataset.py")], "runs": tmp_path / "runs"}


def test_position_ids_of_older_transformers_are_left_out(tmp_path, state, place):
    state["Model.text_model.model.embeddings.position_ids"] = torch.arange(4)[None]
    assert import_checkpoint("self_mm", save(tmp_path, state), "trace", **place).metrics


def save(folder: Path, state: object) -> Path:
    torch.save(state, folder / "self_mm-trace.pth")
    return folder / "self_mm-trace.pth"


def test_an_imported_checkpoint_predicts_as_upstream(tmp_path, trace, state, place):
    run = import_checkpoint("self_mm", save(tmp_path, state), "trace", **place)
    np.testing.assert_allclose(run.predictions["prediction"], trace.arrays["final_eval/M"], atol=1e-5)
    assert run.metrics["MAE"] == pytest.approx(
        np.abs(trace.arrays["final_eval/M"] - trace.arrays["labels"]).mean(), abs=1e-5
    )
    assert (run.best_epoch, run.settings["seed"]) == (None, None)
    assert run.settings["imported_from"] == "self_mm-trace.pth"
    assert run.settings["config"]["post_fusion_dim"] == trace.meta["post_fusion_dim"]
    again = load_run(run.folder, plugins=place["plugins"]).model.state_dict()
    ours = {
        "encoders.audio.rnn.weight_ih_l0": "audio_model.rnn.weight_ih_l0",
        "fusion.layer_3.bias": "post_fusion_layer_3.bias",
    }
    for name, theirs in ours.items():
        assert torch.equal(again[name], state[f"Model.{theirs}"])


def test_the_unimodal_heads_come_along(tmp_path, state, place):
    from safetensors.torch import load_file

    run = import_checkpoint("self_mm", save(tmp_path, state), "trace", **place)
    saved = load_file(run.folder / "model.safetensors")
    head = saved["hook.ulgm.supervision.heads.text.layer_1.weight"]
    assert torch.equal(head, state["Model.post_text_layer_1.weight"])


@pytest.mark.parametrize("with_data", [True, False])
def test_an_imported_checkpoint_predicts_other_clips(tmp_path, trace, state, place, with_data):
    given = place if with_data else {**place, "data": None}
    run = import_checkpoint("self_mm", save(tmp_path, state), "trace", **given)
    table = predict(run.folder, place["data"], split="test", plugins=place["plugins"], device="cpu")
    for task, column in (("M", "prediction"), ("T", "text"), ("A", "audio"), ("V", "vision")):
        np.testing.assert_allclose(table[column], trace.arrays[f"final_eval/{task}"], atol=1e-5)


def test_without_data_there_is_a_model_and_no_figure(tmp_path, state, place):
    run = import_checkpoint("self_mm", save(tmp_path, state), "trace", **{**place, "data": None})
    assert run.metrics == {}
    assert not (run.folder / "predictions.csv").exists()
    model = load_run(run.folder, plugins=place["plugins"]).model
    assert torch.equal(model.fusion.layer_1.weight, state["Model.post_fusion_layer_1.weight"])


def test_one_checkpoint_with_other_data_is_another_run(tmp_path, state, place):
    path = save(tmp_path, state)
    with_data = import_checkpoint("self_mm", path, "trace", **place)
    without = import_checkpoint("self_mm", path, "trace", **{**place, "data": None})
    assert without.folder != with_data.folder
    assert load_run(with_data.folder).metrics == with_data.metrics
    assert import_checkpoint("self_mm", path, "trace", **place).folder == with_data.folder


def test_the_callers_random_state_is_left_alone(tmp_path, state, place, trace):
    before = torch.get_rng_state()
    import_checkpoint("self_mm", save(tmp_path, state), "trace", **place)
    network_from_state(state, trace.text_config)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: {**state, "Model.extra.weight": torch.zeros(1)},
            r"not a checkpoint of upstream's Self-MM: with extra",
        ),
        (
            lambda state: {k: v for k, v in state.items() if "audio" not in k},
            "Self-MM: without audio_model.rnn.weight_ih_l0",
        ),
        (lambda state: {"weights": [1, 2]}, "is not a state dict: it must hold named tensors"),
        (lambda state: [1], "is not a state dict"),
        (lambda state: print, "cannot be read as a checkpoint of weights"),
        (
            lambda state: {**state, "Model.post_fusion_layer_2.weight": torch.zeros(3, 3)},
            "does not fit self_mm: size mismatch",
        ),
    ],
)
def test_files_that_are_no_such_checkpoint(tmp_path, state, place, change, message):
    with pytest.raises(InputError, match=message) as caught:
        import_checkpoint("self_mm", save(tmp_path, change(state)), "trace", **place)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("content", [None, b"", b"hello"])
def test_files_that_cannot_be_read(tmp_path, place, content):
    path = tmp_path / "self_mm.pth"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match="cannot be read as a checkpoint of weights"):
        import_checkpoint("self_mm", path, "trace", **place)


def test_an_encoder_or_data_of_other_widths(tmp_path, state, place, encoder):
    path = save(tmp_path, state)
    with pytest.raises(InputError, match="pass the one it was trained with as --text-encoder"):
        import_checkpoint("self_mm", path, "trace", **{**place, "data": None}, text_encoder=encoder)
    with pytest.raises(InputError, match="was trained on features of width"):
        import_checkpoint("self_mm", path, "trace", **{**place, "data": feature_file(tmp_path)}, text_encoder=encoder)


def test_a_model_that_imports_none(tmp_path, place):
    (tmp_path / "mean.py").write_text(
        "from registry import register_model\nimport torch\n"
        "@register_model('mean', summary='')\nclass Mean(torch.nn.Module): ..."
    )
    with pytest.raises(InputError, match="model 'mean' cannot import checkpoints"):
        import_checkpoint("mean", tmp_path / "x.pth", "mosi", plugins=[str(tmp_path / "mean.py")])


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("audio_model.rnn.weight_ih_l0", torch.zeros(4)),
        ("audio_model.linear_1.weight", torch.tensor(0.0)),
        ("text_model.model.embeddings.word_embeddings.weight", torch.tensor(0.0)),
        ("audio_model.rnn.weight_ih_l99999", torch.zeros(4, 4)),
    ],
)
def test_tensors_of_nonsensical_shapes_and_names(tmp_path, state, place, name, tensor):
    state[f"Model.{name}"] = tensor
    with pytest.raises(InputError, match=r"importing .* fails|does not fit self_mm"):
        import_checkpoint("self_mm", save(tmp_path, state), "trace", **place)
    assert not list((tmp_path / "runs").rglob("*.json"))


def test_a_registered_file_tests_it(tmp_path, state, place):
    data, root = place.pop("data"), tmp_path / "root"
    from_path = import_checkpoint("self_mm", save(tmp_path, state), "trace", data=data, **place)
    Store(root).add(Plugins(place["plugins"]).load("dataset", "trace"), data)
    data.unlink()
    run = import_checkpoint("self_mm", save(tmp_path, state), "trace", data_root=root, **place)
    assert (run.folder, run.metrics) == (from_path.folder, from_path.metrics)


def test_a_file_in_the_place_of_the_folder_of_runs(tmp_path, state, place):
    (tmp_path / "runs").touch()
    with pytest.raises(InputError, match="cannot be written"):
        import_checkpoint("self_mm", save(tmp_path, state), "trace", **place)
