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
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from threading import Thread
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch

from .benchmark import FAILED_LOG, Result, SeedRun, checked_seeds, find_device
from .benchmark import run as run_model
from .config import accepts, keys_of, parse_settings
from .contract import HookSpec, ModelSpec, Training
from .errors import BenchmarkError, InputError, one_line, unknown
from .jobs import make_plan
from .labels import generated_in_vain
from .metrics import names_of
from .plugins import Plugins
from .runs import Run, fault_of, load_run
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
    controls: Mapping[str, str] = field(default_factory=dict)
    """by hook, the one that stands in its place in the model that shows what it adds"""

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

    @property
    def videos(self) -> list[str]:
        """The test clips' videos; each clip is its own where the ids name only one, which could not be resampled."""
        ids = list(self.ok[0].runs[0].predictions["id"])
        videos = video_of(ids)
        return videos if len(set(videos)) > 1 else ids

    @cached_property
    def differences(self) -> dict[str, Difference]:
        """How every other row differs from the reference on the test split."""
        if self.reference is None:
            return {}
        return self._compared({row.name: self.reference.name for row in self.ok[1:]})

    @cached_property
    def pairs(self) -> dict[str, str]:
        """The rows with a hook that has a control, each with the row that has the control in its place."""
        names = [row.name for row in self.ok]
        pairs = {name: self._control_of(name) for name in names}
        return {name: control for name, control in pairs.items() if control in names and control != name}

    @cached_property
    def effects(self) -> dict[str, Difference]:
        """How every row of `pairs` differs from its control on the test split: what the hook adds."""
        return self._compared(self.pairs)

    def _control_of(self, name: str) -> str:
        model, colon, settings = name.partition(":")
        return "+".join(self.controls.get(part, part) for part in model.split("+")) + colon + settings

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

        `difference` is from the reference, `effect` from the model's control (see `pairs`).
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
            for name in self.metrics:
                record[name] = row.mean.get(name)
                record[f"{name} sd"] = row.std[name] if row.std else None
                for what, found in (("difference", self.differences), ("effect", self.effects)):
                    if difference := found.get(row.name):
                        record[f"{name} {what}"] = difference.mean[name]
                        record[f"{name} {what} low"] = difference.low[name]
                        record[f"{name} {what} high"] = difference.high[name]
            for what, found in (("difference", self.differences), ("effect", self.effects)):
                if difference := found.get(row.name):
                    record[f"MAE {what} p"] = difference.p_mae
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
                    "effect": effect and {"control": self.pairs[row.name], **vars(effect)},
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
    metrics: Sequence[str] = (),
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
        metrics: the ones to show besides MAE; all by default.
        watcher: is told of progress.
        jobs: models trained at once, in processes of their own that share the machine's cores. A script that asks for
            several needs `if __name__ == "__main__":`.
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
            check_metrics(metrics, made_plan.metrics)
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
    reasons: dict[str, str] = {}
    all_refused = True
    work = {name: {"model": plan.model, **options, **plan.options} for name, plan in plans.items()}
    jobs = min(jobs, max(1, len(work)))
    for name, row, refused in (_in_turn if jobs == 1 else partial(_at_once, jobs))(work, watcher, before):
        if refused and name in optional:
            watcher.note(f"{name} is left out: {row.reason}")
            continue
        if row.reason is not None:
            first = reasons.setdefault(row.reason, name)
            watcher.note(f"{name} failed: {row.reason}" if first == name else f"{name} failed as {first} did")
        all_refused &= refused
        made[name] = row
    done = [made[name] for name in plans if name in made]
    if all(row.reason is not None for row in done):
        kind = InputError if all_refused else BenchmarkError
        raise kind(f"no model could be trained: {done[0].reason}" if done else "there is no model to compare")
    controls = {hook.name: hook.control for plan in plans.values() for hook in plan.hooks if hook.control}
    return Comparison(dataset, done, metrics, controls)


def check_metrics(names: Sequence[str], family: Literal["mosi", "sims"]) -> None:
    """See that metrics are of a family's; raises InputError for one that is not."""
    known = names_of(family)
    for name in names:
        if name not in known:
            raise InputError(unknown("metric", name, known))


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
    context = multiprocessing.get_context("spawn")  # a fork would share torch's threads and the GPU's state
    progress = context.Queue()
    watchers = {name: watcher.beside(name) for name in work}
    listener = Thread(target=_listen, args=(progress, watchers), daemon=True)
    listener.start()
    pool = ProcessPoolExecutor(jobs, context, _begin, (jobs, progress))
    try:
        names = {pool.submit(_train_elsewhere, name, options): name for name, options in work.items()}
        for number, future in enumerate(as_completed(names), 1):
            name = names[future]
            watchers[name].end()
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
        progress.put(None)
        listener.join(timeout=5)


def _listen(progress: Any, watchers: Mapping[str, Watcher]) -> None:
    """Pass on what the processes tell, until None comes."""
    while told := progress.get():
        name, call, *what = told
        getattr(watchers[name], call)(*what)


_progress: Any = None
"""In a process of `_at_once`: where its progress is told."""


def _begin(jobs: int, progress: Any) -> None:
    """Make a new process ready to train."""
    global _progress
    _progress = progress
    progress.cancel_join_thread()  # what is not yet told must not keep it from ending
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(max(1, torch.get_num_threads() // jobs))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _train_elsewhere(name: str, options: dict[str, Any]) -> tuple[Row, bool, list[tuple[Any, ...]]]:
    """Train in this process, and return what was said as well."""
    told = _Teller(name)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # an exception, so that nothing half-written stays
    try:
        with redirect_stdout(sys.stderr):  # what a plugin prints is not a result
            return *_train(name, options, told), told.said
    except KeyboardInterrupt:
        os._exit(128 + signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _train(name: str, options: dict[str, Any], watcher: Watcher) -> tuple[Row, bool]:
    try:
        result = run_model(**options, watcher=watcher)
    except (Exception, SystemExit) as error:  # of the data, the encoder, the disk: other models may do better
        reason = str(error) if isinstance(error, BenchmarkError) else one_line(error)
        return Row(name, reason=reason), isinstance(error, InputError)
    failed = {run.seed: run.reason or "" for run in result.runs if run.status == "failed"}
    return Row(name, [load_run(run.folder) for run in result.ok if run.folder], failed), False


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
        found = {place: fault_of(place) for place in _run_folders(folder)}
        if None not in found.values():
            why = "".join(f"; {place}: {fault}" for place, fault in list(found.items())[:3])
            raise InputError(f"{folder} holds no finished run{why}")
        faults = {place: fault and f"{place}: {fault}" for place, fault in found.items()}
        for log in folder.rglob(f"*{FAILED_LOG}"):
            faults[log] = log.read_text("utf-8", "replace").partition("\n")[0]
        for place, fault in sorted(faults.items(), key=lambda item: _natural(item[0])):
            config = configs.setdefault(_key(place), _Config())
            if fault is None:
                run = load_run(place)
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
        if len(meant) != 1:
            raise InputError(unknown("row", reference, [row.name for row in rows]))
        rows.sort(key=lambda row: row is not meant[0])
    settings = rows[0].runs[0].settings
    check_metrics(metrics, settings["data"]["metrics"])
    return Comparison(settings["dataset"], rows, metrics, _controls(rows, Plugins(plugins)))


@dataclass
class _Config:
    """What lies in the folders of one configuration, by seed."""

    runs: dict[int | None, Run] = field(default_factory=dict)
    failed: dict[int | None, str] = field(default_factory=dict)

    @property
    def changed(self) -> str:
        """The settings that are not the preset's, as they are given after a model's name."""
        changed = [run.summary.get("protocol", {}).get("changed settings", "none") for run in self.runs.values()]
        return "" if not changed or changed[0] == "none" else changed[0].replace(", ", ":")


def _run_folders(folder: Path) -> list[Path]:
    """Return what looks like the folder of a run, whole or not."""
    marks = [path for name in ("metrics.json", "environment.json", "predictions.csv") for path in folder.rglob(name)]
    shown = [path for path in marks if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    return list(dict.fromkeys(path.parent for path in shown))


def _key(place: Path) -> tuple[str, ...]:
    """Return model, dataset and configuration of a run or of what is left of one.

    By content where it can be read, and not by place: a configuration's seeds may come from several machines.
    """
    *_, model, dataset, config, name = ("", "", "", *place.resolve().parts)
    try:
        settings = Run(place).settings
        key = (settings["model"], settings["dataset"], config)
        return (*key, name) if settings["seed"] is None else key  # an imported checkpoint is no seed of the others
    except (InputError, KeyError, TypeError):
        return model, dataset, config


def _controls(rows: Sequence[Row], plugins: Plugins) -> dict[str, str]:
    """Return the controls of the hooks that rows were trained with, as far as those are still installed."""
    controls = {}
    for hook in dict.fromkeys(hook for row in rows for run in row.runs for hook in run.settings["hooks"]):
        with suppress(InputError):
            controls[hook] = plugins.load("hook", hook).control
    return {hook: control for hook, control in controls.items() if control}


def _model_of(row: Row) -> str:
    return row.name.partition(":")[0]


def _natural(path: Path) -> list[Any]:
    """Return what sorts a path by its folders' names, and numbers in them by size."""
    return [[int(piece) if piece.isdecimal() else piece for piece in re.split(r"(\d+)", part)] for part in path.parts]


def _names(configs: Mapping[tuple[str, ...], _Config]) -> dict[tuple[str, ...], str]:
    """Return what each configuration is called: its model and, where several have one, what was set or its hash."""
    models = Counter(key[0] for key in configs)
    names = {
        key: key[0] if models[key[0]] == 1 else f"{key[0]}:{config.changed or key[-1]}"
        for key, config in configs.items()
    }
    counts = Counter(names.values())
    return {key: name if counts[name] == 1 else f"{key[0]}:{key[-1]}" for key, name in names.items()}


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
    if with_settings := [name for name in names if re.fullmatch(f"{ALL}[:+].*", name)]:
        raise InputError(
            f"{with_settings[0]}: {ALL} takes no settings and no hooks; --set and --with are for every model"
        )
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


class _Teller(Watcher):
    """Sends progress to the parent process, and keeps notes and failures for the end."""

    def __init__(self, name: str) -> None:
        self.said: list[tuple[Any, ...]] = []
        self._name = name
        self._last = 0.0

    def note(self, text: str) -> None:
        self.said.append(("note", text))

    def failed(self, seed: int, reason: str) -> None:
        self.said.append(("failed", seed, reason))

    def start(self, seed: int, number: str, config: Any) -> None:
        # The whole config may be of a class that only this process has.
        self._send("start", seed, number, Training(epochs=config.epochs, early_stop=config.early_stop))

    def step(self, epoch: int, step: int, steps: int) -> None:
        if time.monotonic() - self._last > 0.5:
            self._last = time.monotonic()
            self._send("step", epoch, step, steps)

    def epoch(self, record: Epoch) -> None:
        self._send("epoch", record)

    def _send(self, *what: Any) -> None:
        _progress.put((self._name, *what))


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

    def beside(self, name: str) -> Watcher:
        return self._watcher.beside(name)
