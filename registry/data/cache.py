"""What was made of a large file is kept in a folder, and is there at once the next time.

Two kinds of files lie in the folder. Each is written whole or not at all; one that is cut short or made otherwise is as
good as none, and is made again. (What stands in arrays is not checked again: that would mean to read them.)

- `features-….safetensors`: arrays, and everything else as JSON in the header. They are mapped into memory: only what is
  used is read from the disk.
- `hash-….json`: the SHA-256 that a file had when it was so large and changed last then, since hashing a file takes
  longer than finding what is kept of it.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

WORTH_KEEPING = 32 << 20
"""bytes; what is smaller is read within a blink and not kept"""

_SPARE = 1 << 30
"""bytes of the disk that are left to others"""
_ABANDONED = 24 * 3600
"""seconds after which an unfinished file is of a process that was killed"""
_TYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype(np.float32), "I64": np.dtype(np.int64)}
_TYPE_NAMES = {dtype: name for name, dtype in _TYPES.items()}
_LONGEST_HEADER = 1 << 30


class Cache:
    """What is kept of one file; nothing is, where there is no folder or the file is small.

    Args:
        folder: where it is kept; it need not exist.
        path: the file.
        variant: what else decides the content, fit for a file name; variants are kept side by side.
        version: of the content's format; another one is never used.
    """

    def __init__(self, folder: Path | None, path: Path, *, variant: str, version: int) -> None:
        self.path = path
        self.variant = variant
        self.version = version
        self._stamp = _stamp(path)
        self._folder = folder if self._stamp and self._stamp["size"] >= WORTH_KEEPING else None

    def sha256(self) -> str | None:
        """Return the file's SHA-256 if it is remembered and the file has not been touched since."""
        known = self._remembered()
        return known["sha256"] if known and known["file"] == self._stamp else None

    def load(self, sha256: str) -> dict[str, Any] | None:
        """Return what was kept of the content of this hash, as it was given to `save`, or None.

        Arrays can be written to; what is written stays in this process.
        """
        if self._folder is None:
            return None
        try:
            content = _mapped(self._kept(sha256), self._key(sha256))
        except Exception:  # not there, or damaged, which can make any step fail
            return None
        if self.sha256() != sha256:
            with suppress(OSError):
                self._remember(sha256)
        return content

    def save(self, sha256: str, content: dict[str, Any]) -> int:
        """Keep what was made of the file, and its hash; return the size in bytes, 0 where it is not kept.

        What cannot be kept is made again the next time: a full disk or a folder that cannot be written is no fault.

        Args:
            sha256: the file's, taken after this object was made.
            content: float32 and int64 arrays, C-contiguous, and JSON's types, in dicts; no key holds a dot.
        """
        if self._folder is None or _stamp(self.path) != self._stamp:  # perhaps it changed between hashing and reading
            return 0
        arrays = dict(_arrays_in(content))
        size = sum(array.nbytes for array in arrays.values())
        with suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._sweep()
            self._remember(sha256)
            if shutil.disk_usage(self._folder).free >= size + _SPARE:
                _write(self._kept(sha256), _serialised(arrays, content, self._key(sha256)))
                return size
        return 0

    def _kept(self, sha256: str) -> Path:
        assert self._folder is not None
        return self._folder / f"features-{sha256[:24]}-{self.variant}.safetensors"

    def _key(self, sha256: str) -> list[Any]:
        return [self.version, sha256, self.variant]

    def _memo(self) -> Path:
        assert self._folder is not None
        assert self._stamp is not None
        return self._folder / f"hash-{hashlib.sha256(self._stamp['path'].encode()).hexdigest()[:24]}.json"

    def _remembered(self) -> dict[str, Any] | None:
        """Return what is remembered of the path: its `sha256` and its stamp at that time, `file`."""
        if self._folder is None:
            return None
        try:
            known = json.loads(self._memo().read_text("utf-8"))
            return known if "file" in known and re.fullmatch("[0-9a-f]{64}", known["sha256"]) else None
        except Exception:  # not there, or damaged
            return None

    def _remember(self, sha256: str) -> None:
        """Remember the hash, and drop what was kept of the path's former content: files are large."""
        assert self._folder is not None
        if _stamp(self.path) != self._stamp:
            return
        before = self._remembered()
        _write(self._memo(), [json.dumps({"file": self._stamp, "sha256": sha256}).encode()])
        if before and before["sha256"] != sha256:
            for former in self._folder.glob(f"features-{before['sha256'][:24]}-*.safetensors"):
                former.unlink(missing_ok=True)

    def _sweep(self) -> None:
        assert self._folder is not None
        for part in (*self._folder.glob("features-*.part"), *self._folder.glob("hash-*.part")):  # ours alone
            with suppress(OSError):
                if time.time() - part.stat().st_mtime > _ABANDONED:
                    part.unlink()


def _stamp(path: Path) -> dict[str, Any] | None:
    """Return what tells whether a file is as it was, None where it cannot be said."""
    try:
        found, place = path.stat(), os.fsencode(path.resolve()).decode("utf-8", "backslashreplace")
    except OSError:
        return None
    return {
        "path": place,
        "size": found.st_size,
        "mtime_ns": found.st_mtime_ns,
        "ctime_ns": found.st_ctime_ns,  # that another file in its place cannot be made to have
        "inode": found.st_ino,
    }


def _write(path: Path, parts: Sequence[bytes | memoryview]) -> None:
    """Write a file whole or not at all; raises OSError."""
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        with open(part, "xb") as file:
            for piece in parts:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())  # else a crash of the machine could leave a file of zeros under its final name
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _arrays_in(content: dict[str, Any], parent: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """Yield every array with the keys that lead to it, joined by dots."""
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _arrays_in(value, f"{parent}{key}.")
        elif isinstance(value, np.ndarray):
            yield f"{parent}{key}", value


def _serialised(arrays: dict[str, np.ndarray], content: dict[str, Any], key: list[Any]) -> list[bytes | memoryview]:
    """Return the parts of a safetensors file; safetensors' own writer would copy all arrays first."""
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
    return [len(encoded).to_bytes(8, "little"), encoded, *(arrays[name].data.cast("B") for name in order)]


def _digest(header: dict[str, Any], rest: str, key: list[Any]) -> str:
    """Return a hash of all that is not an array, and of what the file must be made for."""
    return hashlib.sha256(json.dumps([header, rest, key]).encode()).hexdigest()


def _mapped(path: Path, key: list[Any]) -> dict[str, Any]:
    """Return the content of a file that was made for `key`; raises anything if it is not one, or damaged."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _LONGEST_HEADER:
            raise ValueError("not a header")
        header = json.loads(file.read(length))
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    metadata = header.pop("__metadata__")
    if metadata["digest"] != _digest(header, metadata["content"], key):
        raise ValueError("made otherwise")
    if len(pages) != 8 + length + max(entry["data_offsets"][1] for entry in header.values()):
        raise ValueError("cut short")
    content: dict[str, Any] = json.loads(metadata["content"])
    for name, entry in header.items():
        *parents, last = name.split(".")
        place = content
        for parent in parents:
            place = place[parent]
        dtype, (start, end) = _TYPES[entry["dtype"]], entry["data_offsets"]
        flat = np.frombuffer(pages, dtype, (end - start) // dtype.itemsize, 8 + length + start)
        place[last] = flat.reshape(entry["shape"])
    return content
