"""What the JSON files of a run folder hold, checked on reading: run folders are handed around."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, StringConstraints, ValidationError, field_validator

from .errors import printable
from .plugins import NAME

_LARGEST = 16 << 20
"""bytes of a JSON file"""
_DEEPEST = 100
"""levels of JSON; Python's own functions end at a thousand"""

Name = Annotated[str, StringConstraints(pattern=f"^{NAME}$")]
ModelName = Annotated[str, StringConstraints(pattern=rf"^{NAME}(\+{NAME})*$")]


class _File(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class _Data(_File):
    metrics: Literal["mosi", "sims"]
    sha256: str | None
    label_range: FiniteFloat = Field(gt=0)
    n_train: Annotated[int, Field(ge=0, lt=2**31)] = 0
    max_lengths: dict[str, Annotated[int, Field(ge=0, le=100_000)]] = Field(default_factory=dict)


class _TextEncoder(_File):
    name: str
    sha256: str
    config: dict[str, Any]


class _Settings(_File):
    model: ModelName
    dataset: Name
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None
    config: dict[str, Any]
    hooks: dict[str, Any]
    data: _Data
    text_encoder: _TextEncoder | None


class _Summary(_File):
    metrics: dict[Name, FiniteFloat | None]
    best_epoch: Annotated[int, Field(ge=1, lt=2**31)] | None
    artifacts: list[Name]
    lines: dict[Name, int] = Field(default_factory=dict)
    protocol: dict[str, str] = Field(default_factory=dict)
    parameters: Annotated[int, Field(ge=0, lt=2**63)] | None = None

    @field_validator("metrics")
    @classmethod
    def _has_the_primary_one(cls, metrics: dict[str, float | None]) -> dict[str, float | None]:
        if metrics and "MAE" not in metrics:
            raise ValueError("MAE is not among them")
        return metrics


class _Environment(_File):
    device: str = "unknown"
    threads: int = 0
    sources: dict[str, str] | None = None


FILES: dict[str, type[_File]] = {"metrics.json": _Summary, "config.json": _Settings, "environment.json": _Environment}
"""by name, what the files of a finished run have"""


def read_json(path: Path) -> dict[str, Any]:
    """Return a file's content.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not what a run folder has under that name; the message says why.
    """
    if not path.is_file():  # a pipe would never end
        raise FileNotFoundError(f"{path.name} is missing")
    with open(path, "rb") as file:
        content = file.read(_LARGEST + 1)
    if len(content) > _LARGEST:
        raise ValueError(f"it is larger than {_LARGEST >> 20} MB")
    try:
        value = json.loads(content.decode("utf-8"), parse_constant=_number, parse_float=_number)
    except RecursionError:
        value = None
    if value is None or _depth(value) > _DEEPEST:
        raise ValueError("it is nested too deeply, or holds nothing")
    try:
        FILES[path.name].model_validate(value)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = printable(".".join(map(str, first["loc"]))[:100])
        raise ValueError(f"{place}: {first['msg']}".removeprefix(": ")) from None
    return value


def _number(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:20]} is no number")
    return value


def _depth(value: Any) -> int:
    """Return how many levels a value has, one more than `_DEEPEST` where it has more."""
    level, depth = [value], 0
    while level and depth <= _DEEPEST:
        inner = [item for item in level if isinstance(item, (dict, list))]
        level = [part for item in inner for part in (item.values() if isinstance(item, dict) else item)]
        depth += 1
    return depth
