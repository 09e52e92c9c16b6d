"""Whether models differ on one test split: differences with intervals, and p-values corrected over the table.

Clips of one video resemble each other and a model's seeds differ, so both are resampled. Pure functions over arrays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from zlib import crc32

import numpy as np

from .errors import InputError, unknown
from .metrics import SIMS_EDGES, correlation, interval, vectors

DRAWS = 10_000
_FEWEST_DRAWS = 100
FEWEST_VIDEOS = 10
"""With fewer there is no interval and no p-value: what is drawn says too little of what else might have been tested."""
_CHUNK = 1000
"""Draws computed at once, which bounds memory."""
_ROUNDING = 1e-12
"""Sums of equal numbers may differ by this much, relatively, when added in another order."""
_SPREAD = 1e-6
"""With a smaller variance, relative to the second moment, sums of squares have lost too many digits."""
_Term = tuple[tuple[str, ...], Callable[..., list[np.ndarray]], list[Any]]
"""Names of metrics; the formula that gives them from sums; what is summed over clips, each (S, N) or (N)."""


@dataclass(frozen=True)
class Difference:
    """A model minus its reference, by metric; `low` to `high` is the 95 % interval, `p_mae` is Holm-corrected.

    An interval is NaN with fewer than 10 videos, a p-value also where either side has a single seed.
    """

    mean: dict[str, float]
    low: dict[str, float]
    high: dict[str, float]
    p_mae: float


def video_of(ids: Sequence[str]) -> list[str]:
    """Return the videos of clips: what stands before the last `$_$`; an id without it is a video of its own.

    >>> video_of(["03bSnISJMiM$_$11", "lone"])
    ['03bSnISJMiM', 'lone']
    """
    return [clip.rsplit("$_$", 1)[0] for clip in ids]


def compare_predictions(
    truth: Any,
    predictions: Mapping[str, Any],
    videos: Sequence[str],
    family: Literal["mosi", "sims"],
    *,
    reference: str | Mapping[str, str],
    draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, Difference]:
    """Return how models differ from a reference, by a paired bootstrap over videos and seeds.

    A draw takes as many videos as there are, with replacement and the same ones for all models, and likewise seeds,
    for each model on its own. A model's figure is its metric on the clips drawn, as a mean over the seeds drawn, whose
    distance from the mean over all S seeds is stretched by √(S / (S − 1)): S values drawn from S vary too little. The
    intervals are percentiles of the differences. A two-sided p-value says whether the MAE differs, corrected for their
    number by Holm's step-down procedure; nothing else about a model depends on the others. With one seed an interval
    leaves training out, and holds for that seed only.

    Args:
        truth: (N) labels.
        predictions: (S, N) predictions by model, where S, the number of seeds, may differ.
        videos: (N) names of the clips' videos.
        family: whose definitions of the metrics, as for `regression`.
        reference: the model that all others are compared with, or by model the one that it is compared with.
        draws: of the bootstrap, at least 100; no p-value is below 2 / (draws + 1).
        seed: of the bootstrap.

    Returns:
        Difference by model that has a reference, of `regression`'s metrics. An interval leaves out the draws in
        which its metric is undefined (`Non0_*` where every label drawn is 0), and is NaN if all are.

    Raises:
        InputError: predictions or videos of another length, a value that is not finite, no such reference, a model
            without seeds, an unknown family, or too few draws.
    """
    given = dict.fromkeys((reference, *predictions), reference) if isinstance(reference, str) else reference
    for name in (name for pair in given.items() for name in pair):
        if name not in predictions:
            raise InputError(unknown("reference", name, predictions))
    references = {name: other for name, other in given.items() if name != other}
    if draws < _FEWEST_DRAWS:
        raise InputError(f"a bootstrap needs at least {_FEWEST_DRAWS} draws, got {draws}")
    models = {name: _VideoSums(*_checked(name, rows, truth, videos), family) for name, rows in predictions.items()}
    number = len(set(videos))
    weights = np.random.default_rng(seed).multinomial(number, np.full(number, 1 / number), draws)
    means = {name: model.scores(np.ones((1, number), dtype=int)).mean(axis=(1, 2)) for name, model in models.items()}
    # Each model has a stream of its own, by its predictions: its draws of seeds stay what they are when the table gets
    # a row, or it another name.
    rngs = {name: np.random.default_rng([seed, crc32(model.pred.tobytes())]) for name, model in models.items()}
    drawn = {name: model.resampled(weights, rngs[name]) for name, model in models.items()}
    names = next(iter(models.values())).names
    changes = {name: _minus(drawn[name], drawn[other]) for name, other in references.items()}
    if number < FEWEST_VIDEOS:
        changes = {name: np.full_like(change, np.nan) for name, change in changes.items()}
    p_values = {
        name: _two_sided(changes[name][names.index("MAE")])
        for name, other in references.items()
        if number >= FEWEST_VIDEOS and min(len(models[name].pred), len(models[other].pred)) > 1
    }
    corrected = dict(zip(p_values, _holm([*p_values.values()]), strict=True))
    found = {}
    for name, other in references.items():
        rows = (_minus(means[name], means[other]), *np.transpose([_percentiles(values) for values in changes[name]]))
        mean, low, high = (dict(zip(names, row.tolist(), strict=True)) for row in rows)
        found[name] = Difference(mean, low, high, corrected.get(name, math.nan))
    return found


class _VideoSums:
    """Sums over each video's clips, from which a model's M metrics on any resampling of the V videos follow."""

    def __init__(self, pred: np.ndarray, truth: np.ndarray, videos: Sequence[str], family: str) -> None:
        """Take (S, N) predictions and (N) labels as float32, and the (N) names of videos."""
        self.video = np.unique(np.array(videos), return_inverse=True)[1]
        self.pred, self.truth = (pred.clip(-1, 1), truth.clip(-1, 1)) if family == "sims" else (pred, truth)
        order = self.video.argsort(kind="stable")
        starts = np.searchsorted(self.video[order], np.arange(self.video.max() + 1))
        terms = _terms(self.pred, self.truth, family)
        self.names = [name for names, _, _ in terms for name in names]
        self.sums: list[tuple[Callable[..., list[np.ndarray]], np.ndarray]] = []
        for _, formula, columns in terms:
            clips = np.array([np.broadcast_to(column, pred.shape) for column in columns], dtype=np.float64)
            self.sums.append((formula, np.add.reduceat(clips[..., order], starts, axis=-1).swapaxes(1, 2)))

    def scores(self, weights: np.ndarray) -> np.ndarray:
        """Return the metrics (M, D, S) for how often each video is drawn, integers (D, V)."""
        times = weights.astype(np.float64)
        scores = np.array([metric for formula, sums in self.sums for metric in formula(*(times @ sums))])
        correlations = scores[self.names.index("Corr")]
        for draw, seed in np.argwhere(np.isnan(correlations)):
            copies = weights[draw, self.video]
            correlations[draw, seed] = correlation(self.pred[seed].repeat(copies), self.truth.repeat(copies))
        return scores

    def resampled(self, weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return the metrics (M, D) as means over seeds, which are drawn as well."""
        seeds = len(self.pred)
        times = rng.multinomial(seeds, np.full(seeds, 1 / seeds), len(weights)).astype(np.float64)
        # Means of S values drawn from S vary by (S - 1) / S of what they should.
        times = 1 + (times - 1) * (seeds / max(1, seeds - 1)) ** 0.5
        starts = range(0, len(weights), _CHUNK)
        chunks = [(self.scores(weights[i : i + _CHUNK]) * times[i : i + _CHUNK]).sum(axis=2) for i in starts]
        return np.concatenate(chunks, axis=1) / seeds


def _terms(p: np.ndarray, t: np.ndarray, family: str) -> list[_Term]:
    """Return what gives the metrics of predictions (S, N) and labels (N), under the conditions of `regression`."""
    one, wide_p, wide_t = np.ones(len(t)), p.astype(np.float64), t.astype(np.float64)
    # Correlations do not change, and sums of squares keep more digits, when values are centred.
    x, y = wide_p - wide_p.mean(axis=1, keepdims=True), wide_t - wide_t.mean()
    terms: list[_Term] = [
        (("MAE",), _mean, [one, np.abs(wide_p - wide_t)]),
        (("Corr",), _pearson, [one, x, y, x * x, y * y, x * y]),
    ]
    if family == "sims":
        classes = {name: (interval(p, edges), interval(t, edges)) for name, edges in SIMS_EDGES.items()}
        of_p, of_t = classes.pop("Mult_acc_2")
        terms.append((("Mult_acc_2", "F1_score"), _two_classes, [one, of_p, of_t, of_p & of_t]))
    elif family == "mosi":
        classes = {f"Mult_acc_{2 * m + 1}": (p.clip(-m, m).round(), t.clip(-m, m).round()) for m in (2, 3)}
        has0 = [one, p >= 0, t >= 0, (p >= 0) & (t >= 0)]
        non0 = [t != 0, (p > 0) & (t != 0), t > 0, (p > 0) & (t > 0)]
        terms += [((f"{k}_acc_2", f"{k}_F1_score"), _two_classes, v) for k, v in {"Has0": has0, "Non0": non0}.items()]
    else:
        raise InputError(f"metrics exist for the families mosi and sims, got {family!r}")
    return terms + [((name,), _mean, [one, of_p == of_t]) for name, (of_p, of_t) in classes.items()]


def _mean(count: np.ndarray, total: np.ndarray) -> list[np.ndarray]:
    return [total / count]


def _two_classes(count: np.ndarray, pred: np.ndarray, true: np.ndarray, both: np.ndarray) -> list[np.ndarray]:
    """Return accuracy and weighted F1 from the numbers of clips, of positive ones on either side, and on both."""
    neither = count - pred - true + both
    # A class that neither side has weighs nothing, whatever its F1.
    positive = true * 2 * both / np.maximum(true + pred, 1)
    negative = (count - true) * 2 * neither / np.maximum(2 * count - true - pred, 1)
    with np.errstate(invalid="ignore"):  # undefined without clips
        return [(both + neither) / count, (positive + negative) / count]


def _pearson(
    count: np.ndarray, x: np.ndarray, y: np.ndarray, xx: np.ndarray, yy: np.ndarray, xy: np.ndarray
) -> list[np.ndarray]:
    """Return correlations, NaN where the sums are not precise enough to tell."""
    spread_x, spread_y = count * xx - x * x, count * yy - y * y
    precise = (spread_x > _SPREAD * count * xx) & (spread_y > _SPREAD * count * yy)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = ((count * xy - x * y) / np.sqrt(spread_x) / np.sqrt(spread_y)).clip(-1, 1)
    return [np.where((xx == 0) | (yy == 0), 0, np.where(precise, found, np.nan))]  # no squares: a constant side


def _checked(name: str, rows: Any, truth: Any, videos: Sequence[str]) -> tuple[np.ndarray, np.ndarray, Sequence[str]]:
    if not len(rows):
        raise InputError(f"model {name!r} needs predictions of at least one seed, got none")
    try:
        pairs = [vectors(row, truth) for row in rows]
    except InputError as error:
        raise InputError(f"model {name!r}: {error}") from error
    if len(videos) != len(pairs[0][1]):
        raise InputError(f"every clip needs its video, got {len(videos)} videos for {len(pairs[0][1])} clips")
    return np.array([pred for pred, _ in pairs]), pairs[0][1], videos


def _minus(own: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return differences, 0 where they come from rounding only: a tie counts for both sides of a p-value."""
    change = own - other
    change[np.abs(change) <= _ROUNDING * (1 + np.abs(other))] = 0
    return change


def _two_sided(changes: np.ndarray) -> float:
    """Return the p-value of no difference: twice the smaller side's (k + 1) / (draws + 1)."""
    fewest = min(np.count_nonzero(changes <= 0), np.count_nonzero(changes >= 0))
    return min(1.0, 2 * (fewest + 1) / (len(changes) + 1))


def _holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number by Holm's step-down procedure, in the order given."""
    corrected, least = [0.0] * len(p_values), 0.0
    for rank, row in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        least = corrected[row] = min(1.0, max(least, (len(p_values) - rank) * p_values[row]))
    return corrected


def _percentiles(values: np.ndarray) -> np.ndarray:
    known = values[~np.isnan(values)]
    return np.percentile(known, (2.5, 97.5)) if len(known) else np.full(2, np.nan)
