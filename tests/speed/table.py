"""The figures of a speed comparison as text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import mean
from typing import Any

START_UP = {"upstream": 1, "ours": 2}
"""First epochs that also pay for starting up, and are left out: ours record most of their steps in the first two."""


def derive(figures: Mapping[str, Any], side: str, data: Mapping[str, Any]) -> dict[str, float]:
    """Return what follows from a training's seconds.

    Args:
        figures: `train_seconds` and `valid_seconds` of each epoch, and `peak`, operations a second.
        side: `"upstream"` or `"ours"`.
        data: `clips` in train, `clips_an_update`, `tokens` and `operations` of an epoch.
    """
    first = min(START_UP[side], len(figures["train_seconds"]) - 1)
    train, valid = (mean(figures[f"{part}_seconds"][first:]) for part in ("train", "valid"))
    return {
        "epochs": len(figures["train_seconds"]) - first,
        "train": train,
        "valid": valid,
        "step_ms": 1e3 * train * data["clips_an_update"] / data["clips"],
        "clips_a_second": data["clips"] / train,
        "tokens_a_second": data["tokens"] / train,
        "share_of_peak": data["operations"] / train / figures["peak"][0],
    }


def compared(report: Mapping[str, Any]) -> str:
    """Return the table of upstream beside ours, one column for each precision."""
    columns = {"upstream": report["upstream"], **{f"ours, {name}": ours for name, ours in report["ours"].items()}}
    rows: dict[str, list[str]] = {
        "epochs timed": [f"{column['derived']['epochs']:.0f}" for column in columns.values()],
        "training, s an epoch": [f"{column['derived']['train']:.3f}" for column in columns.values()],
        "validation, s an epoch": [f"{column['derived']['valid']:.3f}" for column in columns.values()],
    }
    for name, parts in (("training", ("train",)), ("both", ("train", "valid"))):
        times = [sum(column["derived"][part] for part in parts) for column in columns.values()]
        rows[f"upstream / ours, {name}"] = ["", *(f"{times[0] / time:.2f}" for time in times[1:])]
    for label, key, form in (
        (f"step of {report['data']['clips_an_update']} clips, ms", "step_ms", "{:.2f}"),
        ("clips a second", "clips_a_second", "{:,.0f}"),
        ("real tokens a second", "tokens_a_second", "{:,.0f}"),
        ("share of peak arithmetic", "share_of_peak", "{:.2%}"),
    ):
        rows[label] = [form.format(column["derived"][key]) for column in columns.values()]
    rows["peak arithmetic, TFLOP/s"] = [f"{column['peak'][0] / 1e12:.3g}" for column in columns.values()]
    rows["peak GPU memory, GB"] = [_gigabytes(column["peak_allocated"]) for column in columns.values()]
    return _aligned(["", *columns], ([label, *cells] for label, cells in rows.items()))


def profile(figures: Mapping[str, Any] | None, unit: str) -> str:
    """Return the table of a profile: milliseconds and number of kernels a step, by class."""
    if figures is None:
        return "no step was profiled: an epoch has too few"
    total = sum(of_class["ms"] for of_class in figures["classes"].values())
    rows = [
        [name, f"{of_class['ms']:.3f}", f"{of_class['ms'] / total:.1%}", f"{of_class['count']:.0f}"]
        for name, of_class in figures["classes"].items()
    ]
    count = sum(of_class["count"] for of_class in figures["classes"].values())
    rows.append(["all", f"{total:.3f}", "", f"{count:.0f}"])
    made = _aligned([f"{figures['steps']} steps", "ms a step", "share", f"{unit} a step"], rows)
    busy = figures["busy"]
    return made if busy is None else f"{made}\nthe GPU was busy {busy:.1%} of the time, while profiled"


def _gigabytes(size: int | None) -> str:
    return "–" if size is None else f"{size / 1e9:.2f}"


def _aligned(heading: list[str], rows: Iterable[list[str]]) -> str:
    """Return lines whose first column is aligned left, the others right."""
    lines = [heading, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heading))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )
