"""Finding models, datasets and hooks: entry points of installed packages, and files given with `--plugin`.

    plugins = Plugins(["my_model.py"])
    plugins.entries("model")              # names, distributions, versions; nothing is imported
    plugins.load("model", "self_mm")      # imports one

An entry point is `name = "package.module:SPEC"` in the group `mmsa.models`, `mmsa.datasets` or `mmsa.hooks`.
SPEC is a `ModelSpec`, `DatasetSpec` or `HookSpec`, or a class that `register_model` gave one.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from .errors import InputError, unknown

GROUPS = {"model": "mmsa.models", "dataset": "mmsa.datasets", "hook": "mmsa.hooks"}
_SPECS = {"model": "ModelSpec", "dataset": "DatasetSpec", "hook": "HookSpec"}


@dataclass(frozen=True)
class Entry:
    """A plugin as it is announced; `spec` is set where a `--plugin` file has been loaded already."""

    name: str
    distribution: str
    version: str
    target: str
    spec: Any = field(default=None, compare=False, repr=False)

    @property
    def origin(self) -> str:
        """Where it comes from, for messages."""
        return f"{self.distribution} {self.version} ({self.target})".replace("  ", " ")


class Plugins:
    """What is installed, and the plugins in `files`, which are `FILE.py` paths or dotted module names.

    Raises:
        InputError: a file of `files` cannot be imported or holds no spec.
    """

    def __init__(self, files: Sequence[str] = ()) -> None:
        self._given = [entry for file in files for entry in _entries_of_file(str(file))]

    def entries(self, kind: str) -> list[Entry]:
        """Return every plugin of a kind ("model", "dataset", "hook"), by name; nothing is imported."""
        found = {entry for kind_of_entry, entry in self._given if kind_of_entry == kind}
        for point in metadata.entry_points(group=GROUPS[kind]):
            name, version = "unknown", ""
            if point.dist is not None:
                name, version = point.dist.name or name, point.dist.version or version
            found.add(Entry(point.name, name, version, point.value))
        return sorted(found, key=lambda entry: (entry.name, entry.origin))

    def load(self, kind: str, name: str) -> Any:
        """Return the spec of a name.

        Raises:
            InputError: there is no such plugin, there are two, or it cannot be imported.
        """
        found = [entry for entry in self.entries(kind) if entry.name == name]
        if not found:
            raise InputError(unknown(kind, name, {entry.name for entry in self.entries(kind)}))
        # A --plugin file may import an installed spec under its own name.
        if len(found) > 1 and len({id(_resolve(kind, entry)) for entry in found}) > 1:
            raise InputError(f"{kind} {name!r} is announced twice: {' and '.join(entry.origin for entry in found)}")
        return _resolve(kind, found[0])

    def load_model(self, name: str, hooks: Sequence[str] = ()) -> tuple[str, Any, list[Any]]:
        """Return the full name, the model's spec and its hooks' specs, of `NAME` or `NAME+HOOK+…` with further hooks.

        Raises:
            InputError: the name is malformed, a plugin cannot be loaded, or a hook is there already.
        """
        model, *borrowed = name.split("+")
        extra = [*borrowed, *hooks]
        if not model or not all(extra):
            raise InputError(f"a model is named NAME or NAME+HOOK, got {name!r}")
        spec = self.load("model", model)
        for hook in extra:
            if [*spec.hooks, *extra].count(hook) > 1:
                reason = f"{model} is always trained with it" if hook in spec.hooks else "it is named twice"
                raise InputError(f"hook {hook!r} cannot be added to {model!r}: {reason}")
        return "+".join([model, *extra]), spec, [self.load("hook", hook) for hook in (*spec.hooks, *extra)]

    def check(self, kind: str) -> list[tuple[Entry, Any]]:
        """Import every plugin of a kind; a failure stands in the place of its spec, as an InputError."""
        results = []
        for entry in self.entries(kind):
            try:
                results.append((entry, self.load(kind, entry.name)))
            except InputError as error:
                results.append((entry, error))
        return results


def _resolve(kind: str, entry: Entry) -> Any:
    spec = entry.spec
    if spec is None:
        module, _, attributes = entry.target.partition(":")
        try:
            spec = importlib.import_module(module)
            for attribute in filter(None, attributes.split(".")):
                spec = getattr(spec, attribute)
        except (Exception, SystemExit) as error:
            raise InputError(
                f"{kind} {entry.name!r} of {entry.origin} cannot be used: {type(error).__name__}: {error}"
            ) from error
        spec = _spec_of(spec)
    if type(spec).__name__ != _SPECS[kind] or not _kind_of(spec) == kind:
        raise InputError(f"{kind} {entry.name!r} of {entry.origin} is not a registry.{_SPECS[kind]}")
    if spec.name != entry.name:
        raise InputError(f"{kind} {entry.name!r} of {entry.origin} calls itself {spec.name!r}; the names must be equal")
    return spec


def _spec_of(value: Any) -> Any:
    """Return a value that is a spec, or the one a class was given by `register_model`."""
    own = vars(value).get("spec") if isinstance(value, type) else None
    return value if own is None else own


def _kind_of(value: Any) -> str | None:
    from . import contract

    return next((kind for kind, spec in _SPECS.items() if isinstance(value, getattr(contract, spec))), None)


def _entries_of_file(given: str) -> list[tuple[str, Entry]]:
    """Import a `--plugin` and return every spec in its namespace, with its kind."""
    try:
        module = _import_path(Path(given)) if given.endswith(".py") else importlib.import_module(given)
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        where = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise InputError(f"plugin {given} cannot be imported{where}: {type(error).__name__}: {error}") from error
    specs = [_spec_of(value) for name, value in vars(module).items() if not name.startswith("_")]
    found = {
        id(spec): (kind, Entry(spec.name, "--plugin", "", given, spec)) for spec in specs if (kind := _kind_of(spec))
    }
    if not found:
        raise InputError(
            f"plugin {given} holds no ModelSpec, DatasetSpec or HookSpec, and no class with @register_model"
        )
    return list(found.values())


def _import_path(path: Path) -> ModuleType:
    if not path.is_file():
        raise InputError(f"plugin {path} does not exist")
    # One name a path: dataclasses and pydantic look their module up by it.
    name = f"_plugin_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
