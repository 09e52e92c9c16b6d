"""Features standardised by the train split: the statistics, what a batch holds, and what a run keeps of them."""

from __future__ import annotations

import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import registry
from registry import InputError, load_run
from registry.comparison import collect
from registry.data import standardize
from registry.data.batches import Split
from registry.data.feature_file import read_feature_file
from registry.data.standardize import Scale
from registry.jobs import make_plan
from registry.runs import identity
from tests.helpers import feature_file
from tests.test_prediction import make_file, trained

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    path = feature_file(tmp_path_factory.mktemp("data"), audio=lambda audio: 100 + 5 * audio)
    return read_feature_file(path, label_range=3.0).splits


def real(arrays, name: str) -> np.ndarray:
    """Return the real steps of a split's features, one after the other."""
    array, lengths = getattr(arrays, name), getattr(arrays, f"{name}_lengths")
    return np.concatenate([clip[:length] for clip, length in zip(array, lengths, strict=True)]).astype(np.float64)


@pytest.mark.parametrize("at_once", [1, 3, 64])
def test_statistics_are_those_of_the_real_steps_of_train(splits, at_once, monkeypatch):
    monkeypatch.setattr(standardize, "_CLIPS_AT_ONCE", at_once)
    scale = Scale.of(splits["train"], ("text", "audio", "vision"))
    assert scale.names == ("audio", "vision")
    for name in scale.names:
        steps = real(splits["train"], name)
        np.testing.assert_allclose(scale.mean(name), steps.mean(0), rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(scale.get_buffer(f"{name}_deviation"), steps.std(0), rtol=1e-6)


def test_train_has_mean_0_and_deviation_1_and_padding_is_0(splits):
    scale = Scale.of(splits["train"], ("audio",))
    batch = Split(splits["train"], None, CPU, train=True, needs=("audio", "vision"), scale=scale).batch(torch.arange(8))
    inside = torch.arange(batch.audio.shape[1]) < batch.audio_lengths[:, None]
    assert not inside.all()
    assert batch.audio[~inside].eq(0).all()
    torch.testing.assert_close(batch.audio[inside].mean(0), torch.zeros(5), atol=1e-4, rtol=0)
    torch.testing.assert_close(batch.audio[inside].std(0, correction=0), torch.ones(5), atol=1e-4, rtol=0)
    plain = Split(splits["train"], None, CPU, train=True, needs=("audio", "vision")).batch(torch.arange(8))
    assert torch.equal(plain.vision, batch.vision)


def test_other_splits_are_measured_by_train_and_the_file_stays(splits):
    scale, test = Scale.of(splits["train"], ("audio",)), splits["test"]
    before = test.audio.copy()
    batch = Split(test, None, CPU, train=False, needs=("audio", "padding"), scale=scale).batch(torch.arange(4))
    steps = real(splits["train"], "audio")
    for clip, length in enumerate(test.audio_lengths):
        expected = (test.audio[clip, :length] - steps.mean(0)) / steps.std(0)
        np.testing.assert_allclose(batch.audio[clip, :length], expected, atol=1e-4)
        np.testing.assert_array_equal(batch.audio[clip, length:], test.audio[clip, length:])  # what the file has there
    np.testing.assert_array_equal(test.audio, before)


@pytest.mark.parametrize("value", [0.0, 0.1, 12345.678])
def test_a_feature_that_is_constant_is_only_shifted(tmp_path, value):
    def constant(audio):
        audio[..., 2] = value
        return audio

    arrays = read_feature_file(feature_file(tmp_path, audio=constant), label_range=3.0).splits["train"]
    scale = Scale.of(arrays, ("audio",))
    assert scale.get_buffer("audio_deviation")[2] == 1
    assert scale.mean("audio")[2] == pytest.approx(value)


def test_a_run_keeps_its_statistics_and_predicts_with_them(tmp_path, encoder):
    data = make_file(tmp_path)
    found, plain = (
        trained("self_mm", data, encoder, tmp_path, standardize=True),
        trained("self_mm", data, encoder, tmp_path),
    )
    assert found.folder.parent != plain.folder.parent
    assert found.summary["protocol"]["changed settings"].endswith("standardize=true")
    steps = real(read_feature_file(data, label_range=3.0).splits["train"], "audio")
    kept = load_file(found.folder / "model.safetensors")
    np.testing.assert_allclose(kept["scale.audio_mean"], steps.mean(0), atol=1e-6)
    assert {name.partition(".")[0] for name in load_file(plain.folder / "model.safetensors")} == {"model", "hook"}
    for run in (found, plain):
        table = registry.predict(run, data, split="test")
        np.testing.assert_allclose(table["prediction"], run.predictions["prediction"], atol=1e-6)
    assert load_run(plain.folder).scale is None
    save_file({name: value for name, value in kept.items() if "scale" not in name}, found.folder / "model.safetensors")
    with pytest.raises(InputError, match=r"the statistics of .* cannot be made again"):
        registry.predict(found.folder, data)


def test_runs_from_before_these_keys_are_found(tmp_path, encoder):
    """Also by `benchmark table`, which tells configurations apart by what runs have saved."""
    run = trained("lf_dnn", make_file(tmp_path), encoder, tmp_path)
    config = run.settings["config"]
    before = {key: value for key, value in config.items() if key not in ("standardize", "without")}
    assert len(before) == len(config) - 2
    assert identity({"config": before}) == identity({"config": config})
    text = json.dumps({"config": before}, sort_keys=True)
    assert identity({"config": config}) == hashlib.sha256(text.encode()).hexdigest()[:12]
    for changed in ({"standardize": True}, {"without": ["audio"]}):
        assert identity({"config": {**config, **changed}}) != identity({"config": config})
    older = run.folder.with_name("2222")
    shutil.copytree(run.folder, older)
    (older / "config.json").write_text(json.dumps({**run.settings, "seed": 2222, "config": before}))
    (row,) = collect([run.folder.parent]).rows
    assert [run.settings["seed"] for run in row.runs] == [1111, 2222]


def test_it_is_a_choice_of_two():
    with pytest.raises(InputError, match="'standardize' must be true or false, got 'yes'"):
        make_plan("self_mm", "demo", config={"standardize": "yes"})
