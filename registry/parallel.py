"""Training the rows of a comparison: one after the other, or several at once in processes of their own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stdout, suppress
from dataclasses import replace
from threading import Thread
from typing import Any

import torch

from .benchmark import run as run_model
from .comparison import Row
from .contract import Training
from .errors import BenchmarkError, InputError, one_line
from .runs import Run, load_run
from .training import Epoch, Watcher

Work = Mapping[str, dict[str, Any]]
"""The arguments of `run` by the name of a row"""
Before = Callable[[str, int, int], None] | None


def in_turn(work: Work, watcher: Watcher, before: Before) -> Iterator[tuple[str, Row, bool]]:
    """Train one model after the other; yield name, row, and whether its input was refused."""
    for number, (name, options) in enumerate(work.items(), 1):
        if before:
            before(name, number, len(work))
        yield name, *_train(name, options, watcher)


def at_once(jobs: int, work: Work, watcher: Watcher, before: Before) -> Iterator[tuple[str, Row, bool]]:
    """Train several models at a time, each in a process, and yield them as they end."""
    context = multiprocessing.get_context("spawn")  # a fork would share torch's threads and the GPU's state
    progress = context.Queue()
    progress.cancel_join_thread()  # a process that was killed may hold its lock for ever
    watchers = {name: watcher.beside(name) for name in work}
    listener = Thread(target=_listen, args=(progress, watchers), daemon=True)
    listener.start()
    pool = ProcessPoolExecutor(jobs, context, _begin, (jobs, progress))
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
        progress.put(None)
        listener.join(timeout=5)


def _listen(progress: Any, watchers: Mapping[str, Watcher]) -> None:
    """Pass on what the processes tell, until None comes."""
    while told := progress.get():
        name, call, *what = told
        with suppress(Exception):  # what is shown must not stop what is trained
            getattr(watchers[name], call)(*what)


_progress: Any = None
"""In a process of `at_once`: where its progress is told."""


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
        told.end()


def _train(name: str, options: dict[str, Any], watcher: Watcher) -> tuple[Row, bool]:
    try:
        result = run_model(**options, watcher=watcher)
    except (Exception, SystemExit) as error:  # of the data, the encoder, the disk: other models may do better
        reason = str(error) if isinstance(error, BenchmarkError) else one_line(error)
        return Row(name, reason=reason), isinstance(error, InputError)
    failed = {run.seed: run.reason or "" for run in result.runs if run.status == "failed"}
    return Row(name, [load_run(run.folder) for run in result.ok if run.folder], failed), False


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

    def resume(self, history: Sequence[Epoch]) -> None:
        self._send("resume", list(history))

    def step(self, epoch: int, step: int, steps: int) -> None:
        if time.monotonic() - self._last > 0.5:
            self._last = time.monotonic()
            self._send("step", epoch, step, steps)

    def epoch(self, record: Epoch) -> None:
        self._send("epoch", record)

    def finished(self, seed: int, run: Run) -> None:
        self._send("finished", seed, replace(run))

    def end(self) -> None:
        self._send("end")

    def _send(self, *what: Any) -> None:
        _progress.put((self._name, *what))
