"""The trials of a search: which configuration comes next, and what it scores on validation. Test is never touched."""

from __future__ import annotations

import gc
import math
import os
import random
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .benchmark import build, checked_precision, reason_of
from .contract import Training
from .data.text_model import set_precision
from .isolation import isolated
from .jobs import Job, Plan
from .search_space import Dimension, settings_of
from .studies import counts, is_running, release
from .training import Epoch, Relay, Watcher, train

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

SPLITS = ("train", "valid")
MOST_POINTS = 10_000
"""of a grid"""
_FIRST_PRUNED_EPOCH = 3
"""generated labels first count in this one"""
_TRIALS_BEFORE_PRUNING = 5
_STEPS_OF_A_SEED = 10_000
"""epochs of later seeds are counted on from here"""


@dataclass(frozen=True)
class Desk:
    """What all trials share: the plan, and its data, read once for all that read them alike."""

    plan: Plan
    data: Mapping[str, Any]
    """what `Plan.read` is told of it"""
    text_encoder: str | None
    device: torch.device
    precision: str | None
    cache: Path
    graph: bool
    watcher: Watcher
    _read: dict[tuple[Any, ...], Job] = field(default_factory=dict)

    def job(self, plan: Plan) -> Job:
        """Return the job of a configuration, without the test split."""
        key = (plan.needs, plan.config.model.without, plan.config.model.standardize)
        if key not in self._read:
            precision = checked_precision(self.precision, self.device, trains_text="text" in plan.needs)
            watcher = _Silent() if self._read else self.watcher  # its notes on the data have been said
            job = plan.read(
                **self.data,
                text_encoder=self.text_encoder,
                watcher=watcher,
                device=self.device,
                cache=self.cache,
                precision=precision,
            )
            assert job.file is not None
            kept = replace(job.file, splits={name: job.file.splits[name] for name in SPLITS})
            self._read[key] = replace(job, file=kept)
        return replace(self._read[key], plan=plan)

    def train(self, job: Job, seed: int, watcher: Watcher, number: str) -> Epoch:
        """Train one seed of a configuration as `registry.run` does, and return its best epoch."""
        config = job.plan.config.model
        with isolated(seed, self.device, job.precision):
            splits = {name: job.split(name, self.device) for name in SPLITS}
            model, hooks = build(job, splits["train"], self.device)
            set_precision(model, job.precision)
            watcher.start(seed, number, config)
            outcome = train(
                model,
                hooks,
                config,
                splits,
                per_sample=job.plan.spec.per_sample,
                generator=torch.Generator().manual_seed(seed),
                watcher=watcher,
                graph=self.graph,
            )
        return outcome.history[outcome.best_epoch - 1]


class _Silent(Watcher):
    def note(self, text: str) -> None:
        pass


class _Pruned(Exception):
    """Other trials were better at this epoch."""


class _Reporter(Relay):
    """Passes progress on, tells the study of each epoch, and ends a trial that does not keep up with the others."""

    def __init__(self, watcher: Watcher, trial: optuna.Trial, prune: bool) -> None:
        super().__init__(watcher)
        self._trial, self._prune = trial, prune
        self._last: int | None = None
        self.scores: list[float] = []
        """the lowest validation MAE of each seed so far"""

    def start(self, seed: int, number: str, config: Training) -> None:
        self.scores.append(math.inf)
        self._last = config.epochs
        self._watcher.start(seed, number, config)

    def epoch(self, record: Epoch) -> None:
        self._watcher.epoch(record)
        self.scores[-1] = min(self.scores[-1], record.valid_mae)
        step = (len(self.scores) - 1) * _STEPS_OF_A_SEED + record.epoch
        self._trial.report(float(np.mean(self.scores)), step)
        if self._prune and record.epoch != self._last and self._trial.should_prune():
            raise _Pruned(f"in epoch {record.epoch}")


@dataclass(frozen=True)
class Search:
    """Asks the study for configurations until there are `trials`, trains each, and tells it the score."""

    study: optuna.Study
    desk: Desk
    space: Mapping[str, Dimension]
    seeds: Sequence[int]
    sampler: str
    sampler_seed: int
    prune: bool
    trials: int

    def begin_with_preset(self) -> None:
        """Put the preset's values first, those that are in the space."""
        base = self.desk.plan.config.as_dict()
        for key in [key for key in base if isinstance(base[key], dict)]:
            base |= {f"{key}.{entry}": value for entry, value in base[key].items()}
        inside = {key: base[key] for key, values in self.space.items() if key in base and values.has(base[key])}
        self.study.enqueue_trial({key: self.space[key].stored(value) for key, value in inside.items()})

    def run(self) -> Iterator[int]:
        """Yield the number, from 1, of each trial that has ended."""
        from optuna.pruners import MedianPruner

        self.study.pruner = MedianPruner(_TRIALS_BEFORE_PRUNING, _FIRST_PRUNED_EPOCH)
        distributions = {key: values.distribution() for key, values in self.space.items()}
        while (done := len(self._there())) < self.trials:
            if self.sampler == "grid" and not self._queue_next_point():
                return
            self.study.sampler = self._make_sampler(done)
            trial = self.study.ask(distributions)
            trial.set_user_attr("process", [socket.gethostname(), os.getpid()])
            try:
                self._try(trial, done + 1)
            except KeyboardInterrupt:
                release(self.study, self.study.get_trials(deepcopy=False)[trial.number])
                raise
            yield trial.number + 1
            if self.desk.device.type == "cuda":
                gc.collect()  # the model and its recorded steps, or there is no room for the next

    def _there(self) -> list[FrozenTrial]:
        """Return the trials that have ended, and those that another process is at."""
        return [trial for trial in self.study.get_trials(deepcopy=False) if counts(trial) or is_running(trial)]

    def _make_sampler(self, done: int) -> optuna.samplers.BaseSampler:
        """Return a sampler for one trial: a study that was interrupted draws on as it would have."""
        from optuna.samplers import RandomSampler, TPESampler

        seed = int(np.random.SeedSequence([self.sampler_seed, done]).generate_state(1)[0])
        return TPESampler(seed=seed) if self.sampler == "tpe" else RandomSampler(seed=seed)

    def _queue_next_point(self) -> bool:
        """Put a point of the grid first that nobody has tried; False where there is none."""
        if any(trial.state.name == "WAITING" for trial in self.study.get_trials(deepcopy=False)):
            return True
        points = list(product(*([value.stored(v) for v in value.extremes()] for value in self.space.values())))
        random.Random(self.sampler_seed).shuffle(points)
        tried = [trial.params for trial in self._there()]
        for point in points:
            params = dict(zip(self.space, point, strict=True))
            if params not in tried:
                self.study.enqueue_trial(params)
                return True
        return False

    def _try(self, trial: optuna.Trial, number: int) -> None:
        """Train a trial with every seed, and record its score, or why there is none."""
        from optuna.trial import TrialState

        best_epochs: list[int] = []
        reporter = _Reporter(self.desk.watcher, trial, self.prune)
        twin = next((t for t in self._there() if t.state.name == "COMPLETE" and t.params == trial.params), None)
        if twin is not None:  # it would get the same score
            trial.set_user_attr("best_epochs", twin.user_attrs.get("best_epochs", []))
            trial.set_user_attr("reason", f"the same as trial {twin.number + 1}")
            self.study.tell(trial, twin.value, skip_if_finished=True)
            return
        try:
            job = self.desk.job(self.desk.plan.having(settings_of(trial.params, self.space)))
            for position, seed in enumerate(self.seeds, 1):
                of = f", seed {position} of {len(self.seeds)}" if len(self.seeds) > 1 else ""
                best = self.desk.train(job, seed, reporter, f"trial {number} of {self.trials}{of}")
                best_epochs.append(best.epoch)
        except _Pruned as reason:
            trial.set_user_attr("reason", str(reason))
            self.study.tell(trial, state=TrialState.PRUNED, skip_if_finished=True)
        except (Exception, SystemExit) as error:  # the model's, mostly; other configurations may do better
            trial.set_user_attr("reason", " ".join(reason_of(error).split()))
            self.study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
        else:
            trial.set_user_attr("best_epochs", best_epochs)
            self.study.tell(trial, float(np.mean(reporter.scores)), skip_if_finished=True)
