"""`tune`: a search for hyper-parameters with Optuna, scored on the validation split alone.

tuning = registry.tune("tfn", "mosi", data="unaligned_50.pkl", trials=50)
tuning.best.valid_mae, tuning.best.settings, tuning.config_file

A study is kept in a database: the same search continues where it was left, and several processes may share one.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .benchmark import checked_seeds, find_device
from .contract import Range
from .errors import BenchmarkError, InputError, unknown
from .jobs import Job, make_plan
from .plugins import NAME
from .runs import finite, identity, require_file, require_writable, write_file
from .search_space import Dimension, make_space, settings_of
from .studies import blaming_storage, counts, importance_of, open_study, quiet, release_interrupted
from .training import Watcher
from .trials import MOST_POINTS, Desk, Search

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

SAMPLERS = ("tpe", "random", "grid")
SELECTION = "the lowest validation MAE of the best epoch; the test split is not read"


@dataclass(frozen=True)
class Trial:
    """One configuration that was tried; of one that is not `"ok"`, `reason` says why."""

    number: int
    """from 1; Optuna counts from 0"""
    status: str
    """ok, pruned or failed"""
    reason: str | None
    valid_mae: float | None
    """of the best epoch, mean over seeds; of one that was pruned, as far as it had come"""
    settings: dict[str, Any]
    """the keys that are searched"""
    best_epochs: list[int]
    """of each seed"""
    seconds: float


@dataclass(frozen=True)
class Tuning:
    """A search as it stands, with the files that were written of it."""

    model: str
    dataset: str
    study: str
    storage: str
    space: Mapping[str, Dimension]
    trials: list[Trial]
    folder: Path
    preset: str | None = None
    changed: Mapping[str, Any] = field(default_factory=dict)
    """what the best trial's configuration has that the preset and the defaults have not"""
    importance: Mapping[str, float] = field(default_factory=dict)
    """share of the scores' variance by key (fANOVA), largest first; empty where there are too few trials to tell"""
    figure: Path | None = None

    @cached_property
    def ranking(self) -> list[Trial]:
        """The trials that are ok, best first."""
        done = [trial for trial in self.trials if trial.status == "ok" and trial.valid_mae is not None]
        return sorted(done, key=lambda trial: (trial.valid_mae, trial.number))

    @property
    def best(self) -> Trial:
        """The trial with the lowest validation MAE."""
        return self.ranking[0]

    @property
    def config_file(self) -> Path:
        """What `benchmark run --config` takes to train the best configuration."""
        return self.folder / "best.json"

    @property
    def counts(self) -> dict[str, int]:
        """How many trials are ok, pruned and failed."""
        return dict(Counter(trial.status for trial in self.trials))

    def as_dict(self) -> dict[str, Any]:
        """Return the fields that `tune --json` prints."""
        return {
            "model": self.model,
            "dataset": self.dataset,
            "selection": SELECTION,
            "study": self.study,
            "storage": self.storage,
            "best": asdict(self.best),
            "importance": dict(self.importance),
            "trials": [asdict(trial) for trial in self.trials],
            "config": str(self.config_file),
            "figure": str(self.figure),
        }

    def to_json(self) -> str:
        """Return them as JSON."""
        return json.dumps(finite(self.as_dict()), indent=2, allow_nan=False)


def tune(
    model: str,
    dataset: str = "demo",
    *,
    trials: int = 50,
    search: Mapping[str, Any] | None = None,
    search_file: str | Path | None = None,
    data: str | Path | None = None,
    data_root: str | Path | None = None,
    features: Mapping[str, str | Path] | None = None,
    text_encoder: str | None = None,
    seeds: Sequence[int] = (1111,),
    preset: str | None = None,
    config: Mapping[str, Any] | None = None,
    config_file: str | Path | None = None,
    hooks: Sequence[str] = (),
    label_range: float | None = None,
    device: str = "auto",
    precision: str | None = None,
    graph: bool = True,
    runs: str | Path = "runs",
    plugins: Sequence[str] = (),
    sampler: str = "tpe",
    sampler_seed: int = 0,
    prune: bool = True,
    study: str | None = None,
    storage: str | None = None,
    figure: str | Path | None = None,
    watcher: Watcher | None = None,
    after: Callable[[Trial, Tuning], None] | None = None,
) -> Tuning:
    """Search for the configuration with the lowest validation MAE; a study that exists is continued.

    The first trial has the preset's values, as far as they are in the space. A trial that fails is recorded, and the
    search goes on; one that is interrupted is tried again.

    Args:
        model, dataset, data, data_root, features, text_encoder, preset, config_file, hooks, label_range: as for
            `registry.run`.
        trials: how many there are to be in the end, those of earlier calls included.
        search: what is searched, by config key: a `registry.Range`, its fields in a dict, or a list of values; added to
            the model's own `ModelSpec.search`, key by key.
        search_file: JSON or TOML of the same, in place of the model's own; `"none"` for nothing but `search`.
        seeds: a trial is trained with each, and scored by the mean.
        config: keys that are set, and so not searched.
        device, precision, graph, plugins: as for `registry.run`.
        runs: the study and its files are kept in `RUNS/tune/STUDY`.
        sampler: `"tpe"`, `"random"`, or `"grid"`, which takes lists of values only.
        sampler_seed: with the same one the same search tries the same, interrupted or not.
        prune: give up a trial whose validation MAE is above the median of the others at the same epoch.
        study: its name; by default one that is made of model, dataset and all that the scores depend on.
        storage: the URL of Optuna's storage; by default an SQLite file.
        figure: .png, .pdf or .svg; `study.png` beside the study by default.
        watcher: is told of progress within a trial.
        after: is told of each trial as it ends, and of the search as it then stands.

    Raises:
        InputError: something given is wrong, or the study was made for something else; nothing has been trained.
        BenchmarkError: no trial has a result.
    """
    seeds = checked_seeds(seeds)
    watcher = watcher or Watcher()
    if trials < 1:
        raise InputError(f"--trials must be at least 1, got {trials}")
    if sampler_seed < 0:
        raise InputError(f"--seed must be at least 0, got {sampler_seed}")
    if sampler not in SAMPLERS:
        raise InputError(unknown("sampler", sampler, SAMPLERS))
    if study is not None and not re.fullmatch(NAME, study):
        raise InputError(f"--study is made of letters, digits, '.', '_' and '-', got {study!r}")
    try:
        import optuna as _  # noqa: F401
    except ImportError as error:
        raise InputError(f'tuning needs the package optuna ({error}): pip install "selfmm-plugin[tune]"') from error
    plan = make_plan(
        model,
        dataset,
        preset=preset,
        config=config,
        config_file=config_file,
        hooks=hooks,
        label_range=label_range,
        plugins=plugins,
        data=data,
        data_root=data_root,
    )
    space = make_space(plan, search, file=search_file, fixed=config)
    if sampler == "grid":
        _check_grid(space)
    root = Path(os.path.expanduser(runs))
    given = {"data": data, "data_root": data_root, "features": features}
    desk = Desk(plan, given, text_encoder, find_device(device), precision, root / ".cache", graph, watcher)
    facts = _facts(desk.job(plan), seeds, space)
    name = study or f"{plan.name.replace('+', '-')}-{plan.dataset.name}-{identity(facts)[:8]}"
    folder = root / "tune" / name
    picture = folder / "study.png" if figure is None else Path(os.path.expanduser(figure))
    _check_figure(picture)
    require_writable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    storage = storage or f"sqlite:///{(folder / 'study.db').absolute()}"
    with quiet(), blaming_storage(storage):
        made = open_study(name, storage, facts)
        release_interrupted(made)
        search_of = Search(made, desk, space, seeds, sampler, sampler_seed, prune, trials)
        if sampler != "grid" and not made.get_trials(deepcopy=False):
            search_of.begin_with_preset()
        tuning = Tuning(plan.name, plan.dataset.name, name, storage, space, _trials(made, space), folder)
        for number in search_of.run():
            tuning = replace(tuning, trials=_trials(made, space))
            if after:
                after(next(trial for trial in tuning.trials if trial.number == number), tuning)
        if not tuning.ranking:
            reasons = [trial.reason for trial in tuning.trials if trial.status == "failed"]
            why = f"{len(reasons)} failed, as by: {reasons[0]}" if reasons else "all were pruned"
            raise BenchmarkError(f"no trial of the study {name} has a result: {why}")
        best_config = plan.having(tuning.best.settings).config
        tuning = replace(
            tuning,
            preset=best_config.preset,
            changed=best_config.changed,
            importance=importance_of(made),
            figure=picture,
        )
    _write_files(tuning, seeds)
    return tuning


def _check_grid(space: Mapping[str, Dimension]) -> None:
    if ranges := [key for key, dimension in space.items() if isinstance(dimension.values, Range)]:
        raise InputError(f"--sampler grid takes lists of values, and {ranges[0]} has a range")
    points = math.prod(len(dimension.extremes()) for dimension in space.values())
    if points > MOST_POINTS:
        raise InputError(f"--sampler grid: the space has {points:,} points, and {MOST_POINTS:,} are the most it takes")


def _trials(study: optuna.Study, space: Mapping[str, Dimension]) -> list[Trial]:
    """Return the trials that have ended, by number."""
    return [_trial(frozen, space) for frozen in study.get_trials(deepcopy=False) if counts(frozen)]


def _trial(frozen: FrozenTrial, space: Mapping[str, Dimension]) -> Trial:
    status = {"COMPLETE": "ok", "PRUNED": "pruned"}.get(frozen.state.name, "failed")
    reached = min(frozen.intermediate_values.values(), default=None)
    return Trial(
        number=frozen.number + 1,
        status=status,
        reason=frozen.user_attrs.get("reason"),
        valid_mae={"ok": frozen.value, "pruned": reached}.get(status),
        settings=settings_of(frozen.params, space),
        best_epochs=frozen.user_attrs.get("best_epochs", []),
        seconds=round(frozen.duration.total_seconds(), 2) if frozen.duration else 0.0,
    )


def _facts(job: Job, seeds: Sequence[int], space: Mapping[str, Dimension]) -> dict[str, Any]:
    """Return what the scores of a study depend on, by what users call it."""
    settings = job.settings()
    versions = {key: settings[key] for key in ("model", "version", "hooks")}
    return {
        "model": versions,
        "settings": settings["config"],
        "data": {"dataset": settings["dataset"], **settings["data"]},
        "text encoder": (settings["text_encoder"] or {}).get("sha256"),
        "precision": settings["precision"],
        "seeds": list(seeds),
        "search space": {key: repr(dimension.values) for key, dimension in space.items()},
    }


# --- files


def _check_figure(path: Path) -> None:
    from .tuning_figure import FORMATS

    require_file(path, "--figure")
    if path.suffix[1:].lower() not in FORMATS:
        raise InputError(f"--figure {path} must end in {', '.join(f'.{name}' for name in FORMATS)}")


def _write_files(tuning: Tuning, seeds: Sequence[int]) -> None:
    """Write the best configuration, every trial, and the figure."""
    import pandas as pd

    from .tuning_figure import write_figure

    best = {
        "model": tuning.model,
        "dataset": tuning.dataset,
        "preset": tuning.preset,
        "config": dict(tuning.changed),
        "tuned": {
            "selection": SELECTION,
            "valid_mae": tuning.best.valid_mae,
            "trial": tuning.best.number,
            "trials": tuning.counts,
            "seeds": list(seeds),
            "study": tuning.study,
            "search": {key: str(dimension) for key, dimension in tuning.space.items()},
        },
    }
    text = json.dumps(finite(best), indent=2) + "\n"
    write_file(tuning.config_file, lambda path: path.write_text(text, "utf-8"))
    rows = []
    for trial in tuning.trials:
        row = {key: value for key, value in vars(trial).items() if key not in ("settings", "best_epochs")}
        shown = {key: tuning.space[key].stored(value) for key, value in trial.settings.items()}
        rows.append({**row, "best_epochs": " ".join(map(str, trial.best_epochs)), **shown})
    write_file(tuning.folder / "trials.csv", lambda path: pd.DataFrame(rows).to_csv(path, index=False))
    assert tuning.figure is not None
    write_figure(tuning, tuning.figure)
