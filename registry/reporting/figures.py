"""The figures of a report: seeds by model, learning curves, predictions, confusion, and how labels moved."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ..comparison import Comparison, Row
from ..labels import GeneratedLabels, draw
from ..metrics import CLASSES, finest_classes
from .pictures import COLOURS, GREY, INK, AnyFigure, Panel, Picture, shortened

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

MOST_POINTS = 5000
"""in all scatter plots of a page; more are counted in hexagons"""
MOVEMENTS = ("distance", "moved", "Corr true")
"""of the label movement, those that are drawn"""
_LINES = ("-", "--", "-.", ":")


def colours_of(comparison: Comparison) -> dict[str, str]:
    """Return each row's colour, the same in all figures; beyond seven rows they come again."""
    return {row.name: COLOURS[number % len(COLOURS)] for number, row in enumerate(comparison.ok)}


def label_limit(comparison: Comparison) -> float:
    """Return the end of the labels' axis: their range, or the farthest label of the test split."""
    first = comparison.ok[0].runs[0]
    return float(max(first.settings["data"]["label_range"], first.predictions["label"].abs().max()))


def _axes(made: AnyFigure, left: float, bottom: float, right: float, top: float) -> Axes:
    """Return axes that leave so many inches free, which puts those of all panels in the same place."""
    width, height = made.bbox.width / made.dpi, made.bbox.height / made.dpi
    return made.add_axes(
        (left / width, bottom / height, (width - left - right) / width, (height - bottom - top) / height)
    )


def _number(value: float) -> str:
    return f"{value:.4g}".replace("-", "−")


# --- seeds by model


def strips(comparison: Comparison, metrics: Sequence[str]) -> list[Panel]:
    """Return a panel a metric: every seed of every model, and their mean."""
    panels = []
    for metric in metrics:
        known = [row for row in comparison.ok if np.isfinite(row.mean[metric])]
        if known:
            best = (min if metric == "MAE" else max)(known, key=lambda row: row.mean[metric])
            alt = f"{metric} on test of {len(known)} models; the best mean is {best.name}'s, {best.mean[metric]:.4f}."
            size = (4.1, 0.62 + (0.24 if len(known) <= 20 else 0.19) * len(known))
            panels.append(Panel(metric, alt, size, partial(_strip, known, metric, colours_of(comparison))))
    return panels


def _strip(rows: Sequence[Row], metric: str, colours: dict[str, str], made: AnyFigure) -> None:
    names = [shortened(row.name, 34) for row in rows]
    axes = _axes(made, 0.16 + 0.064 * max(map(len, names)), 0.44, 0.12, 0.06)
    for place, row in enumerate(rows):
        values = np.array([run.metrics[metric] for run in row.runs])
        apart = (np.arange(len(values)) - (len(values) - 1) / 2) * min(0.09, 0.5 / len(values))
        axes.plot([row.mean[metric]] * 2, [place - 0.34, place + 0.34], color=INK, linewidth=1.6, zorder=3)
        axes.plot(
            values, place + apart, "o", color=colours[row.name], markersize=4.5, alpha=0.8, markeredgewidth=0, zorder=4
        )
    axes.axvline(rows[0].mean[metric], color=GREY, linewidth=0.6, linestyle=(0, (4, 3)), zorder=1)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)), names)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#e4e4e4", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines["left"].set_visible(False)
    axes.margins(x=0.06)
    axes.locator_params(axis="x", nbins=6)
    axes.set_xlabel("MAE in label units, lower is better" if metric == "MAE" else f"{metric}, higher is better")


# --- learning curves


def curves(comparison: Comparison) -> tuple[list[Panel], float | None]:
    """Return a panel a model that was trained here, and where the axis of validation MAE was cut, if it was."""
    histories = {
        row.name: [(run.history, run.best_epoch) for run in row.runs if run.best_epoch is not None]
        for row in comparison.ok
    }
    histories = {name: found for name, found in histories.items() if found}
    if not histories:
        return [], None
    values = np.concatenate([history["valid_mae"] for found in histories.values() for history, _ in found])
    values = values[np.isfinite(values)]
    highest, usual = (float(values.max()), 3 * float(np.median(values))) if len(values) else (1.0, 1.0)
    limits = (float(values.min()) if len(values) else 0.0, min(highest, usual))
    panels = []
    for name, found in histories.items():
        epochs = [epoch for _, epoch in found]
        best = ", ".join(map(str, epochs if len(set(epochs)) > 1 else epochs[:1]))
        alt = f"Validation MAE and train loss of {name} by epoch, {len(found)} seeds; best epochs {best}."
        draw_it = partial(_curves, found, limits, colours_of(comparison)[name])
        panels.append(Panel(name, alt, (2.5, 2.3), draw_it, f"best epoch {best}"))
    return panels, usual if usual < highest else None


def _curves(
    found: Sequence[tuple[pd.DataFrame, int | None]], limits: tuple[float, float], colour: str, made: AnyFigure
) -> None:
    low, high = limits
    room = 0.08 * (high - low) or 0.1
    upper, lower = _axes(made, 0.62, 1.26, 0.1, 0.08), _axes(made, 0.62, 0.4, 0.1, 1.2)
    longest = max(int(history["epoch"].max()) for history, _ in found)
    for history, best in found:
        upper.plot(history["epoch"], history["valid_mae"], color=colour, linewidth=0.9, alpha=0.85)
        chosen = history[history["epoch"] == best]
        upper.plot(chosen["epoch"], chosen["valid_mae"], "o", color=colour, markersize=4.5, clip_on=False, zorder=5)
        lower.plot(history["epoch"], history["train_loss"], color=colour, linewidth=0.9, alpha=0.85)
    upper.set_ylim(low - room, high + room)
    upper.set_ylabel("valid. MAE")
    lower.set_ylabel("train loss")
    lower.set_xlabel("epoch", labelpad=1)
    upper.tick_params(labelbottom=False)
    for axes in (upper, lower):
        _epochs(axes, longest)
        axes.locator_params(axis="y", nbins=4)
        axes.yaxis.set_label_coords(-0.24, 0.5)


def _epochs(axes: Axes, longest: int) -> None:
    """Set an axis of epochs 1 to `longest`."""
    from matplotlib.ticker import MaxNLocator

    room = 0.04 * max(longest - 1, 1)
    axes.set_xlim(1 - room, max(longest, 2) + room)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    axes.grid(color="#ececec", linewidth=0.5)
    axes.set_axisbelow(True)


# --- predicted against true


def scatters(comparison: Comparison) -> tuple[list[Panel], bool, int]:
    """Return a panel a model, whether clips are counted in hexagons, and how many predictions lie off the axes."""
    limit = 1.1 * label_limit(comparison)
    points = {row.name: [run.predictions for run in row.runs] for row in comparison.ok}
    counted = sum(len(table) for tables in points.values() for table in tables) > MOST_POINTS
    panels, outside = [], 0
    for row in comparison.ok:
        true = np.concatenate([table["label"] for table in points[row.name]])
        predicted = np.concatenate([table["prediction"] for table in points[row.name]])
        outside += int((abs(predicted) > limit).sum())
        said = f"MAE {row.mean['MAE']:.3f}, Corr {row.mean['Corr']:.3f}".replace("-", "−")
        alt = f"Predicted against true labels of the test clips by {row.name}, {len(row.runs)} seeds: {said}."
        colour = colours_of(comparison)[row.name]
        draw_it = partial(_scatter, true, predicted.clip(-limit, limit), limit, colour, counted)
        panels.append(Panel(row.name, alt, (2.5, 2.4), draw_it, said))
    return panels, counted, outside


def _scatter(
    true: np.ndarray, predicted: np.ndarray, limit: float, colour: str, counted: bool, made: AnyFigure
) -> None:
    from matplotlib.colors import LinearSegmentedColormap, LogNorm

    axes = _axes(made, 0.46, 0.4, 0.1, 0.06)
    axes.plot([-limit, limit], [-limit, limit], color=GREY, linewidth=0.7, zorder=1)
    if counted:
        shades = LinearSegmentedColormap.from_list("", ["#e3e3e3", colour, "#000000"])
        extent = (-limit, limit, -limit, limit)
        axes.hexbin(true, predicted, gridsize=24, extent=extent, mincnt=1, norm=LogNorm(), cmap=shades, linewidths=0.1)
    else:
        axes.plot(true, predicted, "o", color=colour, markersize=2.6, alpha=0.4, markeredgewidth=0, zorder=2)
    ticks = _label_ticks(limit / 1.1)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(ticks, [_number(tick) for tick in ticks])
    axes.set_xlim(-limit, limit)
    axes.set_ylim(-limit, limit)
    axes.set_xlabel("true label", labelpad=1)
    axes.set_ylabel("predicted", labelpad=1)


def _label_ticks(limit: float) -> list[float]:
    whole = int(limit)
    return list(map(float, range(-whole, whole + 1))) if 2 <= whole <= 4 else [-limit, -limit / 2, 0, limit / 2, limit]


# --- confusion


def confusions(comparison: Comparison) -> list[Panel]:
    """Return a panel a model: how many clips of each class, over all seeds, were predicted to be of each class."""
    family = comparison.ok[0].runs[0].settings["data"]["metrics"]
    panels = []
    for row in comparison.ok:
        counts = np.sum([_confusion(run.predictions, family) for run in row.runs], axis=0)
        right = np.trace(counts) / counts.sum()
        said = f"{100 * right:.1f} % in the right class"
        alt = f"Confusion of {len(CLASSES[family])} classes by {row.name}: {said}."
        colour = colours_of(comparison)[row.name]
        panels.append(Panel(row.name, alt, (2.5, 2.4), partial(_matrix, counts, family, colour), said))
    return panels


def _confusion(predictions: pd.DataFrame, family: Any) -> np.ndarray:
    """Return counts (classes, classes), a row a true class."""
    number = len(CLASSES[family])
    true, predicted = (finest_classes(predictions[column], family) for column in ("label", "prediction"))
    return np.bincount(true * number + predicted, minlength=number**2).reshape(number, number)


_SHORT = {"sims": ("neg.", "weak\nneg.", "neut.", "weak\npos.", "pos.")}


def _matrix(counts: np.ndarray, family: str, colour: str, made: AnyFigure) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    number = len(counts)
    axes = _axes(made, 0.62 if family == "sims" else 0.46, 0.46, 0.08, 0.04)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    shades = LinearSegmentedColormap.from_list("", ["#ffffff", colour])
    axes.pcolormesh(shares, cmap=shades, vmin=0, vmax=1, edgecolors="#dddddd", linewidth=0.3)
    for true, predicted in np.ndindex(*counts.shape):
        if counts[true, predicted]:
            rgb = np.array(shades(shares[true, predicted])[:3])
            dark = rgb @ (0.299, 0.587, 0.114) < 0.55
            text = _count(int(counts[true, predicted]))
            place = (predicted + 0.5, true + 0.5)
            axes.text(*place, text, ha="center", va="center", fontsize=6.5, color="white" if dark else INK)
    names = _SHORT.get(family, CLASSES["mosi"])
    middles = np.arange(number) + 0.5
    axes.set_xticks(middles, names)
    axes.set_yticks(middles, names)
    axes.tick_params(length=0, labelsize=7)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set_ylim(number, 0)
    axes.set_xlabel("predicted class", labelpad=1)
    axes.set_ylabel("true class", labelpad=1)


def _count(number: int) -> str:
    return str(number) if number < 10_000 else f"{number / 1000:.0f}k"


# --- generated labels


def distributions(labels: Sequence[GeneratedLabels]) -> list[Picture]:
    """Return the paper's figure of each run."""
    pictures = []
    for found in labels:
        epochs = ", ".join(map(str, found.shown_epochs))
        what = ", ".join(found.modalities)
        alt = f"Histograms of the labels that were generated for {what}, at the end of epochs {epochs}: {found.title}."
        model, seed = found.run.settings["model"], found.run.settings["seed"]
        pictures.append(Picture(f"{model}, seed {seed}", alt, partial(draw, found)))
    return pictures


def movements(rows: Sequence[tuple[Row, Sequence[GeneratedLabels]]]) -> list[Panel]:
    """Return a panel a model: how far its labels lay from the multimodal one, moved, and followed the true ones."""
    shown = [
        column
        for column in MOVEMENTS
        if any(
            column in found.movement and found.movement[column].notna().any() for _, of_row in rows for found in of_row
        )
    ]
    names = list(dict.fromkeys(name for _, of_row in rows for found in of_row for name in found.modalities))
    panels = []
    for row, of_row in rows:
        alt = f"How the generated labels of {row.name} moved by epoch, {len(of_row)} seeds: {', '.join(shown)}."
        height = 0.68 + 0.92 * len(shown)
        panels.append(Panel(row.name, alt, (2.5, height), partial(_movement, of_row, shown, names)))
    return panels


def _movement(of_row: Sequence[GeneratedLabels], shown: Sequence[str], names: Sequence[str], made: AnyFigure) -> None:
    longest = max(found.epochs[-1] for found in of_row)
    for number, column in enumerate(shown):
        below = 0.4 + 0.92 * (len(shown) - 1 - number)
        axes = _axes(made, 0.62, below, 0.1, 0.28 + 0.92 * number + 0.1)
        for place, name in enumerate(names[: len(COLOURS)]):
            looks: dict[str, Any] = {"color": COLOURS[place], "linestyle": _LINES[place % len(_LINES)]}
            for seed, found in enumerate(of_row):
                table = found.movement[found.movement["modality"] == name]
                if column in table:
                    axes.plot(table["epoch"], table[column], linewidth=1, label=name if seed == 0 else None, **looks)
                if column == "Corr true" and "Corr true, multimodal" in table and seed == 0:
                    level = table["Corr true, multimodal"].iloc[-1]
                    axes.axhline(level, color=looks["color"], linewidth=0.5, alpha=0.6, zorder=1)
        _epochs(axes, longest)
        axes.locator_params(axis="y", nbins=3)
        axes.set_ylabel(column)
        axes.yaxis.set_label_coords(-0.24, 0.5)
        axes.tick_params(labelbottom=number == len(shown) - 1)
        if number == 0:
            handles, texts = axes.get_legend_handles_labels()
            made.legend(
                handles, texts, loc="upper center", ncols=4, borderpad=0, handlelength=1.6, columnspacing=1.0,
                handletextpad=0.4,
            )  # fmt: skip
    axes.set_xlabel("epoch", labelpad=1)
