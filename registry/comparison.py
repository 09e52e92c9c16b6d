"""`compare`: many models on one dataset under one protocol, side by side.

comparison = registry.compare(["self_mm", "tfn", "tfn+ulgm"], "mosi", data="unaligned_50.pkl", seeds=[1111, 1112, 1113])
comparison.frame(), comparison.rows[0].mean["MAE"], comparison.differences["tfn"].p_mae
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from .benchmark import Result, SeedRun, checked_seeds, find_device
from .benchmark import run as run_model
from .config import accepts, keys_of, parse_settings
from .contract import HookSpec, ModelSpec
from .errors import BenchmarkError, InputError, one_line, unknown
from .jobs import make_plan
from .plugins import Plugins
from .runs import Run, finished, load_run
from .statistics import Difference, compare_predictions, video_of
from .training import Epoch, Watcher

ALL = "all"
PRIMARY = "MAE"
SEEDS = (1111, 1112, 1113, 1114, 1115)


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
        """Names of the metrics, the primary one first."""
        found = list(self.ok[0].runs[0].metrics) if self.ok else []
        return sorted(found, key=lambda name: (name != PRIMARY, name != "Corr"))

    @property
    def videos(self) -> list[str]:
        """The test clips' videos; each clip is its own where the ids name only one, which could not be resampled."""
        ids = list(self.ok[0].runs[0].predictions["id"])
        videos = video_of(ids)
        return videos if len(set(videos)) > 1 else ids

    @cached_property
    def differences(self) -> dict[str, Difference]:
        """How every other row differs from the reference on the test split."""
        if self.reference is None or len(self.ok) < 2:
            return {}
        tables = {row.name: [run.predictions for run in row.runs] for row in self.ok}
        family = self.reference.runs[0].settings["data"]["metrics"]
        predictions = {name: np.stack([t["prediction"] for t in of_row]) for name, of_row in tables.items()}
        truth = tables[self.reference.name][0]["label"].to_numpy()
        return compare_predictions(truth, predictions, self.videos, family, reference=self.reference.name)

    def frame(self) -> pd.DataFrame:
        """Return one row a model with every figure as a number, ready for further work."""
        records = []
        for row in self.rows:
            difference = self.differences.get(row.name)
            record: dict[str, Any] = {
                "model": row.name,
                "text": row.text if row.runs else None,
                "text encoder": row.protocol.get("text encoder"),
                "tuned for": row.protocol.get("tuned for"),
                "data": row.protocol.get("data"),
                "seeds": len(row.runs),
            }
            for name in self.metrics:
                record[name] = row.mean.get(name)
                record[f"{name} sd"] = row.std[name] if row.std else None
                if difference:
                    record[f"{name} difference"] = difference.mean[name]
                    record[f"{name} low"], record[f"{name} high"] = difference.low[name], difference.high[name]
            if difference:
                record["MAE p"] = difference.p_mae
            record |= {"parameters": row.parameters, "seconds an epoch": row.seconds_per_epoch, "note": row.note}
            records.append(record)
        return pd.DataFrame(records)

    def to_json(self) -> list[dict[str, Any]]:
        """Return what `compare --format json` prints: what `run --json` does for each row, and its differences."""
        rows = []
        for row in self.rows:
            difference = self.differences.get(row.name)
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
                }
            )
        return rows


def compare(
    models: Sequence[str],
    dataset: str = "demo",
    *,
    also_with: Sequence[str] = (),
    data: str | Path | None = None,
    text_encoder: str | None = None,
    seeds: Sequence[int] = SEEDS,
    preset: str | None = None,
    config: Mapping[str, Any] | None = None,
    label_range: float | None = None,
    device: str = "auto",
    runs: str | Path = "runs",
    plugins: Sequence[str] = (),
    watcher: Watcher | None = None,
    jobs: int = 1,
    before: Callable[[str, int, int], None] | None = None,
) -> Comparison:
    """Train and test every model that is not yet, and return them side by side.

    Args:
        models: names as for `registry.run`, each perhaps with settings of its own, as `"tfn:finetune_text=true"`;
            `"all"` stands for every registered model that is not named.
        dataset: as for `registry.run`.
        also_with: hooks to add to each model, one row each, where the model allows it.
        data, text_encoder, label_range, device, runs, plugins: as for `registry.run`.
        seeds: one run each, for every model.
        preset: for the models that have it.
        config: keys that override the preset, for the models that have them.
        watcher: is told of progress.
        jobs: models trained at once, in processes of their own that share the machine's cores; epochs are then not
            told of. A script that asks for several needs `if __name__ == "__main__":`.
        before: is told each model's name, its number and how many there are, before it is trained; with several jobs
            when it has ended.

    Returns:
        Every model, also those that failed.

    Raises:
        InputError: a name or a setting is wrong; nothing has been trained.
    """
    if jobs < 1:
        raise InputError(f"--jobs must be at least 1, got {jobs}")
    watcher = _Once(watcher or Watcher())
    found = Plugins(plugins)
    for hook in also_with:
        found.load("hook", hook)
    wanted = _expand(models, found, watcher)
    rows, optional = [], set()
    for name in wanted:
        rows.append(name)
        model, colon, settings = name.partition(":")
        added = [f"{model}+{hook}{colon}{settings}" for hook in also_with]
        extra = [other for other in added if other not in wanted]
        optional |= set(extra)
        rows += extra
    if twice := [name for name, count in Counter(rows).items() if count > 1]:
        raise InputError(f"--models names {twice[0]!r} twice")
    shared = dict(config or {})
    plans = {name: plan for name in rows if (plan := _plan(name, found, preset, shared, optional))}
    _check_used(shared, preset, plans, watcher)
    checked_seeds(seeds)
    find_device(device)
    for name, plan in list(plans.items()):  # all that can be told before anything is trained
        try:
            made_plan = make_plan(plan.model, dataset, label_range=label_range, plugins=plugins, **plan.options)
        except InputError as error:
            if name not in optional:
                raise InputError(f"{name}: {error}") from error
            watcher.note(f"{name} is left out: {error}")
            del plans[name]
        else:
            made_plan.place_of(data)
    options: dict[str, Any] = {
        "dataset": dataset,
        "data": data,
        "text_encoder": text_encoder,
        "seeds": seeds,
        "label_range": label_range,
        "device": device,
        "runs": runs,
        "plugins": plugins,
    }
    made: dict[str, Row] = {}
    all_refused = True
    work = {name: {"model": plan.model, **options, **plan.options} for name, plan in plans.items()}
    jobs = min(jobs, max(1, len(work)))
    for name, row, refused in (_in_turn if jobs == 1 else partial(_at_once, jobs))(work, watcher, before):
        if refused and name in optional:
            watcher.note(f"{name} is left out: {row.reason}")
            continue
        if row.reason is not None:
            watcher.note(f"{name} failed: {row.reason}")
        all_refused &= refused
        made[name] = row
    done = [made[name] for name in plans if name in made]
    if all(row.reason is not None for row in done):
        kind = InputError if all_refused else BenchmarkError
        raise kind(f"no model could be trained: {done[0].reason}" if done else "there is no model to compare")
    return Comparison(dataset, done)


_Work = Mapping[str, dict[str, Any]]
"""The arguments of `run` by the name of a row"""
_Before = Callable[[str, int, int], None] | None


def _in_turn(work: _Work, watcher: Watcher, before: _Before) -> Iterator[tuple[str, Row, bool]]:
    """Train one model after the other; yield name, row, and whether its input was refused."""
    for number, (name, options) in enumerate(work.items(), 1):
        if before:
            before(name, number, len(work))
        yield name, *_train(name, options, watcher)


def _at_once(jobs: int, work: _Work, watcher: Watcher, before: _Before) -> Iterator[tuple[str, Row, bool]]:
    """Train several models at a time, each in a process, and yield them as they end."""
    # A fork would share torch's threads and the GPU's state.
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _share_cores, (jobs,))
    try:
        names = {pool.submit(_train_elsewhere, name, options): name for name, options in work.items()}
        for number, future in enumerate(as_completed(names), 1):
            name = names[future]
            if before:
                before(f"{name} has ended", number, len(work))
            try:
                row, refused, said = future.result()
            except BrokenProcessPool:  # for want of memory, or since the caller cannot be imported again
                reason = "its process, or one beside it, was killed: run the same again with fewer jobs"
                yield name, Row(name, reason=reason), False
                continue
            for call, *words in said:
                getattr(watcher, call)(*words)
            yield name, row, refused
    except BaseException:  # what has begun, or waits in the pool's own queue, would be trained to its end
        for process in list(pool._processes.values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _share_cores(jobs: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    torch.set_num_threads(max(1, torch.get_num_threads() // jobs))


def _train_elsewhere(name: str, options: dict[str, Any]) -> tuple[Row, bool, list[tuple[Any, ...]]]:
    """Train in this process, and return what was said as well."""
    kept = _Kept()
    with redirect_stdout(sys.stderr):  # what a plugin prints is not a result
        return *_train(name, options, kept), kept.said


def _train(name: str, options: dict[str, Any], watcher: Watcher) -> tuple[Row, bool]:
    try:
        result = run_model(**options, watcher=watcher)
    except (Exception, SystemExit) as error:  # of the data, the encoder, the disk: other models may do better
        reason = str(error) if isinstance(error, BenchmarkError) else one_line(error)
        return Row(name, reason=reason), isinstance(error, InputError)
    failed = {run.seed: run.reason or "" for run in result.runs if run.status == "failed"}
    return Row(name, [load_run(run.folder) for run in result.ok if run.folder], failed), False


def collect(folders: Sequence[str | Path], reference: str | None = None) -> Comparison:
    """Return finished runs side by side, one row for each configuration.

    Args:
        folders: of seeds, of configurations, or any above them.
        reference: the name of the row that the others are compared with; the first one by default.

    Raises:
        InputError: there is no finished run, or the runs are of different test splits.
    """
    by_config: dict[tuple[str, ...], list[Run]] = {}
    key: tuple[str, ...]
    for folder in map(Path, map(os.path.expanduser, folders)):
        below = [path.parent for path in folder.rglob("metrics.json") if not _hidden(path.relative_to(folder))]
        there = [place for place in sorted(below, key=_natural) if finished(place)]
        if not there:
            raise InputError(f"{folder} holds no finished run")
        for run in map(load_run, there):
            settings = run.settings
            # By content, not place: a configuration's seeds may come from several machines.
            key = (settings["model"], settings["dataset"], run.folder.resolve().parent.name)
            if settings["seed"] is None:  # an imported checkpoint is no seed of those that were trained
                key = (*key, run.folder.name)
            of_config = by_config.setdefault(key, [])
            if settings["seed"] not in [other.settings["seed"] for other in of_config]:
                of_config.append(run)
    tested = {config: [run for run in found if run.metrics] for config, found in by_config.items()}
    names = _names({config: found[0] for config, found in tested.items() if found})
    rows = [Row(names[config], found) for config, found in tested.items() if found]
    if not rows:
        raise InputError("the runs were not tested: they are checkpoints that were imported without --data")
    _check_one_split(rows)
    if reference is not None:
        if reference not in names.values():
            raise InputError(unknown("row", reference, names.values()))
        rows.sort(key=lambda row: row.name != reference)
    return Comparison(rows[0].runs[0].settings["dataset"], rows)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _natural(path: Path) -> list[Any]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", str(path))]


def _names(runs: Mapping[tuple[str, ...], Run]) -> dict[tuple[str, ...], str]:
    """Return what each configuration is called: its model and, where several have one, what was set or its hash."""
    models = {config: config[0] for config in runs}
    shared = {model for model, count in Counter(models.values()).items() if count > 1}
    names = {}
    for config, run in runs.items():
        changed = run.summary.get("protocol", {}).get("changed settings", "none")
        what = config[-1] if changed == "none" else changed.replace(", ", ":")
        names[config] = f"{models[config]}:{what}" if models[config] in shared else models[config]
    twice = {name for name, count in Counter(names.values()).items() if count > 1}
    return {config: f"{models[config]}:{config[-1]}" if name in twice else name for config, name in names.items()}


def _check_one_split(rows: Sequence[Row]) -> None:
    first = rows[0].runs[0]
    columns = ["id", "label"]
    for run in (run for row in rows for run in row.runs):
        same = run.settings["data"]["metrics"] == first.settings["data"]["metrics"]
        if not same or not run.predictions[columns].equals(first.predictions[columns]):
            raise InputError(
                f"{run.folder} and {first.folder} were tested on different clips or labels: "
                "name runs of one dataset and file"
            )


def _expand(models: Sequence[str], plugins: Plugins, watcher: Watcher) -> list[str]:
    """Return the names asked for, `all` replaced by every model that can be imported, the others among it once."""
    known = {entry.name for entry in plugins.entries("model")} | {ALL}
    names: list[str] = []
    parts = ",".join([models] if isinstance(models, str) else models).split(",")
    for part in map(str.strip, parts):
        if names and ":" in names[-1] and re.split("[:+]", part)[0] not in known:
            names[-1] += f",{part}"  # of a list, as in NAME:modalities=text,audio
        else:
            names.append(part)
    if not all(names):
        raise InputError("--models takes names with commas between them, as self_mm,tfn,tfn+ulgm")
    if ALL not in names:
        return names
    rest = []
    for entry, spec in plugins.check("model"):
        if isinstance(spec, BenchmarkError):
            watcher.note(f"{entry.name} is left out: {spec}")
        elif entry.name not in {name.partition(":")[0] for name in names}:
            rest.append(entry.name)
    at = names.index(ALL)
    return [*names[:at], *rest, *names[at + 1 :]]


@dataclass(frozen=True)
class _Plan:
    """A row to be made: a model with its hooks, and its options for `run`."""

    model: str
    spec: ModelSpec
    hooks: Sequence[HookSpec]
    options: dict[str, Any]


def _plan(
    name: str, plugins: Plugins, preset: str | None, shared: Mapping[str, Any], optional: Collection[str]
) -> _Plan | None:
    """Return what a row's name asks for; None for a hook that its model does not take."""
    model, *settings = name.split(":")
    try:
        _, spec, hooks = plugins.load_model(model)
    except InputError:
        if name in optional:
            return None
        raise
    config = {key: value for key, value in shared.items() if accepts(spec, hooks, key)} | parse_settings(settings)
    return _Plan(model, spec, hooks, {"config": config, "preset": preset if preset in spec.presets else None})


def _check_used(shared: Mapping[str, Any], preset: str | None, plans: Mapping[str, _Plan], watcher: Watcher) -> None:
    """See that every setting is one of some model, and say which models do not have it."""
    for key in shared:
        lacking = [name for name, plan in plans.items() if not accepts(plan.spec, plan.hooks, key)]
        if len(lacking) == len(plans):
            known = {known for plan in plans.values() for known in keys_of(plan.spec, plan.hooks)}
            raise InputError(unknown("key", key, known).partition(" (available")[0] + ": none of the models has it")
        if lacking:
            watcher.note(f"--set {key} does not apply to {', '.join(lacking)}")
    if preset is not None:
        lacking = [name for name, plan in plans.items() if preset not in plan.spec.presets]
        if len(lacking) == len(plans):
            raise InputError(
                unknown("preset", preset, {known for plan in plans.values() for known in plan.spec.presets})
            )
        if lacking:
            watcher.note(f"there is no preset {preset} for {', '.join(lacking)}: their own default is used")


class _Kept(Watcher):
    """Keeps notes and failures."""

    def __init__(self) -> None:
        self.said: list[tuple[Any, ...]] = []

    def note(self, text: str) -> None:
        self.said.append(("note", text))

    def failed(self, seed: int, reason: str) -> None:
        self.said.append(("failed", seed, reason))


class _Once(Watcher):
    """Passes everything on, and each note once: many models are told the same of the data."""

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher
        self._said: set[str] = set()

    def note(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self._watcher.note(text)

    def failed(self, seed: int, reason: str) -> None:
        self._watcher.failed(seed, reason)

    def start(self, seed: int, number: str, config: Any) -> None:
        self._watcher.start(seed, number, config)

    def step(self, epoch: int, step: int, steps: int) -> None:
        self._watcher.step(epoch, step, steps)

    def epoch(self, record: Epoch) -> None:
        self._watcher.epoch(record)
