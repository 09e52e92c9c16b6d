"""What the labels that a hook generated did during a training: a table, a figure, and the labels of one epoch by clip.

    for run in find_runs("runs/self_mm/mosi/3f2a…"):
        labels = read_labels(run)
        labels.by_clip(labels.best_epoch), draw(labels)

They are read from tables of the train split that the hook saved with the run, whichever hook it was: `labels` (`epoch`,
`id`, `fusion`, which is the human multimodal label, and each modality), `label_movement` (`epoch`, `modality`, any
figures) and, where they are known, `true_labels` (`id` and modalities).
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .errors import InputError
from .runs import FINISHED, Run, finished, finite, load_run, require_file, write_file
from .tables import Rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_EPOCHS = 5
"""in a table or a figure"""
MEANINGS = {
    "moved": "mean change of a label since the epoch before",
    "distance": "mean distance from the human multimodal label",
    "changed sign": "share of clips whose label has another sign (−1, 0, +1) than the multimodal one",
    "Corr multimodal": "correlation with the multimodal label",
    "Corr true": "correlation with the true unimodal label; beside it that of the multimodal label",
}


@dataclass(frozen=True)
class GeneratedLabels:
    """The labels that a hook generated in one run."""

    run: Run
    labels: pd.DataFrame
    movement: pd.DataFrame
    true: pd.DataFrame | None

    @property
    def title(self) -> str:
        """Which run it is."""
        model, dataset, seed = (self.run.settings[key] for key in ("model", "dataset", "seed"))
        return f"{model} on {dataset}, seed {seed}, generated labels of the train split"

    @property
    def modalities(self) -> list[str]:
        """The modalities that have labels of their own."""
        return [str(name) for name in self.labels.columns if name not in ("epoch", "id", "fusion")]

    @property
    def epochs(self) -> list[int]:
        """Every epoch that was trained, also those after the best one."""
        return sorted(map(int, self.labels["epoch"].unique()))

    @property
    def best_epoch(self) -> int:
        """The epoch whose weights the run kept."""
        assert self.run.best_epoch is not None
        return self.run.best_epoch

    @property
    def shown_epochs(self) -> list[int]:
        """The first two, the best and the last epoch, and what lies in the widest gaps between: at most five."""
        epochs = self.epochs
        shown = {*epochs[:2], self.best_epoch, epochs[-1]}
        while len(shown) < min(MOST_EPOCHS, len(epochs)):
            before, after = max(pairwise(sorted(shown)), key=lambda pair: pair[1] - pair[0])
            shown.add((before + after) // 2)
        return sorted(shown)

    @property
    def range(self) -> float:
        """The labels lie within ± this: the data's range, or what the hook clamped them to if that is wider."""
        widest = self.labels[["fusion", *self.modalities]].abs().to_numpy().max()
        return float(max(widest, self.run.settings["data"]["label_range"]))

    def of_epoch(self, epoch: int) -> pd.DataFrame:
        """Return `id`, `fusion` and each modality's labels at an epoch's end.

        Raises:
            InputError: the run has no such epoch.
        """
        if epoch not in self.epochs:
            raise InputError(f"{self.run.folder} has labels of epochs 1 to {self.epochs[-1]}, and none of {epoch}")
        return self.labels[self.labels["epoch"] == epoch].drop(columns="epoch").reset_index(drop=True)

    def by_clip(self, epoch: int) -> pd.DataFrame:
        """Return one row a clip: `id`, `multimodal`, each modality and, where known, `true MODALITY`."""
        table = self.of_epoch(epoch).rename(columns={"fusion": "multimodal"})
        if self.true is None:
            return table
        true = self.true.rename(columns={name: f"true {name}" for name in self.true.columns if name != "id"})
        return table.merge(true, on="id", how="left", validate="one_to_one")

    def movement_rows(self) -> Rows:
        """Return the movement in the shown epochs, ready to print; the best epoch is marked."""
        rows = self.movement[self.movement["epoch"].isin(self.shown_epochs)]
        return [{str(column): self._cell(column, value) for column, value in row.items()} for row in _records(rows)]

    def _cell(self, column: Any, value: Any) -> str:
        if column == "epoch":
            return f"{value} (best)" if value == self.best_epoch else str(value)
        return str(value) if isinstance(value, (str, int)) else "-" if np.isnan(value) else f"{value:.4f}"


def _records(table: pd.DataFrame) -> list[dict[Any, Any]]:
    return table.to_dict("records")


def find_runs(folder: str | Path) -> list[Run]:
    """Return the finished run in a folder of one seed, or those in the folder of a configuration, by seed.

    Raises:
        InputError: it is the folder of neither.
    """
    place = Path(os.path.expanduser(folder))
    seeds = [entry for entry in place.iterdir() if entry.name.isdecimal()] if place.is_dir() else []
    if finished(place) or not seeds or (place / FINISHED).exists():
        return [load_run(place)]
    return [load_run(seed) for seed in sorted(seeds, key=lambda entry: int(entry.name))]


def read_labels(run: Run) -> GeneratedLabels:
    """Read what a run saved of generated labels.

    Raises:
        InputError: it has none, or a table lacks a column.
    """
    saved = run.summary["artifacts"]
    if not {"labels", "label_movement"} <= set(saved):
        hooks = ", ".join(run.settings.get("hooks", {})) or "none"
        raise InputError(
            f"{run.folder} has no generated labels (no table 'label_movement'): only a run whose hook generates "
            f"unimodal labels saves them, and this is one of {run.settings.get('model')} (hooks: {hooks}) that did not"
        )
    needed = {"labels": ("epoch", "id", "fusion"), "label_movement": ("epoch", "modality"), "true_labels": ("id",)}
    tables = {name: run.table(name) for name in needed if name in saved}
    for name, table in tables.items():
        if absent := [column for column in needed[name] if column not in table]:
            raise InputError(f"the table {name!r} of {run.folder} has no column {', '.join(absent)}")
    return GeneratedLabels(run, tables["labels"], tables["label_movement"], tables.get("true_labels"))


def generated_in_vain(run: Run) -> bool:
    """Whether a hook generated labels of which none had moved before the run's best epoch.

    The weights of that epoch have then seen human labels only: labels that move in an epoch are used in the next one.
    """
    if run.best_epoch is None or "label_movement" not in run.summary["artifacts"]:
        return False
    movement = run.table("label_movement")
    if not {"epoch", "distance"} <= set(movement.select_dtypes("number")):
        return False
    return not movement.loc[movement["epoch"] < run.best_epoch, "distance"].gt(0).any()


def to_json(found: Sequence[GeneratedLabels], files: Sequence[Files]) -> str:
    """Return the movement in every epoch, and the files, as `labels --json` prints them."""
    settings = found[0].run.settings
    runs = [
        {
            "seed": labels.run.settings["seed"],
            "best_epoch": labels.best_epoch,
            "label_movement": _records(labels.movement),
            "folder": str(labels.run.folder),
            "figure": str(written.figure),
            "csv": str(written.csv),
        }
        for labels, written in zip(found, files, strict=True)
    ]
    value = {"model": settings["model"], "dataset": settings["dataset"], "runs": runs}
    return json.dumps(finite(value), indent=2, allow_nan=False)


# --- the figure

FORMATS = ("png", "pdf", "svg")
BINS = 31
"""Odd, so that 0 lies in the middle of one, as do the published labels: multiples of 0.2 within ±3 or ±1."""
_GENERATED, _MULTIMODAL = "#8fb3d4", "#333333"
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 8,
    "axes.linewidth": 0.6,
    "legend.fontsize": 8,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "pdf.fonttype": 42,  # publishers refuse Type 3
}


def draw(labels: GeneratedLabels) -> Figure:
    """Return histograms of the generated labels, a row a modality and a column an epoch."""
    from matplotlib.figure import Figure

    modalities, epochs = labels.modalities, labels.shown_epochs
    made = Figure(figsize=(0.9 + 1.3 * len(epochs), 0.9 + 1.0 * len(modalities)), layout="constrained")
    grid = made.subplots(len(modalities), len(epochs), sharex=True, sharey=True, squeeze=False)
    for column, epoch in enumerate(epochs):
        table = labels.of_epoch(epoch)
        for axes, modality in zip(grid[:, column], modalities, strict=True):
            _histogram(axes, table[modality], table["fusion"], labels.range)
        grid[0, column].set_title(f"epoch {epoch}{' (best)' if epoch == labels.best_epoch else ''}", fontsize=8)
    for axes, modality in zip(grid[:, -1], modalities, strict=True):
        axes.text(1.06, 0.5, modality, transform=axes.transAxes, rotation=270, va="center")
    made.supxlabel("label", fontsize=8)
    made.supylabel("share of clips", fontsize=8)
    handles, names = grid[0, 0].get_legend_handles_labels()
    made.legend(handles, names, loc="outside upper center", ncols=2, frameon=False)
    return made


def _histogram(axes: Axes, generated: pd.Series[float], multimodal: pd.Series[float], limit: float) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    edges = (np.arange(BINS + 1) - BINS / 2) * 2 * limit / (BINS - 1)
    for values, looks in (
        (generated, {"histtype": "stepfilled", "color": _GENERATED, "label": "generated label"}),
        (multimodal, {"histtype": "step", "color": _MULTIMODAL, "linewidth": 0.7, "label": "human multimodal label"}),
    ):
        axes.hist(values, bins=edges.tolist(), weights=np.full(len(values), 1 / len(values)), **looks)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_xticks([-limit, 0, limit], [f"{tick:g}".replace("-", "−") for tick in (-limit, 0, limit)])
    axes.yaxis.set_major_locator(MaxNLocator(3))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.spines[["top", "right"]].set_visible(False)


# --- files


def places(found: Sequence[GeneratedLabels], given: Path | None, suffix: str) -> list[Path]:
    """Return where each run's file goes: by default `labels-MODEL-DATASET-SEED` in the working folder.

    Args:
        found: one run, or the seeds of a configuration.
        given: the user's name for it; with several seeds each one's is added to it.
        suffix: of the default.

    Raises:
        InputError: it would lie in a run folder.
    """
    paths = []
    for labels in found:
        model, dataset, seed = (labels.run.settings[key] for key in ("model", "dataset", "seed"))
        path = Path(f"labels-{model}-{dataset}-{seed}{suffix}")
        if given is not None:
            path = Path(os.path.expanduser(given))
            path = path if len(found) == 1 else path.with_name(f"{path.stem}-{seed}{path.suffix}")
        require_file(path, f"--{'figure' if suffix == '.png' else 'csv'}")
        if finished(path.resolve().parent):
            raise InputError(f"{path} would lie in the folder of a run, which stays as it is: name another place")
        paths.append(path)
    return paths


@dataclass(frozen=True)
class Files:
    """What was written of one run."""

    figure: Path
    csv: Path


def write_files(
    found: Sequence[GeneratedLabels], *, figure: Path | None = None, csv: Path | None = None, epoch: int | None = None
) -> list[Files]:
    """Write each run's figure, and its labels by clip at its best epoch or at `epoch`; files there are replaced.

    Raises:
        InputError: nothing has been written if a name is wrong or a run has no such epoch.
    """
    from matplotlib import rc_context

    figures, csvs = places(found, figure, ".png"), places(found, csv, ".csv")
    if set(figures) & set(csvs):
        raise InputError(f"--figure and --csv name one file, {figures[0]}")
    kind = figures[0].suffix[1:].lower()
    if kind not in FORMATS:
        raise InputError(f"--figure {figure} must end in {', '.join(f'.{name}' for name in FORMATS)}")
    tables = [labels.by_clip(labels.best_epoch if epoch is None else epoch) for labels in found]
    with rc_context(STYLE):
        for labels, path in zip(found, figures, strict=True):
            write_file(path, partial(draw(labels).savefig, format=kind, dpi=300))
    for table, path in zip(tables, csvs, strict=True):
        write_file(path, partial(table.to_csv, index=False))
    return [Files(*pair) for pair in zip(figures, csvs, strict=True)]
