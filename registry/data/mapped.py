"""Arrays, and everything else as JSON, in one safetensors file that is mapped into memory.

Only what is used is read from the disk. A file is written whole or not at all; one that is cut short, damaged in its
header or made for another key is refused. (What stands in arrays is not checked again: that would mean to read them.)
"""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

_ABANDONED = 24 * 3600
"""seconds after which an unfinished file is of a process that was killed"""
_TYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype(np.float32), "I64": np.dtype(np.int64)}
_TYPE_NAMES = {dtype: name for name, dtype in _TYPES.items()}
_LONGEST_HEADER = 1 << 28
_PIECE = 16 << 20
"""bytes that are written between two words about it"""

Told = Callable[[int], None]
"""is told how many more bytes are done"""


def write_mapped(path: Path, content: dict[str, Any], key: list[Any], told: Told | None = None) -> None:
    """Write a file that `read_mapped` reads with the same key.

    Args:
        path: its place; the folder exists.
        content: float32 and int64 arrays, C-contiguous, and JSON's types, in dicts; no key holds a dot.
        key: what the file is made for, as JSON.
        told: is told of progress.

    Raises:
        OSError: it cannot be written.
    """
    write_whole(path, _serialised(content, key), told)


def read_mapped(path: Path, key: list[Any], *, arrays: bool = True) -> dict[str, Any]:
    """Return the content of a file that was made for `key`, with None for every array unless `arrays`.

    Arrays can be written to; what is written stays in this process.

    Raises:
        Exception: anything, where it is not there, or is not one, or damaged.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if length > min(_LONGEST_HEADER, size):
            raise ValueError("not a header")
        header = json.loads(file.read(length))
        metadata = header.pop("__metadata__")
        if metadata["digest"] != _digest(header, metadata["content"], key):
            raise ValueError("made otherwise")
        if size != 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0):
            raise ValueError("cut short")
        content: dict[str, Any] = json.loads(metadata["content"])
        if not arrays:
            return content
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    for name, entry in header.items():
        *parents, last = name.split(".")
        place = content
        for parent in parents:
            place = place[parent]
        dtype, (start, end) = _TYPES[entry["dtype"]], entry["data_offsets"]
        flat = np.frombuffer(pages, dtype, (end - start) // dtype.itemsize, 8 + length + start)
        place[last] = flat.reshape(entry["shape"])
    return content


def write_whole(path: Path, parts: Sequence[bytes | memoryview], told: Told | None = None) -> None:
    """Write a file whole or not at all; raises OSError."""
    part = path.with_name(f"{uuid.uuid4().hex}.part")
    try:
        with open(part, "xb") as file:
            for piece in parts:
                for start in range(0, len(piece), _PIECE):
                    done = file.write(piece[start : start + _PIECE])
                    if told:
                        told(done)
            file.flush()
            os.fsync(file.fileno())  # else a crash of the machine could leave a file of zeros under its final name
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove what a process that was killed has left unfinished in a folder."""
    for part in folder.glob("*.part"):
        with suppress(OSError):
            if re.fullmatch(r"[0-9a-f]{32}\.part", part.name) and time.time() - part.stat().st_mtime > _ABANDONED:
                part.unlink()


def size_of(content: dict[str, Any]) -> int:
    """Return the bytes of the arrays in a content."""
    return sum(array.nbytes for _, array in _arrays_in(content))


def _arrays_in(content: dict[str, Any], parent: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """Yield every array with the keys that lead to it, joined by dots."""
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _arrays_in(value, f"{parent}{key}.")
        elif isinstance(value, np.ndarray):
            yield f"{parent}{key}", value


def _serialised(content: dict[str, Any], key: list[Any]) -> list[bytes | memoryview]:
    """Return the parts of a safetensors file; safetensors' own writer would copy all arrays first."""
    arrays = dict(_arrays_in(content))
    order = sorted(arrays, key=lambda name: -arrays[name].itemsize)  # so that each is aligned
    header: dict[str, Any] = {}
    end = 0
    for name in order:
        start, end = end, end + arrays[name].nbytes
        of_type = _TYPE_NAMES[arrays[name].dtype]
        header[name] = {"dtype": of_type, "shape": list(arrays[name].shape), "data_offsets": [start, end]}
    rest = json.dumps(content, default=lambda array: None)
    header["__metadata__"] = {"content": rest, "digest": _digest(header, rest, key)}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    if len(encoded) > _LONGEST_HEADER:
        raise OSError(errno.EFBIG, "its ids and texts are too long")
    return [len(encoded).to_bytes(8, "little"), encoded, *(arrays[name].data.cast("B") for name in order)]


def _digest(header: dict[str, Any], rest: str, key: list[Any]) -> str:
    """Return a hash of all that is not an array, and of what the file must be made for."""
    return hashlib.sha256(json.dumps([header, rest, key]).encode()).hexdigest()
