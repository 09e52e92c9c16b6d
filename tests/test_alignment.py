"""Which steps lie in which interval, and what they come to: against a double loop, and against the SDK."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.data import alignment
from registry.data.alignment import REDUCTIONS, Steps, align, reduce_steps, steps_within
from registry.errors import InputError
from tests.sequences import make_videos, write_csd

interval = st.tuples(st.integers(0, 40), st.integers(0, 12)).map(lambda pair: (pair[0] / 4, sum(pair) / 4))


def intervals(ordered: bool) -> st.SearchStrategy[np.ndarray]:
    rows = st.lists(interval, max_size=20)
    return rows.map(lambda found: np.array(sorted(found) if ordered else found).reshape(-1, 2))


def by_double_loop(wanted: np.ndarray, steps: np.ndarray, epsilon: float) -> list[list[int]]:
    return [[row for row, (a, b) in enumerate(steps) if min(b, end) - max(a, start) > epsilon] for start, end in wanted]


@given(intervals(ordered=False), intervals(ordered=True), st.sampled_from([1e-5, 1e-3, 0.25]))
def test_steps_within_is_what_a_double_loop_finds(wanted, steps, epsilon):
    """Also where steps lie in one another, are of no length, or end in another order than they start."""
    found, begin = steps_within(wanted, steps, epsilon)
    assert [part.tolist() for part in np.split(found, begin[1:-1])][: len(wanted)] == by_double_loop(
        wanted, steps, epsilon
    )
    assert begin[-1] == len(found)


@given(intervals(ordered=False), intervals(ordered=True), st.sampled_from(REDUCTIONS))
def test_reductions_are_numpys_own(wanted, steps, reduction):
    features = np.random.default_rng(0).normal(size=(len(steps), 3)).astype(np.float32)
    made, filled = reduce_steps(features, *steps_within(wanted, steps), reduction)
    own = {"mean": lambda x: x.mean(0), "max": lambda x: x.max(0), "min": lambda x: x.min(0)}
    own |= {"first": lambda x: x[0], "last": lambda x: x[-1]}
    for row, rows in enumerate(by_double_loop(wanted, steps, alignment.EPSILON)):
        assert filled[row] == bool(rows)
        np.testing.assert_allclose(made[row], own[reduction](features[rows]) if rows else np.zeros(3), atol=1e-6)


def test_more_intervals_than_are_reduced_at_once():
    steps = np.stack([np.arange(3000.0), np.arange(3000.0) + 1], axis=1)
    wanted = np.stack([steps[::2, 0], steps[1::2, 1]], axis=1)
    made, filled = reduce_steps(np.arange(3000.0)[:, None], *steps_within(wanted, steps), "mean")
    np.testing.assert_allclose(made[:, 0], np.arange(1500) * 2 + 0.5)
    assert filled.all()


def test_steps_that_are_everywhere_are_refused(monkeypatch):
    monkeypatch.setattr(alignment, "_MOST_PAIRS", 99)
    everywhere = np.tile([0.0, 100.0], (10, 1))
    with pytest.raises(InputError, match="10 steps overlap 10 intervals 100 times"):
        steps_within(everywhere, everywhere)


def test_alignment_is_the_sdks(tmp_path, capsys):
    """Audio to words of a second with numpy's mean, and both to segments, as the SDK's `align` does it."""
    mmdatasdk = pytest.importorskip("mmsdk.mmdatasdk")
    made = make_videos()
    for video in made["words"].values():  # the SDK cannot reduce bytes
        video["features"] = np.arange(10.0)[:, None]
    made["labels"]["v0"]["intervals"] += [[-0.3, 0.45]]  # so that words and steps lie across the borders
    paths = {role: str(write_csd(tmp_path / f"{role}.csd", made[role], role)) for role in ("words", "audio", "labels")}
    theirs = mmdatasdk.mmdataset(paths)
    labels = theirs.computational_sequences.pop("labels")
    theirs.align("words", collapse_functions=[lambda _, features: np.average(features, axis=0)])
    theirs.computational_sequences["labels"] = labels
    theirs.align("labels")
    compared = 0
    for video in made["words"]:
        words, audio, labels = (Steps(**made[role][video]) for role in ("words", "audio", "labels"))
        ours = align(words.intervals, audio, epsilon=1e-3)  # of the SDK's version of 2019
        found, begin = steps_within(labels.intervals, ours.intervals, 1e-3)
        for row in range(2):
            entry = theirs["audio"].data[f"{video}[{row}]"]
            inside = found[begin[row] : begin[row + 1]]
            np.testing.assert_allclose(ours.features[inside], entry["features"], atol=1e-6)
            assert len(inside) == len(theirs["words"].data[f"{video}[{row}]"]["features"])
            compared += len(inside)
    assert compared == 4 * 8 + 5 + 6
