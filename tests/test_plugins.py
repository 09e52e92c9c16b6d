"""Finding plugins: entry points of installed distributions, files and modules given with `--plugin`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from textwrap import dedent
from types import ModuleType
from typing import Any

import pytest

from registry import DatasetSpec, HookSpec, InputError, ModelSpec, PublishedResults, TrainingHook, register_model
from registry.plugins import Entry, Plugins
from selfmm_plugin.plugin import SELF_MM, ULGM

MODEL = 'from registry import ModelSpec\nSPEC = ModelSpec(name="{0}", summary="{0} of {1}", build=print)\n'
KINDS = {"model": ModelSpec, "hook": HookSpec, "dataset": DatasetSpec, "published": PublishedResults}
Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Return a function that lays a distribution of one module where pip would, without pip."""
    before = set(sys.modules)

    def put(distribution: str, code: str, group: str = "mmsa.models", **points: str) -> None:
        folder = tmp_path / distribution
        info = folder / f"{distribution}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        lines = [f"{name} = {target}" for name, target in points.items()]
        (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines]))
        (folder / f"{distribution}.py").write_text(dedent(code))
        monkeypatch.syspath_prepend(folder)

    yield put
    for name in set(sys.modules) - before:
        if name.startswith(("stranger", "_plugin_")):
            del sys.modules[name]


@pytest.fixture
def plugin_file(tmp_path: Path) -> Callable[..., str]:
    def write(code: str, name: str = "my_model.py") -> str:
        path = tmp_path / name
        path.write_text(dedent(code))
        return str(path)

    return write


def refusal(name: str, kind: str = "model", files: tuple[str, ...] = ()) -> str:
    """Return the message with which a plugin, or a `--plugin` file, is refused."""
    with pytest.raises(InputError) as caught:
        Plugins(files).load(kind, name)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


def names(kind: str, files: tuple[str, ...] = ()) -> list[str]:
    return [entry.name for entry in Plugins(files).entries(kind)]


def checked(kind: str = "model") -> Mapping[str, Any]:
    """Return what `check` finds, by name."""
    return {entry.name: found for entry, found in Plugins().check(kind)}


# --- entry points


def test_an_entry_is_listed_with_its_origin_and_not_imported(install):
    install("stranger", MODEL.format("mine", "stranger"), mine="stranger:SPEC")
    (entry,) = [entry for entry in Plugins().entries("model") if entry.name == "mine"]
    assert entry == Entry("mine", "stranger", "1.0", "stranger:SPEC", "stranger", None)
    assert entry.origin == "stranger 1.0 (stranger:SPEC)"
    assert "stranger" not in sys.modules


def test_a_broken_plugin_is_listed_like_any_other(install):
    install("stranger", "raise ImportError('never reached')", mine="stranger:SPEC")
    assert "mine" in names("model")


def test_load_imports_and_returns_the_spec(install):
    install("stranger", MODEL.format("mine", "stranger"), mine="stranger:SPEC")
    spec = Plugins().load("model", "mine")
    assert isinstance(spec, ModelSpec)
    assert spec.summary == "mine of stranger"
    assert spec is sys.modules["stranger"].SPEC


@pytest.mark.parametrize("target", ["stranger:Mine", "stranger:Box.Inner"])
def test_a_registered_class_and_a_nested_one_are_targets(install, target):
    code = """
        import torch
        from registry import register_model

        @register_model("mine", summary="a class")
        class Mine(torch.nn.Module):
            pass

        class Box:
            Inner = Mine
    """
    install("stranger", code, mine=target)
    spec = Plugins().load("model", "mine")
    assert (spec.summary, spec.build) == ("a class", sys.modules["stranger"].Mine)


def test_blanks_and_extras_in_an_entry_point_are_read_as_the_standard_library_does(install):
    install("stranger", MODEL.format("mine", "stranger"), mine="stranger : SPEC [extra]")
    assert Plugins().load("model", "mine").name == "mine"


def test_a_subclass_does_not_inherit_its_parents_name(install):
    code = """
        import torch
        from registry import register_model

        @register_model("parent")
        class Parent(torch.nn.Module):
            pass

        class Child(Parent):
            pass
    """
    install("stranger", code, parent="stranger:Child")
    assert "is not a registry.ModelSpec" in refusal("parent")


@pytest.mark.parametrize(
    ("kind", "group", "code"),
    [
        ("hook", "mmsa.hooks", "from registry import HookSpec as S\nSPEC = S(name='mine', summary='', build=print)"),
        (
            "dataset",
            "mmsa.datasets",
            "from registry import DatasetSpec as S\nSPEC = S(name='mine', summary='', label_range=3.0, metrics='mosi')",
        ),
        (
            "published",
            "mmsa.published",
            "from registry import PublishedResults as S\nSPEC = S(name='mine', summary='', results=())",
        ),
    ],
)
def test_hooks_datasets_and_published_results_join_likewise(install, kind, group, code):
    install("stranger", code, group=group, mine="stranger:SPEC")
    assert "mine" in names(kind)
    assert "mine" not in names("model")
    assert Plugins().load(kind, "mine").name == "mine"


def test_the_registrys_own_are_found_like_anybody_elses():
    plugins = Plugins()
    own = {kind: [e.name for e in plugins.entries(kind) if e.distribution == "selfmm-plugin"] for kind in KINDS}
    assert "self_mm" in own["model"]
    assert "ulgm" in own["hook"]
    assert {"custom", "demo", "mosei", "mosi", "sims", "simsv2"} <= set(own["dataset"])
    assert plugins.load("model", "self_mm") is SELF_MM
    assert plugins.load("hook", "ulgm") is ULGM
    for kind, spec_class in KINDS.items():
        found = [spec for entry, spec in plugins.check(kind) if entry.distribution == "selfmm-plugin"]
        assert len(found) == len(own[kind])
        assert all(isinstance(spec, spec_class) for spec in found), found


# --- plugins that are broken

BROKEN = {
    "import": ("import no_such_package", "ModuleNotFoundError: No module named 'no_such_package'"),
    "syntax": ("x = 1\nif x print(x)", "SyntaxError"),
    "exit": ("raise SystemExit('go away')", "SystemExit: go away"),
    "anything": ("1 / 0", "ZeroDivisionError: division by zero"),
    "attribute": ("x = 1", "AttributeError: module 'stranger' has no attribute 'SPEC'"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_plugin_stands_in_its_place_and_the_others_load(install, fault):
    code, cause = BROKEN[fault]
    install("stranger", code, mine="stranger:SPEC")
    install("stranger_good", MODEL.format("good", "stranger_good"), good="stranger_good:SPEC")
    found = checked()
    assert isinstance(found["mine"], InputError)
    for part in ("model 'mine'", "stranger 1.0", cause):
        assert part in str(found["mine"])
    assert found["good"].summary == "good of stranger_good"
    assert found["self_mm"] is SELF_MM


@pytest.mark.parametrize("fault", BROKEN)
def test_loading_a_broken_plugin_says_whose_it_is_and_why(install, fault):
    code, cause = BROKEN[fault]
    install("stranger", code, mine="stranger:SPEC")
    message = refusal("mine")
    assert message.startswith("model 'mine' of stranger 1.0 (stranger:SPEC) cannot be used: ")
    assert cause in message


def test_the_cause_is_one_line_even_where_the_exception_has_many(install):
    # Pydantic's errors have a line for each field; a misspelt Training(...) in a plugin raises one.
    install("stranger", "from registry import Training\nTraining(batch_size=0, epochs='a')", mine="stranger:SPEC")
    assert "batch_size" in refusal("mine")


def test_an_interrupt_while_importing_is_not_swallowed(install):
    install("stranger", "raise KeyboardInterrupt", mine="stranger:SPEC")
    with pytest.raises(KeyboardInterrupt):
        Plugins().check("model")


@pytest.mark.parametrize(
    "value",
    [
        "HookSpec(name='mine', summary='', build=print)",
        "'mine'",
        "3",
        "None",
        "type('ModelSpec', (), {'name': 'mine'})()",  # the name alone does not make it one
    ],
)
def test_an_entry_point_must_name_a_spec_of_its_kind(install, value):
    install("stranger", f"from registry import HookSpec\nSPEC = {value}", mine="stranger:SPEC")
    assert refusal("mine") == "model 'mine' of stranger 1.0 (stranger:SPEC) is not a registry.ModelSpec"


def test_an_entry_point_that_names_only_a_module(install):
    install("stranger", MODEL.format("mine", "stranger"), mine="stranger")
    assert refusal("mine") == "model 'mine' of stranger 1.0 (stranger) is not a registry.ModelSpec"


def test_a_spec_of_another_name_is_refused(install):
    install("stranger", MODEL.format("yours", "stranger"), mine="stranger:SPEC")
    assert "model 'mine' of stranger 1.0 (stranger:SPEC) calls itself 'yours'" in refusal("mine")


# --- names


def test_two_plugins_with_one_name_are_both_named(install):
    for distribution in ("stranger_a", "stranger_b"):
        install(distribution, MODEL.format("mine", distribution), mine=f"{distribution}:SPEC")
    message = refusal("mine")
    assert message.startswith("model 'mine' is announced twice: ")
    assert "stranger_a 1.0" in message
    assert "stranger_b 1.0" in message
    found = [error for entry, error in Plugins().check("model") if entry.name == "mine"]
    assert len(found) == 2
    assert all("announced twice" in str(error) for error in found)


def test_both_are_named_even_where_one_of_them_is_broken(install):
    install("stranger", "import no_such_package", self_mm="stranger:SPEC")
    message = refusal("self_mm")
    assert "stranger 1.0" in message
    assert "selfmm-plugin" in message


def test_a_collision_leaves_other_names_alone(install):
    install("stranger", MODEL.format("self_mm", "stranger"), self_mm="stranger:SPEC")
    assert "selfmm-plugin" in refusal("self_mm")
    assert Plugins().load("hook", "ulgm") is ULGM


def test_one_name_in_two_groups_is_no_collision(install):
    install("stranger", MODEL.format("ulgm", "stranger"), ulgm="stranger:SPEC")
    plugins = Plugins()
    assert plugins.load("model", "ulgm").summary == "ulgm of stranger"
    assert plugins.load("hook", "ulgm") is ULGM


def test_the_same_spec_announced_twice_is_no_collision(install, plugin_file):
    install("stranger", MODEL.format("mine", "stranger"), mine="stranger:SPEC")
    file = plugin_file("from stranger import SPEC\nfrom selfmm_plugin.plugin import SELF_MM")
    plugins = Plugins([file])
    assert plugins.load("model", "mine") is sys.modules["stranger"].SPEC
    assert plugins.load("model", "self_mm") is SELF_MM


def test_a_file_that_takes_an_installed_name_is_a_collision(plugin_file):
    file = plugin_file(MODEL.format("self_mm", "file"))
    message = refusal("self_mm", files=(file,))
    assert "selfmm-plugin" in message
    assert file in message


@pytest.mark.parametrize(
    ("kind", "given", "meant"),
    [
        ("model", "self_nm", "self_mm"),
        ("model", "SELF_MM", "self_mm"),
        ("hook", "ulmg", "ulgm"),
        ("dataset", "mosy", "mosi"),
    ],
)
def test_an_unknown_name_brings_the_available_and_the_nearest(kind, given, meant):
    message = refusal(given, kind)
    assert message.startswith(f"unknown {kind} {given!r}, did you mean {meant!r}? (available: ")
    assert all(name in message for name in names(kind))


def test_an_unknown_name_that_resembles_nothing():
    assert "did you mean" not in refusal("zzzzzz")


# --- files and modules given with --plugin


def test_a_file_brings_every_spec_in_it(plugin_file):
    code = """
        import torch
        from registry import DatasetSpec, HookSpec, TrainingHook, register_model

        @register_model("late", summary="a class")
        class Late(torch.nn.Module):
            pass

        HOOK = HookSpec(name="extra", summary="", build=TrainingHook)
        DATA = DatasetSpec(name="mine", summary="", label_range=1.0, metrics="sims")
    """
    file = plugin_file(code)
    plugins = Plugins([file])
    assert plugins.load("model", "late").summary == "a class"
    assert plugins.load("hook", "extra").build is TrainingHook
    assert plugins.load("dataset", "mine").metrics == "sims"
    (entry,) = [entry for entry in plugins.entries("model") if entry.name == "late"]
    assert entry.origin == f"--plugin ({file})"
    assert "late" not in names("model")


def test_a_file_can_hold_dataclasses_and_configs(plugin_file):
    code = """
        from __future__ import annotations
        from dataclasses import dataclass, field
        from registry import Config, ModelSpec

        @dataclass
        class Part:
            width: int = 3
            parts: list[Part] = field(default_factory=list)

        class Mine(Config):
            width: int | None = 4
            other: Mine | None = None

        SPEC = ModelSpec(name="mine", summary="", build=Part, config=Mine)
    """
    spec = Plugins([plugin_file(code)]).load("model", "mine")
    assert spec.config(width=5, other=spec.config()).other.width == 4
    assert spec.build().width == 3


def test_the_same_file_twice_is_one_plugin(plugin_file):
    file = plugin_file(MODEL.format("mine", "file"))
    assert names("model", (file, file)).count("mine") == 1
    assert Plugins([file, file]).load("model", "mine").name == "mine"


def test_one_file_under_two_spellings_is_one_plugin(plugin_file, tmp_path, monkeypatch):
    file = plugin_file(MODEL.format("mine", "file"))
    monkeypatch.chdir(tmp_path)
    assert Plugins([file, "my_model.py"]).load("model", "mine").name == "mine"


def test_two_specs_of_one_name_in_one_file_are_a_collision(plugin_file):
    code = MODEL.format("mine", "first") + MODEL.format("mine", "second").replace("SPEC =", "OTHER =")
    assert "announced twice" in refusal("mine", files=(plugin_file(code),))


def test_two_files_of_one_name_are_two_modules(plugin_file, tmp_path):
    (tmp_path / "sub").mkdir()
    files = [plugin_file(MODEL.format("a", "file")), plugin_file(MODEL.format("b", "file"), "sub/my_model.py")]
    plugins = Plugins(files)
    assert [plugins.load("model", name).summary for name in "ab"] == ["a of file", "b of file"]


def test_a_file_that_does_not_exist(tmp_path):
    file = str(tmp_path / "none.py")
    assert refusal("mine", files=(file,)) == f"plugin {file} does not exist"


def test_a_syntax_error_comes_with_its_line(plugin_file):
    message = refusal("mine", files=(plugin_file("x = 1\ny = 2\nif x print(y)\n"),))
    assert "my_model.py cannot be imported, line 3: SyntaxError" in message


UNPRINTABLE = "class Odd(Exception):\n    def __str__(self): raise ValueError\nraise Odd"


@pytest.mark.parametrize("code", ["import no_such_package", "raise SystemExit(0)", "1 / 0", UNPRINTABLE, "x = '\0'"])
def test_a_file_that_fails_leaves_no_module_behind(plugin_file, code):
    before = set(sys.modules)
    file = plugin_file(code)
    assert refusal("mine", files=(file,)).startswith(f"plugin {file} cannot be imported: ")
    assert not [name for name in set(sys.modules) - before if name.startswith("_plugin_")]


def test_a_file_without_a_spec(plugin_file):
    # A private name and the class ModelSpec itself are no announcement.
    file = plugin_file(MODEL.format("mine", "file").replace("SPEC =", "_SPEC ="))
    assert refusal("mine", files=(file,)).startswith(f"plugin {file} holds no ModelSpec, DatasetSpec, HookSpec")


def test_a_dotted_module(tmp_path, monkeypatch):
    package = tmp_path / "stranger_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "models.py").write_text(MODEL.format("mine", "module"))
    monkeypatch.syspath_prepend(tmp_path)
    try:
        plugins = Plugins(["stranger_package.models"])
        assert plugins.load("model", "mine") is sys.modules["stranger_package.models"].SPEC
    finally:
        for name in ("stranger_package", "stranger_package.models"):
            sys.modules.pop(name, None)


@pytest.mark.parametrize("module", ["no_such.module", "", ".relative", "no/such/folder"])
def test_a_module_that_cannot_be_found(module):
    assert refusal("mine", files=(module,)).startswith(f"plugin {module} cannot be imported: ")


def test_register_model_gives_a_class_its_own_spec():
    class Model(TrainingHook):
        pass

    made = register_model("mine", summary="s", per_sample=True, needs=("audio",))(Model)
    assert made is Model
    assert (Model.spec.name, Model.spec.summary, Model.spec.build) == ("mine", "s", Model)
    assert (Model.spec.per_sample, Model.spec.needs) == (True, ("audio",))


# --- MODEL+HOOK

TWO = """
    from registry import HookSpec, ModelSpec, TrainingHook
    A = ModelSpec(name="a", summary="", build=print, hooks=("own",))
    OWN, B, C = (HookSpec(name=name, summary="", build=TrainingHook) for name in ("own", "b", "c"))
"""


@pytest.mark.parametrize(
    ("given", "more", "name", "hooks"),
    [
        ("a", (), "a", ["own"]),
        ("a+b", (), "a+b", ["own", "b"]),
        ("a+b+c", (), "a+b+c", ["own", "b", "c"]),
        ("a+c", ("b",), "a+c+b", ["own", "c", "b"]),
    ],
)
def test_a_model_borrows_hooks_by_name(plugin_file, given, more, name, hooks):
    full, spec, found = Plugins([plugin_file(TWO)]).load_model(given, more)
    assert (full, spec.name, [hook.name for hook in found]) == (name, "a", hooks)


@pytest.mark.parametrize(("given", "other"), [("a+b+c", "b"), ("a+c+b", "b"), ("a+c", "own")])
def test_a_hook_that_excludes_another(plugin_file, given, other):
    code = TWO + f'\n    C = HookSpec(name="c", summary="", build=TrainingHook, excludes={{"{other}": "they quarrel"}})'
    plugins = Plugins([plugin_file(code)])
    with pytest.raises(InputError) as caught:
        plugins.load_model(given)
    assert str(caught.value) == f"'a' cannot be trained with the hooks '{other}' and 'c' at once: they quarrel"
    assert [hook.name for hook in plugins.load_model("a")[2]] == ["own"]


@pytest.mark.parametrize("given", ["", "+", "a+", "+b", "a++b"])
def test_a_model_name_with_an_empty_part_is_refused(plugin_file, given):
    with pytest.raises(InputError, match="NAME or NAME\\+HOOK") as caught:
        Plugins([plugin_file(TWO)]).load_model(given)
    assert repr(given) in str(caught.value)


@pytest.mark.parametrize(
    ("given", "more", "reason"),
    [
        ("a+own", (), "hook 'own' cannot be added to 'a': a is always trained with it"),
        ("a+b+b", (), "hook 'b' cannot be added to 'a': it is named twice"),
        ("a+b", ("b",), "hook 'b' cannot be added to 'a': it is named twice"),
        ("a+bb", (), "unknown hook 'bb'"),
        ("aa+b", (), "unknown model 'aa', did you mean 'a'?"),
    ],
)
def test_a_hook_that_is_there_already_or_unknown_is_refused(plugin_file, given, more, reason):
    with pytest.raises(InputError) as caught:
        Plugins([plugin_file(TWO)]).load_model(given, more)
    assert str(caught.value).startswith(reason)


def test_what_a_plugin_prints_does_not_reach_standard_output(install, tmp_path, capsys):
    install("stranger", "print('loud')\n" + MODEL.format("mine", "stranger"), mine="stranger:SPEC")
    Plugins().load("model", "mine")
    (tmp_path / "loud.py").write_text("print('louder')\n" + MODEL.format("other", "loud"))
    Plugins([str(tmp_path / "loud.py")])
    assert capsys.readouterr() == ("", "loud\nlouder\n")


def test_a_file_finds_its_neighbours_and_a_module_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "neighbour_of_mine.py").write_text("SUMMARY = 'from next door'")
    (tmp_path / "beside.py").write_text("from neighbour_of_mine import SUMMARY\n" + MODEL.format("beside", "beside"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    before = list(sys.path)
    assert Plugins([str(tmp_path / "beside.py")]).load("model", "beside").name == "beside"
    assert Plugins(["beside"]).load("model", "beside").name == "beside"
    assert sys.path == before


def source_sha256(file: Path | str) -> str:
    return Plugins([str(file)]).entry("model", "mine").source_sha256


def test_files_in_two_folders_find_each_its_own_neighbour(tmp_path):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "neighbour_of_both.py").write_text(f"SUMMARY = 'from {folder}'")
        code = "from neighbour_of_both import SUMMARY\n" + MODEL.format(folder, "x").replace(
            f'"{folder} of x"', "SUMMARY"
        )
        (tmp_path / folder / "announced.py").write_text(code)
    files = [str(tmp_path / folder / "announced.py") for folder in "ab"]
    assert [Plugins([file]).load("model", name).summary for file, name in zip(files, "ab", strict=True)] == [
        "from a",
        "from b",
    ]
    plugins = Plugins(files)
    assert [plugins.load("model", name).summary for name in "ab"] == ["from a", "from b"]


def test_the_source_of_a_file_is_itself_and_what_it_imports_from_its_folder(tmp_path, monkeypatch):
    package = tmp_path / "neighbours"
    package.mkdir()
    mine = f"import neighbours.one\n{MODEL.format('mine', 'x')}\ndef f(): import late_neighbour\n"
    modules = {
        package / "__init__.py": "",
        package / "one.py": "from . import two",
        package / "two.py": "",
        tmp_path / "late_neighbour.py": "",
        tmp_path / "mine.py": mine,
    }
    others = [tmp_path / "unread.py", package / "unread.py", tmp_path / "torch.py"]
    for file, code in (modules | dict.fromkeys(others, "")).items():
        file.write_text(code)
    seen = {source_sha256(tmp_path / "mine.py")}
    monkeypatch.chdir(tmp_path)
    assert {source_sha256("mine.py")} == seen
    for file in others:
        file.write_text("# edited\n")
    driver = ModuleType("driver")
    driver.__file__ = str(tmp_path / "unread.py")
    monkeypatch.setitem(sys.modules, "driver", driver)
    assert {source_sha256("mine.py")} == seen
    for file, code in modules.items():
        file.write_text(code + "# edited\n")
        seen.add(source_sha256("mine.py"))
    assert len(seen) == 1 + len(modules)


def test_an_unchanged_neighbour_is_one_module_for_all_files(tmp_path):
    (tmp_path / "neighbour_of_two.py").write_text("class Shared: pass")
    for name in "ab":
        code = f"from neighbour_of_two import Shared\n{MODEL.format(name, name)}"
        (tmp_path / f"{name}.py").write_text(code.replace("build=print", "build=Shared"))
    plugins = Plugins([str(tmp_path / "a.py"), str(tmp_path / "b.py")])
    assert plugins.load("model", "a").build is plugins.load("model", "b").build


def test_a_module_that_somebody_else_imported_stays_theirs(tmp_path, monkeypatch):
    """The file gets what stands beside it now; who imported it before keeps what they have."""
    (tmp_path / "neighbour_in_use.py").write_text("SUMMARY = 'old'")
    monkeypatch.syspath_prepend(tmp_path)
    import neighbour_in_use  # type: ignore[import-not-found]

    code = MODEL.format("mine", "x").replace('"mine of x"', "SUMMARY")
    (tmp_path / "mine.py").write_text(f"from neighbour_in_use import SUMMARY\n{code}")
    (tmp_path / "neighbour_in_use.py").write_text("SUMMARY = 'new'")
    assert Plugins([str(tmp_path / "mine.py")]).load("model", "mine").summary == "new"
    assert sys.modules.pop("neighbour_in_use") is neighbour_in_use


def test_a_neighbour_that_is_gone_is_not_taken_from_elsewhere(tmp_path):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "file.py").write_text("import neighbour_of_one\n" + MODEL.format("mine", "x"))
    (tmp_path / "a" / "neighbour_of_one.py").write_text("")
    assert Plugins([str(tmp_path / "a" / "file.py")])
    for folder in "ba":
        (tmp_path / "a" / "neighbour_of_one.py").unlink(missing_ok=True)
        with pytest.raises(InputError, match="No module named 'neighbour_of_one'"):
            Plugins([str(tmp_path / folder / "file.py")])


def test_annotations_are_what_the_file_says(plugin_file):
    code = (
        MODEL.format("mine", "x") + "def f(x: int): ...\nSPEC.summary.__class__\nassert f.__annotations__['x'] is int\n"
    )
    assert names("model", (plugin_file(code),)).count("mine") == 1


def test_a_neighbours_syntax_error_is_named(tmp_path):
    (tmp_path / "broken_neighbour.py").write_text("\n\nif x print(y)\n")
    (tmp_path / "mine.py").write_text("import broken_neighbour\n" + MODEL.format("mine", "x"))
    message = refusal("mine", files=(str(tmp_path / "mine.py"),))
    assert "mine.py cannot be imported: SyntaxError" in message
    assert "broken_neighbour.py, line 3" in message
    (tmp_path / "mine.py").write_text("def f(): import broken_neighbour\n" + MODEL.format("mine", "x"))
    assert names("model", (str(tmp_path / "mine.py"),)).count("mine") == 1


def test_the_source_of_a_lone_module_is_also_what_stands_beside_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = set()
    for text in ("", "# edited"):
        (tmp_path / "neighbour_of_module.py").write_text(text)
        (tmp_path / "lone_module.py").write_text("import neighbour_of_module\n" + MODEL.format("mine", "x"))
        seen.add(Plugins(["lone_module"]).entry("model", "mine").source_sha256)
        for name in ("lone_module", "neighbour_of_module"):
            del sys.modules[name]
    assert len(seen) == 2


def test_one_plugin_may_stand_without_a_list(plugin_file):
    assert Plugins(plugin_file(MODEL.format("mine", "file"))).load("model", "mine").name == "mine"


@pytest.mark.parametrize("name", ["../escape", "/absolute", ".hidden", "a b", "x" * 101])
def test_a_name_that_is_no_folders_name(tmp_path, name):
    (tmp_path / "odd.py").write_text(MODEL.format(name, "odd"))
    with pytest.raises(InputError, match="a name is made of letters, digits"):
        Plugins([str(tmp_path / "odd.py")]).load("model", name)


def test_a_damaged_distribution_is_warned_of_and_the_rest_works(install, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    install("stranger", MODEL.format("mine", "stranger"), mine="stranger:SPEC")
    damaged = tmp_path / "damaged-1.0.dist-info"
    damaged.mkdir()
    (damaged / "METADATA").write_text("Metadata-Version: 2.1\nName: damaged\nVersion: 1.0\n")
    (damaged / "entry_points.txt").write_text("[mmsa.models]\nno equals sign\n")
    with pytest.warns(UserWarning, match="an installed package's entry points cannot be read"):
        assert Plugins().load("model", "mine").name == "mine"


def test_a_plugin_that_leaves_by_an_exception_of_its_own(install):
    code = "class Panic(BaseException): ...\nraise Panic('deep')"
    install("stranger", code, mine="stranger:SPEC")
    with pytest.raises(InputError, match="cannot be used: Panic: deep"):
        Plugins().load("model", "mine")


@pytest.mark.parametrize("value", ["foo.mod:Model [x] y", "", "not a module"])
def test_a_malformed_entry_point_is_named_and_left_out(tmp_path, monkeypatch, value):
    folder = tmp_path / "foo-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: foo\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text(f"[mmsa.models]\nfoo = {value}\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.warns(UserWarning, match="mmsa.models 'foo' of foo is left out"):
        names = [entry.name for entry in Plugins().entries("model")]
    assert "self_mm" in names
    assert "foo" not in names
