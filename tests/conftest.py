"""Fixtures that several test modules share."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest
import torch

from registry import cli
from tests.helpers import tiny_encoder


def pytest_configure() -> None:
    """Let Ctrl-C reach the processes that tests start, also where pytest runs in the background, deaf to it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _same_draws_every_time() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _nothing_is_registered(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("MMSA_DATA", str(tmp_path / "registered"))


@pytest.fixture(scope="session")
def encoder(tmp_path_factory) -> str:
    """The folder of a tiny random text encoder."""
    return str(tiny_encoder(tmp_path_factory.mktemp("encoder")))


@pytest.fixture
def empty_folder(tmp_path, monkeypatch) -> Path:
    """An empty working directory."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def benchmark(monkeypatch, capsys):
    """Run a command line in this process; returns exit code, standard output and standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        code = caught.value.code
        return (code if isinstance(code, int) else 1, *capsys.readouterr())

    return run
