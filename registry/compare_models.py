"""`compare`: every model that is asked for, trained where it is not yet, side by side.

comparison = registry.compare(["self_mm", "tfn", "tfn+ulgm"], "mosi", data="unaligned_50.pkl", seeds=[1111, 1112, 1113])
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from .benchmark import checked_precision, checked_seeds, find_device
from .comparison import Comparison, Row, check_metrics, controls_of
from .config import accepts, keys_of, parse_settings
from .contract import HookSpec, ModelSpec
from .data.modality_files import checked_paths
from .errors import BenchmarkError, InputError, unknown
from .jobs import make_plan
from .parallel import at_once, in_turn
from .plugins import Plugins
from .tracking import require_tracker
from .training import Relay, Watcher

ALL = "all"
SEEDS = (1111, 1112, 1113, 1114, 1115)


def compare(
    models: Sequence[str],
    dataset: str = "demo",
    *,
    also_with: Sequence[str] = (),
    data: str | Path | None = None,
    data_root: str | Path | None = None,
    features: Mapping[str, str | Path] | None = None,
    text_encoder: str | None = None,
    seeds: Sequence[int] = SEEDS,
    preset: str | None = None,
    config: Mapping[str, Any] | None = None,
    label_range: float | None = None,
    device: str = "auto",
    precision: str | None = None,
    graph: bool = True,
    deterministic: bool = False,
    runs: str | Path = "runs",
    plugins: Sequence[str] = (),
    metrics: Sequence[str] = (),
    track: str | None = None,
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
        data, data_root, features, text_encoder, label_range, device, precision, graph, deterministic, runs, plugins,
            track: as for `registry.run`.
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
    if track is not None:
        require_tracker(track)
    checked_precision(precision, find_device(device))
    checked_paths(features)
    for name, plan in list(plans.items()):  # all that can be told before anything is trained
        try:
            made_plan = make_plan(
                plan.model,
                dataset,
                label_range=label_range,
                plugins=plugins,
                data=data,
                data_root=data_root,
                **plan.options,
            )
        except InputError as error:
            if name not in optional:
                raise InputError(f"{name}: {error}") from error
            watcher.note(f"{name} is left out: {error}")
            del plans[name]
        else:
            made_plan.place_of(data, data_root)
            check_metrics(metrics, made_plan.metrics)
    options: dict[str, Any] = {
        "dataset": dataset,
        "data": data,
        "data_root": data_root,
        "features": features,
        "text_encoder": text_encoder,
        "seeds": seeds,
        "label_range": label_range,
        "device": device,
        "precision": precision,
        "graph": graph,
        "deterministic": deterministic,
        "runs": runs,
        "plugins": plugins,
        "track": track,
    }
    made: dict[str, Row] = {}
    reasons: dict[str, str] = {}
    all_refused = True
    work = {name: {"model": plan.model, **options, **plan.options} for name, plan in plans.items()}
    jobs = min(jobs, max(1, len(work)))
    for name, row, refused in (in_turn if jobs == 1 else partial(at_once, jobs))(work, watcher, before):
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
    return Comparison(dataset, done, metrics, controls_of(done, found))


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


class _Once(Relay):
    """Passes on each note once: many models are told the same of the data."""

    def __init__(self, watcher: Watcher) -> None:
        super().__init__(watcher)
        self._said: set[str] = set()

    def note(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            super().note(text)
