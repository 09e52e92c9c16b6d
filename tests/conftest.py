"""Fixtures that several test modules share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import tiny_encoder


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
