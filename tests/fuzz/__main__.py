"""`python -m tests.fuzz TARGET --minutes N`: bytes with atheris, coverage-guided; structures with hypothesis."""

from __future__ import annotations

import argparse
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from registry.errors import BenchmarkError, printable

SECONDS, MEGABYTES, LONGEST_MESSAGE = 5, 1024, 10_000


class Fault(Exception):
    """An outcome that is neither success nor a sentence for the user."""


def checked(read: Callable[[Any], object], given: Any) -> None:
    """Read an input; raises what is a fault."""
    try:
        read(given)
    except BenchmarkError as error:
        message = str(error)
        if "does not fit into memory" in message:
            raise Fault(f"a small input takes all memory: {message}") from error
        if len(message) > LONGEST_MESSAGE or message != printable(message):
            raise Fault(f"no sentence for people: {message[:500]!r}") from error


def limit_memory() -> None:
    """Let this process take a gigabyte more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + (MEGABYTES << 20)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def fuzz_bytes(read: Callable[[bytes], object], seeds: list[bytes], seconds: int, folder: Path) -> None:
    """Mutate bytes, guided by the code they reach; libFuzzer prints the number of inputs and leaves the process."""
    import atheris

    from tests.fuzz.targets import instrumented

    for function in instrumented():
        atheris.instrument_func(function)
    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds):
        (corpus / f"seed{number}").write_bytes(seed)
    longest = max(4096, 2 * max(map(len, seeds)))
    options = [f"-max_total_time={seconds}", f"-timeout={SECONDS}", f"-max_len={longest}", "-rss_limit_mb=4096"]
    atheris.Setup([sys.argv[0], *options, f"-artifact_prefix={folder}/", str(corpus)], lambda data: checked(read, data))
    atheris.Fuzz()


def fuzz_structures(read: Callable[[Any], object], strategy: Any, seconds: int) -> None:
    """Draw structures until the time is over; a fault is shrunk and raised."""
    from hypothesis import HealthCheck, given, seed, settings

    def late(*_: object) -> None:
        raise Fault(f"it takes more than {SECONDS} s")

    signal.signal(signal.SIGALRM, late)
    inputs, end = 0, time.monotonic() + seconds

    def one(drawn: Any) -> None:
        nonlocal inputs
        inputs += 1
        signal.alarm(SECONDS)
        try:
            checked(read, drawn)
        finally:
            signal.alarm(0)

    options = settings(max_examples=500, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    start = time.time_ns()
    try:
        while time.monotonic() < end:
            start += 1
            seed(start)(options(given(strategy)(one)))()
    finally:
        print(f"{inputs} inputs", flush=True)


def main() -> None:
    """Read the command line and fuzz."""
    from tests.fuzz.targets import TARGETS

    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument(
        "--folder", type=Path, help="keeps corpus and faults of a target of bytes; a new one by default"
    )
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix=f"fuzz-{arguments.target}-"))
    read, drawn = TARGETS[arguments.target](folder / "work")
    limit_memory()
    warnings.simplefilter("ignore")
    seconds = int(arguments.minutes * 60)
    if isinstance(drawn, list):
        fuzz_bytes(read, drawn, seconds, folder)
    else:
        fuzz_structures(read, drawn, seconds)


if __name__ == "__main__":
    main()
