"""Predictions of finished runs: those that the run wrote, for its own file, for parts of it, and for single clips."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import registry
from registry import InputError, Run, RunFailed, load_run
from registry.metrics import regression
from registry.prediction import Predictor
from tests.helpers import feature_file, tiny_encoder, write_features

MODELS = {
    "self_mm": {},
    "tfn:as_upstream": {"as_upstream": True},
    "tfn+ulgm": {},
    "mult": {},
    "text_only": {"finetune_text": True},
    "mmsa_tfr_net": {},
    "self_mm:aligned file": {},
    "ef_lstm:as_upstream": {"as_upstream": True},
    "misa": {},
}
"""of each kind: text that is trained or frozen, padding that counts, heads of a hook and of the model, any lengths"""
SLOW = list(MODELS)[-3:]


def no_padding(key: str) -> Any:
    """Zero what is behind a clip's end, as extractors leave it."""

    def change(arrays: dict[str, Any]) -> None:
        for row, length in enumerate(arrays[f"{key}_lengths"]):
            arrays[key][row, length:] = 0

    return change


def content_of(path: Path) -> dict[str, Any]:
    return pickle.loads(path.read_bytes())


def make_file(folder: Path, *, aligned: bool = False, name: str = "features.pkl") -> Path:
    """Write a file with zeros for padding and labels of every task."""
    folder.mkdir(exist_ok=True)
    content = content_of(feature_file(folder, name=name))
    for arrays in content.values():
        for key in ("audio", "vision"):
            no_padding(key)(arrays)
            if aligned:
                del arrays[f"{key}_lengths"]
                arrays[key] = np.resize(arrays[key], (len(arrays["id"]), 9, arrays[key].shape[2]))
        arrays |= {f"regression_labels_{task}": arrays["regression_labels"] / 2 for task in "TAV"}
    return write_features(folder / name, content)


def trained(model: str, data: Path, encoder: str | None, folder: Path, **config: Any) -> Run:
    result = registry.run(
        model,
        "custom",
        data=data,
        text_encoder=encoder,
        label_range=3.0,
        config={"epochs": 1, "batch_size": 4, **config},
        runs=folder / "runs",
        device="cpu",
    )
    assert result.ok, result.runs[0].reason
    return load_run(result.runs[0].folder)


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in MODELS],
)
def run(request, tmp_path_factory, encoder) -> tuple[Run, Path]:
    """A finished run of a model, and its file."""
    folder = tmp_path_factory.mktemp("run")
    data = make_file(folder, aligned="aligned" in request.param)
    return trained(request.param.partition(":")[0], data, encoder, folder, **MODELS[request.param]), data


@pytest.fixture(scope="module")
def self_mm(tmp_path_factory, encoder) -> tuple[Run, Path]:
    folder = tmp_path_factory.mktemp("self_mm")
    data = make_file(folder)
    return trained("self_mm", data, encoder, folder), data


# --- the same predictions


def test_the_runs_own_file_gets_what_the_run_wrote(run):
    found, data = run
    table = registry.predict(found, data, split="test")
    pd.testing.assert_frame_equal(
        table[["id", "label", "prediction"]], found.predictions, check_dtype=False, atol=1e-6, rtol=0
    )
    assert set(table["split"]) == {"test"}
    assert len(registry.predict(found.folder, data)) == 16


def test_labels_ids_and_other_splits_may_be_missing(run, tmp_path):
    found, data = run
    test = content_of(data)["test"]
    test = {key: value for key, value in test.items() if key != "id" and "labels" not in key}
    table = registry.predict(found, write_features(tmp_path / "blind.pkl", {"test": test}))
    assert table["id"].tolist() == [f"test_{row}" for row in range(4)]
    assert "label" not in table
    np.testing.assert_allclose(table["prediction"], found.predictions["prediction"], atol=1e-6)


def test_a_single_clip_without_padding_and_without_its_dimension(run):
    """As MMSA-FET returns one: no id, no lengths, and token ids (3, L) that are as long as the text."""
    found, data = run
    test = content_of(data)["test"]
    for row in range(3):
        tokens = int(test["text_bert"][row, 1].sum())
        ends = {key: test.get(f"{key}_lengths", [tokens] * 4)[row] for key in ("audio", "vision")}
        clip = {key: test[key][row, :end] for key, end in ends.items()}
        clip |= {"text_bert": test["text_bert"][row, :, :tokens], "raw_text": test["raw_text"][row]}
        table = registry.predict(found, clip)
        assert table["id"].tolist() == ["clip"]
        assert "split" not in table
        assert table["prediction"][0] == pytest.approx(found.predictions["prediction"][row], abs=1e-5)


def test_what_is_given_as_arrays_stays_as_it_is(self_mm):
    found, data = self_mm
    clips = content_of(data)["test"]
    clips |= {"audio": torch.tensor(clips["audio"]), "vision": clips["vision"].copy()}
    clips["vision"][0, 0] = np.nan
    with pytest.warns(UserWarning, match="3 values that are not finite"):
        table = registry.predict(found, clips)
    assert np.isnan(clips["vision"][0, 0]).all()
    np.testing.assert_allclose(table["prediction"][1:], found.predictions["prediction"][1:], atol=1e-6)


def test_only_one_split_is_labelled(self_mm, benchmark, tmp_path):
    found, data = self_mm
    content = content_of(data)
    content.pop("train")
    del content["valid"]["regression_labels"]
    file = write_features(tmp_path / "some.pkl", content)
    assert registry.predict(found, file)["label"].notna().tolist() == [False] * 4 + [True] * 4
    code, out, _ = benchmark("predict", found.folder, file, "--device", "cpu")
    assert (code, f"{found.metrics['MAE']:.4f}" in out, "nan" in out) == (0, True, False)


# --- unimodal predictions


@pytest.mark.parametrize("model", ["self_mm", "lf_dnn+heads", "mlf_dnn"])
def test_unimodal_predictions_are_those_of_the_heads(model, tmp_path, encoder):
    data = make_file(tmp_path)
    found = trained(model, data, encoder, tmp_path)
    table = registry.predict(found, data, split="test")
    assert list(table)[-3:] == ["text", "audio", "vision"]
    predictor = Predictor(found, device="cpu")
    if not predictor.hooks:
        assert np.isfinite(table[["text", "audio", "vision"]]).all(axis=None)
        return
    heads = predictor.hooks[0].supervision.heads
    features = {}
    predictor.model.register_forward_hook(lambda _, __, output: features.update(output.features))
    predictor.table(predictor.read(data), "test")
    for name in ("text", "audio", "vision"):  # a batch of four clips keeps their order where there is but one chunk
        torch.testing.assert_close(
            torch.tensor(table[name]), heads[name](features[name])[0].detach(), atol=1e-6, rtol=0
        )


def test_hooks_that_cannot_be_made_again_are_left_out(self_mm, tmp_path, monkeypatch):
    found, data = self_mm
    monkeypatch.setattr("selfmm_plugin.supervision.UlgmHook.load_state_dict", lambda *_: 1 / 0)
    with pytest.warns(UserWarning, match="unimodal predictions of hooks are left out"):
        assert list(registry.predict(load_run(found.folder), data)) == ["id", "split", "label", "prediction"]


# --- what does not fit


def without(key: str) -> Any:
    return {key: None, f"{key}_lengths": None}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"audio": lambda audio: audio[..., :4]}, r"needs audio of width 5, and it has width 4$"),
        (without("vision"), r"needs vision of width 3, and there is no key vision$"),
        ({"raw_text": None, "text_bert": None}, r"needs text, and there is no key text_bert or raw_text$"),
        ({"audio_lengths": None}, r"expected one length a clip, since audio has 6 steps, found nothing"),
    ],
    ids=["width", "vision", "text", "lengths"],
)
def test_a_file_that_does_not_fit(self_mm, tmp_path, changes, expected):
    found, _ = self_mm
    with pytest.raises(InputError, match=expected):
        registry.predict(found, feature_file(tmp_path, **changes))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([1], "expected a dict of"),
        ({"dev": {}}, "expected any of train, valid, test, or the keys of clips"),
        ({"test": 3}, "test: expected a dict of arrays, found a int"),
        ({"raw_text": []}, "expected a list of strings, found a list of length 0"),
        ({"raw_text": "a", "audio": np.ones((2, 3, 5))}, "audio: expected 1 rows as in id, found 2"),
        ({"raw_text": "a", "audio": [[1.0], [1.0, 2.0]]}, "audio: expected an array of 3 dimensions"),
    ],
    ids=str,
)
def test_content_that_is_none(self_mm, tmp_path, content, expected):
    with pytest.raises(InputError, match=expected):
        registry.predict(self_mm[0], write_features(tmp_path / "file.pkl", content))


def test_a_file_to_train_on_still_needs_everything(tmp_path):
    content = content_of(make_file(tmp_path))["test"]
    content.pop("regression_labels")
    for wrong in (content, {"test": content}, {"clips": content}):
        with pytest.raises(InputError, match="train: expected a dict of arrays"):
            registry.run("tfn", "custom", data=write_features(tmp_path / "w.pkl", wrong), label_range=3.0)


def test_names_that_are_not_there(self_mm, tmp_path):
    found, data = self_mm
    with pytest.raises(InputError, match="unknown split 'tset', did you mean 'test'"):
        registry.predict(found, data, split="tset")
    with pytest.raises(InputError, match=r"absent\.pkl does not exist"):
        registry.predict(found, tmp_path / "absent.pkl")
    with pytest.raises(InputError, match="needs a feature file: that which it was trained on is not registered"):
        registry.predict(found)


def test_clips_that_are_longer_than_any_of_the_run(run, tmp_path):
    found, data = run
    content = content_of(data)
    for arrays in content.values():
        arrays["raw_text"] = [" ".join(["good"] * 40)] * len(arrays["id"])
        arrays["audio"] = np.concatenate([arrays["audio"]] * 2, axis=1)
        arrays["audio_lengths"] = [arrays["audio"].shape[1]] * len(arrays["id"])
        arrays["vision_lengths"] = [arrays["vision"].shape[1]] * len(arrays["id"])
        del arrays["text_bert"]
    with pytest.warns(UserWarning, match=r"clips have more than the \d+ steps of .* the rest was cut"):
        assert len(registry.predict(found, write_features(tmp_path / "long.pkl", content))) == 16


def test_predictions_that_are_not_finite(self_mm, monkeypatch):
    found, data = self_mm
    predictor = Predictor(found, device="cpu")
    torch.nn.init.constant_(predictor.model.fusion.layer_3.bias, float("nan"))
    with pytest.raises(RunFailed, match=r"4 of 4 predictions of the run .* are not finite"):
        predictor.table(predictor.read(data), "test")


# --- the text encoder


def test_another_text_encoder(tmp_path, encoder):
    data = make_file(tmp_path)
    frozen, tuned = trained("lf_dnn", data, encoder, tmp_path), trained("self_mm", data, encoder, tmp_path)
    torch.manual_seed(5)
    other = tiny_encoder(tmp_path / "other")
    larger = tiny_encoder(tmp_path / "larger", vocab_size=99)
    with pytest.raises(InputError, match=r"other weights than .* had, .*: pass the same one as --text-encoder"):
        registry.predict(frozen, data, text_encoder=str(other))
    with pytest.raises(InputError, match="pass the same one as --text-encoder"):
        registry.predict(tuned, data, text_encoder=str(larger))
    with pytest.warns(UserWarning, match="only its vocabulary is used"):
        table = registry.predict(tuned, data, split="test", text_encoder=str(other))
    np.testing.assert_allclose(table["prediction"], tuned.predictions["prediction"], atol=1e-6)


def test_a_text_encoder_that_has_moved(tmp_path):
    data, there = make_file(tmp_path), tiny_encoder(tmp_path / "there")
    found = trained("self_mm", data, str(there), tmp_path)
    there.rename(tmp_path / "here")
    with pytest.raises(InputError, match="where it lies elsewhere now, say --text-encoder FOLDER"):
        registry.predict(found, data)
    table = registry.predict(found, data, split="test", text_encoder=str(tmp_path / "here"))
    np.testing.assert_allclose(table["prediction"], found.predictions["prediction"], atol=1e-6)


def test_text_features_of_the_file_itself(tmp_path):
    content = content_of(make_file(tmp_path))
    for arrays in content.values():
        arrays["text"] = np.random.default_rng(0).normal(size=(len(arrays["id"]), 9, 6))
    data = write_features(tmp_path / "with_text.pkl", content)
    found = trained("lf_dnn", data, None, tmp_path)
    table = registry.predict(found, data, split="test")
    np.testing.assert_allclose(table["prediction"], found.predictions["prediction"], atol=1e-6)
    with pytest.raises(InputError, match=r"needs text of width 6, and there is no key text$"):
        registry.predict(found, make_file(tmp_path))
    with pytest.raises(InputError, match="has none; leave it out"):
        registry.predict(found, data, text_encoder="minilm")


# --- the command


def test_the_command_prints_or_writes(self_mm, benchmark, empty_folder):
    found, data = self_mm
    code, out, _ = benchmark("predict", found.folder, data, "--device", "cpu")
    assert code == 0
    assert "test$_$3" in out
    assert "-o FILE.csv or FILE.json" in out
    code, out, _ = benchmark("predict", found.folder, data, "--split", "test", "-o", "p.csv", "--device", "cpu")
    assert (code, "4 predictions written to p.csv" in out) == (0, True)
    assert list(pd.read_csv("p.csv")) == ["id", "split", "label", "prediction", "text", "audio", "vision"]
    assert f"{found.metrics['MAE']:.4f}" in out
    assert benchmark("predict", found.folder.parent, data, "-o", "p.json", "--device", "cpu")[0] == 0
    written = json.loads(Path("p.json").read_text())
    assert (written["model"], written["seed"], len(written["predictions"])) == ("self_mm", 1111, 16)
    assert written["metrics"]["test"] == pytest.approx(found.metrics, nan_ok=True)
    train = pd.DataFrame(written["predictions"]).query("split == 'train'")
    assert written["metrics"]["train"]["MAE"] == pytest.approx(regression(train["prediction"], train["label"])["MAE"])


def test_the_command_refuses(self_mm, benchmark, empty_folder, tmp_path):
    found, data = self_mm
    for arguments, expected in (
        (["nowhere", data], "nowhere is not the folder of a finished run"),
        ([found.folder, data, "-o", "p.xlsx"], "must end in .csv or .json"),
        ([found.folder, write_features(tmp_path / "e.pkl", print)], "asks to load 'builtins.print'"),
    ):
        code, _, err = benchmark("predict", *arguments)
        assert code == 2
        assert expected in " ".join(err.split())
    assert not list(empty_folder.iterdir())
