"""Where a step's time goes: a profile of some steps of a run, by classes of kernels (on a CPU, of operations)."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from registry.training import Watcher

from .machine import synchronise

STEPS = 10
LISTED = 40
CLASSES = {
    "Adam": r"adam",
    "LSTM": r"lstm|rnn",
    "attention": r"flash|fmha|attention|softmax",
    "matmul": r"gemm|gemv|cutlass|xmma|nvjet|cublas|splitk|aten::(add|b|badd)?mm\b|aten::addmv|mkldnn_linear",
    "index, scatter, sort": r"index|scatter|gather|sort|radix|embedding|cub::|nonzero|aten::(take|where|bincount)",
    "casts and copies": r"copy|memcpy|memset|catarray|aten::(cat|stack|clone|to|fill_|zero_|zeros|pad)\b",
    "norms, dropout, elementwise": (
        r"norm|dropout|philox|elementwise|gelu|gammabeta|triton_(poi|red|per)"
        r"|aten::(add|sub|mul|div|neg|abs|relu|tanh|sqrt|threshold|bernoulli|clamp|sgn|lerp|isfinite|bitwise)"
    ),
    "reductions": r"reduce|aten::(sum|mean|max|min|all|any)\b",
}
"""Regular expressions of names, the first that is found counts; what none finds is `other`."""
OTHER = "other"


class Event(NamedTuple):
    """Something that ran: its name, when, and how long without what it called; in microseconds."""

    name: str
    start: float
    end: float
    own: float


def class_of(name: str) -> str:
    """Return the class of a kernel or operation."""
    return next((kind for kind, pattern in CLASSES.items() if re.search(pattern, name, re.IGNORECASE)), OTHER)


class Silent(Watcher):
    """Says nothing of the data: sizes that are not the published ones, and early best epochs, mean nothing here."""

    def note(self, text: str) -> None:
        """Nothing."""


class Profiler(Silent):
    """Watches a run in silence, and profiles some steps of one epoch.

    Args:
        epoch: whose steps are profiled.
        device: `"cpu"` or `"cuda"`.
    """

    def __init__(self, epoch: int, device: str) -> None:
        self.profiled_epoch, self.device = epoch, device
        self.figures: dict[str, Any] | None = None
        self._running: profile | None = None
        self._until = 0

    def step(self, epoch: int, step: int, steps: int) -> None:
        """Begin in the middle of the epoch, where every step is a full group."""
        if epoch == self.profiled_epoch and step == max(1, steps // 2 - 1):
            self._until = min(step + STEPS, steps - 1)
            synchronise(self.device)
            activity = ProfilerActivity.CUDA if self.device == "cuda" else ProfilerActivity.CPU
            self._running = profile(activities=[activity])
            self._first = step
            self._running.start()
        elif self._running and step == self._until:
            synchronise(self.device)
            self._running.stop()
            self.figures = summary(self._events(self._running), step - self._first, self.device)
            self._running = None

    def _events(self, done: profile) -> list[Event]:
        on_gpu = self.device == "cuda"
        wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
        return [
            Event(span.name, when.start, when.end, when.elapsed_us() if on_gpu else span.self_cpu_time_total)
            for span, when in ((event, event.time_range) for event in done.events() or [])
            # What a program marks is a span over kernels, not one.
            if span.device_type == wanted and not getattr(span, "is_user_annotation", False)
        ]


def summary(events: Iterable[Event], steps: int, device: str) -> dict[str, Any]:
    """Return milliseconds and number of kernels a step by class, the longest kernels, and the GPU's busy share."""
    events = sorted(events, key=lambda event: event.start)
    by_name: dict[str, list[float]] = defaultdict(list)
    for event in events:
        by_name[event.name].append(event.own)
    classes = {kind: {"ms": 0.0, "count": 0.0} for kind in (*CLASSES, OTHER)}
    for name, times in by_name.items():
        of_class = classes[class_of(name)]
        of_class["ms"] += sum(times) / steps / 1e3
        of_class["count"] += len(times) / steps
    longest = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:LISTED]
    return {
        "steps": steps,
        "classes": classes,
        "busy": _busy(events) if device == "cuda" else None,
        "longest": [
            {"name": name[:200], "class": class_of(name), "ms": sum(times) / steps / 1e3, "count": len(times) / steps}
            for name, times in longest
        ],
    }


def _busy(events: list[Event]) -> float:
    """Return the share of the time between the first kernel's start and the last one's end that a kernel ran."""
    if not events:
        return 0.0
    busy, reached = 0.0, events[0].start
    for event in events:
        busy += max(0.0, event.end - max(event.start, reached))
        reached = max(reached, event.end)
    return busy / (reached - events[0].start)
