"""The errors that users see: one sentence each, and the exit code the command line gives them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
"""C0 and C1 without tab and line feed, and what turns the direction of text"""

_LONGEST_NAME = 100


class BenchmarkError(Exception):
    """Something the user can act on; the message is one sentence saying what, got, allowed and what to do."""

    exit_code = 1


class InputError(BenchmarkError):
    """Bad input: an unknown name, a wrong config key, a broken file."""

    exit_code = 2


class RunFailed(BenchmarkError):
    """A training run that produced no usable model."""


def unknown(kind: str, name: str, available: Iterable[str]) -> str:
    """Return `unknown model 'tfm', did you mean 'tfn'? (available: lmf, tfn)`."""
    names = sorted(available)
    name = name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}…"
    close = difflib.get_close_matches(name.lower(), names, n=1)
    hint = f", did you mean {close[0]!r}?" if close else ""
    return f"unknown {kind} {name!r}{hint} (available: {', '.join(names) or 'none'})"


@contextmanager
def blaming(what: str) -> Iterator[None]:
    """Turn whatever a plugin's code raises into an InputError that says whose it is."""
    try:
        yield
    except BenchmarkError:
        raise
    except (Exception, SystemExit) as error:
        raise InputError(f"{what} fails: {one_line(error)}") from error


def printable(text: str) -> str:
    """Return text with every control character but a line's end as it is spelled: a terminal would obey it."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def one_line(error: BaseException) -> str:
    """Return an error of somebody else's code as one line, of 300 characters at most."""
    from pydantic import ValidationError

    try:
        text = " ".join(str(error).split())
    except Exception:
        text = ""
    if isinstance(error, ValidationError):
        faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
        text = f"{error.title}: {'; '.join(faults)}"
    return printable(f"{type(error).__name__}: {text}".removesuffix(": ")[:300])
