"""Computational sequences, the CMU Multimodal SDK's form of a dataset.

A `.csd` file is HDF5, and comes from people's drives: `ROOT/data/VIDEO/{features (n, d), intervals (n, 2)}`. It is
read a video at a time; nothing outside the file is opened, and the sizes that it declares are checked before.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from registry.errors import InputError, one_line

from .alignment import Steps

_MOST_BYTES = 2 << 30
"""of one array of a video: ten hours of COVAREP"""
_MOST_COMPRESSED = 1100
"""how many bytes HDF5's filters can make of one"""


@dataclass(frozen=True)
class ComputationalSequence:
    """The steps of one modality, or the labels, of many videos.

    Args:
        name: what it calls itself, as `COVAREP`.
        entries: by `VIDEO`, or `VIDEO[n]` as the SDK's `align` names parts of it: `"features"` (n, d) and `"intervals"`
            (n, 2) in seconds, each an array or an HDF5 dataset.
        path: the file that it is from.

    Raises:
        InputError: an entry lacks one of the two, or their shapes or types do not fit.
    """

    name: str
    entries: Mapping[str, Mapping[str, Any]]
    path: Path | None = None
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for key, entry in self.entries.items():
            self._check(key, entry)
        if not self.shapes:
            raise InputError(f"{self.where} holds no videos")
        arrays = [array for entry in self.entries.values() for array in (entry["features"], entry["intervals"])]
        declared = sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays)
        if self.path and declared > self.path.stat().st_size * _MOST_COMPRESSED:  # one array under many names
            raise InputError(f"{self.where} says it holds {declared >> 20:,} MiB, more than it can: it is damaged")

    @property
    def where(self) -> str:
        """Name it in an error."""
        return str(self.path or self.name)

    @cached_property
    def videos(self) -> dict[str, list[str]]:
        """The keys of each video that has steps."""
        found: dict[str, list[str]] = {}
        for key in self.shapes:
            found.setdefault(key.partition("[")[0], []).append(key)
        return found

    @property
    def width(self) -> int:
        """How many features a step has."""
        return next(iter(self.shapes.values()))[1]

    def _check(self, key: str, entry: Any) -> None:
        where = f"{self.where}: video {key!r}"
        parts = {}
        for name in ("features", "intervals"):
            parts[name] = _member(entry, name, where)
            _check_size(parts[name], f"{where}: {name}", self.path)
        rows, intervals = parts["features"].shape, parts["intervals"].shape
        if 0 in rows and 0 in intervals:  # nothing was measured, as where a face was never found
            return
        if len(rows) == 1:  # one feature a step
            rows = (*rows, 1)
        if len(rows) != 2 or len(intervals) != 2 or intervals[1] != 2 or rows[0] != intervals[0]:
            raise InputError(
                f"{where}: expected features (n, d) and intervals (n, 2) of as many rows, "
                f"found {parts['features'].shape} and {intervals}"
            )
        self.shapes[key] = rows
        if rows[1] != self.width:
            raise InputError(f"{where} has {rows[1]} features a step, those before it {self.width}")

    def numbers(self, video: str) -> Steps:
        """Return a video's numbers as they are; none where it has none."""
        parts = [self._numbers(key) for key in self.videos.get(video, [])]
        intervals, order = self._intervals(video)
        return Steps(intervals, np.concatenate([*parts, np.zeros((0, self.width), np.float32)])[order])

    def words(self, video: str) -> Steps:
        """Return a video's words; none where it has none."""
        parts = [word for key in self.videos.get(video, []) for word in self._words(key)]
        intervals, order = self._intervals(video)
        return Steps(intervals, np.array(parts, dtype=object)[order])

    def _intervals(self, video: str) -> tuple[np.ndarray, np.ndarray]:
        """Return a video's intervals in order of time, and the rows that they are from."""
        parts = [self._read(key, "intervals", "numbers", "biuf") for key in self.videos.get(video, [])]
        intervals = np.concatenate([*parts, np.zeros((0, 2))]).astype(np.float64)
        start, end = intervals.T
        # CMU-MOSEI has segments that start up to half a second before their video does.
        wrong = ~np.isfinite(intervals).all(axis=1) | (end < start) | (end < 0)
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            raise InputError(
                f"{self.where}: video {video!r}: expected intervals from a start to a later end, in seconds, "
                f"found {start[row]:g} to {end[row]:g} ({int(wrong.sum())} such)"
            )
        order = np.argsort(start, kind="stable")
        return intervals[order], order

    def _numbers(self, key: str) -> np.ndarray:
        values = self._read(key, "features", "numbers", "biuf")
        with np.errstate(over="ignore", invalid="ignore"):  # what is beyond float32 becomes inf, then 0
            return values.reshape(self.shapes[key]).astype(np.float32)

    def _words(self, key: str) -> Iterator[str]:
        if self.width != 1:
            raise InputError(f"{self.where}: video {key!r}: expected one word a step, found {self.width} features")
        for word in self._read(key, "features", "words", "SUO").ravel().tolist():
            try:
                text = word.decode("utf-8") if isinstance(word, bytes) else str(word)
                text.encode("utf-8")
            except UnicodeError:
                raise InputError(f"{self.where}: video {key!r}: the word {word!r} is not UTF-8") from None
            yield " ".join(text.split())

    def _read(self, key: str, name: str, what: str, kinds: str) -> np.ndarray:
        """Return an array of the entry, whole."""
        where = f"{self.where}: video {key!r}: {name}"
        stored = self.entries[key][name]
        if stored.dtype.kind not in kinds or (stored.dtype.kind == "O" and not _holds_text(stored)):
            raise InputError(f"{where}: expected {what}, found {stored.dtype}")
        try:
            if stored.dtype.kind != "O" or isinstance(stored, np.ndarray):
                return np.asarray(stored[()])
            # A string of any length may be referred to by any number of rows.
            rows = max(1, _MOST_BYTES // 8 // max(1, self.path.stat().st_size if self.path else 1 << 20))
            return np.concatenate([stored[row : row + rows] for row in range(0, len(stored), rows)] or [np.empty(0)])
        except MemoryError:
            raise InputError(f"{where} does not fit into memory ({stored.shape})") from None
        except Exception as error:  # a damaged file can make any operation of HDF5 fail
            raise InputError(f"{where} cannot be read: the file is damaged or cut short ({one_line(error)})") from None


@contextmanager
def open_sequence(path: Path) -> Iterator[ComputationalSequence]:
    """Open a `.csd` file; what it holds is read when it is asked for.

    Raises:
        InputError: it cannot be read, is no computational sequence, or refers to something outside itself.
    """
    import h5py

    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} is a folder, expected a .csd file" if path.is_dir() else f"{path} does not exist")
    try:
        file = h5py.File(path, "r")
    except PermissionError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except Exception as error:
        reason = f"damaged or cut short ({one_line(error)})" if h5py.is_hdf5(path) else "not an HDF5 file"
        raise InputError(f"{path} is no computational sequence: it is {reason}") from None
    with file:
        yield _sequence_in(file, path)


def _sequence_in(file: Any, path: Path) -> ComputationalSequence:
    try:
        root = file["/"]
        roots = _names(root, str(path))
        if len(roots) != 1:
            raise InputError(f"{path}: expected one root with data and metadata, found {len(roots)}")
        data = _member(_member(root, roots[0], str(path)), "data", f"{path}: {roots[0]!r}")
        entries = {name: _member(data, name, f"{path}: data") for name in _names(data, f"{path}: data")}
        return ComputationalSequence(roots[0], entries, path)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged or cut short ({one_line(error)})") from None


def as_sequence(value: Any, role: str) -> ComputationalSequence:
    """Return a `ComputationalSequence`, made of the SDK's `computational_sequence` where the value is one.

    Args:
        value: either. The SDK's has `.data`, by video, and `.metadata`, whose strings are bytes in some versions.
        role: what it is given for, for an error.

    Raises:
        InputError: it is neither, or its parts do not fit.
    """
    if isinstance(value, ComputationalSequence):
        return value
    data, metadata = getattr(value, "data", None), getattr(value, "metadata", None)
    if not isinstance(data, Mapping):
        raise InputError(
            f"{role}: expected the path of a .csd file or a computational sequence, found a {type(value).__name__}"
        )
    name = _text((metadata or {}).get("root name", role)).strip('"')
    return ComputationalSequence(name, {_text(key): entry for key, entry in data.items()})


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _names(group: Any, where: str) -> list[str]:
    """Return the names in an HDF5 group, none of which is opened."""
    if not hasattr(group, "keys"):
        raise InputError(f"{where}: expected a group, found something else")
    try:
        return [name.decode("utf-8") for name in group.id]
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: the name {error.object!r} is not UTF-8") from None


def _member(group: Any, name: str, where: str) -> Any:
    """Return what a group, of a file or a plain dict, has under a name, if it stands in the same file."""
    if not hasattr(group, "keys"):
        raise InputError(f"{where}: expected a group with {name}, found something else")
    found = _linked(group, name, where) if hasattr(group, "id") else group.get(name)
    if found is None:
        raise InputError(f"{where} has no {name}")
    return found


def _linked(group: Any, name: str, where: str) -> Any:
    import h5py

    links, key = group.id.links, name.encode()
    if not links.exists(key):
        return None
    if links.get_info(key).type != h5py.h5l.TYPE_HARD:
        raise InputError(f"{where}: {name} is a link to somewhere else, which is not followed")
    found = group[name]
    if isinstance(found, h5py.Dataset) and (found.is_virtual or found.external):
        raise InputError(f"{where}: {name} is stored in other files, which are not read")
    return found


def _check_size(stored: Any, where: str, path: Path | None) -> None:
    """See that an array is one, and no larger than its file can hold."""
    if not hasattr(stored, "shape") or not hasattr(stored, "dtype") or stored.shape is None:
        raise InputError(f"{where}: expected an array, found something else")
    if isinstance(stored, np.ndarray):
        return
    size = math.prod(stored.shape) * stored.dtype.itemsize
    packed = stored.id.get_create_plist().get_nfilters() > 0
    held = path.stat().st_size * (_MOST_COMPRESSED if packed else 1) if path else size
    if size > held or (size and not packed and stored.id.get_storage_size() < size):
        raise InputError(
            f"{where} says it is {stored.shape} of {stored.dtype}, more than the file holds: it is damaged"
        )
    if size > _MOST_BYTES:
        raise InputError(
            f"{where} is {stored.shape} of {stored.dtype}, more than {_MOST_BYTES >> 30} GiB for one video"
        )


def _holds_text(stored: Any) -> bool:
    if isinstance(stored, np.ndarray):
        return all(isinstance(word, str | bytes) for word in stored.ravel())
    import h5py

    return h5py.check_string_dtype(stored.dtype) is not None
