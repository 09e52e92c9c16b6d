"""Rules of the house: who may import whom, what an import may do, and clean tools."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import registry

ROOT = Path(__file__).parents[1]
PLUGINS = ("selfmm_plugin", "baselines_compat")
SOURCES = {package: sorted((ROOT / package).rglob("*.py")) for package in ("registry", *PLUGINS)}
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for paths in SOURCES.values()
    for path in paths
)


def imports(source: str) -> Iterator[tuple[str, str | None]]:
    """Yield (module, name) of every absolute import, wherever it stands; name is None for `import module`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from ((node.module or "", alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            yield from ((arg.value, None) for arg in node.args[:1] if isinstance(arg, ast.Constant))


def top(module: str) -> str:
    return module.partition(".")[0]


def python(code: str, *arguments: str, cwd: Path = ROOT) -> str:
    """Run code in a fresh interpreter that finds this tree first, and return what it printed."""
    preamble = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
    command = [sys.executable, "-B", "-c", preamble + code, *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# --- who imports whom


def test_the_walk_sees_every_form_of_import():
    source = """
        import a.b
        from c import d as e
        from . import own
        def later():
            from f.g import h
            importlib.import_module("i.j")
    """
    seen = set(imports("if True:" + source))
    assert seen == {("a.b", None), ("c", "d"), ("f.g", "h"), ("i.j", None)}
    assert all(len(paths) > 0 for paths in SOURCES.values())


@pytest.mark.parametrize("path", SOURCES["registry"], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_registry_never_imports_a_plugin(path):
    assert not [module for module, _ in imports(path.read_text("utf-8")) if top(module) in PLUGINS]


@pytest.mark.parametrize("package", PLUGINS)
def test_plugins_import_only_public_names_of_the_registry(package):
    """`from registry import X`; the registry's submodules and private names are its own business."""
    public = {("registry", name) for name in registry.__all__}
    for path in SOURCES[package]:
        used = {pair for pair in imports(path.read_text("utf-8")) if top(pair[0]) == "registry"}
        assert used <= public, f"{path.name}: {used - public}"


def test_self_mm_does_not_know_the_baselines():
    for path in SOURCES["selfmm_plugin"]:
        assert "baselines_compat" not in {top(module) for module, _ in imports(path.read_text("utf-8"))}, path.name


def test_no_source_names_a_plugins_model():
    """The host has no special case for `self_mm`: it finds it by its entry point."""
    for path in SOURCES["registry"]:
        constants = [node.value for node in ast.walk(ast.parse(path.read_text("utf-8"))) if is_text(node)]
        assert "self_mm" not in constants, path.name
        assert "ulgm" not in constants, path.name


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


# --- what an import loads

HEAVY = [
    *("torch", "transformers", "numpy", "pandas", "sklearn", "safetensors", "matplotlib"),
    *("h5py", "optuna", "tensorboard", "jinja2"),
]
LOADED = f"print([name for name in {HEAVY} if name in sys.modules])"


def test_the_registrys_names_are_lazy():
    assert python(f"import registry\n{LOADED}").strip() == "[]"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["run", "--help"],
        ["labels", "--help"],
        ["data", "from-csd", "--help"],
        ["report", "--help"],
        ["predict", "--help"],
        ["missing", "--help"],
        ["push", "--help"],
        ["tune", "--help"],
        ["doctor", "--help"],
        ["list", "models"],
        ["list", "datasets", "--json"],
        ["nonsense"],
    ],
    ids=" ".join,
)
def test_commands_that_need_no_model_load_none(arguments):
    code = f"""
from registry.cli import main
sys.argv[0] = "benchmark"
try:
    main()
except SystemExit:
    pass
print()
{LOADED}
"""
    assert python(code, *arguments).splitlines()[-1] == "[]"


def test_ulgm_in_a_plain_loop_loads_no_text_encoder_and_no_command_line():
    heavy = ["transformers", "pandas", "sklearn", "typer", "rich", "registry.benchmark", "registry.training"]
    code = f"from selfmm_plugin import UnimodalSupervision\nprint([name for name in {heavy} if name in sys.modules])"
    assert python(code).strip() == "[]"


def test_public_names():
    assert len(set(registry.__all__)) == len(registry.__all__)
    for name in registry.__all__:
        assert getattr(registry, name).__name__ == name
    promised = {"Batch", "FusionOutput", "DataInfo", "Training", "ModelSpec", "DatasetSpec", "HookSpec", "TrainingHook"}
    assert promised | {"register_model", "run", "load_run", "Result"} <= set(registry.__all__)
    assert dir(registry) == registry.__all__


@pytest.mark.parametrize("name", ["no_such_name", "split_model_name", "__wrapped__"])
def test_an_unknown_name(name):
    with pytest.raises(AttributeError, match=f"module 'registry' has no attribute '{name}'"):
        getattr(registry, name)


# --- what an import does

SIDE_EFFECTS = """
import importlib, json, logging, os, random, warnings
import MMSA, numpy, pandas, rich.console, safetensors.torch, sklearn.metrics, torch, transformers, typer
from transformers import AutoConfig, AutoModel, AutoTokenizer

wrote = []
def audit(event, arguments):
    if event == "open":
        _, mode, flags = arguments
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and arguments[0] != os.devnull:
            wrote.append(str(arguments[0]))
    elif event in ("os.mkdir", "os.rename", "os.remove", "os.chdir", "os.putenv", "socket.connect", "subprocess.Popen"):
        wrote.append(event + str(arguments))
sys.addaudithook(audit)

def state():
    root = logging.getLogger()
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": numpy.random.get_state()[1].tolist(),
        "random": random.getstate(),
        "dtype": str(torch.get_default_dtype()),
        "threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "logging": [str(handler) for handler in root.handlers] + [root.level],
        "verbosity": transformers.logging.get_verbosity(),
        "warnings": len(warnings.filters),
        "directory": os.getcwd(),
        "path": list(sys.path),
    }

changed = {}
before = state()
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
    after = state()
    faults = [key for key in before if before[key] != after[key]] + wrote
    if faults:
        changed[name] = faults
    before, wrote[:] = after, []
print(json.dumps(changed))
"""


def test_no_import_has_a_side_effect(tmp_path):
    """Nothing is written, started or seeded; the libraries that are used are imported beforehand."""
    shown = python(SIDE_EFFECTS, json.dumps(MODULES), cwd=tmp_path)
    assert json.loads(shown) == {}
    assert list(tmp_path.iterdir()) == []


def test_the_watch_for_side_effects_sees_one(tmp_path):
    (tmp_path / "guilty.py").write_text("import torch\ntorch.rand(1)\nopen('trace.txt', 'w').close()\n")
    shown = python("sys.path.insert(0, '.')\n" + SIDE_EFFECTS, json.dumps(["guilty"]), cwd=tmp_path)
    assert json.loads(shown) == {"guilty": ["torch", "trace.txt"]}


# --- tools


@pytest.mark.parametrize(
    "arguments",
    [["ruff", "check", "--no-cache", "."], ["ruff", "format", "--check", "--no-cache", "."], ["mypy", "--cache-dir"]],
    ids=["ruff check", "ruff format", "mypy"],
)
def test_tools_have_nothing_to_say(arguments, tmp_path):
    cache = [str(tmp_path)] if arguments[-1] == "--cache-dir" else []
    done = subprocess.run(
        [sys.executable, "-m", *arguments, *cache], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_metrics_and_testing_are_reached_without_a_further_import():
    code = "import registry as r; print(r.metrics.regression([1.0, 2.0], [1.0, 2.0])['MAE'], r.testing.check_model)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("0.0 <function check_model")
