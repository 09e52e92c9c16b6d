"""Data that is registered once serves every command, without --data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers import feature_file

OPTIONS = ("-m", "lf_dnn", "-d", "mosi", "--set", "batch_size=4", "--epochs", 2, "--device", "cpu")


@pytest.fixture
def run(benchmark, tmp_path, encoder, empty_folder) -> Path:
    """A run on a file that was registered, and then deleted."""
    file = feature_file(tmp_path, name="mine.pkl")
    code, _, err = benchmark("data", "add", "mosi", file)
    assert code == 0, err
    file.unlink()
    code, out, err = benchmark("run", *OPTIONS, "--text-encoder", encoder, "--json")
    assert code == 0, err
    return Path(json.loads(out)["runs"][0]["folder"])


def test_prediction(benchmark, run):
    code, out, err = benchmark("predict", run, "--split", "test")
    assert code == 0, err
    assert benchmark("predict", run, "mine", "--split", "test")[1] == out
    assert float(out.split("MAE")[1].split("│")[1]) == pytest.approx(
        json.loads((run / "metrics.json").read_text())["metrics"]["MAE"], abs=1e-4
    )
    code, _, err = benchmark("predict", run, "yours")
    assert code == 2
    assert "yours does not exist, and no registered file of mosi has that name (registered are mine.pkl)" in err


def test_missing_modalities(benchmark, run):
    code, out, err = benchmark("missing", run, "--rates", "0,0.5", "--seeds", 1)
    assert code == 0, err
    assert "lf_dnn" in out


def test_a_report_has_the_texts(benchmark, run):
    code, _, err = benchmark("report", run.parent)
    assert code == 0, err
    assert "THE" in Path("report.html").read_text() or "MOVIE" in Path("report.html").read_text()
    assert "Run folders hold no texts" not in Path("report.html").read_text()


def test_a_search(benchmark, run, encoder):
    code, out, err = benchmark(
        "tune",
        *OPTIONS,
        "--text-encoder",
        encoder,
        "-n",
        2,
        "--search",
        "none",
        "--search-set",
        "learning_rate=1e-4,1e-3",
    )
    assert code == 0, err
    assert "benchmark run" in out


def test_what_is_no_longer_registered(benchmark, run):
    assert benchmark("data", "remove", "mosi", "mine")[0] == 0
    code, _, err = benchmark("predict", run)
    assert code == 2
    assert "needs a feature file: that which it was trained on is not registered" in err
    assert benchmark("report", run.parent)[0] == 0
    assert "Run folders hold no texts" in Path("report.html").read_text()
