"""Several seeds on one GPU at once: each has a stream of its own, and they take turns to fill it for an epoch.

A recorded step of a small batch leaves a GPU half idle, which another seed's step fills; and while one seed keeps the
host busy, the GPU has the others' steps. On a CPU, and where no steps are recorded, one seed comes after the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from .isolation import Isolation

MOST_AT_ONCE = 8
"""more would not fill a GPU better"""
SHARE_OF_MEMORY = 0.8
"""of what is free on the GPU, that the seeds beside the first may fill"""

Training = Iterator[int]
"""Goes on for about an epoch at a time, and gives how many are done."""


@dataclass
class Turns:
    """Trainings of several seeds.

    Args:
        device: where they train.
        precision: one of `registry.jobs.PRECISIONS`.
        room: is asked, when the first one has done an epoch alone, how many may take turns; if None, one comes after
            the other.
    """

    device: torch.device
    precision: str
    room: Callable[[], int] | None = None
    live: dict[int, tuple[Training, Isolation]] = field(default_factory=dict)
    """those that have begun and not ended, by seed"""

    def go(self, trainings: Mapping[int, Training]) -> Iterator[tuple[int, BaseException | None]]:
        """Train all of them; yield each seed when it has ended, with what ended it too early."""
        waiting, most = dict(trainings), 1
        while waiting or self.live:
            while waiting and len(self.live) < most:
                seed = next(iter(waiting))
                self.live[seed] = waiting.pop(seed), self._isolation(seed)
            asks = self.room is not None and most == 1 and bool(waiting)
            for seed in list(self.live):
                error, epochs = None, None
                try:
                    epochs = self._advance(seed, 1 if asks else math.inf)
                except (Exception, SystemExit) as raised:
                    error = raised
                if epochs is None:
                    del self.live[seed]
                    yield seed, error
                elif asks and self.room is not None:
                    most = self.room()

    def _isolation(self, seed: int) -> Isolation:
        takes_turns = self.device.type == "cuda" and self.room is not None
        stream = torch.cuda.Stream(self.device) if takes_turns else None
        return Isolation(seed, self.device, self.precision, stream=stream)

    def _advance(self, seed: int, epochs: float) -> int | None:
        """Do an epoch of one of several, or so many of the only one; return how many are done, None at its end."""
        training, isolation = self.live[seed]
        with isolation.entered():
            done = next(training, None)
            while done is not None and len(self.live) == 1 and done < epochs:
                done = next(training, None)
        return done


def room_on_gpu(device: torch.device) -> Callable[[], int]:
    """Return what tells, when one training has begun since, for how many in all a GPU has memory."""
    before = torch.cuda.memory_reserved(device)

    def room() -> int:
        torch.cuda.synchronize(device)  # what they share is there for every stream
        taken = torch.cuda.memory_reserved(device) - before
        free, _ = torch.cuda.mem_get_info(device)
        return min(MOST_AT_ONCE, 1 + int(SHARE_OF_MEMORY * free / max(taken, 1)))

    return room
