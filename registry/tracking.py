"""Tracking a run while it goes on: `--track tensorboard` writes event files that TensorBoard shows.

A tracker is a watcher that stands before another one, and passes everything on.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import as_typed
from .contract import Training
from .errors import InputError, one_line, unknown
from .training import Epoch, Relay, Watcher

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

    from .runs import Run

TRACKERS = ("tensorboard",)
FOLDER = ".tensorboard"
"""below the folder of runs; what TensorBoard's `--logdir` takes"""


def require_tracker(name: str) -> None:
    """See that a tracker can be used.

    Raises:
        InputError: there is none of this name, or its package is not installed.
    """
    if name not in TRACKERS:
        raise InputError(unknown("tracker", name, TRACKERS))
    try:
        import torch.utils.tensorboard as _  # noqa: F401
    except ImportError as error:
        raise InputError(
            f'--track tensorboard needs the package tensorboard ({error}): pip install "selfmm-plugin[tensorboard]"'
        ) from error


class TensorBoard(Relay):
    """Writes each epoch's figures and, at a seed's end, its settings with its test metrics.

    Args:
        watcher: is told everything too.
        folder: of the configuration; each seed has a folder in it.
        settings: flat, by config key.
    """

    def __init__(self, watcher: Watcher, folder: Path, settings: Mapping[str, Any]) -> None:
        super().__init__(watcher)
        self._folder = folder
        self._settings = {key: _plain(value) for key, value in settings.items()}
        self._seed: int | None = None
        self._writer: SummaryWriter | None = None
        self._fault = False

    def failed(self, seed: int, reason: str) -> None:
        self._close()
        self._watcher.failed(seed, reason)

    def start(self, seed: int, number: str, config: Training) -> None:
        self._close()
        self._seed = seed
        self._watcher.start(seed, number, config)

    def resume(self, history: Sequence[Epoch]) -> None:
        if not (self._folder / str(self._seed)).exists():  # they were trained without this
            for record in history:
                self._track(record)
        super().resume(history)

    def epoch(self, record: Epoch) -> None:
        self._track(record)
        super().epoch(record)

    def finished(self, seed: int, run: Run) -> None:
        try:
            if seed != self._seed and not (self._folder / str(seed)).exists():  # it was trained before, without this
                self._seed = seed
                for record in run.history.to_dict("records"):
                    self._write(Epoch(**{str(key): value for key, value in record.items()}))
            if self._writer is not None and seed == self._seed:
                known = {f"test/{name}": value for name, value in run.metrics.items() if math.isfinite(value)}
                self._writer.add_hparams({"seed": seed, **self._settings}, known, run_name=".")
            self._close()
        except Exception as error:
            self._give_up(error)
        self._watcher.finished(seed, run)

    def end(self) -> None:
        self._close()
        self._watcher.end()

    def _track(self, record: Epoch) -> None:
        try:
            self._write(record)
        except Exception as error:  # a full disk, mostly; what is shown must not stop what is trained
            self._give_up(error)

    def _write(self, record: Epoch) -> None:
        if self._fault:
            return
        if self._writer is None:
            self._writer = self._open(record.epoch)
        self._writer.add_scalar("train/loss", record.train_loss, record.epoch)
        self._writer.add_scalar("valid/MAE", record.valid_mae, record.epoch)
        self._writer.add_scalar("epoch/seconds", record.train_seconds + record.valid_seconds, record.epoch)
        self._writer.flush()

    def _open(self, epoch: int) -> SummaryWriter:
        """Return what writes a seed's events; those of an earlier training of it are dropped from this epoch on."""
        from torch.utils.tensorboard.writer import SummaryWriter

        place = self._folder / str(self._seed)
        if epoch == 1 and place.exists():
            shutil.rmtree(place)
        return SummaryWriter(str(place), purge_step=epoch if epoch > 1 else None)

    def _close(self) -> None:
        if self._writer is not None:
            with suppress(Exception):  # what could not be written has been told of
                self._writer.close()
            self._writer = None

    def _give_up(self, error: Exception) -> None:
        self._fault, self._writer = True, None
        self._watcher.note(f"tracking has stopped, training goes on: {one_line(error)}")


def _plain(value: Any) -> bool | str | int | float:
    """Return a setting as TensorBoard has it."""
    return value if isinstance(value, (bool, int, float, str)) else as_typed(value)
