"""`benchmark data` and the options that name data, as typed."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from tests.helpers import SIZES, feature_file, make_split, write_features
from tests.test_modality_files import part


@pytest.fixture
def root(tmp_path):
    return tmp_path / "registered"  # as $MMSA_DATA has it


def test_from_a_file_to_a_run_without_it(tmp_path, benchmark, encoder, root, empty_folder):
    path = feature_file(tmp_path)
    code, out, err = benchmark("data", "add", "mosi", path)
    assert (code, err) == (0, "")
    assert out.startswith("features.pkl: registered: unaligned, not a published file; ")
    assert out.endswith(f" at {root / 'mosi' / 'features.pkl.safetensors'}\n")
    assert "registered already, nothing to do" in benchmark("data", "add", "mosi", path)[1]
    path.unlink()
    code, out, err = benchmark("run", "-m", "tfn", "-d", "mosi", "--text-encoder", encoder, "--epochs", 1)
    assert (code, "tfn on mosi, test split" in out) == (0, True), err
    code, out, _ = benchmark(
        "compare", "-m", "tfn,lmf", "-d", "mosi", "--data", "features", "--text-encoder", encoder, "--epochs", 1,
        "--seeds", "1111", "--format", "csv",
    )  # fmt: skip
    assert (code, out.count("\ntfn,")) == (0, 1)
    code, out, _ = benchmark("data", "remove", "mosi", "features")
    assert (code, out.startswith("removed ")) == (0, True)
    assert "needs --data FILE" in benchmark("run", "-m", "tfn", "-d", "mosi")[2]


def test_several_files_of_which_one_is_broken(tmp_path, benchmark):
    one, two = feature_file(tmp_path), feature_file(tmp_path, name="two.pkl", audio=lambda audio: audio + 1)
    code, out, err = benchmark("data", "add", "mosi", one, tmp_path / "none.pkl", two)
    assert (code, out.count("registered:")) == (2, 2)
    assert err == f"error: {tmp_path / 'none.pkl'} does not exist\n"


def test_a_published_name_with_other_content(tmp_path, benchmark):
    path = feature_file(tmp_path, name="unaligned_50.pkl")
    code, out, err = benchmark("data", "add", "mosi", path)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert "78e0f8b5ef8ff71558e7307848fc1fa929ecb078203f565ab22b9daab2e02524" in err
    assert benchmark("data", "add", "mosi", path, "--unverified")[0] == 0


def test_another_data_root(tmp_path, benchmark, root):
    place = tmp_path / "elsewhere"
    path = feature_file(tmp_path)
    assert benchmark("data", "add", "custom", path, "--label-range", 3, "--data-root", place)[0] == 0
    assert not root.exists()
    assert "features.pkl" in benchmark("data", "list", "--data-root", place)[1]
    assert "nothing is registered in" in benchmark("data", "list")[1]
    assert "needs --label-range" in benchmark("data", "add", "custom", path)[2]


def test_list(tmp_path, benchmark, root):
    assert "nothing yet of custom, mosei, mosi, sims, simsv2" in benchmark("data", "list")[1]
    benchmark("data", "add", "mosi", feature_file(tmp_path))
    code, out, _ = benchmark("data", "list")
    assert code == 0
    assert all(word in out for word in ("mosi", "features.pkl", "unaligned", "8 / 4 / 4", "kB"))
    shown = json.loads(benchmark("data", "list", "--json")[1])
    assert shown["files"][0]["clips"] == SIZES
    assert shown["without"] == ["custom", "mosei", "sims", "simsv2"]
    (root / "mosi" / "features.pkl.safetensors").write_bytes(b"x")
    code, out, err = benchmark("data", "list")
    assert (code, "cannot be used" in out) == (0, True)
    assert "type `benchmark data add mosi FILE` once more" in err
    assert benchmark("data", "list", "--json")[0] == 0


def test_what_a_name_holds_is_printed_as_it_is(tmp_path, benchmark):
    path = shutil.copy(feature_file(tmp_path), tmp_path / "[red]x[bold].pkl")
    assert "[red]x[bold].pkl: registered" in benchmark("data", "add", "mosi", path)[1]
    assert "[red]x[bold].pkl" in benchmark("data", "list")[1]
    assert "[red]x[bold].pkl" in benchmark("data", "check", path)[1]


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        ("mosi", ["https://github.com/thuiar/MMSA", "78e0f8b5", "benchmark data add mosi aligned_50.pkl"]),
        ("simsv2", ["ch-sims-v2", "no file's SHA-256 is known", "benchmark data add simsv2 FILE"]),
        ("custom", ["benchmark data add custom FILE --label-range 3"]),
        ("demo", ["makes its own data"]),
    ],
)
def test_get(benchmark, dataset, words):
    code, out, _ = benchmark("data", "get", dataset)
    assert code == 0
    assert all(word in out for word in words)


def test_check(tmp_path, benchmark):
    path = feature_file(tmp_path)
    code, out, err = benchmark("data", "check", path, "--dataset", "mosi")
    assert (code, err) == (0, "")
    assert all(word in out for word in ("8×6×5", "float32", "steps of audio", "M train", "from -3 to 3", "no faults"))
    assert "train has 8 clips, mosi as published 1284" in out
    assert max(map(len, out.splitlines()[1:])) <= 120
    code, out, _ = benchmark("data", "check", path, "--label-range", 1, "--json")
    shown = json.loads(out)
    assert code == 2
    assert len(shown["faults"]) == 3
    assert shown["splits"]["train"]["keys"]["audio"]["shape"] == [8, 6, 5]


def test_check_shows_what_it_can(tmp_path, benchmark):
    content = {split: make_split(n, prefix=split) for split, n in SIZES.items()}
    content["train"] |= {"raw_text": ["[bold]odd[/]"] * 8, "audio": torch.zeros(2).tolist(), "[x]": 3}
    code, out, _ = benchmark("data", "check", write_features(tmp_path / "x.pkl", content))
    assert code == 2
    assert "fault: train: audio" in out
    assert "[bold]odd[/]" in out
    assert "[x]" in out
    (tmp_path / "y.pkl").write_text("no pickle")
    code, out, _ = benchmark("data", "check", tmp_path / "y.pkl")
    assert (code, out.count("fault:")) == (2, 1)
    assert benchmark("data", "check", tmp_path)[0] == 2


def test_features_of_a_modality(tmp_path, benchmark, encoder, empty_folder):
    options = ["-d", "mosi", "--data", feature_file(tmp_path), "--text-encoder", encoder, "--epochs", 1]
    code, out, err = benchmark("run", "-m", "tfn", *options, "--audio-features", part(tmp_path))
    assert code == 0
    assert "data: unaligned, audio of part.pkl" in out
    assert "16 of its 16 clips, joined by id" in err
    code, _, err = benchmark("compare", "-m", "tfn", *options, "--text-features", tmp_path / "none.pkl")
    assert (code, err.strip().endswith("none.pkl does not exist")) == (2, True)
    code, _, err = benchmark(
        "run", "-m", "tfn", *options, "--vision-features", part(tmp_path, id=lambda a: a["raw_text"])
    )
    assert code == 2
    assert "Traceback" not in err


def test_a_bar_for_large_files_on_a_terminal(tmp_path, benchmark, monkeypatch):
    from registry.cli import screen

    monkeypatch.setattr(screen.err, "_force_terminal", True)
    code, out, _ = benchmark("data", "add", "mosi", feature_file(tmp_path))
    assert (code, "registered" in out) == (0, True)
