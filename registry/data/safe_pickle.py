"""An unpickler that builds numpy arrays and plain containers and nothing else: reading a file runs no code of it."""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from registry.errors import InputError

_MOST_ITEMS = 50_000_000
"""in lists; arrays are one item each"""


class _RefusedError(Exception):
    """The file asks for something that is not admitted."""


class _Maker:
    """An admitted name: a pickle may call it and can change nothing of it."""

    __slots__ = ("make",)

    def __init__(self, make: Callable[..., Any]) -> None:
        self.make = make

    def __call__(self, *args: Any) -> Any:
        return self.make(*args)

    def __setstate__(self, state: Any) -> None:
        raise TypeError("an admitted name has no state")


class _DType:
    """Stands for a dtype: a forged state of a real one makes numpy take bytes for pointers."""

    def __init__(self, code: str, *_: Any) -> None:
        if not re.fullmatch(r"[biufc]\d{1,2}|[SU]\d{1,9}|O[48]?", code):
            raise _RefusedError(f"numpy.dtype({code!r})")
        self.dtype = np.dtype(code[0] if code[0] == "O" else code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class Array:
    """Stands for an array that is created empty and filled by its state, as pickles of arrays are."""

    value: np.ndarray | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        shape, dtype, fortran, data = state[-4:]
        self.value = _array(data, dtype, shape, "F" if fortran else "C")


def _array(data: Any, dtype: _DType, shape: tuple[int, ...], order: Any) -> np.ndarray:
    """Return the array of a pickle's parts; numpy itself does not check that they fit each other."""
    if any(type(length) is not int or length < 0 for length in shape):
        raise ValueError("a shape is not made of lengths")
    kind, size = dtype.dtype, math.prod(shape)
    if kind.hasobject:
        if not isinstance(data, list) or len(data) != size:
            raise ValueError("an object array does not have as many items as its shape says")
        array = np.empty(size, dtype=object)
        for row, item in enumerate(data):
            array[row] = item
        return array.reshape(shape)
    if isinstance(data, str):  # Python 2's bytes
        data = data.encode("latin1")
    if len(data) != size * kind.itemsize:
        raise ValueError("an array does not have as many bytes as its shape says")
    if isinstance(data, bytes):  # numpy's own way: the array is writeable and large data are not copied
        array = np.empty(0, dtype=kind)
        array.__setstate__((1, tuple(shape), kind, order == "F", data))
        return array
    return np.frombuffer(data, dtype=kind).reshape(shape, order=order)


def _array_from_buffer(
    data: Any, dtype: _DType, shape: tuple[int, ...], order: str, axes: tuple[int, ...] | None = None
) -> Array:
    """Return an array of protocol 5; one whose axes are in another order in memory names them since numpy 2.3."""
    array = Array()
    if order == "K" and axes is not None:
        array.value = _array(data, dtype, shape, "C").transpose(axes)
    else:
        array.value = _array(data, dtype, shape, order)
    return array


def _encode(text: str, encoding: str = "") -> bytes:
    if encoding not in ("latin1", "latin-1") or not isinstance(text, str):
        raise _RefusedError("_codecs.encode")
    return text.encode("latin1")


def _bytearray(data: bytes = b"") -> bytearray:
    if not isinstance(data, bytes):
        raise _RefusedError("builtins.bytearray")
    return bytearray(data)


_ADMITTED: dict[str, Callable[..., Any]] = {
    "numpy.ndarray": lambda: None,  # only named, as what `_reconstruct` shall make
    "numpy.dtype": _DType,
    **{f"numpy.{core}.multiarray._reconstruct": lambda *_: Array() for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": lambda d, b: _array(b, d, (1,), "C")[0].item() for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _array_from_buffer for core in ("core", "_core")},
    "_codecs.encode": _encode,
    "collections.OrderedDict": dict,
    "collections.defaultdict": lambda *_: {},
    "builtins.bytes": lambda: b"",
    "builtins.bytearray": _bytearray,
    **{f"builtins.{plain.__name__}": plain for plain in (set, frozenset, list, dict, tuple)},
}


class _Unpickler(pickle._Unpickler):  # type: ignore[name-defined, misc]
    """Admits `_ADMITTED`. Pickle's Python version, as the C version lets one damaged byte claim 64 GB for its memo."""

    def find_class(self, module: str, name: str) -> _Maker:
        if not re.fullmatch(r"[\w.]+", module + name):  # a text file's first line can look like a request
            raise pickle.UnpicklingError("not a name")
        wanted = f"{module.replace('__builtin__', 'builtins')}.{name}"
        if wanted not in _ADMITTED:
            raise _RefusedError(f"{module}.{name}")
        return _Maker(_ADMITTED[wanted])

    def get_extension(self, code: int) -> None:
        raise _RefusedError(f"extension {code}")

    def persistent_load(self, pid: Any) -> None:
        raise _RefusedError("an object outside the file")


def load_pickle(path: Path) -> Any:
    """Return a pickle's content; arrays stand in `Array`s, which `plain` opens.

    Raises:
        InputError: it is damaged, is not a pickle, or asks for anything else than arrays and plain containers.
        MemoryError: it does not fit into memory.
    """
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty, expected a pickled feature file")
    try:
        with open(path, "rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"
            file.seek(0)
            content = None if is_zip else _Unpickler(file, encoding="latin1").load()
        items = _items(content, {})
    except _RefusedError as error:
        asked = str(error) if len(str(error)) < 200 else f"{str(error)[:200]}…"
        hint = ": save arrays in the place of tensors, as MMSA-FET does with return_type='np'"
        raise InputError(
            f"{path} asks to load {asked!r}; a feature file may hold numpy arrays and plain containers only"
            f"{hint if asked.startswith('torch.') else ''}"
        ) from None
    except MemoryError:
        raise
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except Exception as error:  # a damaged pickle can make any operation of the unpickler fail
        raise InputError(
            f"{path} is not a pickle, or is damaged or cut short ({type(error).__name__}): fetch it again"
        ) from None
    if is_zip:
        raise InputError(f"{path} is a zip archive (as .npz and .pth files are), expected a pickled feature file")
    if items > max(path.stat().st_size, _MOST_ITEMS):
        raise InputError(f"{path} repeats parts of itself beyond any feature file's size")
    return content


def _items(value: Any, known: dict[int, int]) -> int:
    """Return how many items a value has once what stands in it several times is written out."""
    if isinstance(value, Array) and value.value is not None and value.value.dtype.hasobject:
        parts = value.value.ravel().tolist()
    elif isinstance(value, dict):
        parts = list(value.values())
    elif isinstance(value, list | tuple):
        parts = value
    else:
        return 1
    if id(value) not in known:
        known[id(value)] = 1  # while it is counted: it may hold itself
        known[id(value)] = 1 + sum(_items(part, known) for part in parts)
    return known[id(value)]


def plain(value: Any, depth: int = 0) -> Any:
    """Return the value with arrays in the place of their stand-ins; no feature nests deeper than four."""
    if isinstance(value, Array):
        value = value.value
    if isinstance(value, np.ndarray) and value.dtype.hasobject:
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [plain(item, depth + 1) for item in value] if depth < 4 else None
    return value
