"""What a hyper-parameter search tries: a model's own space, a file, and single keys, checked against the model.

space = make_space(plan, {"learning_rate": Range(1e-4, 1e-2, log=True), "batch_size": [16, 32, 64]})
space["learning_rate"].distribution(), space["batch_size"].stored(32)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from .config import as_typed, kinds_of, read_table, read_value, require_key
from .contract import Range
from .errors import InputError, one_line
from .jobs import Plan

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

NO_SPACE = "none"
"""in the place of a file: an empty space, for keys that are named one by one"""


@dataclass(frozen=True)
class Dimension:
    """The values that one config key may take: a range, or choices."""

    key: str
    values: Range | tuple[Any, ...]

    def __str__(self) -> str:
        if isinstance(self.values, Range):
            return f"{self.values.low:g} to {self.values.high:g}{', log' * self.values.log}"
        return " | ".join(map(as_typed, self.values))

    def distribution(self) -> BaseDistribution:
        """Return it as Optuna has it."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if not isinstance(self.values, Range):
            return CategoricalDistribution([self.stored(value) for value in self.values])
        kind = IntDistribution if isinstance(self.values.low, int) else FloatDistribution
        return kind(self.values.low, self.values.high, log=self.values.log)  # type: ignore[arg-type]

    def stored(self, value: Any) -> Any:
        """Return a value as a study stores it, which has no lists: as JSON."""
        return json.dumps(value, default=str) if isinstance(value, (list, tuple, dict)) else value

    def value(self, stored: Any) -> Any:
        """Return the value that a study has stored."""
        if isinstance(self.values, Range):
            return stored
        return next(value for value in self.values if self.stored(value) == stored)

    def has(self, value: Any) -> bool:
        """Whether a value is among them."""
        if isinstance(self.values, Range):
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            return is_number and self.values.low <= value <= self.values.high
        return self.stored(value) in map(self.stored, self.values)

    def extremes(self) -> tuple[Any, ...]:
        """Return the values that must be right for all to be."""
        return (self.values.low, self.values.high) if isinstance(self.values, Range) else self.values


def make_space(
    plan: Plan,
    given: Mapping[str, Any] | None = None,
    *,
    file: str | Path | None = None,
    fixed: Mapping[str, Any] | None = None,
) -> dict[str, Dimension]:
    """Return what is searched, by config key.

    Args:
        plan: the model, whose own space is the first layer.
        given: the last layer, key by key: a `Range`, its fields in a dict, or a list of values.
        file: a JSON or TOML file of the same, in place of the model's own space; `"none"` is an empty one.
        fixed: keys that are set, and so not searched.

    Raises:
        InputError: a key or a value is not the model's, or nothing is left to search.
    """
    spec, hooks = plan.spec, plan.hooks
    own: Mapping[str, Any] = spec.search
    if file is not None:
        own = {} if str(file) == NO_SPACE else _flat(read_table(Path(file).expanduser(), "search space"))
    settled = {require_key(spec, hooks, key)[0] for key in fixed or {} if key != "hook"}
    space: dict[str, Dimension] = {}
    for layer, named in ((own, False), (_flat(given or {}), True)):
        for key, values in layer.items():
            dimension = _dimension(plan, key, values)
            if not settled & {dimension.key, dimension.key.rpartition(".")[0]}:
                space[dimension.key] = dimension
            elif named:
                raise InputError(f"{key} is set, and to be searched as well: leave out one")
    tables = {key.rpartition(".")[0] for key in space if "." in key.removeprefix("hook.")}
    if both := tables & space.keys():
        raise InputError(f"search space: {min(both)} and an entry of it are both to be searched: leave out one")
    if not space:
        raise InputError(
            f"{plan.name} declares nothing to search: name keys with --search-set KEY=LOW..HIGH or KEY=A,B,C, "
            "or a file with --search FILE"
        )
    _check_values(plan, space)
    return space


def _dimension(plan: Plan, key: str, values: Any) -> Dimension:
    """Return a key's values, in the types that the key has."""
    name, info = require_key(plan.spec, plan.hooks, key)
    try:
        checked = Range(**values) if isinstance(values, Mapping) else values
    except (ValidationError, TypeError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else one_line(error)
        raise InputError(f"search space: {key!r} is no range of low, high and log: {reason}") from error
    if isinstance(checked, Range):
        kinds, ends = set(kinds_of(info)), (checked.low, checked.high)
        if not kinds & {int, float, Any}:
            raise InputError(f"search space: {key!r} is no number, and has no range: list its values")
        whole = all(float(end).is_integer() for end in ends)
        if kinds.isdisjoint({float, Any}) and not whole:
            raise InputError(f"search space: {key!r} is an integer, got {ends[0]} to {ends[1]}")
        is_integer = float not in kinds and all(isinstance(end, int) or int in kinds for end in ends)
        number = int if is_integer else float
        checked = Range(number(checked.low), number(checked.high), log=checked.log)
    elif not isinstance(checked, (list, tuple)) or not checked:
        raise InputError(f"search space: {key!r} takes a range or a list of values, got {values!r}")
    else:
        checked = tuple(checked)
        stored = [json.dumps(value, default=str) for value in checked]
        if len(set(stored)) < len(stored):
            raise InputError(f"search space: {key!r} has a value twice, in {as_typed(checked)}")
    return Dimension(name, checked)


def _check_values(plan: Plan, space: Mapping[str, Dimension]) -> None:
    """See that the model's configuration allows every value: many at once and, where that fails, one by one."""
    values = {key: dimension.extremes() for key, dimension in space.items()}
    try:
        for turn in range(max(map(len, values.values()))):
            plan.having({key: of[turn % len(of)] for key, of in values.items()})
    except InputError:
        for key, of in values.items():
            for value in of:
                try:
                    plan.having({key: value})
                except InputError as error:
                    raise InputError(f"search space: {error}") from error


def settings_of(params: Mapping[str, Any], space: Mapping[str, Dimension]) -> dict[str, Any]:
    """Return the values of keys that a study has stored."""
    return {key: space[key].value(stored) for key, stored in params.items() if key in space}


def _flat(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return a table with the tables in it spread out, as `KEY.ENTRY`; a range is none of them."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping) and not value.keys() & {"low", "high"}:
            flat |= {f"{key}.{entry}": part for entry, part in _flat(value).items()}
        else:
            flat[key] = value
    return flat


def parse_search(settings: Sequence[str]) -> dict[str, Any]:
    """Read `KEY=LOW..HIGH`, `KEY=LOW..HIGH:log`, `KEY=A,B,C`, or, of values that are lists, `KEY=A,B|C,D`.

    Raises:
        InputError: one is none of them, or a key stands twice.
    """
    space: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = (part.strip() for part in setting.partition("="))
        if not equals or not key or not text:
            raise InputError(f"--search-set takes KEY=LOW..HIGH[:log] or KEY=A,B,C, got {setting!r}")
        if key in space:
            raise InputError(f"--search-set {key} is given twice")
        low, dots, high = text.partition("..")
        if dots:
            end, colon, word = high.partition(":")
            ends = [read_value(low.strip()), read_value(end.strip())]
            if (colon and word.strip() != "log") or not all(type(value) in (int, float) for value in ends):
                raise InputError(f"--search-set takes numbers as {key}=LOW..HIGH or {key}=LOW..HIGH:log, got {text!r}")
            space[key] = {"low": ends[0], "high": ends[1], "log": bool(colon)}
        elif "|" in text:
            space[key] = [[read_value(item.strip()) for item in part.split(",")] for part in text.split("|")]
        else:
            space[key] = [read_value(item.strip()) for item in text.split(",")]
    return space
