"""What a shell is offered, and that it comes without torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import registry
from registry.cli import completion

ROOT = Path(registry.__file__).parents[1]


@pytest.mark.parametrize(
    ("complete", "incomplete", "offered"),
    [
        (completion.model, "self", ["self_mm"]),
        (completion.model, "tfn+", ["tfn+heads", "tfn+ulgm"]),
        (completion.model, "tfn+heads+u", ["tfn+heads+ulgm"]),
        (completion.models, "self_mm,al", ["self_mm,all"]),
        (completion.models, "self_mm,tfn+u", ["self_mm,tfn+ulgm"]),
        (completion.models, "nothing", []),
        (completion.dataset, "mos", ["mosei", "mosi"]),
        (completion.hooks, "", ["heads", "ulgm"]),
        (completion.hooks, "heads,", ["heads,heads", "heads,ulgm"]),
    ],
)
def test_names(complete, incomplete, offered):
    assert complete(incomplete) == offered


SHELL = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import atexit
atexit.register(lambda: print([name for name in ("torch", "numpy", "pandas", "transformers") if name in sys.modules]))
sys.argv = ["benchmark"]
from registry.cli import main
main()
"""


@pytest.mark.parametrize("line", ["benchmark run --model tf", "benchmark describe tf", "benchmark compare -m tf"])
def test_a_shell_is_offered_them_and_nothing_heavy_is_loaded(line):
    asked = {"_BENCHMARK_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1)}
    done = subprocess.run(
        [sys.executable, "-c", SHELL], env={**os.environ, **asked}, capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines() == ["tfn", "[]"]


def test_the_script_for_a_shell_can_be_shown_in_a_pipe(tmp_path):
    asked = {"_BENCHMARK_COMPLETE": "source_zsh"}
    done = subprocess.run(
        [sys.executable, "-c", SHELL], env={**os.environ, **asked}, capture_output=True, text=True, check=False
    )
    assert "#compdef benchmark" in done.stdout
