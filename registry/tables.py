"""Results and configurations as rows of text, ready to print."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pandas as pd

from .config import as_typed, describe
from .contract import HookSpec, ModelSpec
from .runs import load_run
from .search_space import Dimension

if TYPE_CHECKING:
    from .benchmark import Result

Rows = list[dict[str, str]]


class Best(str):
    """A cell that is the best of its column."""

    is_best = True


MOST_SEED_COLUMNS = 5


def result_table(result: Result) -> Rows:
    """Return one row a metric: each seed's value (up to five seeds) and, from two on, mean ± standard deviation."""
    runs = result.ok
    shown = runs if len(runs) <= MOST_SEED_COLUMNS else []
    rows = [{"metric": "best epoch", **{f"seed {run.seed}": str(run.best_epoch) for run in shown}}]
    for name, mean in result.mean.items():
        row = {"metric": name, **{f"seed {run.seed}": f"{run.metrics[name]:.4f}" for run in shown}}
        if result.std is not None:
            row["mean ± sd"] = f"{mean:.4f} ± {result.std[name]:.4f}"
        rows.append(row)
    if result.std is not None:
        epochs = [run.best_epoch for run in runs if run.best_epoch is not None]
        rows[0]["mean ± sd"] = f"{min(epochs)} to {max(epochs)}" if len(set(epochs)) > 1 else str(epochs[0])
    return rows


def artifact_tables(result: Result, most_rows: int) -> dict[str, Rows]:
    """Return the small tables of the best epoch that hooks saved with the runs, averaged over seeds."""
    runs = [load_run(run.folder) for run in result.ok if run.folder]
    tables: dict[str, Rows] = {}
    for name in dict.fromkeys(name for run in runs for name in run.summary["artifacts"]):
        found = [run.table(name) for run in runs if name in run.summary["artifacts"]]
        if {"id", "epoch"} & {*found[0]} or max(len(table) for table in found) > most_rows:
            continue
        key = list(found[0].select_dtypes(exclude="number").columns)
        mean = pd.concat(found).groupby(key, sort=False).mean().reset_index() if key else found[0]
        tables[name] = [
            {str(column): f"{value:.4f}" if isinstance(value, float) else str(value) for column, value in row.items()}
            for row in mean.to_dict("records")
        ]
    return tables


def config_tables(spec: ModelSpec, hooks: Sequence[HookSpec]) -> dict[str, Rows]:
    """Return, by title, every config key with type, default and meaning, each preset's values, and the search space."""
    rows = describe(spec, hooks)
    tables = {
        "config keys": [
            {"key": row.key, "type": row.type, "default": as_typed(row.default), "meaning": row.meaning} for row in rows
        ]
    }
    for preset, by_dataset in spec.presets.items():
        tables[f"preset {preset}"] = [
            {"key": row.key, **{dataset: as_typed(row.presets[preset].get(dataset, "")) for dataset in by_dataset}}
            for row in rows
            if row.presets.get(preset)
        ]
    if spec.search:
        space = [Dimension(key, values) for key, values in spec.search.items()]
        tables["what benchmark tune searches"] = [{"key": of.key, "values": str(of)} for of in space]
    return tables
