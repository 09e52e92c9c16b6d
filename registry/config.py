"""The configuration of a run: preset ← dataset's defaults ← file ← `--set`, typed, every fault reported at once.

config = resolve(spec, hooks, dataset, overrides={"batch_size": 8, "hook.distance": "cosine"})
config.model.batch_size, config.hooks["ulgm"].distance
"""

from __future__ import annotations

import json
import reprlib
import sys
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from numbers import Number
from pathlib import Path
from typing import Any

from pydantic import ValidationError, create_model
from pydantic.fields import FieldInfo

from .contract import Config, DatasetSpec, HookSpec, ModelSpec, Training
from .errors import InputError, unknown

HOOK = "hook."
_LARGEST = 1 << 20
"""bytes of a config file"""
_MOST_DOTS = 200
"""in a line: Python's reader of TOML takes a time that grows with the square of a key's parts"""
_MOST_KEYS = 1000
_LONGEST_KEY = 100
_MOST_FAULTS = 20
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 200
_REPR.maxlist = _REPR.maxtuple = _REPR.maxdict = 20


@dataclass(frozen=True)
class RunConfig:
    """A resolved configuration: `model` has the model's own keys and those of `Training`."""

    model: Any
    hooks: dict[str, Config]
    preset: str | None
    derived: Mapping[str, frozenset[str]]
    """keys by hook that follow from the model's own"""
    changed: Mapping[str, Any] = field(default_factory=dict)
    """what the user set to something else than preset and defaults have"""

    def as_dict(self) -> dict[str, Any]:
        """Return one flat dict, ready for JSON; the keys of hooks as `hook.KEY`, those that are derived left out."""
        values = self.model.model_dump(mode="json")
        for name, config in self.hooks.items():
            own = config.model_dump(mode="json", exclude=set(self.derived[name]))
            values |= {HOOK + key: value for key, value in own.items()}
        return values


def config_class(spec: ModelSpec) -> type[Config]:
    """Return the class of a model's whole config: the fields of `Training`, with the spec's defaults, and its own."""
    own = spec.config.model_fields
    if taken := {"standardize", "without"} & own.keys():
        raise InputError(f"model {spec.name!r} has a config key {min(taken)!r}, which is every model's: rename it")
    defaults = {
        key: (info.annotation, FieldInfo.merge_field_infos(info, default=getattr(spec.training, key)))
        for key, info in Training.model_fields.items()
        if key not in own
    }
    return create_model(f"{spec.name}_config", __base__=spec.config, **defaults)  # type: ignore[call-overload]


def resolve(
    spec: ModelSpec,
    hooks: Sequence[HookSpec],
    dataset: DatasetSpec,
    *,
    preset: str | None = None,
    file: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> RunConfig:
    """Layer and validate a configuration; a later layer wins. A dict's entries, `KEY.ENTRY`, are layered one by one.

    Args:
        spec: whose class defaults are the first layer.
        hooks: the hooks of the run; their keys are `hook.KEY`.
        dataset: picks the values of a preset.
        preset: a name in `spec.presets`; the first one that knows the dataset by default.
        file: JSON or TOML; flat keys, nested tables, or a run's `config.json`.
        overrides: the last layer, as from `--set`.
        defaults: of the dataset, between preset and file.

    Raises:
        InputError: lists every unknown key and wrong value.
    """
    file_values, file_preset = _read_file(file, spec) if file else ({}, None)
    name, preset_values = _preset(spec, dataset, file_preset if preset is None else preset)
    chosen, given = _settle(spec, hooks, name, [preset_values, defaults or {}, file_values, overrides or {}])
    classes = [("", config_class(spec)), *((HOOK, hook.config) for hook in hooks)]
    required = {prefix + key for prefix, cls in classes for key, info in cls.model_fields.items() if info.is_required()}
    required -= preset_values.keys()
    try:
        open_keys = {key: value for key, value in given.items() if key in required}
        before = _settle(spec, hooks, name, [preset_values, defaults or {}, open_keys])[0].as_dict()
    except InputError:  # what is required does not fit what else is there by default
        before = {}
    values = chosen.as_dict()
    changed = {k: v for k, v in values.items() if k in required or k not in before or before[k] != v}
    return replace(chosen, changed=changed)


def derived_keys(spec: ModelSpec, hook: HookSpec, config: Config | None) -> frozenset[str]:
    """Return the keys of a model's own hook that follow from the model's; they cannot be set."""
    if config is None or hook.name not in spec.hooks or spec.hook_config is None:
        return frozenset()
    return frozenset(spec.hook_config(config)) & hook.config.model_fields.keys()


def keys_of(spec: ModelSpec, hooks: Sequence[HookSpec]) -> list[str]:
    """Return the keys that a model with these hooks has."""
    return [row.key for row in describe(spec, hooks)]


def accepts(spec: ModelSpec, hooks: Sequence[HookSpec], key: str) -> bool:
    """Whether a model with these hooks has a key, in any of its spellings."""
    return find_key(spec, hooks, key) is not None


def find_key(spec: ModelSpec, hooks: Sequence[HookSpec], key: str) -> tuple[str, FieldInfo] | None:
    """Return a key, `KEY.ENTRY` of a table included, under its field's name, with that field; None if there is none."""
    hook_fields = {name: info for hook in hooks for name, info in hook.config.model_fields.items()}
    fields = {"": config_class(spec).model_fields, HOOK: hook_fields}
    found = _canonical(key, fields) or ""
    prefix = HOOK if key.startswith(HOOK) else ""
    name = found.removeprefix(prefix).partition(".")[0]
    return (found, fields[prefix][name]) if prefix + name in keys_of(spec, hooks) else None


def require_key(spec: ModelSpec, hooks: Sequence[HookSpec], key: str) -> tuple[str, FieldInfo]:
    """Return what `find_key` does; raises InputError where there is no such key."""
    found = find_key(spec, hooks, key)
    if found is None:
        said = unknown("key", key, keys_of(spec, hooks)).partition(" (available")[0]
        raise InputError(f"{said} (see `benchmark describe {spec.name}`)")
    return found


def kinds_of(info: FieldInfo) -> tuple[Any, ...]:
    """Return the types that a key's value may have; of a table, those of its entries."""
    kinds = _members(info.annotation)
    tables = [typing.get_args(kind)[1] for kind in kinds if typing.get_origin(kind) is dict]
    return tuple(kind for table in tables for kind in _members(table)) or kinds


def _example(spec: ModelSpec, layers: Sequence[Mapping[str, Any]] = ()) -> Config | None:
    """Return a config of the model's own keys: of these layers or, where they do not fit, its defaults or a preset."""
    whole = config_class(spec)
    presets = [[values] for by_dataset in spec.presets.values() for values in by_dataset.values()]
    for tried in (layers, [], *presets):
        own = _gather(tried, {"": whole.model_fields}, [])
        config = _validate(whole, _assemble(whole.model_fields, own), "", [])
        if config is not None:
            return config
    return None


def _settle(
    spec: ModelSpec, hooks: Sequence[HookSpec], preset: str | None, layers: Sequence[Mapping[str, Any]]
) -> tuple[RunConfig, dict[str, Any]]:
    """Return the configuration and the values that were given for it."""
    whole = config_class(spec)
    own = whole.model_fields
    # Which keys of its hooks a model derives is known of a config only, so its own keys are read first.
    example = _example(spec, layers)
    derived_by_hook = {hook.name: derived_keys(spec, hook, example) for hook in hooks}
    settable: dict[str, dict[str, FieldInfo]] = {}
    for hook in hooks:
        keys = {key: info for key, info in hook.config.model_fields.items() if key not in derived_by_hook[hook.name]}
        if shared := keys.keys() & {key for others in settable.values() for key in others}:
            raise InputError(f"hook {hook.name!r} has keys of another hook: {', '.join(sorted(shared))}")
        settable[hook.name] = keys
    faults: list[str] = []
    of_hooks = {key: info for keys in settable.values() for key, info in keys.items()}
    fields = {"": own, HOOK: of_hooks} if hooks else {"": own}
    values = _gather(layers, fields, faults, {HOOK + key for keys in derived_by_hook.values() for key in keys})
    model = _validate(whole, _assemble(own, values), "", faults)
    derived = spec.hook_config(model) if spec.hook_config and model is not None else {}
    hook_values = {key.removeprefix(HOOK): value for key, value in values.items() if key.startswith(HOOK)}
    resolved = {}
    for hook in hooks:
        given = {key: derived[key] for key in derived_by_hook[hook.name] if derived.get(key) is not None}
        resolved[hook.name] = _validate(hook.config, given | _assemble(settable[hook.name], hook_values), HOOK, faults)
    if faults:
        raise InputError(f"config of {spec.name}: " + "; ".join(dict.fromkeys(faults)))
    return RunConfig(model, typing.cast("dict[str, Config]", resolved), preset, derived_by_hook), values


def _gather(
    layers: Sequence[Mapping[str, Any]],
    fields: Mapping[str, Mapping[str, FieldInfo]],
    faults: list[str],
    derived: Collection[str] = (),
) -> dict[str, Any]:
    """Return the last value of every key, under its field's name; those of `derived` cannot be set."""
    values: dict[str, Any] = {}
    for layer in layers:
        read: dict[str, str] = {}
        for key, value in _flat(layer, fields).items():
            target = _canonical(key, fields)
            if target is None:
                few = len(faults) < _MOST_FAULTS
                faults.append(_unknown_key(key[:_LONGEST_KEY], fields, derived) if few else "and more")
            elif target in read:
                faults.append(f"{read[target]!r} and {key!r} are two spellings of one key")
            else:
                read[target] = key
                values[target] = value
    return values


def _assemble(fields: Mapping[str, FieldInfo], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of these fields, the entries `KEY.ENTRY` of a table joined with those it has by default."""
    made: dict[str, Any] = {}
    for key, value in values.items():
        top, _, entry = key.partition(".")
        if top in fields and not entry:
            made[top] = value
        elif top in fields:
            default = fields[top].get_default(call_default_factory=True)
            before = made.get(top, default if isinstance(default, Mapping) else {})
            made[top] = {**before, entry: value} if isinstance(before, Mapping) else before
    return made


def _preset(spec: ModelSpec, dataset: DatasetSpec, wanted: str | None) -> tuple[str | None, Mapping[str, Any]]:
    of = dataset.presets_of or dataset.name
    if wanted is not None and wanted not in spec.presets:
        raise InputError(unknown(f"preset of {spec.name}", wanted, spec.presets))
    if wanted is not None and of not in spec.presets[wanted]:
        raise InputError(f"preset {wanted!r} of {spec.name} has no {of}, only {', '.join(spec.presets[wanted])}")
    name = wanted or next((name for name, by_dataset in spec.presets.items() if of in by_dataset), None)
    return name, spec.presets[name][of] if name else {}


def _read_file(path: Path, spec: ModelSpec) -> tuple[Mapping[str, Any], str | None]:
    """Return the keys in a file and, from a run's own `config.json`, its preset."""
    content = read_table(path, "config")
    if isinstance(content.get("config"), dict):  # a run's own
        preset, of = content.get("preset"), str(content.get("model", spec.name))
        if of.partition("+")[0] != spec.name:
            raise InputError(f"config file {path} is of a run of {of[:_LONGEST_KEY]}, not of {spec.name}")
        if preset is not None and not isinstance(preset, str):
            raise InputError(f"config file {path}: 'preset' must be text, got {_REPR.repr(preset)}")
        content = content["config"]
    else:
        preset = None
    if _keys_in(content) > _MOST_KEYS:
        raise InputError(f"config file {path} has more than {_MOST_KEYS} keys, which no model has")
    return content, preset


def _keys_in(table: Mapping[str, Any]) -> int:
    keys, tables = 0, [table]
    while tables:
        table = tables.pop()
        keys += len(table)
        tables += [value for value in table.values() if isinstance(value, dict)]
    return keys


def read_table(path: Path, what: str) -> dict[str, Any]:
    """Return the table in a JSON or TOML file; raises InputError, which calls it a `what` file."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    readers = {".json": partial(json.loads, object_pairs_hook=_once), ".toml": tomllib.loads}
    if path.suffix not in readers:
        raise InputError(f"{what} file {path} must end in .json or .toml")
    try:
        with open(path, "rb") as file:
            written = file.read(_LARGEST + 1)
        text = written.decode("utf-8-sig")
        if len(written) > _LARGEST:
            raise ValueError(f"it is larger than {_LARGEST >> 20} MB")
        if path.suffix == ".toml" and max(line.count(".") for line in text.split("\n")) > _MOST_DOTS:
            raise ValueError(f"a line has more than {_MOST_DOTS} dots")
        content = readers[path.suffix](text)
    except OSError as error:
        raise InputError(f"{what} file {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{what} file {path} is not {path.suffix[1:].upper()}: {str(error)[:200]}") from error
    if not isinstance(content, dict):
        raise InputError(f"{what} file {path} must hold a table of keys, got a {type(content).__name__}")
    return content


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for key, value in pairs:
        if key in table:
            raise ValueError(f"the key {key!r} stands in it twice")
        table[key] = value
    return table


def _flat(layer: Mapping[str, Any], fields: Mapping[str, Mapping[str, FieldInfo]]) -> dict[str, Any]:
    """Return a layer with its tables spread out: `hook` as `hook.KEY`, the value of a dict as `KEY.ENTRY`."""
    flat: dict[str, Any] = {}
    for key, value in layer.items():
        spreads = key == "hook" or (value and "." not in key.removeprefix(HOOK) and _canonical(f"{key}.", fields))
        if spreads and isinstance(value, Mapping) and all(isinstance(entry, str) for entry in value):
            flat |= _flat({f"{key}.{entry}": part for entry, part in value.items()}, fields)
        else:
            flat[key] = value
    return flat


def _spellings(name: str, info: FieldInfo) -> set[str]:
    return {name, info.alias or name}


def _canonical(key: str, fields: Mapping[str, Mapping[str, FieldInfo]]) -> str | None:
    """Return a key under its field's name (`H` is `label_range`), or None if there is no such key."""
    prefix = HOOK if key.startswith(HOOK) else ""
    top, dot, entry = key.removeprefix(prefix).partition(".")
    for name, info in fields.get(prefix, {}).items():
        if top in _spellings(name, info) and (not dot or typing.get_origin(info.annotation) is dict):
            return f"{prefix}{name}{dot}{entry}"
    return None


def _unknown_key(key: str, fields: Mapping[str, Mapping[str, FieldInfo]], derived: Collection[str]) -> str:
    if key.startswith(HOOK) and HOOK not in fields:
        return f"{key!r} is the key of a hook, and there is none"
    own = key.removeprefix(HOOK)
    if ".".join(key.split(".")[:2]) in derived and own not in fields[""]:
        return f"{key!r} follows from the model's own keys: set those (see `benchmark describe`)"
    if key in derived:
        return f"unknown key {key!r}, did you mean {own!r}?"
    known = {prefix + name for prefix, names in fields.items() for name in names}
    # The list of all keys is long; `benchmark describe` shows it.
    said = unknown("key", key, known).partition(" (available")[0]
    return said if "did you mean" in said else f"{said} (see `benchmark describe`)"


def _validate(cls: type[Config], values: Mapping[str, Any], prefix: str, faults: list[str]) -> Config | None:
    prepared = {key: _for_field(cls.model_fields[key], value) for key, value in values.items()}
    try:
        return cls(**prepared)
    except ValidationError as error:
        for fault in error.errors():
            key = ".".join(map(str, fault["loc"]))
            got = "" if fault["type"] == "missing" else f", got {_REPR.repr(fault['input'])}"
            faults.append(f"{prefix + key!r} {_plain(fault, cls)}{got}")
        return None


def _for_field(info: FieldInfo, value: Any) -> Any:
    """Return a value as its strict field wants it: a list or `a,b` for a tuple, a number's text for text."""
    wanted = _members(info.annotation)
    if value is None and "none" in typing.get_args(info.annotation):
        return "none"  # a word of its own, and not that there is no value
    if any(typing.get_origin(kind) is tuple for kind in wanted):
        if isinstance(value, str):
            parts = [part.strip() for part in value.split(",") if part.strip()]
            of_numbers = any({int, float} & {*typing.get_args(kind)} for kind in wanted)
            return tuple(map(read_value, parts) if of_numbers else parts)
        return tuple(value) if isinstance(value, list) else value
    if isinstance(value, Number) and hasattr(value, "item"):  # numpy's
        value = value.item()
    if str in wanted and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    return value


def _members(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def _plain(fault: Any, cls: type[Config]) -> str:
    """Return pydantic's fault in the words of a user."""
    kind, context = fault["type"], fault.get("ctx", {})
    names = {"int": "an integer", "float": "a number", "bool": "true or false", "string": "text"}
    names |= {"dict": "a table", "tuple": "a list", "finite": "a number"}
    for start, word in names.items():
        if kind in (f"{start}_type", f"{start}_parsing", f"{start}_number"):
            return f"must be {word}"
    if kind == "literal_error":
        return f"must be {context['expected']}"
    if kind == "string_pattern_mismatch":
        return f"must match {context['pattern']}"
    if kind == "value_error":
        return str(context["error"])
    signs = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
    if kind == "missing":
        return "has no default and must be set"
    limits = [f"{sign} {context[key]:g}" for key, sign in signs.items() if key in context]
    return f"must be {limits[0]}" if limits else fault["msg"][0].lower() + fault["msg"][1:]


def parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    """Read `key=value` settings; a value is JSON, Python's True, False, None, or text.

    Raises:
        InputError: one has no `=`, or a key stands twice.
    """
    values: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = (part.strip() for part in setting.partition("="))
        if not equals or not key:
            raise InputError(f"--set takes KEY=VALUE, got {setting!r}")
        if key in values:
            raise InputError(f"--set {key} is given twice")
        values[key] = read_value(text)
    return values


def read_value(text: str) -> Any:
    """Return what a setting's text says."""
    words = {"true": True, "false": False, "none": None, "null": None}
    try:
        return words[text.lower()] if text.lower() in words else json.loads(text)
    except (ValueError, RecursionError):
        return text


def as_typed(value: Any) -> str:
    """Return a value as `--set` takes it; a table as `KEY VALUE, …`."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {as_typed(item)}" for key, item in value.items())
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


@dataclass(frozen=True)
class Row:
    """A config key for `benchmark describe`; `presets` is `{preset: {dataset: value}}`."""

    key: str
    type: str
    default: Any
    meaning: str
    presets: dict[str, dict[str, Any]] = field(default_factory=dict)


def describe(spec: ModelSpec, hooks: Sequence[HookSpec]) -> list[Row]:
    """Return every key of a model and of its hooks."""
    rows, example = [], _example(spec)
    for key, info in config_class(spec).model_fields.items():
        presets = {
            preset: {dataset: values[key] for dataset, values in by_dataset.items() if key in values}
            for preset, by_dataset in spec.presets.items()
        }
        rows.append(_row(key, info, presets))
    for hook in hooks:
        own = hook.config.model_fields.keys() - derived_keys(spec, hook, example)
        rows += [_row(HOOK + key, info, {}) for key, info in hook.config.model_fields.items() if key in own]
    return rows


def _row(key: str, info: FieldInfo, presets: dict[str, dict[str, Any]]) -> Row:
    other = _spellings(key, info) - {key}
    meaning = (info.description or "") + (f" (also {', '.join(sorted(other))})" if other and "." not in key else "")
    default = "must be set" if info.is_required() else info.get_default(call_default_factory=True)
    return Row(key, _type_name(info), default, meaning, presets)


def _type_name(info: FieldInfo) -> str:
    names = {int: "integer", float: "number", bool: "true|false", str: "text", type(None): "none"}
    words = []
    for kind in _members(info.annotation):
        origin = typing.get_origin(kind)
        if origin is typing.Literal:
            words.append("|".join(map(str, typing.get_args(kind))))
        else:
            words.append({tuple: "list", dict: "table"}.get(origin) or names.get(kind, str(kind)))  # type: ignore[call-overload]
    return " or ".join(words)
