"""What a measurement ran on, and the most arithmetic that could be done there."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch

PEAK = {"fp32": 67e12, "tf32": 494.7e12, "bf16": 989.4e12}
"""Dense operations a second of an H100 or H200 SXM, by NVIDIA's data sheet."""
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}


def describe(device: str) -> str:
    """Return the device, and how many cores this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = f"{torch.cuda.get_device_name()}, " if device == "cuda" else ""
    return f"{gpu}{_processor()}, {cores} cores"


def versions(device: str) -> str:
    """Return the versions of what the figures depend on."""
    found = [f"{name} {version(name)}" for name in ("torch", "transformers", "MMSA")]
    if device == "cuda":
        found += [f"CUDA {torch.version.cuda}", f"cuDNN {torch.backends.cudnn.version()}"]
    return ", ".join([f"Python {sys.version.split()[0]}", *found])


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def peak(device: str, precision: str) -> tuple[float, str]:
    """Return operations a second, and where the number is from: a data sheet, or a large product measured here."""
    if device == "cuda" and any(card in torch.cuda.get_device_name() for card in ("H100", "H200")):
        return PEAK[precision], "data sheet, dense"
    size = 8192 if device == "cuda" else 2048
    return _measured(device, precision, size), f"measured, product of {size} × {size}"


def _measured(device: str, precision: str, size: int, times: int = 5) -> float:
    """Return operations a second of the fastest of some products of two square matrices."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    a, b = (torch.randn(size, size, device=device, dtype=DTYPES[precision]) for _ in range(2))
    seconds = []
    for _ in range(times):
        synchronise(device)
        start = time.perf_counter()
        a @ b
        synchronise(device)
        seconds.append(time.perf_counter() - start)
    torch.set_float32_matmul_precision(before)
    return 2 * size**3 / min(seconds)


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Let torch use so many cores, where a number is given."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    yield
    torch.set_num_threads(before)


def synchronise(device: str) -> None:
    """Wait for a GPU, so that a clock tells when its work is done."""
    if device == "cuda":
        torch.cuda.synchronize()
