"""Which steps of one sequence lie in the intervals of another, and what they come to there."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from registry.errors import InputError

EPSILON = 1e-5
"""seconds: a step lies in an interval if more than this of it does, as in the SDK's `align`"""

REDUCTIONS = ("mean", "max", "min", "first", "last")

_MOST_PAIRS = 50_000_000
"""of intervals and the steps in them, in one video"""
_AT_ONCE = 256


@dataclass(frozen=True)
class Steps:
    """What a sequence says of one video, in order of time."""

    intervals: np.ndarray
    """float64 (n, 2): start and end in seconds"""
    features: np.ndarray
    """float32 (n, d), or n strings"""


def steps_within(intervals: np.ndarray, steps: np.ndarray, epsilon: float = EPSILON) -> tuple[np.ndarray, np.ndarray]:
    """Return which steps lie in which interval.

    Args:
        intervals: (m, 2) in seconds.
        steps: (n, 2) in seconds, in order of start.
        epsilon: more than this of a step has to lie in the interval.

    Returns:
        The numbers of the steps, those of one interval after those of another, and (m + 1) where each interval's begin.

    Raises:
        InputError: there are so many that the steps cannot be those of a sequence.
    """
    (start, end), (starts, ends) = intervals.T, steps.T
    first = np.searchsorted(np.maximum.accumulate(ends), start, side="right")  # ends need not be in order
    counts = np.maximum(np.searchsorted(starts, end, side="left") - first, 0)
    if counts.sum() > _MOST_PAIRS:
        raise InputError(f"{len(steps)} steps overlap {len(intervals)} intervals {counts.sum()} times, expected fewer")
    interval = np.repeat(np.arange(len(intervals)), counts)
    step = np.arange(len(interval)) + np.repeat(first - (np.cumsum(counts) - counts), counts)
    kept = np.minimum(ends[step], end[interval]) - np.maximum(starts[step], start[interval]) > epsilon
    within = np.bincount(interval[kept], minlength=len(intervals))
    return step[kept], np.concatenate([[0], np.cumsum(within)])


def align(intervals: np.ndarray, steps: Steps, reduction: str = "mean", epsilon: float = EPSILON) -> Steps:
    """Return one step for each interval that has any: what its steps' features come to, as the SDK's `align` does.

    Args:
        intervals: (m, 2) in seconds.
        steps: numbers (n, d), in order of start.
        reduction: one of `REDUCTIONS`; the mean is of whole steps, however little of one lies in the interval.
        epsilon: as for `steps_within`.
    """
    features, filled = reduce_steps(steps.features, *steps_within(intervals, steps.intervals, epsilon), reduction)
    return Steps(intervals[filled], features[filled])


def reduce_steps(
    features: np.ndarray, step: np.ndarray, begin: np.ndarray, reduction: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return float32 (m, d), zeros for an interval without a step, and (m) whether it has any.

    Args:
        features: (n, d).
        step, begin: from `steps_within`.
        reduction: one of `REDUCTIONS`.
    """
    counts = np.diff(begin)
    result = np.zeros((len(counts), features.shape[1]), dtype=np.float32)
    rows = np.flatnonzero(counts)
    for start in range(0, len(rows), _AT_ONCE):  # so that what is gathered stays small
        some = rows[start : start + _AT_ONCE]
        low, high = begin[some[0]], begin[some[-1] + 1]
        gathered, at = features[step[low:high]], begin[some] - low
        if reduction == "mean":
            result[some] = np.add.reduceat(gathered, at, dtype=np.float64) / counts[some, None]
        elif reduction in ("max", "min"):
            result[some] = (np.maximum if reduction == "max" else np.minimum).reduceat(gathered, at)
        else:
            result[some] = gathered[at if reduction == "first" else at + counts[some] - 1]
    return result, counts > 0
