"""What tells whether a step can be recorded; that it is recorded and replayed, only a GPU can show (test_gpu.py)."""

from __future__ import annotations

import random
from collections import deque
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from torch import nn

from registry import graphs
from registry.contract import Batch
from registry.graphs import Recorder, _has_room, host_state


class Model(nn.Module):
    """With attributes of many kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LSTM(2, 3)
        self.steps, self.seen, self.queue = 0, {"a": [1, 2]}, deque([1])
        self.schedule = SimpleNamespace(temperature=1.0)
        self.table = np.zeros(3)
        self.bank, self.host = torch.zeros(2, device="meta"), torch.zeros(2)
        self.rngs = {"numpy": np.random.default_rng(0), "random": random.Random(0), "torch": torch.Generator()}
        self.register_buffer("mean", torch.zeros(2, device="meta"))
        self.device = torch.device("cpu")


def change(step) -> list[str]:
    """Return what a step is said to have changed."""
    model = Model()
    before = host_state([model])
    step(model)
    after = host_state([model])
    return [name for name in before | after if before.get(name) != after.get(name)]


def count(model: Model) -> None:
    model.steps += 1


def rebind(model: Model) -> None:
    model.bank = model.bank + 1


def rebind_buffer(model: Model) -> None:
    model.mean = model.mean * 0.9


def count_forward_calls(model: Model) -> None:
    model._forward_calls = 1


def swap_values(model: Model) -> None:
    model.inner.bias_ih_l0.data = torch.ones(12)


def anneal(model: Model) -> None:
    model.schedule.temperature *= 0.9


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (count, "changes Model.steps"),
        (lambda model: model.seen["a"].append(3), "changes Model.seen"),
        (anneal, "changes Model.schedule"),
        (lambda model: model.table.fill(1), "changes Model.table"),
        (rebind, "changes Model.bank"),
        (lambda model: setattr(model, "new", 1), "changes Model.new"),
        (count_forward_calls, "changes Model._forward_calls"),
        (rebind_buffer, "changes Model._buffers"),
        (swap_values, "changes Model.inner._parameters"),
        (lambda model: model.host.add_(1), "changes Model.host"),
        (lambda model: model.rngs["numpy"].random(), "changes Model.rngs"),
        (lambda model: model.rngs["random"].random(), "changes Model.rngs"),
        (lambda model: torch.rand(1, generator=model.rngs["torch"]), "changes Model.rngs"),
        (lambda model: model.eval(), "changes Model.training"),
        (lambda model: setattr(model.inner, "dropout", 0.5), "changes Model.inner.dropout"),
        (lambda model: random.random(), "draws random numbers on the host"),
        (lambda model: np.random.rand(), "draws random numbers on the host"),
        (lambda model: torch.rand(1), "draws random numbers on the host"),
    ],
)
def test_what_a_recorded_step_would_not_repeat_is_seen(step, said):
    assert said in change(step)


def queue_and_take(model: Model) -> None:
    model.queue.append(2)
    model.queue.pop()


@pytest.mark.parametrize(
    "step",
    [
        lambda model: None,
        queue_and_take,
        lambda model: model.bank.add_(1),
        lambda model: model.mean.add_(1),
        lambda model: setattr(model, "device", torch.zeros(1).device),
        lambda model: model.inner(torch.zeros(4, 1, 2))[0].sum().backward(),
        lambda model: torch.optim.SGD(model.parameters(), lr=1.0).zero_grad(),
    ],
)
def test_what_tensors_hold_may_change(step):
    assert change(step) == []


@pytest.mark.parametrize(("free", "enough"), [(5.0, True), (3.9, False)])
def test_memory_is_asked_for_three_of_the_largest_step(monkeypatch, free, enough):
    gigabytes = {"memory_allocated": 3.0, "max_memory_allocated": 5.0, "memory_reserved": 5.0}
    for name, value in gigabytes.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value * 1e9)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free * 1e9, 80e9))
    assert _has_room() is enough


class Played:
    """Takes a recorded step's place where there is no GPU: what it is given runs as it comes."""

    pool = None

    def __init__(self, step, batch: Batch, pool: object) -> None:
        self.replay = step


@pytest.fixture
def recorder(monkeypatch) -> Recorder:
    """One whose device is imitated."""
    device = MagicMock()
    for name in ("reset_peak_memory_stats", "default_generators", "current_device", "current_stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(device, name))
    for name in ("get_sync_debug_mode", "set_sync_debug_mode"):
        monkeypatch.setattr(torch.cuda, name, getattr(device, name))
    monkeypatch.setattr(graphs, "_Graph", Played)
    monkeypatch.setattr(graphs, "_has_room", lambda: True)
    return Recorder([], [], lambda: None)


def sums(recorder: Recorder, *sizes: int) -> list[int]:
    return [int(recorder(lambda batch: batch.index.sum(), Batch(torch.arange(size)), 0)) for size in sizes]


def test_a_shape_is_recorded_when_it_comes_again(recorder):
    assert sums(recorder, 4, 4, 5, 4, 5, 4) == [6, 6, 10, 6, 10, 6]
    assert str(recorder) == "3 of 6 steps were replayed as CUDA graphs, in 2 shapes"


def test_recorded_steps_go_where_memory_gets_short(recorder, monkeypatch):
    sums(recorder, 4, 4, 4, 5)
    monkeypatch.setattr(graphs, "_has_room", lambda: False)
    assert sums(recorder, 4, 5, 4, 6, 6) == [6, 10, 6, 15, 15]
    said = "2 of 9 steps were replayed as CUDA graphs, then no more: the GPU has too little free memory"
    assert (str(recorder), recorder._graphs) == (said, {})


def test_memory_that_runs_out_while_a_step_is_recorded_ends_the_training(recorder, monkeypatch):
    def failing(*_: object) -> None:
        try:
            raise torch.OutOfMemoryError("out of memory")
        finally:
            raise RuntimeError("unjoined work")  # as torch does, whose recording then ends badly

    sums(recorder, 4, 4)
    monkeypatch.setattr(graphs, "_Graph", failing)
    with pytest.raises(torch.OutOfMemoryError, match=r"recording one failed \(unjoined work\)"):
        sums(recorder, 4)
