"""`registry.statistics` against `regression` on copied clips, a plain bootstrap, and figures known beforehand."""

from __future__ import annotations

import doctest
from math import isnan
from typing import Any
from zlib import crc32

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import registry.statistics
from registry.errors import InputError
from registry.metrics import regression
from registry.statistics import Difference, _holm, _VideoSums, compare_predictions, video_of

BOUNDS = {"mosi": 4.0, "sims": 1.2}
EDGES = [0.0, 0.1, 0.5, 0.7, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5]
numbers = st.sampled_from([*EDGES, *(-edge for edge in EDGES)]) | st.floats(-5, 5, width=32)
families = st.sampled_from(["mosi", "sims"])


def table(family: str = "mosi", *, clips: int = 60, videos: int = 12, **seeds: int) -> tuple[Any, dict, list[str]]:
    """Labels on a grid, predictions of some seeds by model, many of them on edges of classes, and videos."""
    rng = np.random.default_rng(clips)
    truth = np.round(rng.uniform(-1, 1, clips) * 5) / 5 * BOUNDS[family]
    predictions = {}
    for name, number in seeds.items():
        own = np.random.default_rng(crc32(name.encode()))
        predictions[name] = np.round(truth + own.normal(scale=BOUNDS[family] / 4, size=(number, clips)), 1)
    return truth, predictions, [f"video{i}" for i in rng.permutation(np.arange(clips) % videos)]


def errors_by_video(seed: int, *, videos: int = 30, clips: int = 5, spread: float) -> tuple[Any, dict, list[str]]:
    """Two models of one seed that are equally good, on clips whose errors share a part, `spread`, within a video."""
    rng = np.random.default_rng(seed)
    video = np.repeat(np.arange(videos), clips)
    errors = 0.1 * (spread * rng.normal(size=(2, videos))[:, video] + rng.normal(size=(2, videos * clips)))
    truth = rng.uniform(-0.5, 0.5, len(video))
    return truth, {"a": truth + errors[:1], "b": truth + errors[1:]}, [f"video{i}" for i in video]


@pytest.fixture
def any_number_of_videos(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.statistics, "FEWEST_VIDEOS", 1)


def width(found: Difference, metric: str = "MAE") -> float:
    return found.high[metric] - found.low[metric]


def assert_weighted(pred: np.ndarray, truth: np.ndarray, videos: list, family: Any, weights: np.ndarray) -> None:
    """Check the sums' metrics (M, D, S) against those of clips copied as often as their video is drawn."""
    sums = _VideoSums(np.float32(pred), np.float32(truth), videos, family)
    scores = sums.scores(weights)
    for draw, times in enumerate(weights):
        copies = times[np.unique(videos, return_inverse=True)[1]]
        for seed, row in enumerate(pred):
            expected = regression(row.repeat(copies), truth.repeat(copies), family)
            found = dict(zip(sums.names, scores[:, draw, seed], strict=True))
            assert found == pytest.approx(expected, abs=1e-9, rel=1e-9, nan_ok=True)


@pytest.mark.parametrize("family", ["mosi", "sims"])
def test_weighted_metrics_are_those_of_copied_clips(family: Any) -> None:
    truth, predictions, videos = table(family, a=3)
    weights = np.random.default_rng(0).multinomial(12, np.full(12, 1 / 12), 8)
    assert_weighted(predictions["a"], truth, videos, family, weights)


@settings(max_examples=40, deadline=None)
@given(
    clips=st.lists(st.tuples(numbers, numbers, numbers, st.integers(0, 3)), min_size=1, max_size=12),
    family=families,
    seed=st.integers(0, 99),
)
def test_weighted_metrics_of_few_clips(clips: list[tuple], family: Any, seed: int) -> None:
    first, second, truth, video = map(np.array, zip(*clips, strict=True))
    number = len(set(video.tolist()))
    weights = np.random.default_rng(seed).multinomial(number, np.full(number, 1 / number), 4)
    assert_weighted(np.array([first, second]), truth, video.tolist(), family, weights)


def test_correlation_within_one_of_two_distant_videos() -> None:
    near = np.array([0.0, 0.1, 0.3, 0.2]) * 1e-3
    truth, pred = np.append(near - 3, near[::-1] + 4), np.append(near[[1, 0, 2, 3]] - 3, near + 2.3)
    flat = np.repeat([0.1, 0.7], 4)  # constant within a video
    assert_weighted(np.array([pred, flat]), truth, list("xxxxyyyy"), "mosi", np.array([[2, 0], [0, 2], [1, 1]]))


@pytest.mark.usefixtures("any_number_of_videos")
def test_every_figure_against_a_plain_bootstrap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.statistics, "_CHUNK", 33)
    truth, predictions, videos = table("sims", clips=30, videos=6, ours=3, base=2)
    names, video = np.unique(videos, return_inverse=True)
    draws = 100
    times = np.random.default_rng(7).multinomial(len(names), np.full(len(names), 1 / len(names)), draws)
    drawn: dict[str, list[dict[str, float]]] = {}
    for model, rows in predictions.items():
        rng = np.random.default_rng([7, crc32(np.float32(rows).clip(-1, 1).tobytes())])
        seeds = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), draws)
        drawn[model] = []
        for draw in range(draws):
            clips = np.arange(len(truth)).repeat(times[draw][video])
            scores = [regression(row[clips], truth[clips], "sims") for row in rows]
            stretched = 1 + (seeds[draw] - 1) * (len(rows) / (len(rows) - 1)) ** 0.5
            drawn[model].append({m: float(np.mean([s[m] for s in scores] * stretched)) for m in scores[0]})
    found = compare_predictions(truth, predictions, videos, "sims", reference="base", draws=draws, seed=7)["ours"]
    for metric in drawn["ours"][0]:
        changes = [own[metric] - other[metric] for own, other in zip(drawn["ours"], drawn["base"], strict=True)]
        assert [found.low[metric], found.high[metric]] == pytest.approx(np.percentile(changes, [2.5, 97.5]), abs=1e-9)
        ours, base = (
            [regression(row, truth, "sims")[metric] for row in predictions[model]] for model in ("ours", "base")
        )
        assert found.mean[metric] == pytest.approx(np.mean(ours) - np.mean(base), abs=1e-9)
        if metric == "MAE":
            sides = [sum(change <= 0 for change in changes), sum(change >= 0 for change in changes)]
            assert 0 < min(sides) < draws / 2
            assert found.p_mae == pytest.approx(2 * (min(sides) + 1) / (draws + 1))


@pytest.mark.usefixtures("any_number_of_videos")
def test_draws_of_seeds_follow_their_known_distribution() -> None:
    truth = np.array([0.0, 1.0, -1.0])
    shifts = np.array([[1.0], [3.0]])  # whichever clips are drawn, a mean error of 1, 2 or 3: 1/4, 1/2, 1/4
    predictions = {"exact": truth[None].repeat(2, axis=0), "shifted": truth + shifts, "close": truth + shifts[[0, 0]]}
    found = compare_predictions(truth, predictions, ["x", "y", "z"], "mosi", reference="exact")
    shifted = found["shifted"]
    # The distance of 1 from the mean over the seeds, stretched by √(2 / 1).
    assert [shifted.mean["MAE"], shifted.low["MAE"], shifted.high["MAE"]] == pytest.approx([2, 2 - 2**0.5, 2 + 2**0.5])
    assert [found["close"].low["MAE"], found["close"].high["MAE"]] == pytest.approx([1, 1])
    assert found["close"].p_mae == pytest.approx(2 * 2 / 10_001)  # the least that there is, for two rows


def test_share_of_intervals_that_hold_no_difference() -> None:
    holds = 0
    for seed in range(200):
        found = compare_predictions(*errors_by_video(seed, spread=2), "sims", reference="a", draws=200, seed=seed)["b"]
        holds += found.low["MAE"] <= 0 <= found.high["MAE"]
    assert 0.88 <= holds / 200 <= 0.985


def test_correlated_clips_of_a_video_widen_the_interval() -> None:
    truth, predictions, videos = errors_by_video(0, spread=3)
    by_video, by_clip = (
        compare_predictions(truth, predictions, names, "sims", reference="a", draws=1000)["b"]
        for names in (videos, [str(clip) for clip in range(len(videos))])
    )
    assert width(by_video) > 1.4 * width(by_clip)


def test_another_row_changes_nothing_but_holm() -> None:
    truth, predictions, videos = table(base=2, ours=3, other=4)
    two = {name: predictions[name] for name in ("base", "ours")}
    alone = compare_predictions(truth, two, videos, "mosi", reference="base", draws=1500)["ours"]
    reordered = {name: predictions[name] for name in ("other", "ours", "base")}
    among = compare_predictions(truth, reordered, videos, "mosi", reference="base", draws=1500)
    assert list(among) == ["other", "ours"]
    assert (among["ours"].mean, among["ours"].low, among["ours"].high) == (alone.mean, alone.low, alone.high)
    assert among["ours"].p_mae == pytest.approx(min(1, 2 * alone.p_mae)) or among["ours"].p_mae == among["other"].p_mae


def test_better_and_worse_rows() -> None:
    truth, predictions, videos = table(base=2)
    rows = {"base": predictions["base"], "better": predictions["base"] * 0.1 + truth * 0.9}
    rows["worse"] = -truth[None].repeat(2, axis=0)
    found = compare_predictions(truth, rows, videos, "mosi", reference="base", draws=1000)
    assert found["better"].high["MAE"] < 0 < found["worse"].low["MAE"]
    assert found["worse"].high["Corr"] < 0
    assert found["better"].p_mae == found["worse"].p_mae == pytest.approx(4 / 1001)


@pytest.mark.parametrize("family", ["mosi", "sims"])
def test_identical_predictions(family: Any) -> None:
    truth, predictions, videos = table(family, base=1)
    rows = {"base": predictions["base"].repeat(2, axis=0), "same": predictions["base"].repeat(5, axis=0)}
    found = compare_predictions(truth, rows, videos, family, reference="base", draws=500)["same"]
    assert {*found.mean.values(), *found.low.values(), *found.high.values()} == {0.0}
    assert found.p_mae == 1


def test_few_videos_have_no_interval_and_no_p_value() -> None:
    for videos in (9, 10):
        truth, predictions, names = table(videos=videos, base=2, ours=3)
        found = compare_predictions(truth, predictions, names, "mosi", reference="base", draws=200)["ours"]
        assert not isnan(found.mean["MAE"])
        assert {isnan(found.low["MAE"]), isnan(found.high["Corr"]), isnan(found.p_mae)} == {videos == 9}


def test_a_single_seed_has_an_interval_and_no_p_value() -> None:
    truth, predictions, videos = table(base=2, ours=3, single=1)
    found = compare_predictions(truth, predictions, videos, "mosi", reference="base", draws=500)
    assert found["single"].low["MAE"] < found["single"].high["MAE"]
    assert isnan(found["single"].p_mae)
    del predictions["single"]
    alone = compare_predictions(truth, predictions, videos, "mosi", reference="base", draws=500)
    assert found["ours"] == alone["ours"]  # it is not corrected for a p-value that is not given


def test_a_reference_of_each_model_s_own() -> None:
    truth, predictions, videos = table(base=2, ours=3, other=2)
    of_one, of_other = (
        compare_predictions(truth, predictions, videos, "mosi", reference=name, draws=500) for name in ("base", "other")
    )
    found = compare_predictions(
        truth, predictions, videos, "mosi", reference={"ours": "other", "other": "base"}, draws=500
    )
    assert list(found) == ["ours", "other"]
    assert (found["ours"].low, found["other"].low) == (of_other["ours"].low, of_one["other"].low)


def test_the_seed_decides_the_draws() -> None:
    truth, predictions, videos = table(base=2, ours=2)
    first, again, other = (
        compare_predictions(truth, predictions, videos, "mosi", reference="base", draws=200, seed=seed)
        for seed in (0, 0, 1)
    )
    assert first == again
    assert first["ours"].low != other["ours"].low


@pytest.mark.usefixtures("any_number_of_videos")
def test_draws_without_an_answer_do_not_count() -> None:
    pred, truth = np.array([[1.0, -1.0, 1.0, 2.0]]), np.array([0.0, 0.0, 2.0, -1.0])
    rows = {"base": pred, "ours": -pred}
    some = compare_predictions(truth, rows, list("xxyy"), "mosi", reference="base", draws=200)["ours"]
    assert (some.low["Non0_acc_2"], some.high["Non0_acc_2"]) == (0, 0)  # a quarter of the draws has labels 0 only
    none = compare_predictions(0 * truth, rows, list("xxyy"), "mosi", reference="base", draws=200)["ours"]
    assert isnan(none.mean["Non0_F1_score"])
    assert isnan(none.low["Non0_acc_2"])
    assert not isnan(none.low["Has0_acc_2"])


@pytest.mark.parametrize(
    ("p_values", "corrected"),
    [
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),  # 3·0.01, then 2·0.03 holds 0.04 up, 4·0.005
        ([0.5, 0.4], [0.8, 0.8]),
        ([0.6, 0.9, 0.7], [1, 1, 1]),
        ([0.02], [0.02]),
        ([], []),
    ],
)
def test_holm_by_hand(p_values: list[float], corrected: list[float]) -> None:
    assert _holm(p_values) == pytest.approx(corrected)


def test_videos_of_clips() -> None:
    assert video_of(["a$_$1", "a$_$2", "b$_$c$_$1", "lone", "x_$1"]) == ["a", "a", "b$_$c", "lone", "x_$1"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"predictions": {"a": [[1.0, 2.0]], "b": [[1.0]]}}, r"model 'b': .*\(1,\) and \(2,\)"),
        ({"predictions": {"a": [[1.0, 2.0]], "b": [[1.0, 2.0], [1.0]]}}, r"model 'b': .*\(1,\) and \(2,\)"),
        ({"predictions": {"a": [1.0, 2.0]}}, r"model 'a': .*\(\) and \(2,\)"),
        ({"predictions": {"a": [[1.0, float("nan")]]}}, "model 'a': 1 of 2 predictions are not finite"),
        ({"truth": [1.0, float("inf")]}, "1 of 2 labels are not finite"),
        ({"predictions": {"a": [[1.0, 2.0]], "b": []}}, "model 'b' needs predictions of at least one seed"),
        ({"videos": ["x"]}, "1 videos for 2 clips"),
        ({"reference": "c"}, "unknown reference 'c'.*available: a"),
        ({"draws": 99}, "at least 100 draws, got 99"),
        ({"family": "iemocap"}, "'iemocap'"),
    ],
)
def test_what_is_refused(change: dict[str, Any], words: str) -> None:
    valid: dict[str, Any] = {
        "truth": [1.0, 2.0],
        "predictions": {"a": [[1.0, 2.0]]},
        "videos": ["x", "y"],
        "family": "mosi",
    }
    assert compare_predictions(**valid, reference="a") == {}
    with pytest.raises(InputError, match=words):
        compare_predictions(**{"reference": "a"} | valid | change)


def test_the_example_in_the_docstring() -> None:
    outcome = doctest.testmod(registry.statistics)
    assert outcome.attempted > 0
    assert outcome.failed == 0
