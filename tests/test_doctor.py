"""What `benchmark doctor` finds, also where something is broken."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from registry import doctor
from registry.doctor import diagnose


def found(*sections: str, runs="runs") -> dict[str, doctor.Finding]:
    """Return the findings of some sections by name."""
    return {finding.name: finding for finding in diagnose(runs, sections)}


def test_what_is_there(empty_folder):
    findings = diagnose()
    values = {(finding.section, finding.name): finding.value for finding in findings}
    assert values["versions", "torch"] == metadata.version("torch")
    assert values["text encoders", "minilm"] == "384 wide, weights are the published ones"
    assert values["plugins", "hooks"].endswith("can be used")
    assert "cores" in values["device", "CPU"]
    assert not [finding for finding in findings if finding.is_broken]
    assert list(empty_folder.iterdir()) == []


def without(monkeypatch, *names: str) -> None:
    """Let packages seem not to be installed."""
    real = metadata.version

    def version(name: str) -> str:
        if name in names:
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)


def test_an_extra_that_is_not_installed_says_what_to_type_and_what_for(monkeypatch, empty_folder):
    without(monkeypatch, "optuna")
    finding = found("extras")["tune"]
    assert finding.value == "without optuna"
    assert finding.advice == 'pip install "selfmm-plugin[tune]", for benchmark tune'
    assert not finding.is_broken


def test_a_requirement_that_is_absent_or_too_old_is_broken(monkeypatch, empty_folder):
    without(monkeypatch, "pandas")
    monkeypatch.setattr(doctor, "_satisfies", lambda version, wanted: ">=2.5" not in wanted)
    seen = found("versions")
    assert seen["pandas"].advice == 'pip install "pandas>=2.2.1"'
    assert seen["torch"].value.endswith("needed is >=2.5")
    assert seen["pandas"].is_broken
    assert seen["torch"].is_broken


def test_every_extra_says_what_it_is_for():
    """But for those that only add up others."""
    extras = set(metadata.metadata("selfmm-plugin").get_all("Provides-Extra"))
    assert {"demo", "mmsa", "tensorboard", "tune", "test"} <= extras
    assert set(doctor.EXTRAS) <= extras


def test_without_torch_the_rest_is_told(tmp_path):
    """In a process where importing torch fails, as with a broken CUDA library."""
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.12: cannot open shared object file')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from registry.cli import main; main()"
    command = [sys.executable, "-c", code, "doctor", "--json"]
    root = Path(doctor.__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 1, done.stderr
    seen = {finding["name"]: finding for finding in json.loads(done.stdout)}
    assert "libcudart.so.12" in seen["torch cannot be imported"]["value"]
    assert "pip install" in seen["torch cannot be imported"]["advice"]
    assert seen["models"]["value"].startswith("0 of ")
    assert "free" in seen["runs"]["value"]
    assert "encoding" in seen["standard output"]["value"]


def test_folders(tmp_path, monkeypatch):
    (tmp_path / "runs" / ".cache").mkdir(parents=True)
    (tmp_path / "runs" / ".cache" / "large").write_bytes(b"0" * 3_000_000)
    monkeypatch.setenv("MMSA_DATA", str(tmp_path / "nowhere"))
    seen = found("folders", runs=tmp_path / "runs")
    assert "3 MB" in seen["cache of feature files"].value
    assert seen["registered data"].value == f"{tmp_path / 'nowhere'}, nothing"
    assert "benchmark data add" in seen["registered data"].advice
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    assert found("folders", runs=tmp_path / "runs")["runs"].is_broken


def test_the_cache_of_the_hub(monkeypatch):
    import huggingface_hub

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(
        huggingface_hub, "try_to_load_from_cache", lambda name, file: file if name == "bert-base-uncased" else None
    )
    seen = found("text encoders")
    assert "offline (HF_HUB_OFFLINE is set)" in seen["cache of the hub"].value
    assert seen["bert-base-uncased"].value == "in the cache; the default for mosei, mosi"
    assert "let the first run fetch it" not in seen["bert-base-chinese"].advice
    assert "hf download bert-base-chinese" in seen["bert-base-chinese"].advice


def test_a_plugin_that_fails_is_told_with_its_reason(monkeypatch):
    from registry.errors import InputError
    from registry.plugins import Plugins

    def check(self, kind, original=Plugins.check):
        error = InputError("model 'x' of y 1 (z:SPEC) cannot be used: ImportError: no z")
        return [(entry, error if entry.name in ("tfn", "lmf") else spec) for entry, spec in original(self, kind)]

    monkeypatch.setattr(Plugins, "check", check)
    finding = found("plugins")["lmf, tfn"]
    assert (finding.value, finding.advice) == ("ImportError: no z", "mend or remove selfmm-plugin")


def test_the_command(benchmark, empty_folder, monkeypatch):
    code, out, _ = benchmark("doctor")
    assert code == 0
    for word in ("versions", "extras", "device", "folders", "text encoders", "plugins", "terminal", "is there"):
        assert word in out
    without(monkeypatch, "pandas")
    code, out, _ = benchmark("doctor")
    assert code == 1
    assert "✗ pandas" in out
    assert "1 broken" in out
