"""Several seeds on one GPU at once: their steps take turns, each seed in a stream of its own.

A recorded step of a small batch leaves a GPU half idle, which another seed's step fills. On a CPU, and where steps are
not to be recorded, one seed comes after the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from .isolation import Isolation

MOST_AT_ONCE = 8
"""more would not fill a GPU better"""
SHARE_OF_MEMORY = 0.8
"""of what is free on the GPU, that the seeds beside the first may fill"""

Training = Iterator[int]
"""Goes on by a step at a time, and gives how many epochs are done."""


@dataclass
class Turns:
    """Trainings of several seeds.

    Args:
        device: where they train.
        precision: one of `registry.jobs.PRECISIONS`.
        at_once: whether they may take turns; else one comes after the other.
    """

    device: torch.device
    precision: str
    at_once: bool
    live: dict[int, tuple[Training, Isolation]] = field(default_factory=dict)
    """those that have begun and not ended, by seed"""

    def go(self, trainings: Mapping[int, Training]) -> Iterator[tuple[int, BaseException | None]]:
        """Train all of them; yield each seed when it has ended, with what ended it too early.

        The first one is alone for an epoch, which tells how many there is memory for.
        """
        waiting, room = dict(trainings), 1
        before = torch.cuda.memory_reserved(self.device) if self.at_once else 0
        while waiting or self.live:
            while waiting and len(self.live) < room:
                seed = next(iter(waiting))
                stream = torch.cuda.Stream(self.device) if self.at_once else None
                isolation = Isolation(seed, self.device, self.precision, stream=stream)
                self.live[seed] = waiting.pop(seed), isolation
            for seed in list(self.live):
                error, epochs = None, None
                try:
                    epochs = self._advance(seed, until_epoch=room == 1 and self.at_once and bool(waiting))
                except (Exception, SystemExit) as raised:
                    error = raised
                if epochs is None:
                    del self.live[seed]
                    yield seed, error
                elif room == 1:
                    room = self._room(torch.cuda.memory_reserved(self.device) - before)

    def _advance(self, seed: int, *, until_epoch: bool) -> int | None:
        """Do a step of one of several, or all of the only one's, perhaps but its first epoch; None at its end."""
        training, isolation = self.live[seed]
        with isolation.entered():
            epochs = next(training, None)
            while epochs is not None and len(self.live) == 1 and not (until_epoch and epochs):
                epochs = next(training, None)
        return epochs

    def _room(self, taken: int) -> int:
        """Return for how many there is memory, if one has taken so many bytes."""
        torch.cuda.synchronize(self.device)  # what they share is there for every stream
        free, _ = torch.cuda.mem_get_info(self.device)
        return min(MOST_AT_ONCE, 1 + int(SHARE_OF_MEMORY * free / max(taken, 1)))
