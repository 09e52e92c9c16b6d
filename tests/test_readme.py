"""The README does what it says: its examples run, its commands and options exist."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from registry import cli
from tests.helpers import feature_file

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")


def example(name: str) -> str:
    """Return the code block below the mark `<!-- test: name -->`."""
    (code,) = re.findall(rf"<!-- test: {re.escape(name)} -->\n```python\n(.*?)```", README, re.DOTALL)
    return code


def benchmark(monkeypatch, capsys, line: str) -> str:
    """Run one command line of the README and return what it prints."""
    monkeypatch.setattr(sys, "argv", shlex.split(line))
    with pytest.raises(SystemExit) as caught:
        cli.main()
    out, err = capsys.readouterr()
    assert not caught.value.code, err
    return out


def test_the_first_lines_are_the_two_commands():
    lines = [line.strip() for line in README.splitlines() if line.startswith("    ")]
    assert lines[0] == 'pip install -e ".[demo]" && benchmark run --model self_mm'
    assert lines[1] == 'pip install -e ".[test]" && pytest'


def test_ci_runs_the_readmes_test_command():
    script = (ROOT / ".ci" / "run").read_text("utf-8")
    assert '-e ".[test]"' in script
    assert re.search(r"^\S*pytest$", script, re.MULTILINE)


def test_ulgm_in_a_plain_loop(empty_folder):
    space: dict = {}
    exec(example("plain loop"), space)
    labels = space["supervision"].generator.labels
    assert set(labels) == {"fusion", "text", "audio"}
    assert not labels["text"].equal(space["labels"])
    assert labels["text"].abs().max() <= 3
    assert example("plain loop").count("# added") + example("plain loop").count("# changed") == 5


def test_other_parts_of_ulgm():
    space: dict = {}
    exec(example("parts"), space)
    space["supervision"].generator.update({"fusion": torch.rand(4, 20), "text": torch.rand(4, 32)}, torch.arange(4), 1)


def test_the_plain_loop_s_five_lines_are_what_it_takes():
    """Without the marked lines it is a loop without ULGM that still runs."""
    kept = [line for line in example("plain loop").splitlines() if "# added" not in line]
    code = "\n".join(kept).replace("[*parameters, *supervision.parameters()]", "parameters")
    space: dict = {}
    exec(code, space)
    assert "supervision" not in space


def test_a_model_in_one_file(monkeypatch, capsys, empty_folder):
    (empty_folder / "my_model.py").write_text(example("my_model.py"))
    commands = [line.strip() for line in README.splitlines() if "my_model.py" in line and line.startswith("    bench")]
    assert len(commands) == 4
    assert "fault" not in benchmark(monkeypatch, capsys, commands[0])
    out = benchmark(monkeypatch, capsys, f"{commands[1]} --epochs 1")
    assert "late_mean on demo, test split" in out
    out = benchmark(monkeypatch, capsys, f"{commands[2]} --epochs 3")
    assert "what ulgm adds" in out
    (empty_folder / "my_hook.py").write_text(example("my_hook.py"))
    out = benchmark(monkeypatch, capsys, f"{commands[3]} --epochs 1")
    assert "late_mean+small on demo, test split" in out
    assert "hook.strength=0.1" in out


def test_a_feature_file_of_ones_own(monkeypatch, capsys, encoder, empty_folder):
    exec(example("my_features.py"), {})
    (command,) = re.findall(r"benchmark run .*my_features\.pkl.*\\\n.*", README)
    out = benchmark(monkeypatch, capsys, command.replace("\\\n", "").replace("minilm", encoder) + " --epochs 2")
    assert "self_mm on custom, test split" in out
    assert "metrics: as defined for CH-SIMS" in out


def test_the_python_example(monkeypatch, capsys, encoder, empty_folder):
    """With a small file under the published name, and a tiny encoder in the place of the hub's."""
    monkeypatch.setattr("registry.data.text._hub_folder", lambda name: Path(encoder))
    feature_file(empty_folder, name="unaligned_50.pkl")
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "registry.run(" in block)
    exec(code.replace('"epochs": 20', '"epochs": 2'), {})
    out = capsys.readouterr().out
    assert re.match(r"\[\(1111, 'ok', None\), \(1112, 'ok', None\)\]\n\d\.\d+ \d\.\d+\n", out)
    assert "prediction" in out


def test_every_option_and_command_of_the_readme_exists(monkeypatch, capsys):
    helps = {}
    single = ("run", "compare", "table", "report", "list", "describe", "check", "labels", "import-checkpoint")
    for command in (*single, "predict", "missing", "push", "pull", "tune", "doctor"):
        monkeypatch.setenv("COLUMNS", "200")
        helps[command] = benchmark(monkeypatch, capsys, f"benchmark {command} --help")
    subcommands = {"add", "list", "remove", "get", "check", "from-csd"}
    assert set(re.findall(r"benchmark data ([a-z-]+)", README)) <= subcommands
    helps["data"] = "".join(benchmark(monkeypatch, capsys, f"benchmark data {name} --help") for name in subcommands)
    helps[""] = benchmark(monkeypatch, capsys, "benchmark --help")
    named = set(re.findall(r"benchmark ([a-z][a-z-]*)", README)) - {"run"}
    assert named <= helps.keys()
    for line in re.findall(r"benchmark (?:[a-z][a-z-]*)[^`\n]*", README):
        command = line.split()[1]
        for option in re.findall(r"(?<=\s)--?[a-z][a-z-]*", line):
            assert option in helps[command], line
    for option in set(re.findall(r"`[^`\n]*?(--[a-z][a-z-]*)", README)):
        assert any(option in text for text in helps.values()), option


def test_every_file_the_readme_names_is_there():
    for path in re.findall(r"`((?:docs|tests|registry|selfmm_plugin)/[\w./]+)`|\]\((docs/[\w.]+)\)", README):
        assert (ROOT / (path[0] or path[1])).exists(), path
