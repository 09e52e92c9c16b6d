"""The wheel: what is in it, that it works without the source tree, and with strangers' plugins next to it."""

from __future__ import annotations

import email.message
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from textwrap import dedent
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("registry", "selfmm_plugin", "baselines_compat")
SETUPTOOLS = 77
"""The first version that reads `license = "MIT"`."""

GOOD = """
    import torch
    from registry import FusionOutput, register_model


    @register_model("good_model", summary="a stranger's ten lines", needs=("audio", "vision"))
    class Good(torch.nn.Module):
        def __init__(self, config, data):
            super().__init__()
            self.head = torch.nn.Linear(data.dims["audio"] + data.dims["vision"], 1)
            self.feature_dims = {}

        def forward(self, batch):
            audio = batch.audio.sum(1) / batch.audio_lengths[:, None]
            vision = batch.vision.sum(1) / batch.vision_lengths[:, None]
            return FusionOutput(prediction=self.head(torch.cat([audio, vision], dim=-1)).squeeze(-1))
"""
BROKEN = "import no_such_package\n"
CAUSE = "ModuleNotFoundError: No module named 'no_such_package'"


def pip(command: str, *arguments: str | Path) -> None:
    """Run pip without the network where this environment has a setuptools that can build, else isolated."""
    try:
        isolated = int(metadata.version("setuptools").partition(".")[0]) < SETUPTOOLS
    except metadata.PackageNotFoundError:
        isolated = True
    flags = [] if isolated else ["--no-build-isolation"]
    base = [sys.executable, "-m", "pip", command, "--no-deps", "--quiet", "--disable-pip-version-check", *flags]
    done = subprocess.run([*base, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of what a wheel is built from, and of what must not get into it; building writes into it."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in (*PACKAGES, "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    pip("wheel", "--wheel-dir", folder, source)
    (path,) = folder.glob("*.whl")
    return path


def strangers_package(folder: Path, distribution: str, model: str, target: str, code: str) -> Path:
    """Write a source package of one module that announces one model."""
    folder.mkdir()
    module = target.partition(":")[0]
    (folder / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools>=61"]\nbuild-backend = "setuptools.build_meta"\n'
        f'[project]\nname = "{distribution}"\nversion = "1.5"\n'
        f'[project.entry-points."mmsa.models"]\n{model} = "{target}"\n'
        f'[tool.setuptools]\npy-modules = ["{module}"]\n'
    )
    (folder / f"{module}.py").write_text(dedent(code))
    return folder


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder into which the project and two strangers' packages are installed."""
    base = tmp_path_factory.mktemp("site")
    good = strangers_package(base / "good", "good-plugin", "good_model", "good_plugin:Good", GOOD)
    broken = strangers_package(base / "broken", "broken-plugin", "broken_model", "broken_plugin:MODEL", BROKEN)
    pip("install", "--target", base / "packages", wheel, good, broken)
    return base / "packages"


class Shell:
    """Runs commands in an empty folder, where only the installed packages can be found."""

    def __init__(self, site: Path, folder: Path) -> None:
        self.site, self.folder = site, folder
        self.environment = {**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}

    def run(self, command: Sequence[str | Path]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*map(str, command)],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            encoding="utf-8",
            check=False,
        )

    def python(self, code: str) -> str:
        done = self.run([sys.executable, "-c", code])
        assert done.returncode == 0, done.stderr
        return done.stdout

    def benchmark(self, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        """Run the installed script `benchmark` and check its exit code."""
        script = shutil.which("benchmark", path=self.site / "bin")
        assert script is not None
        done = self.run([script, *arguments])
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done


@pytest.fixture
def shell(site: Path, tmp_path: Path) -> Shell:
    return Shell(site, tmp_path)


# --- what is in the wheel


def test_the_wheel_holds_the_three_packages_and_nothing_else(source, wheel):
    """Every file of the packages, code and presets alike; no tests."""
    names = [name for name in ZipFile(wheel).namelist() if not name.endswith("/")]
    expected = {path.relative_to(source).as_posix() for p in PACKAGES for path in (source / p).rglob("*.*")}
    assert {name for name in names if ".dist-info/" not in name} == {n for n in expected if "__pycache__" not in n}
    assert {"registry/py.typed", "registry/data/text.py", "selfmm_plugin/presets/mmsa.json"} <= set(names)
    assert len(names) == len(set(names))


def test_the_presets_in_the_wheel_are_those_of_the_source(source, wheel):
    presets = [name for name in ZipFile(wheel).namelist() if "/presets/" in name]
    assert presets
    for name in presets:
        assert json.loads(ZipFile(wheel).read(name)) == json.loads((source / name).read_text("utf-8"))


def wheel_metadata(wheel: Path) -> email.message.Message:
    with ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return email.message_from_bytes(archive.read(name))


def test_metadata(wheel):
    content = wheel_metadata(wheel)
    assert content["Name"] == "selfmm-plugin"
    assert content["Requires-Python"] == ">=3.10"
    assert content["License-Expression"] == "MIT"
    assert content["License-File"] == "LICENSE"
    assert content["Description-Content-Type"] == "text/markdown"
    assert wheel.name.endswith("-py3-none-any.whl")


def test_requirements_are_lower_bounds(wheel):
    """An upper bound on torch or transformers would fight with what a user has installed."""
    requirements = [line.partition(";") for line in wheel_metadata(wheel).get_all("Requires-Dist")]
    needed = [name.strip() for name, _, marker in requirements if "extra" not in marker]
    assert [name for name in needed if name.startswith("torch>=")]
    for name in needed:
        assert ">=" in name, name
        assert not any(sign in name for sign in ("<", "==", "~=", "!=", ",")), name


# --- the installed project


def test_the_installed_packages_are_the_ones_that_are_used(shell, site):
    found = shell.python(
        "from importlib import metadata, util\n"
        f"for name in {PACKAGES}: print(util.find_spec(name).origin)\n"
        "print(metadata.distribution('selfmm-plugin').locate_file('registry'))"
    )
    assert len(found.splitlines()) == 4
    for line in found.splitlines():
        assert Path(line).is_relative_to(site), found


def test_list_models_names_every_distribution(shell):
    """A plugin that would fail to import is listed too, as nothing is imported."""
    rows = json.loads(shell.benchmark("list", "models", "--json").stdout)
    versions = {row["name"]: (row["distribution"], row["version"]) for row in rows}
    assert versions["good_model"] == ("good-plugin", "1.5")
    assert versions["broken_model"] == ("broken-plugin", "1.5")
    assert versions["self_mm"][0] == "selfmm-plugin"
    table = shell.benchmark("list", "models").stdout
    assert all(name in table for name in versions)


def test_list_hooks_and_datasets(shell):
    assert {"ulgm", "heads"} <= {row["name"] for row in json.loads(shell.benchmark("list", "hooks", "--json").stdout)}
    names = {row["name"] for row in json.loads(shell.benchmark("list", "datasets", "--json").stdout)}
    assert {"custom", "demo", "mosei", "mosi", "sims", "simsv2"} <= names


def test_describe_reads_the_presets(shell):
    shown = shell.benchmark("describe", "self_mm").stdout
    assert "mmsa (mosi, mosei, sims" in shown
    assert "learning_rate_bert" in shown


# --- strangers' packages


def test_list_check_shows_what_works_and_why_the_rest_does_not(shell):
    done = shell.benchmark("list", "models", "--check", code=1)
    lines = done.stdout.splitlines()
    assert [line for line in lines if "good_model" in line and "a stranger's ten lines" in line]
    (line,) = [line for line in lines if "broken_model" in line]
    assert "broken-plugin" in line
    assert "failed" in line
    (reason,) = done.stderr.splitlines()
    assert "broken-plugin" in reason
    assert CAUSE in reason


def test_check_of_a_strangers_model(shell):
    shown = shell.benchmark("check", "good_model").stdout
    assert "good_model" in shown
    assert "label blindness" in shown
    assert "fault" not in shown


def test_run_of_a_strangers_model_trains(shell):
    done = shell.benchmark("run", "--model", "good_model", "--epochs", "1", "--runs", "runs", "--json")
    result = json.loads(done.stdout)
    (run,) = result["runs"]
    assert (result["model"], result["dataset"], run["status"], run["best_epoch"]) == ("good_model", "demo", "ok", 1)
    assert 0 < run["metrics"]["MAE"] < 3
    folder = shell.folder / run["folder"]
    assert len((folder / "predictions.csv").read_text("utf-8").splitlines()) == 1 + 240
    assert (folder / "model.safetensors").is_file()
    assert [path.name for path in shell.folder.iterdir()] == ["runs"]


def test_run_of_a_broken_model_says_why_in_one_line(shell):
    done = shell.benchmark("run", "--model", "broken_model", "--runs", "runs", code=2)
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: model 'broken_model' of broken-plugin 1.5 (broken_plugin:MODEL) cannot be used: ")
    assert line.endswith(CAUSE)
    assert list(shell.folder.iterdir()) == []


def test_the_error_names_the_strangers_model_that_was_meant(shell):
    done = shell.benchmark("run", "--model", "good_modl", code=2)
    assert "unknown model 'good_modl', did you mean 'good_model'?" in done.stderr
