"""What a shell completes: names of models, datasets and hooks, from entry points alone, so that it is instant."""

from __future__ import annotations

import re
import warnings


def _names(kind: str) -> list[str]:
    from ..plugins import Plugins

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a line that is being typed is no place for them
        return sorted({entry.name for entry in Plugins().entries(kind)})


def _complete(incomplete: str, *others: str) -> list[str]:
    """Return what a list of models with hooks may go on with: `tfn,t` with `tfn,tfn`, `tfn+u` with `tfn+ulgm`."""
    before, last = re.fullmatch(r"(.*[,+])?(.*)", incomplete, re.DOTALL).groups("")  # type: ignore[union-attr]
    names = _names("hook") if before.endswith("+") else [*_names("model"), *others]
    return [before + name for name in names if name.startswith(last)]


def model(incomplete: str) -> list[str]:
    return [] if "," in incomplete else _complete(incomplete)


def models(incomplete: str) -> list[str]:
    return _complete(incomplete, "all")


def dataset(incomplete: str) -> list[str]:
    return [name for name in _names("dataset") if name.startswith(incomplete)]


def hooks(incomplete: str) -> list[str]:
    before, comma, last = incomplete.rpartition(",")
    return [before + comma + name for name in _names("hook") if name.startswith(last)]
