"""Torch as one run needs it, whatever the caller has set."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch

_ONE_AT_A_TIME = threading.RLock()
"""Random numbers and settings are the whole process's: threads that trained at once would get one another's."""


@contextmanager
def isolated(
    seed: int, device: torch.device, precision: str = "fp32", *, deterministic: bool = False
) -> Iterator[None]:
    """Seed torch, numpy and `random`, set aside what the caller set in torch, and leave all as it was.

    Matrix products on a GPU round their factors to TF32 unless `precision` is `"fp32"`. With `deterministic` a GPU sums
    in one order; an operation that cannot raises a RuntimeError.
    """
    with ExitStack() as stack:
        stack.enter_context(_ONE_AT_A_TIME)
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        stack.callback(os.chdir, os.getcwd())  # relative paths must mean what they did
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        stack.callback(torch.set_deterministic_debug_mode, torch.get_deterministic_debug_mode())
        if deterministic:
            torch.use_deterministic_algorithms(True)
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(
            torch.backends.cudnn.flags(enabled=True, deterministic=deterministic, allow_tf32=precision != "fp32")
        )
        stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            torch.cuda.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        yield
