"""The studies of Optuna: where trials are kept, so that a search goes on where it was left.

A trial that was interrupted is one that failed without a reason; its configuration waits to be tried again.
"""

from __future__ import annotations

import math
import os
import socket
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any

from .errors import BenchmarkError, InputError, one_line
from .runs import identity

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

FEWEST_TO_TELL = 4
"""trials that importance is told of"""
_SECONDS_TO_BEGIN = 30


def open_study(name: str, storage: str, facts: Mapping[str, Any]) -> optuna.Study:
    """Return the study of a name, a new one if there is none.

    Raises:
        InputError: there is one, and it is of something else.
    """
    import optuna

    options: dict[str, Any] = {}
    if storage.startswith("sqlite"):  # other processes may be writing
        options = {"engine_kwargs": {"connect_args": {"timeout": 60}}}
    backend = optuna.storages.RDBStorage(storage, **options) if "://" in storage else storage
    study = optuna.create_study(storage=backend, study_name=name, direction="minimize", load_if_exists=True)
    marks = {part: identity({part: value}) for part, value in facts.items()}
    before = study.user_attrs.get("made_for")
    if before is None and not study.get_trials(deepcopy=False):
        study.set_user_attr("made_for", marks)
    elif before != marks:
        other = [part for part, mark in marks.items() if (before or {}).get(part) != mark]
        raise InputError(
            f"the study {name!r} in {storage} is of another {' and another '.join(other)}: name a new one with --study"
        )
    return study


def counts(trial: FrozenTrial) -> bool:
    """Whether a trial has ended by itself; one that was interrupted has no reason."""
    return trial.state.is_finished() and (trial.state.name != "FAIL" or "reason" in trial.user_attrs)


def is_running(trial: FrozenTrial) -> bool:
    return trial.state.name == "RUNNING"


def release_interrupted(study: optuna.Study) -> None:
    """Let the trials be tried again whose process is gone; one of another machine is taken to be running."""
    for trial in filter(is_running, study.get_trials(deepcopy=False)):
        if not _is_alive(trial):
            release(study, trial)


def _is_alive(trial: FrozenTrial) -> bool:
    here = socket.gethostname()
    host, process = trial.user_attrs.get("process", [here, None])
    if process is None:  # it has begun just now, or never came to say whose it is
        begun = trial.datetime_start
        return begun is not None and (datetime.now() - begun).total_seconds() < _SECONDS_TO_BEGIN
    if host != here or process == os.getpid():
        return host != here
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def release(study: optuna.Study, trial: FrozenTrial) -> None:
    """End a trial that was interrupted, and put its configuration in the queue."""
    from optuna.trial import TrialState

    study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
    if params := {**trial.system_attrs.get("fixed_params", {}), **trial.params}:
        study.enqueue_trial(params)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Optuna from printing each trial, and leave its verbosity as it was."""
    import optuna

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(verbosity)


@contextmanager
def blaming_storage(storage: str) -> Iterator[None]:
    """Say in one sentence what the database says in many."""
    try:
        yield
    except BenchmarkError:
        raise
    except Exception as error:
        if not type(error).__module__.startswith(("optuna", "sqlalchemy", "alembic")):
            raise
        cause = getattr(error, "orig", None) or error  # without the statement that failed
        raise InputError(f"the storage {storage} cannot be used: {one_line(cause)}") from error


def importance_of(study: optuna.Study) -> dict[str, float]:
    """Return the share of the scores' variance that each key explains, largest first; nothing of too few trials."""
    if len([trial for trial in study.get_trials(deepcopy=False) if trial.state.name == "COMPLETE"]) < FEWEST_TO_TELL:
        return {}
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0))
        except (ValueError, RuntimeError):  # all of one score
            return {}
    return {key: float(share) for key, share in found.items()} if all(map(math.isfinite, found.values())) else {}
