"""The command `benchmark`: arguments in, `registry`'s functions, tables and messages out."""

from __future__ import annotations

import io
import sys
import warnings

from ..errors import BenchmarkError
from . import compare, doctor, labels, registered, run, screen, tune
from .common import app

__all__ = ["compare", "doctor", "labels", "main", "registered", "run", "tune"]


def main() -> None:
    """Run the command line; an error is one sentence and an exit code: 2 bad input, 1 anything else."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a run must not end with a sign that a terminal cannot show
            stream.reconfigure(errors="replace")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = screen.warn
            app()  # exits by itself, with 2 where the command line is not one
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        if isinstance(error, BenchmarkError):
            screen.complain(str(error))
            sys.exit(error.exit_code)
        screen.complain(f"{type(error).__name__}: {error} (--debug shows where)")
        sys.exit(1)
