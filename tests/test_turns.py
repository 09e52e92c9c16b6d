"""Trainings that take turns: each goes on where it was left, with the random numbers that it would have alone."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import registry
from registry import benchmark
from registry.turns import Turns
from tests.helpers import feature_file

CPU = torch.device("cpu")
Log = list[tuple[int, int, float, float, float]]


def training(seed: int, steps: int, log: Log, fails_at: int | None = None) -> Iterator[int]:
    """Two steps an epoch."""
    for step in range(steps):
        if step == fails_at:
            raise ValueError(f"{seed} failed")
        log.append((seed, step, random.random(), float(np.random.rand()), float(torch.rand(()))))
        yield (step + 1) // 2


def go(
    steps: dict[int, int], room: int | None, fails_at: int | None = None
) -> tuple[Log, list[tuple[int, str | None]]]:
    """Return what was drawn, and how the seeds ended, in order; seed 2 is the one that fails."""
    log: Log = []
    turns = Turns(CPU, "fp32", room and (lambda: room))
    trainings = {seed: training(seed, n, log, fails_at if seed == 2 else None) for seed, n in steps.items()}
    return log, [(seed, error and str(error)) for seed, error in turns.go(trainings)]


STEPS = {1: 6, 2: 4, 3: 8, 4: 4}


@pytest.mark.parametrize("room", [2, 3, 9])
def test_turns_give_each_seed_the_draws_it_has_alone(room):
    alone, _ = go(STEPS, None)
    in_turn, ended = go(STEPS, room)
    assert sorted(in_turn) == sorted(alone)
    assert sorted(ended) == [(seed, None) for seed in STEPS]
    assert len({draw for _, _, *drawn in alone for draw in drawn}) == 3 * sum(STEPS.values())


def test_one_seed_comes_after_the_other_where_nothing_is_said_of_room():
    log, ended = go(STEPS, None)
    assert [seed for seed, *_ in log] == [seed for seed, n in STEPS.items() for _ in range(n)]
    assert [seed for seed, _ in ended] == list(STEPS)


def test_the_first_is_alone_for_an_epoch_and_then_so_many_take_turns():
    log, _ = go(STEPS, 3)
    order = [seed for seed, *_ in log]
    assert order[:2] == [1, 1]
    assert order[2:8] == [1, 2, 3, 1, 2, 3]
    assert 4 not in order[:10]
    assert order.count(4) == 4


def test_a_seed_that_fails_leaves_the_others_alone():
    alone, _ = go(STEPS, None)
    log, ended = go(STEPS, 4, fails_at=1)
    assert dict(ended) == {1: None, 2: "2 failed", 3: None, 4: None}
    assert sorted(entry for entry in log if entry[0] != 2) == sorted(entry for entry in alone if entry[0] != 2)


def test_the_caller_gets_back_what_was_his(tmp_path):
    def moves() -> Iterator[int]:
        os.chdir(tmp_path)
        torch.set_default_dtype(torch.float64)
        yield 0
        assert Path.cwd() == tmp_path
        assert torch.get_default_dtype() == torch.float64
        yield 1

    before, place = (random.getstate(), torch.get_rng_state().tolist()), Path.cwd()
    turns = Turns(CPU, "fp32", lambda: 2)
    for _ in turns.go({1: moves(), 2: training(2, 4, [])}):
        assert (Path.cwd(), torch.get_default_dtype()) == (place, torch.float32)
    assert (random.getstate(), torch.get_rng_state().tolist()) == before


def as_on_a_gpu(monkeypatch, room: int) -> None:
    monkeypatch.setattr(benchmark, "Turns", lambda device, precision, _: Turns(device, precision, lambda: room))


@pytest.mark.parametrize("room", [2, 4])
def test_a_run_s_seeds_in_turn_give_what_they_give_alone(room, tmp_path, monkeypatch, encoder):
    options = {"label_range": 3.0, "text_encoder": encoder, "data": feature_file(tmp_path), "seeds": [5, 3, 4]}
    run = partial(registry.run, "self_mm", "custom", config={"epochs": 3}, device="cpu", **options)
    alone = run(runs=tmp_path / "alone")
    as_on_a_gpu(monkeypatch, room)
    in_turn = run(runs=tmp_path / "turns")
    assert [seed.seed for seed in in_turn.runs] == [5, 3, 4]
    assert [seed.metrics for seed in in_turn.runs] == [seed.metrics for seed in alone.runs]
    for one, other in zip(in_turn.runs, alone.runs, strict=True):
        for name in ("predictions.csv", "labels.csv", "model.safetensors"):
            assert (one.folder / name).read_bytes() == (other.folder / name).read_bytes()


FAILS = """
import torch
from registry import FusionOutput, register_model

@register_model("sometimes", needs=("audio",))
class Sometimes(torch.nn.Module):
    def __init__(self, config, data):
        super().__init__()
        self.linear = torch.nn.Linear(data.dims["audio"], 1)
        self.feature_dims, self.left = {}, 3 if torch.initial_seed() == 3 else 99
    def forward(self, batch):
        self.left -= 1
        if self.left < 0:
            raise ValueError("no more")
        return FusionOutput(self.linear(batch.audio.mean(1))[:, 0])
"""


def test_a_seed_that_fails_among_others_is_said_and_its_epochs_kept(tmp_path, monkeypatch):
    (tmp_path / "sometimes.py").write_text(FAILS)
    as_on_a_gpu(monkeypatch, 3)
    result = registry.run(
        "sometimes",
        "custom",
        data=feature_file(tmp_path),
        label_range=3.0,
        seeds=[1, 3, 5],
        plugins=[str(tmp_path / "sometimes.py")],
        config={"epochs": 4},
        runs=tmp_path / "runs",
        device="cpu",
    )
    assert [(run.seed, run.status) for run in result.runs] == [(1, "ok"), (3, "failed"), (5, "ok")]
    log = (result.folder / "3.failed.log").read_text()
    assert log.startswith("ValueError: no more")
    assert "epoch   1" in log
