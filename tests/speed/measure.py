"""Each measurement in a process of its own, so that neither side's settings, caches and memory are the other's.

Importing MMSA, for one, changes the environment that cuBLAS reads; so it is imported where it is measured.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import machine
from .shapes import Shape

SEED = 1111


class Different(Exception):
    """Both sides do not do the same work, so their times would not compare."""


@dataclass(frozen=True)
class Case:
    """What both sides train on, and how."""

    shape: Shape
    data: Path
    encoder: str
    device: str
    folder: Path
    """for what they write"""


def alone(work: Callable[..., Any], *arguments: Any, here: bool = False) -> Any:
    """Return what a function returns in a new process, or `here`, in this one."""
    if here:
        return work(*arguments)
    spawn, usual = multiprocessing.get_context("spawn"), multiprocessing.get_start_method()
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=_start_others, initargs=(usual,)) as process:
        return process.submit(work, *arguments).result()


def _start_others(method: str) -> None:
    """Let this process start others as is usual.

    One that was spawned spawns its own, and every pass of upstream's loaders would wait for theirs to import torch.
    """
    multiprocessing.set_start_method(method, force=True)


def same_losses(case: Case) -> list[tuple[float, float]]:
    """Return both sides' losses of the first updates; raises Different where they are not the same."""
    from . import same_losses

    return same_losses.compare(case.shape, case.encoder, case.device, case.folder)


def time_upstream(case: Case, epochs: int, workers: int) -> dict[str, Any]:
    """Train upstream's for some epochs."""
    from . import upstream

    args = upstream.arguments(case.shape.dataset, case.data, case.encoder, case.device, early_stop=epochs + 1)
    figures = upstream.train(args, SEED, workers, epochs, case.folder / "upstream.pth")
    return figures | _most(case.device, "fp32")


def time_ours(case: Case, epochs: int, options: dict[str, Any]) -> dict[str, Any]:
    """Train ours for some epochs, and one more that is profiled; `options` are further arguments of `registry.run`."""
    from . import ours

    named = {"seed": SEED, "epochs": epochs, "profiled": True, **options}
    figures = ours.train(case.shape.dataset, case.data, case.encoder, case.device, case.folder / "runs", **named)
    return figures | _most(case.device, figures["precision"])


def time_ulgm(case: Case, labels: np.ndarray) -> float:
    """Return ULGM's milliseconds in an update."""
    from . import ours

    return ours.ulgm_milliseconds(ours.preset(case.shape.dataset), labels, case.device)


def time_steps_with_and_without_ulgm(case: Case, precision: str) -> tuple[float, float]:
    """Return the milliseconds of a recorded step as it is, and of one in which no label is generated."""
    from . import ours

    runs = case.folder / "runs"
    return ours.steps_with_and_without_ulgm(precision, case.shape.dataset, case.data, case.encoder, case.device, runs)


def _most(device: str, precision: str) -> dict[str, Any]:
    """Return the most bytes that tensors took on the GPU, and torch kept for them, and the device's peak arithmetic."""
    on_gpu = device == "cuda"
    return {
        "peak_allocated": torch.cuda.max_memory_allocated() if on_gpu else None,
        "peak_reserved": torch.cuda.max_memory_reserved() if on_gpu else None,
        "peak": machine.peak(device, precision),
    }
