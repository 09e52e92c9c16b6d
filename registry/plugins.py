"""Finding models, datasets, hooks and published results: entry points of packages, and files given with `--plugin`.

    plugins = Plugins(["my_model.py"])
    plugins.entries("model")              # names, distributions, versions; nothing is imported
    plugins.load("model", "self_mm")      # imports one

An entry point is `name = "package.module:SPEC"` in the group `mmsa.models`, `mmsa.datasets`, `mmsa.hooks` or
`mmsa.published`. SPEC is a `ModelSpec`, `DatasetSpec`, `HookSpec` or `PublishedResults`, or a class that
`register_model` gave one.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import os
import re
import secrets
import sys
import sysconfig
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import Any

from .errors import InputError, one_line, unknown

GROUPS = {
    "model": "mmsa.models",
    "dataset": "mmsa.datasets",
    "hook": "mmsa.hooks",
    "published": "mmsa.published",
}
NAME = r"[A-Za-z0-9][\w.-]{0,99}"
"""What plugins and tables may be called: their names become those of folders and files."""
_SPECS = {"model": "ModelSpec", "dataset": "DatasetSpec", "hook": "HookSpec", "published": "PublishedResults"}


@dataclass(frozen=True)
class Entry:
    """A plugin as it is announced, by an installed package's entry point or by a `--plugin` file that is loaded."""

    name: str
    distribution: str
    version: str
    target: str
    module: str
    """the name of the module that announces it, once it is imported"""
    source: Any = field(compare=False, repr=False)
    """the entry point, or what a `--plugin` file holds"""
    file_sha256: str | None = None
    """hash of a `--plugin` file and of what it imports from its folder"""

    @property
    def origin(self) -> str:
        """Where it comes from, for messages."""
        return f"{self.distribution} {self.version} ({self.target})".replace("  ", " ")

    def load(self) -> Any:
        """Return the spec, imported where it is not yet; raises whatever importing it raises."""
        if not isinstance(self.source, metadata.EntryPoint):
            return _spec_of(self.source)
        with redirect_stdout(sys.stderr):  # standard output is for results
            spec = _spec_of(self.source.load())
        _module_sha256(sys.modules[self.module])
        return spec

    @property
    def is_packaged(self) -> bool:
        """Whether its version says which source it is; that of a single file that nobody installed does not."""
        module = sys.modules[self.module]
        in_package = "." in module.__name__ or hasattr(module, "__path__")
        announced = in_package or isinstance(self.source, metadata.EntryPoint) or _is_installed(module)
        return self.file_sha256 is None and hasattr(module, "__file__") and announced

    @property
    def source_sha256(self) -> str:
        """12 hex digits of a hash of its source as it was when it was loaded."""
        return self.file_sha256 or _module_sha256(sys.modules[self.module])


class Plugins:
    """What is installed, and the plugins in `files`, which are `FILE.py` paths or dotted module names.

    Raises:
        InputError: a file of `files` cannot be imported or holds no spec.
    """

    def __init__(self, files: Sequence[str] = ()) -> None:
        given = [files] if isinstance(files, (str, Path)) else files
        once = {os.path.realpath(file) if file.endswith(".py") else file: file for file in map(str, given)}
        self._given = [entry for file in once.values() for entry in _entries_of_file(file)]

    def entries(self, kind: str) -> list[Entry]:
        """Return every plugin of a kind ("model", "dataset", "hook", "published"), by name; nothing is imported."""
        installed = {
            Entry(point.name, name, version, point.value, point.module, point)
            for name, version, points in _distributions()
            for point in points
            if point.group == GROUPS[kind]
        }
        given = [entry for kind_of_entry, entry in self._given if kind_of_entry == kind]
        return sorted([*installed, *given], key=lambda entry: (entry.name, entry.origin))

    def load(self, kind: str, name: str) -> Any:
        """Return the spec of a name.

        Raises:
            InputError: there is no such plugin, there are two, or it cannot be imported.
        """
        found = [entry for entry in self.entries(kind) if entry.name == name]
        if not found:
            raise InputError(unknown(kind, name, {entry.name for entry in self.entries(kind)}))
        # A --plugin file may import an installed spec under its own name.
        if len(found) > 1 and not _are_one(found):
            raise InputError(f"{kind} {name!r} is announced twice: {' and '.join(entry.origin for entry in found)}")
        return _resolve(kind, found[0])

    def entry(self, kind: str, name: str) -> Entry:
        """Return the entry of a name that is loaded."""
        return next(entry for entry in self.entries(kind) if entry.name == name)

    def load_model(self, name: str, hooks: Sequence[str] = ()) -> tuple[str, Any, list[Any]]:
        """Return the full name, the model's spec and its hooks' specs, of `NAME` or `NAME+HOOK+…` with further hooks.

        Raises:
            InputError: the name is malformed, a plugin cannot be loaded, a hook is there already or excludes another.
        """
        model, *borrowed = name.split("+")
        extra = [*borrowed, *([hooks] if isinstance(hooks, str) else hooks)]
        if not model or not all(extra):
            raise InputError(f"a model is named NAME or NAME+HOOK, and a hook HOOK, got {'+'.join([model, *extra])!r}")
        spec = self.load("model", model)
        for hook in extra:
            if [*spec.hooks, *extra].count(hook) > 1:
                reason = f"{model} is always trained with it" if hook in spec.hooks else "it is named twice"
                raise InputError(f"hook {hook!r} cannot be added to {model!r}: {reason}")
        found = [self.load("hook", hook) for hook in (*spec.hooks, *extra)]
        for hook in found:
            for other in sorted(hook.excludes.keys() & {*spec.hooks, *extra}):
                both = f"{model!r} cannot be trained with the hooks {other!r} and {hook.name!r} at once"
                raise InputError(f"{both}: {hook.excludes[other]}")
        return "+".join([model, *extra]), spec, found

    def check(self, kind: str) -> list[tuple[Entry, Any]]:
        """Import every plugin of a kind; a failure stands in the place of its spec, as an InputError."""
        results = []
        for entry in self.entries(kind):
            try:
                results.append((entry, self.load(kind, entry.name)))
            except InputError as error:
                results.append((entry, error))
        return results


def _distributions() -> list[tuple[str, str, list[metadata.EntryPoint]]]:
    """Return name, version and our entry points of what is installed; one that is damaged is warned of and left out."""
    found: dict[str, tuple[str, str, list[metadata.EntryPoint]]] = {}
    for distribution in metadata.distributions():
        try:
            name = distribution.name
            points = [point for point in distribution.entry_points if point.group in GROUPS.values()]
        except Exception as error:
            warnings.warn(f"an installed package's entry points cannot be read: {one_line(error)}", stacklevel=2)
            continue
        if name in found:  # the first on the path is the one that is imported
            continue
        wrong = [point for point in points if not point.pattern.match(point.value)]
        for point in wrong:
            warnings.warn(
                f"{point.group} {point.name!r} of {name} is left out: {point.value!r} is not package.module:SPEC",
                stacklevel=2,
            )
        found[name] = name, distribution.version or "", [point for point in points if point not in wrong]
    return list(found.values())


def _are_one(entries: Sequence[Entry]) -> bool:
    try:
        return len({id(entry.load()) for entry in entries}) == 1
    except KeyboardInterrupt:
        raise
    except BaseException:
        return False


def _resolve(kind: str, entry: Entry) -> Any:
    try:
        spec = entry.load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # somebody else's code may leave by any exception
        raise InputError(f"{kind} {entry.name!r} of {entry.origin} cannot be used: {one_line(error)}") from error
    if _kind_of(spec) != kind:
        raise InputError(f"{kind} {entry.name!r} of {entry.origin} is not a registry.{_SPECS[kind]}")
    if not re.fullmatch(NAME, spec.name):
        raise InputError(f"{kind} {spec.name!r} of {entry.origin}: a name is made of letters, digits, '.', '_' and '-'")
    if spec.name != entry.name:
        raise InputError(f"{kind} {entry.name!r} of {entry.origin} calls itself {spec.name!r}; the names must be equal")
    if strange := _strange_keys(spec):
        raise InputError(f"{kind} {entry.name!r} of {entry.origin}: search has {strange[0]!r}, which is no config key")
    return spec


def _strange_keys(spec: Any) -> list[str]:
    """Return what is to be searched of a model, and is no config key of it; those of hooks are not known here."""
    from .contract import ModelSpec, Training

    if not isinstance(spec, ModelSpec):
        return []
    known = {*spec.config.model_fields, *Training.model_fields, "hook"}
    return [key for key in spec.search if key.split(".")[0] not in known]


def _spec_of(value: Any) -> Any:
    """Return a value that is a spec, or the one a class was given by `register_model`."""
    own = vars(value).get("spec") if isinstance(value, type) else None
    return value if own is None else own


@cache
def _module_sha256(module: ModuleType) -> str:
    """Return the hash of a module's source as it was when this was first called.

    The source of a module in a package is all of the package's. A module without a file, as in a notebook, is like no
    other.
    """
    package = sys.modules.get(module.__name__.partition(".")[0], module)
    if hasattr(package, "__path__"):
        files = [(folder, path) for folder in package.__path__ for path in Path(folder).rglob("*.py")]
        return _hash({str(path.relative_to(folder)): _read(path) for folder, path in files})
    file = getattr(module, "__file__", None)
    if file is None:
        return secrets.token_hex(6)
    if _is_installed(module):
        return _hash({"": _read(Path(file))})
    return _hash({name: content for name, (_, content) in _sources(Path(file).resolve()).items()})


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _hash(sources: Mapping[str, bytes]) -> str:
    parts = (name + hashlib.sha256(sources[name]).hexdigest() for name in sorted(sources))
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:12]


def _is_installed(module: ModuleType) -> bool:
    """Whether a module belongs to Python or to what is installed for it, and not to a user's folder."""
    file = getattr(module, "__file__", None)
    paths = sysconfig.get_paths()
    roots = [Path(paths[key]).resolve() for key in ("stdlib", "platstdlib", "purelib", "platlib")]
    return file is None or any(Path(file).resolve().is_relative_to(root) for root in roots)


def _kind_of(value: Any) -> str | None:
    from . import contract

    return next((kind for kind, spec in _SPECS.items() if isinstance(value, getattr(contract, spec))), None)


def _entries_of_file(given: str) -> list[tuple[str, Entry]]:
    """Import a `--plugin` and return every spec in its namespace, with its kind."""
    is_file = given.endswith(".py")
    if is_file and not os.path.isfile(given):
        raise InputError(f"plugin {given} does not exist")
    sha256 = None
    try:
        with redirect_stdout(sys.stderr):
            if is_file:
                module, sha256 = _import_file(Path(given))
            else:
                # The console script does not see what stands in the working folder.
                with _on_path(os.getcwd()):
                    module = importlib.import_module(given)
                _module_sha256(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        own = isinstance(error, SyntaxError) and error.filename and error.lineno and Path(error.filename) == Path(given)
        where = f", line {error.lineno}" if own else ""  # type: ignore[attr-defined]
        raise InputError(f"plugin {given} cannot be imported{where}: {one_line(error)}") from error
    specs = {
        id(spec): spec for name, value in vars(module).items() if _kind_of(spec := _spec_of(value)) and name[0] != "_"
    }
    if not specs:
        kinds = ", ".join(_SPECS.values())
        raise InputError(f"plugin {given} holds no {kinds} and no class with @register_model")
    return [
        (str(_kind_of(spec)), Entry(spec.name, "--plugin", "", given, module.__name__, spec, sha256))
        for spec in specs.values()
    ]


@contextmanager
def _on_path(folder: str) -> Iterator[None]:
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with suppress(ValueError):  # the plugin may have taken it out
            sys.path.remove(folder)


def _import_file(path: Path) -> tuple[ModuleType, str]:
    """Import a file, and what it imports from its folder, as they now are; return the module and their hash."""
    sources = _sources(path.resolve())
    others = _make_way(sources)
    before, writes_bytecode = set(sys.modules), sys.dont_write_bytecode
    # One name a path: dataclasses and pydantic look their module up by it.
    name = f"_plugin_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.dont_write_bytecode = True  # it is told apart by the second only
    importlib.invalidate_caches()
    try:
        with _on_path(str(path.resolve().parent)):
            exec(compile(sources[""][1], path, "exec", dont_inherit=True), module.__dict__)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.dont_write_bytecode = writes_bytecode
        _BESIDE.update({name: sources[name] for name in sources.keys() & sys.modules.keys() - before - others.keys()})
        sys.modules.update(others)
    return module, _hash({name: content for name, (_, content) in sources.items()})


_BESIDE: dict[str, tuple[Path, bytes]] = {}
"""Modules that `--plugin` files brought in from their folders, by name, with their source."""


def _make_way(sources: Mapping[str, tuple[Path, bytes]]) -> dict[str, ModuleType]:
    """Drop loaded modules that would stand in for what is now beside a file; return those that others brought in."""
    folder = sources[""][0].parent
    others = {name: sys.modules[name] for name in sources.keys() - _BESIDE.keys() if name in sys.modules}
    others = {name: module for name, module in others.items() if not _is_installed(module)}  # of unknown source
    stale = {
        name
        for name, (file, content) in _BESIDE.items()
        if not file.is_file()
        or not file.is_relative_to(folder)
        or sources.get(name, (file, content)) != (file, content)
    }
    if stale or others:
        for name in {*_BESIDE, *others}:  # they may have imported one another
            sys.modules.pop(name, None)
        _BESIDE.clear()
    return others


def _sources(path: Path) -> dict[str, tuple[Path, bytes]]:
    """Return a file ("") and what its source says it imports from its folder, at any depth, by module name.

    What installed plugins are made of has a version, and is left out.
    """
    points = [point for _, _, points in _distributions() for point in points]
    packaged = {__package__, *(point.module.partition(".")[0] for point in points)}
    found: dict[str, tuple[Path, bytes]] = {}
    waiting = {"": path}
    while waiting:
        name, file = waiting.popitem()
        found[name] = file, file.read_bytes()
        package = name if file.name == "__init__.py" else name.rpartition(".")[0]
        for wanted in _imports(found[name][1], package):
            parts = wanted.split(".")
            for stem in accumulate(parts, "{}.{}".format) if parts[0] not in packaged else ():
                place = path.parent.joinpath(*stem.split("."))
                files = [f for f in (place / "__init__.py", place.with_name(f"{place.name}.py")) if f.is_file()]
                if files and stem not in found:
                    waiting[stem] = files[0]
    return found


def _imports(source: bytes, package: str) -> Iterator[str]:
    """Give the dotted names that a source imports, and those that may be modules; none if it is not Python."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # importing it says where
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            with suppress(ImportError):  # beyond the top
                base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
                yield base
                yield from (f"{base}.{alias.name}" for alias in node.names)
