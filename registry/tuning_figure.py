"""The picture of a search: the score of every trial in their order, beside how much each key matters."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .labels import FORMATS, STYLE
from .runs import write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .tuning import Tuning

__all__ = ["FORMATS", "draw", "write_figure"]

MOST_KEYS = 12
"""in the figure; the others matter least"""
MOST_SPREAD = 6
"""how far up the figure goes from the best score, as a multiple of the median's distance from it"""
_OK, _BEST, _PRUNED, _FAILED = "#8fb3d4", "#333333", "#aaaaaa", "#c0504d"


def draw(tuning: Tuning) -> Figure:
    """Return the validation MAE of every trial, and, where it can be told, the importance of the keys."""
    from matplotlib.figure import Figure

    keys = list(tuning.importance)[:MOST_KEYS]
    made = Figure(figsize=(7.0 if keys else 3.6, max(2.4, 0.9 + 0.17 * len(keys))), layout="constrained")
    panels = made.subplots(1, 2 if keys else 1, squeeze=False)[0]
    _history(panels[0], tuning)
    if keys:
        _importance(panels[1], tuning, keys)
    return made


def _history(axes: Axes, tuning: Tuning) -> None:
    from matplotlib.ticker import MaxNLocator

    order = range(1, len(tuning.trials) + 1)
    by_status = {
        status: [(at, t.valid_mae) for at, t in zip(order, tuning.trials, strict=True) if t.status == status]
        for status in ("ok", "pruned")
    }
    ok = np.array(by_status["ok"], dtype=float)
    axes.plot(*ok.T, "o", color=_OK, markersize=3.5, label="trial")
    best = np.minimum.accumulate(ok[:, 1])
    last = len(tuning.trials)
    axes.step([*ok[:, 0], last], [*best, best[-1]], where="post", color=_BEST, linewidth=0.9, label="best so far")
    if pruned := [(at, value) for at, value in by_status["pruned"] if value is not None]:
        axes.plot(*zip(*pruned, strict=True), "x", color=_PRUNED, markersize=3.5, label="pruned, as far as it came")
    failed = [at for at, trial in zip(order, tuning.trials, strict=True) if trial.status == "failed"]
    if failed:
        bottom = axes.get_xaxis_transform()
        axes.plot(failed, [0.02] * len(failed), "|", color=_FAILED, markersize=5, transform=bottom, label="failed")
    scores = [trial.valid_mae for trial in tuning.trials if trial.valid_mae is not None]
    highest = best[-1] + MOST_SPREAD * (float(np.median(scores)) - best[-1])
    if max(scores) > highest > best[-1]:  # one hopeless trial must not make the others a line
        axes.set_ylim(top=highest)
    axes.set_xlabel("trial")
    axes.set_ylabel("validation MAE")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.03)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, fontsize=7)


def _importance(axes: Axes, tuning: Tuning, keys: list[str]) -> None:
    places = np.arange(len(keys))[::-1]
    shares = [tuning.importance[key] for key in keys]
    axes.barh(places, shares, height=0.65, color=_OK)
    for place, share in zip(places, shares, strict=True):
        axes.text(share + 0.01 * max(shares), place, f"{share:.2f}", va="center", fontsize=7)
    axes.set_yticks(places, keys, fontsize=7)
    axes.set_xlim(0, 1.12 * max(shares))
    axes.set_xlabel("importance (share of variance, fANOVA)")
    axes.spines[["top", "right"]].set_visible(False)


def write_figure(tuning: Tuning, path: Path) -> None:
    """Write it as its name ends: .png, .pdf or .svg; a file that is there is replaced."""
    from matplotlib import rc_context

    with rc_context(STYLE):
        write_file(path, partial(draw(tuning).savefig, format=path.suffix[1:].lower(), dpi=300))
