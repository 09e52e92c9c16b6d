"""Progress of a run: a live bar on a terminal, plain lines in a log."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from .contract import Training
from .training import Epoch, Watcher

_LONGEST_NAME = 18
"""of a model, beside its bar"""


@contextmanager
def make_watcher(console: Console | None = None) -> Iterator[Watcher]:
    """Give a watcher that reports to a console, standard error by default, in the way that suits it."""
    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield PlainWatcher(console)
        return
    columns = (
        TextColumn("{task.fields[seed]}", markup=False),
        BarColumn(max(6, min(40, console.width - 74))),  # the rest is what 80 columns have to show
        TextColumn("epoch {task.fields[epoch]}  {task.fields[figures]}"),
        _TimeLeft(table_column=Column(no_wrap=True)),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield LiveWatcher(console, progress)


class _TimeLeft(TimeRemainingColumn):
    """Time to the end of training if no better epoch comes; nothing while it cannot be told."""

    def render(self, task: Task) -> Text:
        return Text.assemble(super().render(task), " left") if task.time_remaining is not None else Text()


class PlainWatcher(Watcher):
    """One line for every note and every epoch."""

    def __init__(self, console: Console, name: str = "") -> None:
        self.console = console
        self.name = name
        self.seed = ""

    def note(self, text: str) -> None:
        self._line(text)

    def failed(self, seed: int, reason: str) -> None:
        self.console.print(f"[bold red]error:[/] seed {seed} failed: {escape(reason)}", highlight=False, soft_wrap=True)

    def start(self, seed: int, number: str, config: Training) -> None:
        self.seed = f"{self.name} seed {seed}".lstrip()
        self._line(f"{self.seed} ({number})")

    def resume(self, history: Sequence[Epoch]) -> None:
        best = max(record.epoch for record in history if record.best)
        self._line(f"{self.seed}  goes on after epoch {len(history)}, where it was interrupted (best epoch {best})")

    def epoch(self, record: Epoch) -> None:
        self._line(f"{self.seed}  {record}")

    def beside(self, name: str) -> Watcher:
        return PlainWatcher(self.console, name)

    def _line(self, text: str) -> None:
        self.console.print(escape(text), highlight=False, soft_wrap=True)


class LiveWatcher(PlainWatcher):
    """A bar that is full when training would end if no better epoch came; notes stay above it."""

    def __init__(self, console: Console, progress: Progress, name: str = "") -> None:
        super().__init__(console, name)
        self.progress = progress
        self.task: TaskID | None = None

    def beside(self, name: str) -> Watcher:
        return LiveWatcher(self.console, self.progress, name)

    def start(self, seed: int, number: str, config: Training) -> None:
        self.end()
        self.config, self.best = config, (math.inf, 0)
        name = self.name if len(self.name) <= _LONGEST_NAME else f"{self.name[: _LONGEST_NAME - 1]}…"
        label = f"{name or 'seed'} {seed} ({number.replace(' of ', '/')})"
        self.task = self.progress.add_task("", total=None, seed=label, epoch=1, figures="")

    def end(self) -> None:
        if self.task is not None:
            self.progress.remove_task(self.task)
            self.task = None

    def step(self, epoch: int, step: int, steps: int) -> None:
        last = min(self.config.epochs or math.inf, self.best[1] + self.config.early_stop)
        self._update(epoch=epoch, total=last * steps, completed=(epoch - 1) * steps + step)

    def resume(self, history: Sequence[Epoch]) -> None:
        super().resume(history)
        for record in history:
            self.epoch(record)

    def epoch(self, record: Epoch) -> None:
        if record.best:
            self.best = (record.valid_mae, record.epoch)
        best = f"best MAE {self.best[0]:.3f} @{self.best[1]}"
        self._update(figures=best if self.name else f"loss {record.train_loss:.3f}  {best}")

    def _update(self, **fields: object) -> None:
        if self.task is None:  # it has ended
            return
        self.progress.update(self.task, **fields)  # type: ignore[arg-type]
