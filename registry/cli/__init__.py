"""The command `benchmark`: arguments in, `registry`'s functions, tables and messages out."""

from __future__ import annotations

import io
import os
import signal
import sys
import warnings
from types import FrameType

from ..errors import BenchmarkError
from . import compare, data, doctor, from_csd, hub, labels, predict, registered, report, run, screen, tune
from .common import app

__all__ = [
    "compare",
    "data",
    "doctor",
    "from_csd",
    "hub",
    "labels",
    "main",
    "predict",
    "registered",
    "report",
    "run",
    "tune",
]


def main() -> None:
    """Run the command line; an error is one sentence and an exit code: 2 bad input, 1 anything else."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a run must not end with a sign that a terminal cannot show
            stream.reconfigure(errors="replace")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = screen.warn
            app()  # exits by itself, with 2 where the command line is not one
    except KeyboardInterrupt:
        screen.tell("interrupted")
        sys.exit(130)
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        if isinstance(error, BenchmarkError):
            screen.complain(str(error))
            sys.exit(error.exit_code)
        screen.complain(f"{type(error).__name__}: {error} (--debug shows where)")
        sys.exit(1)


def _interrupt(_: int, frame: FrameType | None) -> None:
    """Answer Ctrl-C as Python does but while it imports: modules there swallow the exception, or stay half made."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os.write(2, b"interrupted\n")
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt
