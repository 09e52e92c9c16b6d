"""Many models on one dataset side by side: rows of finished runs, found below folders or made by `compare`.

comparison = collect(["runs/"], "self_mm", dataset="mosi")
comparison.frame(), comparison.rows[0].mean["MAE"], comparison.differences["tfn"].p_mae
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from .benchmark import FAILED_LOG, Result, SeedRun
from .contract import HookSpec
from .errors import InputError, unknown
from .labels import generated_in_vain
from .metrics import names_of
from .plugins import Plugins
from .runs import Run, fault_of, identity, with_later_keys
from .statistics import Difference, compare_predictions, video_of

PRIMARY = "MAE"
_LONGEST_REASON = 2000
"""characters of the first line of a failed seed's log"""


@dataclass(frozen=True)
class Row:
    """One line of a comparison: a model as it was asked for, its finished runs, and what failed."""

    name: str
    runs: Sequence[Run] = ()
    failed: Mapping[int | None, str] = field(default_factory=dict)
    """the reason of each seed that failed"""
    reason: str | None = None
    """why the model could not be trained at all"""

    @cached_property
    def result(self) -> Result:
        """What `registry.run` would have returned."""
        done = [SeedRun(r.settings["seed"], "ok", None, r.best_epoch, r.metrics, r.folder) for r in self.runs]
        done += [SeedRun(seed, "failed", reason, None, {}, None) for seed, reason in self.failed.items()]
        settings = self.runs[0].settings if self.runs else {"dataset": ""}
        folder = self.runs[0].folder.parent if self.runs else Path()
        done.sort(key=lambda run: -1 if run.seed is None else run.seed)
        return Result(self.name, settings["dataset"], done, folder, self.protocol)

    @property
    def mean(self) -> dict[str, float]:
        """Mean of each test metric over seeds."""
        return self.result.mean

    @property
    def std(self) -> dict[str, float] | None:
        """Sample standard deviation of each test metric over seeds; None below two."""
        return self.result.std

    @property
    def protocol(self) -> dict[str, str]:
        """What is to be said of its runs."""
        return self.runs[0].summary.get("protocol", {}) if self.runs else {}

    @property
    def model(self) -> str:
        """The model's registered name, without hooks."""
        return (self.runs[0].settings["model"] if self.runs else self.name).partition("+")[0].partition(":")[0]

    @property
    def text(self) -> str:
        """`frozen`, `fine-tuned` or `none`."""
        return self.protocol.get("text encoder", "none").rpartition(", ")[2]

    @property
    def parameters(self) -> int | None:
        """Number of the network's trainable parameters; a hook's heads are not among them."""
        return self.runs[0].summary.get("parameters") if self.runs else None

    @cached_property
    def seconds_per_epoch(self) -> float | None:
        """Mean time of a training epoch, the first of each seed left out; validation does not count."""
        times = [run.history["train_seconds"] for run in self.runs if run.best_epoch is not None]
        later = [seconds for of_run in times for seconds in (of_run[1:] if len(of_run) > 1 else of_run)]
        return float(np.mean(later)) if later else None

    @property
    def seeds(self) -> list[int]:
        """The seeds of its finished runs; an imported checkpoint has none."""
        return [run.settings["seed"] for run in self.runs if run.settings["seed"] is not None]

    @cached_property
    def generated_in_vain(self) -> list[Run]:
        """The runs whose best epoch had seen none of the labels that were generated, as none had moved before it."""
        return [run for run in self.runs if generated_in_vain(run)]

    @property
    def note(self) -> str:
        """What failed, in one line; empty where nothing did."""
        if self.reason is not None:
            return " ".join(f"failed: {self.reason}".split())
        if not self.failed:
            return ""
        reasons = "; ".join(dict.fromkeys(self.failed.values()))
        return " ".join(f"{len(self.failed)} of {len(self.failed) + len(self.runs)} seeds failed: {reasons}".split())


@dataclass(frozen=True)
class Comparison:
    """Rows on one test split; the first one is the reference of the differences."""

    dataset: str
    rows: Sequence[Row]
    only: Sequence[str] = ()
    """the metrics to show besides MAE; all by default"""
    controls: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """by the row of a model with a hook: that hook, and the row of the model that shows what the hook adds"""

    @property
    def ok(self) -> list[Row]:
        """The rows that have a finished run."""
        return [row for row in self.rows if row.runs]

    @property
    def reference(self) -> Row | None:
        """The first row, if it has a run."""
        return self.rows[0] if self.rows and self.rows[0].runs else None

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics that are shown, the primary one first."""
        found = sorted(self.ok[0].runs[0].metrics, key=lambda name: name != "Corr") if self.ok else []
        return list(dict.fromkeys([PRIMARY, *(self.only or found)])) if found else []

    @cached_property
    def videos(self) -> list[str]:
        """The test clips' videos; each clip is its own where the ids name the split in a video's place."""
        ids = list(self.ok[0].runs[0].predictions["id"])
        videos = video_of(ids)
        return ids if set(videos) <= {"train", "valid", "test"} else videos

    @cached_property
    def differences(self) -> dict[str, Difference]:
        """How every other row differs from the reference on the test split."""
        if self.reference is None:
            return {}
        return self._compared({row.name: self.reference.name for row in self.ok[1:]})

    @cached_property
    def effects(self) -> dict[str, Difference]:
        """How every row that has a control here differs from it on the test split: what its hook adds."""
        ok = {row.name for row in self.ok}
        return self._compared({name: control for name, (_, control) in self.controls.items() if {name, control} <= ok})

    def _compared(self, references: Mapping[str, str]) -> dict[str, Difference]:
        if not references:
            return {}
        wanted = {*references, *references.values()}
        tables = {row.name: [run.predictions for run in row.runs] for row in self.ok if row.name in wanted}
        predictions = {name: np.stack([t["prediction"] for t in of_row]) for name, of_row in tables.items()}
        first = self.ok[0].runs[0]
        family = first.settings["data"]["metrics"]
        return compare_predictions(first.predictions["label"], predictions, self.videos, family, reference=references)

    def frame(self) -> pd.DataFrame:
        """Return one row a model with every figure as a number, ready for further work.

        `difference` is from the reference, `effect` from the model's control.
        """
        records = []
        for row in self.rows:
            record: dict[str, Any] = {
                "model": row.name,
                "text": row.text if row.runs else None,
                "text encoder": row.protocol.get("text encoder"),
                "tuned for": row.protocol.get("tuned for"),
                "data": row.protocol.get("data"),
                "seeds": len(row.runs),
                "which seeds": ",".join(map(str, row.seeds)),
            }
            of_row = {"difference": self.differences.get(row.name), "effect": self.effects.get(row.name)}
            compared = {what: difference for what, difference in of_row.items() if difference}
            for name in self.metrics:
                record[name] = row.mean.get(name)
                record[f"{name} sd"] = row.std[name] if row.std else None
                for what, difference in compared.items():
                    record[f"{name} {what}"] = difference.mean[name]
                    record[f"{name} {what} low"] = difference.low[name]
                    record[f"{name} {what} high"] = difference.high[name]
            record |= {f"MAE {what} p": difference.p_mae for what, difference in compared.items()}
            record |= {"parameters": row.parameters, "seconds an epoch": row.seconds_per_epoch, "note": row.note}
            records.append(record)
        return pd.DataFrame(records)

    def to_json(self) -> list[dict[str, Any]]:
        """Return what `compare --format json` prints: what `run --json` does for each row, and its differences."""
        rows = []
        for row in self.rows:
            difference, effect = self.differences.get(row.name), self.effects.get(row.name)
            rows.append(
                {
                    **row.result.as_dict(),
                    "dataset": self.dataset,
                    "folder": str(row.result.folder) if row.runs else None,
                    "reason": row.reason,
                    "text": row.text,
                    "parameters": row.parameters,
                    "seconds_per_epoch": row.seconds_per_epoch,
                    "protocol": row.protocol,
                    "difference": difference and vars(difference),
                    "effect": effect and {"control": self.controls[row.name][1], **vars(effect)},
                }
            )
        return rows


def controls_of(rows: Sequence[Row], plugins: Plugins) -> dict[str, tuple[str, str]]:
    """Return `Comparison.controls` of rows, by what their runs say and not by how the rows are called."""
    controls: dict[str, tuple[str, str]] = {}
    done = [(row.name, row.runs[0].settings) for row in rows if row.runs]
    for name, settings in done:
        for hook in settings["hooks"]:
            with suppress(InputError):  # it is not installed any more
                spec = plugins.load("hook", hook)
                for other, its in done:
                    if _is_control(its, settings, spec):
                        controls[name] = hook, other
    return controls


def _is_control(other: Mapping[str, Any], settings: Mapping[str, Any], hook: HookSpec) -> bool:
    """Whether a run is another's without what a hook does: all that both have in common is the same."""
    key, _, value = hook.control_setting.partition("=")
    parts = settings["model"].split("+")
    config, others = with_later_keys(settings["config"]), with_later_keys(other["config"])
    apart = set()
    if hook.name in parts:
        model = "+".join(hook.control if part == hook.name else part for part in parts)
    else:
        model, apart = settings["model"], {key, f"hook.{key}"}
        if config.get(key) == value or others.get(key) != value:
            return False
    encoders = [(run["text_encoder"] or {}).get("sha256") for run in (settings, other)]
    return (
        other["model"] == model
        and all(config[name] == others[name] for name in (config.keys() & others.keys()) - apart)
        and settings["data"]["sha256"] == other["data"]["sha256"]
        and encoders[0] == encoders[1]
    )


def check_metrics(names: Sequence[str], family: Literal["mosi", "sims"]) -> None:
    """See that metrics are of a family's; raises InputError for one that is not."""
    known = names_of(family)
    for name in names:
        if name not in known:
            raise InputError(unknown("metric", name, known))


def collect(
    folders: Sequence[str | Path],
    reference: str | None = None,
    *,
    dataset: str | None = None,
    metrics: Sequence[str] = (),
    plugins: Sequence[str] = (),
) -> Comparison:
    """Return the runs in folders side by side, one row for each configuration.

    Args:
        folders: of seeds, of configurations, or any above them.
        reference: the row that the others are compared with, by its name or by that of a model that one row has; the
            first one by default.
        dataset: the one whose runs are meant, where there are several.
        metrics: as for `compare`.
        plugins: files or modules of hooks that are not packaged.

    Returns:
        Every configuration; a run that failed or is broken stands in its row's note.

    Raises:
        InputError: a folder has no finished run, or the runs are of several datasets or test splits.
    """
    configs: dict[tuple[str, ...], _Config] = {}
    for folder in map(Path, map(os.path.expanduser, folders)):
        found = {place: fault_of(place) or _fault_of_tables(Run(place)) for place in _run_folders(folder)}
        if None not in found.values():
            why = "".join(f"; {place}: {fault}" for place, fault in list(found.items())[:3])
            raise InputError(f"{folder} holds no finished run{why}")
        faults = {place: fault and f"{place}: {fault}" for place, fault in found.items()}
        for log in folder.rglob(f"*{FAILED_LOG}"):
            if log.is_file():
                with suppress(OSError), open(log, encoding="utf-8", errors="replace") as file:
                    faults[log] = file.readline(_LONGEST_REASON).rstrip("\n")
        for place, fault in sorted(faults.items(), key=lambda item: _natural(item[0])):
            beside = [other for other in found if found[other] is None and other.parent == place.parent]
            config = configs.setdefault(_key(place, [place] if fault is None else beside), _Config())
            if fault is None:
                run = Run(place)
                config.runs.setdefault(run.settings["seed"], run)
            else:
                seed = place.name.removesuffix(FAILED_LOG)
                config.failed[int(seed) if seed.isdecimal() else None] = fault
    datasets = {key[1] for key in configs}
    if dataset is not None and dataset not in datasets:
        raise InputError(unknown("dataset", dataset, datasets))
    if dataset is None and len(datasets) > 1:
        raise InputError(f"these are runs on {', '.join(sorted(datasets))}: choose one with --dataset")
    configs = {key: config for key, config in configs.items() if dataset in (None, key[1])}
    names = _names(configs)
    rows = []
    for key, config in configs.items():
        tested = [run for run in config.runs.values() if run.metrics]
        failed = {seed: reason for seed, reason in config.failed.items() if seed not in config.runs}
        if tested or failed:
            rows.append(Row(names[key], tested, failed))
    rows.sort(key=lambda row: not row.runs)
    if not rows or not rows[0].runs:
        raise InputError("the runs were not tested: they are checkpoints that were imported without --data")
    _check_one_split([row for row in rows if row.runs])
    if reference is not None:
        meant = [row for row in rows if row.name == reference] or [row for row in rows if _model_of(row) == reference]
        if len(meant) > 1:
            raise InputError(f"several rows have the model {reference!r}: {', '.join(row.name for row in meant)}")
        if not meant:
            raise InputError(unknown("row", reference, [row.name for row in rows]))
        if not meant[0].runs:
            raise InputError(f"the row {meant[0].name!r} has no finished run: {meant[0].note}")
        rows.sort(key=lambda row: row is not meant[0])
    settings = rows[0].runs[0].settings
    check_metrics(metrics, settings["data"]["metrics"])
    return Comparison(settings["dataset"], rows, metrics, controls_of(rows, Plugins(plugins)))


@dataclass
class _Config:
    """What lies in the folders of one configuration, by seed."""

    runs: dict[int | None, Run] = field(default_factory=dict)
    failed: dict[int | None, str] = field(default_factory=dict)

    @property
    def what(self) -> str | None:
        """What sets it apart from others of its model: the settings that are not the preset's; None where unknown."""
        if not self.runs:
            return None
        changed = next(iter(self.runs.values())).summary.get("protocol", {}).get("changed settings", "none")
        return "" if changed == "none" else ":" + changed.replace(", ", ":")


_MARKS = ("metrics.json", "config.json", "environment.json", "predictions.csv", "history.csv", "model.safetensors")


def _run_folders(folder: Path) -> list[Path]:
    """Return what looks like the folder of a run, whole or not: it has at least two of a run's files."""
    marks = [path for name in _MARKS for path in folder.rglob(name)]
    shown = [path for path in marks if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    return [place for place, count in Counter(path.parent for path in shown).items() if count > 1]


def _fault_of_tables(run: Run) -> str | None:
    """Return what a comparison cannot use of a finished run's tables."""
    try:
        tables = [run.predictions] if run.metrics else []
        tables += [run.history] if run.best_epoch is not None else []
    except InputError as error:
        return str(error)
    return "a table has no row" if any(table.empty for table in tables) else None


def _key(place: Path, whole: Sequence[Path]) -> tuple[str, ...]:
    """Return model, dataset and configuration of a run, by content: its seeds may lie in several places.

    What cannot be read, and the log of a failed seed, is of the configuration of the runs beside it, which are whole,
    or else of the one that the path names.
    """
    if whole:
        settings = dict(Run(whole[0]).settings)
        seed = settings.pop("seed")
        settings.pop("preset", None)
        settings["text_encoder"] = (settings["text_encoder"] or {}).get("sha256")
        key = (settings["model"], settings["dataset"], identity(settings))
        return (*key, place.name) if seed is None and whole[0] == place else key  # an import is no seed of the others
    *_, model, dataset, config, _ = ("", "", "", *place.resolve().parts)
    return model, dataset, config


def _model_of(row: Row) -> str:
    return row.name.partition(":")[0]


def _natural(path: Path) -> list[Any]:
    """Return what sorts a path by its folders' names, and numbers in them by size."""
    return [[int(piece) if piece.isdecimal() else piece for piece in re.split(r"(\d+)", part)] for part in path.parts]


def _names(configs: Mapping[tuple[str, ...], _Config]) -> dict[tuple[str, ...], str]:
    """Return what each configuration is called: its model and, where several have one, what was set, or its hash."""
    models = Counter(key[0] for key in configs)
    names = {}
    for key, config in configs.items():
        what = "" if models[key[0]] == 1 else config.what
        names[key] = key[0] + (f":{key[-1]}" if what is None else what)
    counts = Counter(names.values())
    return {key: name if counts[name] == 1 else f"{key[0]}:{key[-1]}" for key, name in names.items()}


def _check_one_split(rows: Sequence[Row]) -> None:
    first, columns = rows[0].runs[0], ["id", "label"]
    clips = first.predictions[columns]
    for run in (run for row in rows for run in row.runs):
        same = run.settings["data"]["metrics"] == first.settings["data"]["metrics"]
        if run.metrics.keys() != first.metrics.keys():
            ranges = [each.settings["data"]["label_range"] for each in (run, first)]
            why = f", labels within ±{ranges[0]:g} and ±{ranges[1]:g}" * (ranges[0] != ranges[1])
            raise InputError(f"{run.folder} and {first.folder} have different metrics{why}: name folders of one kind")
        if not np.isfinite(run.predictions[[*columns[1:], "prediction"]]).all(axis=None):
            raise InputError(f"{run.folder} has predictions or labels that are not finite")
        if not same or not run.predictions[columns].equals(clips):
            raise InputError(
                f"{run.folder} and {first.folder} were tested on different clips or labels: "
                "name runs of one dataset and file"
            )
