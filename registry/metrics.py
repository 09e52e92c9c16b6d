"""Metrics of multimodal sentiment analysis, under MMSA's names and definitions, at full precision.

Pure functions over arrays; accuracies and F1 scores are fractions, MAE is in label units.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from .errors import InputError

SIMS_EDGES = {"Mult_acc_2": [0.0], "Mult_acc_3": [-0.1, 0.1], "Mult_acc_5": [-0.7, -0.1, 0.1, 0.7]}
"""A class ends with its edge: (-0.1, 0.1] is neutral."""
CLASSES = {
    "mosi": ("−3", "−2", "−1", "0", "+1", "+2", "+3"),
    "sims": ("negative", "weakly negative", "neutral", "weakly positive", "positive"),
}
"""The finest classes of each family, those of `Mult_acc_7` and of `Mult_acc_5`"""


def regression(pred: Any, truth: Any, family: Literal["mosi", "sims"] = "mosi") -> dict[str, float]:
    """Return the metrics of predicted sentiments.

    `mosi` (also MOSEI): `Has0_*` splits at ≥ 0, `Non0_*` leaves out clips with label 0 and splits at > 0, `Mult_acc_5`
    and `Mult_acc_7` compare values rounded to integers within ±2 and ±3. `sims`: values are clipped to ±1 first,
    and classes are intervals. F1 scores are weighted by class size. As upstream, values are compared as float32.

    Args:
        pred: (N) predictions.
        truth: (N) labels.
        family: whose definitions.

    Returns:
        Metric by name. `Corr` is 0 where either side is constant; `Non0_*` are NaN where every label is 0.

    Raises:
        InputError: no clips, shapes that differ or are not (N), or a value that is not finite.

    >>> round(regression([1.2, -0.4, 2.0], [1.0, 0.0, -3.0])["MAE"], 4)
    1.8667
    """
    p, t = vectors(pred, truth)
    if family == "sims":
        p, t = p.clip(-1, 1), t.clip(-1, 1)
        classes = {name: (interval(p, edges), interval(t, edges)) for name, edges in SIMS_EDGES.items()}
        scores = {name: _accuracy(*pair) for name, pair in classes.items()}
        scores["F1_score"] = _weighted_f1(*classes["Mult_acc_2"])
    elif family == "mosi":
        known = t != 0
        scores = {
            "Has0_acc_2": _accuracy(p >= 0, t >= 0),
            "Has0_F1_score": _weighted_f1(p >= 0, t >= 0),
            "Non0_acc_2": _accuracy(p[known] > 0, t[known] > 0),
            "Non0_F1_score": _weighted_f1(p[known] > 0, t[known] > 0),
            "Mult_acc_5": _accuracy(p.clip(-2, 2).round(), t.clip(-2, 2).round()),
            "Mult_acc_7": _accuracy(p.clip(-3, 3).round(), t.clip(-3, 3).round()),
        }
    else:
        raise InputError(f"metrics exist for the families mosi and sims, got {family!r}")
    return scores | {"MAE": float(np.abs(p.astype(np.float64) - t).mean()), "Corr": correlation(p, t)}


def finest_classes(values: Any, family: Literal["mosi", "sims"]) -> np.ndarray:
    """Return the numbers (N) of values' (N) classes among `CLASSES`.

    >>> finest_classes([-3.4, -0.5, 0.51], "mosi").tolist()
    [0, 3, 4]
    """
    v = np.asarray(values, dtype=np.float32)
    if family == "sims":
        return interval(v.clip(-1, 1), SIMS_EDGES["Mult_acc_5"])
    return v.clip(-3, 3).round().astype(int) + 3


def names_of(family: Literal["mosi", "sims"]) -> list[str]:
    """Return the names of `regression`'s metrics."""
    return list(regression([1, -1], [1, -1], family))


def classification(logits: Any, classes: Any) -> dict[str, float]:
    """Return the metrics of three-way classification: 0 negative, 1 neutral, 2 positive.

    `Acc_3`, `F1_score_3` are over the three classes; `Has0_*` asks whether a clip is positive and `Non0_*`, over clips
    that are not neutral, which of the two it is, both by the larger of the negative and the positive logit. `Non0_*`
    are NaN where every clip is neutral.

    Args:
        logits: (N, 3).
        classes: (N) integers 0…2.

    Raises:
        InputError: no clips, shapes that do not fit, a logit that is not finite, or another class.
    """
    scores, truth = np.asarray(logits, dtype=np.float32), np.asarray(classes)
    if scores.ndim != 2 or scores.shape[1:] != (3,) or truth.shape != scores.shape[:1] or not len(truth):
        raise InputError(f"expected logits (N, 3) and classes (N), got {scores.shape} and {truth.shape}")
    if not np.isfinite(scores).all() or not np.isin(truth, (0, 1, 2)).all():
        raise InputError("logits must be finite and classes 0, 1 or 2")
    positive, polar = scores[:, 2] > scores[:, 0], truth != 1
    best = scores.argmax(1)
    return {
        "Has0_acc_2": _accuracy(positive, truth == 2),
        "Has0_F1_score": _weighted_f1(positive, truth == 2),
        # Upstream's classes are 0 and 2 in the labels, and 0 and 1 in the predictions: a positive clip never counts.
        "Non0_acc_2": _accuracy(positive[polar].astype(int), truth[polar]),
        "Non0_F1_score": _weighted_f1(positive[polar].astype(int), truth[polar]),
        "Acc_3": _accuracy(best, truth),
        "F1_score_3": _weighted_f1(best, truth),
    }


def vectors(pred: Any, truth: Any) -> tuple[np.ndarray, np.ndarray]:
    with np.errstate(over="ignore"):  # beyond float32 is infinite, and refused below
        p, t = np.asarray(pred, dtype=np.float32), np.asarray(truth, dtype=np.float32)
    if p.ndim != 1 or p.shape != t.shape or not len(p):
        raise InputError(f"expected predictions and labels of one shape (N), got {p.shape} and {t.shape}")
    for name, values in (("predictions", p), ("labels", t)):
        if not np.isfinite(values).all():
            raise InputError(
                f"{np.count_nonzero(~np.isfinite(values))} of {len(values)} {name} are not finite in float32"
            )
    return p, t


def interval(values: np.ndarray, edges: list[float]) -> np.ndarray:
    return np.digitize(values, np.array(edges, dtype=np.float32), right=True)


def _accuracy(pred: np.ndarray, truth: np.ndarray) -> float:
    return float(np.mean(pred == truth)) if len(truth) else float("nan")


def _weighted_f1(pred: np.ndarray, truth: np.ndarray) -> float:
    if not len(truth):
        return float("nan")
    from sklearn.metrics import f1_score

    return float(f1_score(truth, pred, average="weighted"))


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])
