"""Torch as one run needs it, whatever the caller has set."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch

_ONE_AT_A_TIME = threading.RLock()
"""Random numbers and settings are the whole process's: threads that trained at once would get one another's."""


class Isolation:
    """Random numbers, settings of torch and the working folder of one run, which may be left and entered again.

    Whatever the caller has is set aside meanwhile. Matrix products on a GPU round their factors to TF32 unless
    `precision` is `"fp32"`.

    Args:
        seed: of torch, numpy and `random`.
        device: where the run computes.
        precision: one of `registry.jobs.PRECISIONS`.
        stream: where a GPU is to queue the run's work, besides the usual one.
    """

    def __init__(
        self, seed: int, device: torch.device, precision: str = "fp32", *, stream: torch.cuda.Stream | None = None
    ) -> None:
        self._seed = seed
        self._device = device
        self._precision = precision
        self._stream = stream
        self._own: list[Any] = []

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Be in the run."""
        with ExitStack() as stack:
            stack.enter_context(_ONE_AT_A_TIME)
            settings = _settings(self._device)
            theirs = [get() for get, _ in settings]
            stack.callback(_set, settings, theirs)
            if self._own:
                _set(settings, self._own)
            else:
                self._begin()
            if torch.get_default_device().type != "cpu":
                stack.enter_context(torch.device("cpu"))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.autocast(self._device.type, enabled=False))
            tf32 = self._precision != "fp32"
            stack.enter_context(torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32))
            stack.enter_context(torch.cuda.stream(self._stream))
            try:
                yield
            finally:
                self._own = [get() for get, _ in settings]

    def _begin(self) -> None:
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision("highest" if self._precision == "fp32" else "high")
        torch.default_generator.manual_seed(self._seed)
        if self._device.type == "cuda":
            generator = _generator(self._device)
            generator.graphsafe_set_state(generator.clone_state())  # the caller's must not be moved
            generator.manual_seed(self._seed)
        random.seed(self._seed)
        np.random.seed(self._seed)


@contextmanager
def isolated(seed: int, device: torch.device, precision: str = "fp32") -> Iterator[None]:
    """Be in a run that is entered once."""
    with Isolation(seed, device, precision).entered():
        yield


def _settings(device: torch.device) -> list[tuple[Callable[[], Any], Callable[[Any], Any]]]:
    """Return what reads and what sets each thing that is the whole process's."""
    pairs: list[tuple[Callable[[], Any], Callable[[Any], Any]]] = [
        (random.getstate, random.setstate),
        (np.random.get_state, np.random.set_state),
        (torch.default_generator.get_state, torch.default_generator.set_state),
        (os.getcwd, os.chdir),  # relative paths must mean what they did
        (torch.get_num_threads, torch.set_num_threads),
        (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
        (torch.get_default_dtype, torch.set_default_dtype),
        (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    ]
    if device.type == "cuda":
        # A recorded step keeps to the generator's state that it was recorded with.
        generator = _generator(device)
        pairs.append((generator.graphsafe_get_state, generator.graphsafe_set_state))
    return pairs


def _set(settings: list[tuple[Callable[[], Any], Callable[[Any], Any]]], values: list[Any]) -> None:
    for (_, setter), value in zip(settings, values, strict=True):
        setter(value)


def _generator(device: torch.device) -> torch.Generator:
    torch.cuda.init()
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.cuda.default_generators[index]
