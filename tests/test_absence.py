"""Modalities that are silent: in training, in files that lack them, and in predictions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import registry
from registry import InputError
from registry.data.absence import silenced
from registry.data.feature_file import read_feature_file
from registry.jobs import make_plan
from registry.training import Watcher
from tests.helpers import feature_file
from tests.test_prediction import make_file, trained, without

CPU = torch.device("cpu")


def job_of(data, encoder, silent, model="self_mm"):
    return make_plan(model, "custom", label_range=3.0, config={"without": silent}).read(data, encoder, Watcher())


def test_silent_features_are_one_step_of_zeros(tmp_path, encoder):
    job = job_of(feature_file(tmp_path), encoder, "vision")
    batch = job.split("test", CPU).batch(torch.arange(4))
    assert torch.equal(batch.vision, torch.zeros(4, 1, 3))
    assert batch.vision_lengths.tolist() == [1] * 4
    assert batch.audio.abs().sum() > 0
    assert job.info.dims["vision"] == 3
    assert not [note for note in job.notes if "vision" in note]


def test_silent_text_is_the_special_tokens(tmp_path, encoder):
    batch = job_of(feature_file(tmp_path), encoder, "text").split("train", CPU).batch(torch.arange(8))
    assert batch.text_ids.tolist() == [[2, 3]] * 8  # [CLS] [SEP]
    assert batch.text_mask.all()
    frozen = job_of(feature_file(tmp_path), encoder, "text", "tfn").split("train", CPU).batch(torch.arange(8))
    assert frozen.text.shape == (8, 2, 8)
    assert torch.equal(frozen.text, frozen.text[:1].expand(8, 2, 8))


def test_a_file_without_the_modality_will_do(tmp_path, encoder):
    data = feature_file(tmp_path, **without("audio"))
    with pytest.raises(InputError, match=r"no key audio \(leave it out with --set modalities=…\)"):
        job_of(data, encoder, "")
    with pytest.raises(InputError, match=r"no key audio \(leave it out with --set without=audio\)"):
        job_of(data, encoder, "", "tfn")
    assert job_of(data, encoder, "audio").info.dims["audio"] == 1
    mute = feature_file(tmp_path, name="mute.pkl", raw_text=None, text_bert=None)
    assert job_of(mute, encoder, "text", "tfn").info.dims["text"] == 8


def test_text_features_of_the_file_fall_silent_too(tmp_path):
    file = read_feature_file(feature_file(tmp_path, text=lambda _: None), label_range=3.0)
    made = silenced(file, ["text"], {"text": 6}).splits["valid"]
    assert (made.text.shape, made.text.any(), made.text_lengths.tolist()) == ((4, 1, 6), False, [1] * 4)


def test_the_order_means_nothing_and_one_modality_must_stay():
    plans = [make_plan("tfn", "demo", config={"without": given}) for given in ("vision,audio", ["audio", "vision"])]
    assert plans[0].config.as_dict() == plans[1].config.as_dict()
    for given, expected in (("text,audio,vision", "must leave one"), ("face", "must be any of text, audio, vision")):
        with pytest.raises(InputError, match=expected):
            make_plan("tfn", "demo", config={"without": given})


@pytest.mark.parametrize(
    "model", ["self_mm", "mlf_dnn+ulgm", *(pytest.param(m, marks=pytest.mark.slow) for m in ("mult", "mmsa_tfr_net"))]
)
@pytest.mark.parametrize("silent", ["vision", "text"])
def test_models_train_without_it_and_predict_without_it(tmp_path, encoder, model, silent):
    run = trained(model, make_file(tmp_path), encoder, tmp_path, without=silent)
    assert all(np.isfinite(value) for value in run.metrics.values())
    keys = {"text": {"raw_text": None, "text_bert": None}, "vision": without("vision")}[silent]
    blind = feature_file(tmp_path, name="blind.pkl", **keys)
    table = registry.predict(run, make_file(tmp_path), split="test")
    np.testing.assert_allclose(table["prediction"], run.predictions["prediction"], atol=1e-6)
    assert len(registry.predict(run, blind)) == 16


def test_silence_is_silence(tmp_path, encoder):
    """What the silent modality has in a file changes no prediction."""
    run = trained("lf_dnn", make_file(tmp_path), encoder, tmp_path, without="audio", standardize=True)
    loud = registry.predict(run, feature_file(tmp_path, name="loud.pkl", audio=lambda audio: audio + 7))
    quiet = registry.predict(run, feature_file(tmp_path, name="quiet.pkl", **without("audio")))
    np.testing.assert_array_equal(loud["prediction"], quiet["prediction"])
