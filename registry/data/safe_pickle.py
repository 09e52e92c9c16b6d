"""An unpickler that builds numpy arrays and plain containers and nothing else: reading a file runs no code of it."""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np

from registry.errors import InputError

_MOST_ITEMS = 16_000_000
"""that a small file may unfold to by repeating its parts: numbers, characters, lists"""
_SPARE = 1 << 20
"""characters and items that a file may hand over besides as many as it has bytes"""
_MOST_DIMENSIONS = 64  # numpy's own
_SIZED = (str, bytes, bytearray, memoryview, list, tuple, dict)


class RefusedError(Exception):
    """The file asks for something that is not admitted."""


class _RepeatsError(Exception):
    """The file has its parts copied more often than any feature file."""


class _Maker:
    """An admitted name: a pickle may call it and can change nothing of it."""

    __slots__ = ("make",)

    def __init__(self, make: Callable[..., Any]) -> None:
        self.make = make

    def __call__(self, *args: Any) -> Any:
        return self.make(*args)


class _DType:
    """Stands for a dtype: a forged state of a real one makes numpy take bytes for pointers."""

    def __init__(self, code: str, *_: Any) -> None:
        if not re.fullmatch(r"[biufc]\d{1,2}|[SU][1-9]\d{0,8}|O[48]?", code):
            raise RefusedError(f"numpy.dtype({code!r})")
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
    if len(shape) > _MOST_DIMENSIONS or any(type(length) is not int or not 0 <= length < 1 << 63 for length in shape):
        raise ValueError("a shape is not made of lengths")
    kind, size = dtype.dtype, math.prod(shape)
    if size == 0 and math.prod(length or 1 for length in shape) > _SPARE:  # as lists it would be that many
        raise ValueError("an array of very many rows of nothing")
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
        raise RefusedError("_codecs.encode")
    return text.encode("latin1")


def _dict(pairs: Any = ()) -> dict[str, Any]:
    return {key: value for key, value in (pairs.items() if isinstance(pairs, dict) else pairs) if type(key) is str}


def _bytearray(data: bytes = b"") -> bytearray:
    if not isinstance(data, bytes):
        raise RefusedError("builtins.bytearray")
    return bytearray(data)


_ADMITTED: dict[str, Callable[..., Any]] = {
    "numpy.ndarray": lambda: None,  # only named, as what `_reconstruct` shall make
    "numpy.dtype": _DType,
    **{f"numpy.{core}.multiarray._reconstruct": lambda *_: Array() for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": lambda d, b: _array(b, d, (1,), "C")[0].item() for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _array_from_buffer for core in ("core", "_core")},
    "_codecs.encode": _encode,
    "collections.OrderedDict": _dict,
    "collections.defaultdict": lambda *_: {},
    "builtins.bytes": lambda: b"",
    "builtins.bytearray": _bytearray,
    "builtins.dict": _dict,
    **{f"builtins.{plain.__name__}": plain for plain in (list, tuple)},
    **{f"builtins.{name}": lambda *_: frozenset() for name in ("set", "frozenset")},
}


class Unpickler(pickle._Unpickler):  # type: ignore[name-defined, misc]
    """Admits what is `admitted`. In Python, as pickle's C version lets one damaged byte claim 64 GB for its memo.

    Entries of dicts whose keys are no text, and members of sets, are left out: nothing reads them, and the hash of a
    forged value can take hours or the whole C stack. No claim of a length is believed beyond the file's own, and what
    is handed to an admitted name is counted: a short file could have a long text copied again and again.
    """

    admitted: ClassVar[Mapping[str, Callable[..., Any]]] = _ADMITTED
    stack: list[Any]
    memo: dict[int, Any]  # type: ignore[assignment]
    append: Callable[[Any], None]
    read: Callable[[int], bytes]
    readline: Callable[[], bytes]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, file: BinaryIO, size: int) -> None:
        super().__init__(file, encoding="latin1")
        self._file, self._size = file, size
        self._left = 2 * size + _SPARE
        self._file_read = self._read_within_size

    def _read_within_size(self, length: int) -> bytes:
        if length > self._size:
            raise EOFError
        return self._file.read(length)

    def find_class(self, module: str, name: str) -> _Maker:
        if not re.fullmatch(r"[\w.]+", module + name):  # a text file's first line can look like a request
            raise pickle.UnpicklingError("not a name")
        wanted = f"{module.replace('__builtin__', 'builtins')}.{name}"
        if wanted not in self.admitted:
            raise RefusedError(f"{module}.{name}")
        return _Maker(self.admitted[wanted])

    def get_extension(self, code: int) -> None:
        raise RefusedError(f"extension {code}")

    def persistent_load(self, pid: Any) -> None:
        raise RefusedError("an object outside the file")

    def _spend(self, parts: Any) -> None:
        self._left -= sum(len(part) for part in parts if isinstance(part, _SIZED))
        if self._left < 0:
            raise _RepeatsError

    def _instantiate(self, made: Any, arguments: Any) -> None:
        self._spend(arguments)
        self.append(made(*arguments))

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        self._instantiate(self.stack.pop(), arguments)

    def load_build(self) -> None:
        state = self.stack.pop()
        self._spend(state)
        self.stack[-1].__setstate__(state)  # an array or a dtype; nothing else has it

    def load_put(self) -> None:
        place = int(self.readline())
        if not 0 <= place <= self._size:
            raise pickle.UnpicklingError("not a place of the memo")
        self.memo[place] = self.stack[-1]

    def load_bytearray8(self) -> None:
        self.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))

    def load_setitems(self) -> None:
        self._fill(self.pop_mark())

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._fill([key, value])

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._fill(items)

    def _fill(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not dict:
            raise pickle.UnpicklingError("not a dict")
        self.stack[-1].update(_dict(zip(items[::2], items[1::2], strict=False)))

    def load_additems(self) -> None:
        self.pop_mark()

    def load_empty_set(self) -> None:
        self.append(frozenset())

    def load_frozenset(self) -> None:
        self.pop_mark()
        self.append(frozenset())

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **pickle._Unpickler.dispatch,  # type: ignore[attr-defined]
        pickle.REDUCE[0]: load_reduce,
        pickle.BUILD[0]: load_build,
        pickle.PUT[0]: load_put,
        pickle.BYTEARRAY8[0]: load_bytearray8,
        pickle.SETITEMS[0]: load_setitems,
        pickle.SETITEM[0]: load_setitem,
        pickle.DICT[0]: load_dict,
        pickle.ADDITEMS[0]: load_additems,
        pickle.EMPTY_SET[0]: load_empty_set,
        pickle.FROZENSET[0]: load_frozenset,
    }


def load_pickle(path: Path) -> Any:
    """Return a pickle's content; arrays stand in `Array`s, which `plain` opens.

    Raises:
        InputError: it is damaged, is not a pickle, or asks for anything else than arrays and plain containers.
        MemoryError: it does not fit into memory.
    """
    size = path.stat().st_size
    if size == 0:
        raise InputError(f"{path} is empty, expected a pickled feature file")
    try:
        with open(path, "rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"
            file.seek(0)
            content = None if is_zip else Unpickler(file, size).load()
        if _items(content, {}) > max(size, _MOST_ITEMS):
            raise _RepeatsError
    except RefusedError as error:
        asked = str(error) if len(str(error)) < 200 else f"{str(error)[:200]}…"
        hint = ": save arrays in the place of tensors, as MMSA-FET does with return_type='np'"
        raise InputError(
            f"{path} asks to load {asked!r}; a feature file may hold numpy arrays and plain containers only"
            f"{hint if asked.startswith('torch.') else ''}"
        ) from None
    except _RepeatsError:
        raise InputError(f"{path} repeats parts of itself beyond any feature file's size") from None
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
    return content


def _items(value: Any, known: dict[int, float]) -> float:
    """Return how many items and characters a value has once what stands in it several times is written out."""
    if isinstance(value, Array):
        if value.value is None or not value.value.dtype.hasobject:
            return 1 if value.value is None else 1 + value.value.nbytes // 8
        parts = value.value.ravel().tolist()
    elif isinstance(value, dict):
        parts = list(value.values())
    elif isinstance(value, list | tuple):
        parts = value
    else:
        return 1 + len(value) if isinstance(value, _SIZED) else 1
    if id(value) not in known:
        known[id(value)] = math.inf  # while it is counted: it may hold itself
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
