"""Finished runs on test clips of which parts are missing: what is missing, what is kept, and what is told of it."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import registry
from registry import InputError, Run, load_run
from registry.data import absence
from registry.data.absence import Rules, lose_modalities, lose_steps
from registry.data.batches import Split
from registry.data.feature_file import read_feature_file
from registry.data.splits import SplitArrays
from registry.data.standardize import Scale
from registry.metrics import names_of
from registry.missing import AREA, Missing, draw, evaluate_missing
from tests.helpers import feature_file
from tests.test_prediction import make_file, trained, without

BERT = Rules(100, (0, 100, 101, 102, 103), np.array([[101, 102], [1, 1], [0, 0]]))
ALL = ("text", "audio", "vision")


@pytest.fixture(scope="module")
def part(tmp_path_factory) -> tuple[SplitArrays, np.ndarray]:
    path = feature_file(tmp_path_factory.mktemp("data"), sizes={"train": 4, "valid": 4, "test": 200})
    arrays = read_feature_file(path, label_range=3.0).splits["test"]
    return arrays, arrays.text_bert


@pytest.fixture(scope="module")
def run(tmp_path_factory, encoder) -> tuple[Run, Path]:
    folder = tmp_path_factory.mktemp("run")
    data = make_file(folder)
    return trained("lf_dnn", data, encoder, folder), data


def lost_steps(arrays: SplitArrays, of: SplitArrays, name: str) -> np.ndarray:
    """Return which steps (N, L) differ between two splits."""
    return (getattr(arrays, name) != getattr(of, name)).any(axis=2)


# --- what is missing


def test_words_and_real_steps_are_missing_with_the_rate(part):
    arrays, tokens = part
    lacking, changed = lose_steps(part, 0.3, 1, ALL, BERT)
    words = (tokens[:, 1] == 1) & ~np.isin(tokens[:, 0], [101, 102])
    lost = changed[:, 0] != tokens[:, 0]
    assert lost.sum() / words.sum() == pytest.approx(0.3, abs=0.04)
    assert not (lost & ~words).any()
    assert (changed[:, 0][lost] == 100).all()
    np.testing.assert_array_equal(changed[:, 1:], tokens[:, 1:])
    for name in ("audio", "vision"):
        lost, lengths = lost_steps(lacking, arrays, name), getattr(arrays, f"{name}_lengths")
        real = np.arange(lost.shape[1]) < lengths[:, None]
        assert lost.sum() / real.sum() == pytest.approx(0.3, abs=0.05)
        assert not (lost & ~real).any()
        assert not getattr(lacking, name)[lost].any()
        np.testing.assert_array_equal(getattr(lacking, f"{name}_lengths"), lengths)


def test_it_is_upstreams_evaluation_where_it_draws_as_upstream(part, monkeypatch):
    dataset = pytest.importorskip("MMSA.data_loader").MMDataset
    monkeypatch.setattr(absence, "_draws", lambda seed, _, shape: np.random.RandomState(seed).uniform(size=shape))
    arrays, tokens = part
    lacking, changed = lose_steps(part, 0.4, 7, ALL, BERT)
    ids, *_ = dataset.generate_m(None, tokens[:, 0], tokens[:, 1].astype(float), None, 0.4, 7)
    np.testing.assert_array_equal(changed[:, 0], ids)
    lengths = arrays.audio_lengths
    audio, *_ = dataset.generate_m(None, arrays.audio, None, lengths, 0.4, 7, mode="audio")
    real = np.arange(audio.shape[1]) < lengths[:, None]
    np.testing.assert_array_equal(lacking.audio[real], audio[real])


def test_a_higher_rate_keeps_what_was_missing_and_another_seed_does_not(part):
    def lost(rate: float, seed: int, modalities=ALL) -> np.ndarray:
        return lost_steps(lose_steps(part, rate, seed, modalities, BERT)[0], part[0], "audio")

    assert (lost(0.2, 1) <= lost(0.7, 1)).all()
    assert (lost(0.5, 1) != lost(0.5, 2)).any()
    np.testing.assert_array_equal(lost(0.5, 1), lost(0.5, 1, ("audio",)))


def lost_whole(part, rate: float, modalities=ALL, read=ALL, rules=BERT) -> dict[str, np.ndarray]:
    """Return which clips (N) lost each modality."""
    arrays, tokens = lose_modalities(part, rate, 3, modalities, rules, read)
    found = {name: ~getattr(arrays, name).any(axis=(1, 2)) for name in ("audio", "vision")}
    return {"text": (tokens[:, 0, 2:] == 0).all(axis=1), **found}


@pytest.mark.parametrize("rate", [0.4, 1.0])
def test_modalities_are_missing_whole_and_one_stays(part, rate):
    lost = np.stack(list(lost_whole(part, rate).values()))
    assert not lost.all(axis=0).any()
    expected = rate - rate**3 / 3  # of all three, one that stays
    assert lost.mean() == pytest.approx(expected, abs=0.04)
    assert (np.stack(list(lost_whole(part, 0.2).values())) <= lost).all()


def test_a_modality_that_is_missing_is_silent(part):
    arrays, tokens = lose_modalities(part, 1.0, 3, ("text", "audio"), BERT, ALL)
    np.testing.assert_array_equal(tokens[:, :, :2], np.broadcast_to(BERT.nothing, (200, 3, 2)))
    assert not tokens[:, :, 2:].any()
    assert not arrays.audio.any()
    assert set(arrays.audio_lengths) == {1}
    np.testing.assert_array_equal(arrays.vision, part[0].vision)


def test_aligned_clips_keep_their_lengths(part):
    arrays, tokens = lose_modalities(part, 1.0, 3, ("text", "audio"), Rules(100, (101, 102), keeps_lengths=True), ALL)
    np.testing.assert_array_equal(tokens[:, 1], part[1][:, 1])
    np.testing.assert_array_equal(arrays.audio_lengths, part[0].audio_lengths)
    assert set(tokens[:, 0][tokens[:, 1] == 1]) == {100, 101, 102}


def test_what_is_missing_is_0_on_the_models_scale(part):
    arrays, _ = part
    scale = Scale.of(arrays, ALL)
    rules = Rules(fills={name: scale.mean(name) for name in scale.names})
    lacking, _ = lose_steps((arrays, None), 1.0, 1, ("audio", "vision"), rules)
    batch = Split(lacking, None, torch.device("cpu"), train=False, scale=scale).batch(torch.arange(200))
    assert not batch.audio.any()
    assert not batch.vision.any()


def test_the_file_stays_as_it_is(part):
    before = [array.copy() for array in (part[0].audio, part[0].vision_lengths, part[1])]
    lose_steps(part, 0.9, 1, ALL, BERT)
    lose_modalities(part, 0.9, 1, ALL, BERT, ALL)
    for array, now in zip(before, (part[0].audio, part[0].vision_lengths, part[1]), strict=True):
        np.testing.assert_array_equal(array, now)


# --- runs


@pytest.mark.parametrize("kind", ["steps", "modality"])
def test_at_rate_0_metrics_are_the_runs_own(run, kind):
    found, data = run
    measured = evaluate_missing(found.folder, data, rates=[0.8, 0], seeds=[1, 2], kind=kind, device="cpu")
    first, *others = measured.values.to_dict("records")
    assert {name: first[name] for name in found.metrics} == pytest.approx(found.metrics)
    assert [(row["rate"], row["mask_seed"]) for row in others] == [(0.8, 1), (0.8, 2)]
    assert pd.isna(first["mask_seed"])
    again = evaluate_missing(found.folder, data, rates=[0.8], seeds=[2], kind=kind, device="cpu")
    assert again.values["MAE"][0] == others[1]["MAE"] != first["MAE"]


@pytest.mark.parametrize("model", ["self_mm", pytest.param("mult", marks=pytest.mark.slow)])
def test_seeds_of_a_configuration(model, tmp_path, encoder):
    data = make_file(tmp_path)
    options = {"text_encoder": encoder, "label_range": 3.0, "runs": tmp_path / "runs", "device": "cpu"}
    result = registry.run(
        model, "custom", data=data, seeds=[4, 5], config={"epochs": 1, "standardize": True}, **options
    )
    measured = evaluate_missing(result.folder, data, rates=[0, 1], seeds=[1], metrics=["Corr", "MAE"], device="cpu")
    assert measured.values["seed"].tolist() == [4, 5, 4, 5]
    assert measured.values["MAE"][:2].tolist() == pytest.approx([run.metrics["MAE"] for run in result.runs])
    assert measured.metrics == ["Corr", "MAE"]
    assert measured.counted == "2 runs and 1 mask seed"


def test_text_features_of_the_file_are_missing_as_steps(tmp_path):
    features = {split: {"text": np.ones((n, 9, 6))} for split, n in {"train": 8, "valid": 4, "test": 4}.items()}
    data = feature_file(tmp_path, **features)
    found = trained("text_only", data, None, tmp_path)
    measured = evaluate_missing(found.folder, data, rates=[0, 0.9], seeds=[1], device="cpu")
    assert measured.modalities == ("text",)
    assert measured.values["MAE"].nunique() == 2
    with pytest.raises(InputError, match="reads text only, of which kind 'modality' leaves all"):
        evaluate_missing(found.folder, data, kind="modality")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"modalities": ["face"]}, "reads text, audio, vision, so that no 'face' can be missing"),
        ({"rates": [0, 1.5]}, r"rates must be numbers from 0 to 1, .* got \[0, 1\.5\]"),
        ({"rates": [0.1, 0.1]}, "each once"),
        ({"kind": "step"}, "unknown kind 'step', did you mean 'steps'"),
        ({"metrics": ["MEA"]}, "unknown metric 'MEA' .*available: Corr"),
        ({"seeds": [-1]}, "seeds must be whole numbers"),
    ],
    ids=str,
)
def test_arguments_that_are_wrong(run, options, expected):
    with pytest.raises(InputError, match=expected):
        evaluate_missing(run[0].folder, run[1], device="cpu", **options)


def test_a_metric_that_is_named_twice_is_shown_once(run):
    found = evaluate_missing(run[0].folder, run[1], device="cpu", rates=[0], seeds=[1], metrics=["MAE", "MAE"])
    assert found.metrics == ["MAE"]


def test_data_that_cannot_be_tested_on(run, tmp_path):
    found, _ = run
    with pytest.raises(InputError, match="has no test split with labels"):
        evaluate_missing(found.folder, feature_file(tmp_path, test={"regression_labels": None}))
    with pytest.raises(InputError, match="needs vision of width 3, and there is no key vision"):
        evaluate_missing(found.folder, feature_file(tmp_path, **without("vision")))
    with pytest.warns(UserWarning, match=r"other\.pkl is not the file that the run .* was trained and tested on"):
        evaluate_missing(found.folder, feature_file(tmp_path, name="other.pkl"), rates=[0], device="cpu")


# --- what is told of it


def measured_by_hand() -> Missing:
    rows = [(1, 0.0, None, 1.0), (2, 0.0, None, 2.0)]
    rows += [(run, rate, mask, run + 10 * rate + mask) for run in (1, 2) for rate in (0.2, 0.5) for mask in (1, 2)]
    values = pd.DataFrame(rows, columns=["seed", "rate", "mask_seed", "MAE"])
    return Missing("m", "d", "steps", ("text",), values.astype({"seed": "Int64", "mask_seed": "Int64"}))


def test_means_deviations_and_areas_by_hand():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        summary = measured_by_hand().summary()["MAE"]
    assert summary["mean"].to_dict() == pytest.approx(
        {"0": 1.5, "0.2": 5.0, "0.5": 8.0, AREA: ((1.5 + 5.0) / 2 * 0.2 + 6.5 * 0.3) / 0.5}
    )
    assert summary.loc["0.2", "sd"] == pytest.approx(np.std([4, 5, 5, 6], ddof=1))
    assert summary.loc[AREA, "sd"] > 0
    assert measured_by_hand().rows()[1] == {"rate": "0.2", "MAE": "5.0000 ± 0.8165"}


def test_the_figure_has_a_curve_a_metric(run):
    found, data = run
    figure = draw(evaluate_missing(found.folder, data, rates=[0, 0.5], seeds=[1], device="cpu"))
    shown = [axes for axes in figure.axes if axes.lines]
    assert [axes.get_title() for axes in shown] == names_of("mosi")
    assert shown[-1].lines[0].get_xdata().tolist() == [0, 0.5]


def test_the_command(run, benchmark, empty_folder):
    found, data = run
    arguments = ["missing", found.folder, "--data", data, "--rates", "0,0.5", "-s", "1,2", "--device", "cpu"]
    code, out, err = benchmark(*arguments, "-o", "m.csv", "--figure", "m.png", "--modalities", "audio,vision")
    assert code == 0
    assert "rate of words and steps that are missing (audio, vision)" in out
    assert "over 1 run and 2 mask seeds" in out
    assert "rate 0.5" in err
    table = pd.read_csv("m.csv")
    assert list(table)[:7] == ["model", "dataset", "kind", "missing", "seed", "rate", "mask_seed"]
    assert len(table) == 3
    assert Path("m.png").read_bytes().startswith(b"\x89PNG")
    for wrong, expected in (
        (["-o", "m.txt"], "must end in .csv"),
        (["--figure", "m.csv"], "must end in .png"),
        (["--rates", "a"], "--rates takes numbers"),
    ):
        code, _, err = benchmark(*arguments, *wrong)
        assert code == 2
        assert expected in " ".join(err.split())
    assert load_run(found.folder).metrics == found.metrics
