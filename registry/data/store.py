"""Feature files that are registered once: checked, and kept in a folder in a form that is mapped into memory.

DATA_ROOT/<dataset>/<name>.safetensors, one for each file, whose header holds everything that is not an array:

store = Store()
store.add(spec, Path("unaligned_50.pkl"))
store.find("mosi", aligned=False).read(label_range=3.0)
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry.errors import InputError

from .cache import SPARE, stamp
from .checks import Check
from .feature_file import FORMAT, file_sha256, is_content, made_of, read_content, size
from .mapped import Told, read_mapped, size_of, sweep, write_mapped
from .splits import FeatureFile

if TYPE_CHECKING:
    from registry.contract import DatasetSpec

VARIABLE = "MMSA_DATA"
_SUFFIX = ".safetensors"
_KEY = ["registered"]
_LONGEST_NAME = 200
_FACTS = ("sha256", "aligned", "verified", "label_range", "notes", "source", "added")

Progress = Callable[[str, int], Told]
"""is told what is done now and of how many bytes, and returns what is told of them; 0 bytes where nobody knows"""


def data_root(given: str | Path | None = None) -> Path:
    """Return the folder of registered files: the one given, else `$MMSA_DATA`, else the user's own."""
    chosen = given or os.environ.get(VARIABLE)
    if chosen:
        return Path(os.path.expanduser(chosen))
    shared = os.environ.get("XDG_DATA_HOME", "")
    home = Path(shared) if os.path.isabs(shared) else Path(os.path.expanduser("~")) / ".local" / "share"
    return home / "mmsa"


@dataclass(frozen=True)
class Registered:
    """A registered file, of which all but the arrays is read."""

    path: Path
    dataset: str
    name: str
    """of the file that was registered"""
    size: int
    """bytes on the disk"""
    fault: str | None = None
    """why it cannot be used; all that follows is then empty"""
    sha256: str = ""
    """of the file that was registered"""
    aligned: bool = False
    verified: bool = False
    """whether it is one of the dataset's published files"""
    label_range: float = 0.0
    """labels lie in ± this"""
    notes: list[str] = field(default_factory=list)
    source: str = ""
    """where it lay"""
    added: str = ""
    """when, in UTC"""
    clips: dict[str, int] = field(default_factory=dict)
    """by split"""

    def read(self, *, label_range: float, known_sha256: Mapping[str, str] | None = None) -> FeatureFile:
        """Return the file, as `read_feature_file` returned it, with arrays that are mapped into memory.

        Raises:
            InputError: it is damaged or of another version, or labels are not within ± `label_range`.
        """
        if self.fault is None:
            try:
                content = read_mapped(self.path, _KEY)
                if not is_content(content):
                    raise ValueError("it has another form")
            except Exception:  # damaged since it was found, which can make any step fail
                raise InputError(_damaged(self.path, self.dataset)) from None
            file = made_of(content, self.name, self.sha256, known_sha256 or {})
            check = Check(label_range)
            for split, arrays in file.splits.items():
                for task, labels in arrays.labels.items():
                    check.in_range(f"{split}: labels {task}", labels, arrays.ids)
            check.refuse(self.name)
            return file
        raise InputError(self.fault)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return {**vars(self), "path": str(self.path)}


class Store:
    """The registered files in a folder, which need not exist."""

    def __init__(self, root: str | Path | None = None) -> None:
        self.root = data_root(root)

    def files(self, dataset: str | None = None) -> list[Registered]:
        """Return the registered files, of one dataset or of all, by dataset and name.

        Raises:
            InputError: the folder cannot be read.
        """
        if dataset is not None and not re.fullmatch(r"[A-Za-z0-9][\w.-]*", dataset):  # not the name of one
            return []
        try:
            folders = [self.root / dataset] if dataset else sorted(self.root.iterdir())
            paths = [path for folder in folders if folder.is_dir() for path in sorted(folder.glob(f"*{_SUFFIX}"))]
            return [_registered(path) for path in paths if path.is_file()]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise InputError(f"the data folder {self.root} cannot be read: {error.strerror}") from None

    def find(self, dataset: str, name: str | None = None, *, aligned: bool = False) -> Registered:
        """Return the registered file of a dataset that is meant.

        Args:
            dataset: whose.
            name: as it was registered, with or without its suffix; the only one that fits where it is None.
            aligned: which is wanted, where there is no name; an aligned one will do where there is no other.

        Raises:
            InputError: there is none, or several could be meant.
        """
        files = self.files(dataset)
        if name is not None:
            fitting = [file for file in files if file.name == name]
            fitting = fitting or [file for file in files if Path(file.name).stem == name]
            if not fitting:
                known = f"registered are {_names(files)}" if files else "nothing is registered"
                raise InputError(f"{name} does not exist, and no registered file of {dataset} has that name ({known})")
        else:
            usable = [file for file in files if file.fault is None]
            if files and not usable:
                raise InputError(str(files[0].fault))
            fitting = [file for file in usable if file.aligned == aligned] or usable
            if not files:
                raise InputError(
                    f"dataset {dataset!r} needs --data FILE, its features in MMSA's pickle layout, or a file that is "
                    f"registered: `benchmark data get {dataset}` says where to find one, and how"
                )
        if len(fitting) > 1:
            raise InputError(
                f"{len(fitting)} registered files of {dataset} fit: name one with --data: {_names(fitting)}"
            )
        return fitting[0]

    def same(self, dataset: str, sha256: str | None) -> Registered | None:
        """Return the registered file of a dataset that has this content, None where there is none."""
        files = (file for file in self.files(dataset) if file.fault is None)
        return next((file for file in files if file.sha256 == sha256), None)

    def label_range(self, dataset: str, name: str | None = None) -> float | None:
        """Return the label range that a dataset's registered files have, or those of a name; None where they differ."""
        files = [file for file in self.files(dataset) if file.fault is None]
        ranges = {file.label_range for file in files if name in (None, file.name, Path(file.name).stem)}
        return ranges.pop() if len(ranges) == 1 else None

    def add(
        self,
        spec: DatasetSpec,
        path: str | Path,
        *,
        label_range: float | None = None,
        unverified: bool = False,
        replace: bool = False,
        others: Iterable[DatasetSpec] = (),
        progress: Progress | None = None,
    ) -> tuple[Registered, bool]:
        """Read, check and register a file, whole or not at all; the file itself is then no longer needed.

        Args:
            spec: the dataset.
            path: the pickle.
            label_range: labels lie in ± this; the dataset's own by default.
            unverified: take a file that has the name of a published one and other content.
            replace: take the place of another content that is registered under the name.
            others: datasets whose published files are known as well, to say so.
            progress: is told of it.

        Returns:
            The registered file, and whether it was not before.

        Raises:
            InputError: the file has faults, is not the published one, or is registered with other content, or there is
                no room; nothing is written.
        """
        path = Path(os.path.expanduser(path))
        limit = _limit(spec, label_range)
        if len(path.name.encode("utf-8", "surrogateescape")) > _LONGEST_NAME:
            raise InputError(f"the name of {path} is too long: rename it")
        before = stamp(path)
        hashed = progress("hash", before["size"]) if progress and before else None
        sha256 = file_sha256(path, hashed)
        verified = sha256 in spec.sha256.values()
        published = spec.sha256.get(path.name)
        if published and sha256 != published and not unverified:
            theirs = {digest: f"{name} of {other.name}" for other in others for name, digest in other.sha256.items()}
            whose = f" (it is the published {theirs[sha256]})" if sha256 in theirs else ""
            raise InputError(
                f"{path} is not the published {path.name} of {spec.name}{whose}: its SHA-256 is {sha256}, that of the "
                f"published file {published}; fetch it again, rename it, or pass --unverified to take it all the same"
            )
        files = [file for file in self.files(spec.name) if file.fault is None]
        if not replace:
            for file in files:
                if file.sha256 == sha256 and file.label_range == limit:
                    return file, False
                if file.sha256 == sha256:
                    raise InputError(
                        f"{path.name} of {spec.name} is registered with labels within ±{file.label_range:g}, not "
                        f"±{limit:g}: pass --replace"
                    )
                if file.name == path.name:
                    raise InputError(
                        f"{path.name} of {spec.name} is registered with other content (SHA-256 {file.sha256}, that of "
                        f"{path} is {sha256}): pass --replace, or rename the file"
                    )
        if progress:
            progress("read and check", 0)
        content = read_content(path, limit)
        if stamp(path) != before:
            raise InputError(f"{path} changed while it was read: add it again when it is whole")
        content |= {
            "format": FORMAT,
            "dataset": spec.name,
            "name": path.name,
            "sha256": sha256,
            "verified": verified,
            "label_range": float(limit),
            "source": str(path.absolute()),
            "added": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        folder = self.root / spec.name
        target = folder / f"{path.name}{_SUFFIX}"
        needed = size_of(content)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            sweep(folder)
            free = shutil.disk_usage(folder).free
            if free < needed + SPARE:
                raise InputError(
                    f"{folder} has {size(free)} free, and {path.name} needs {size(needed)} beside {size(SPARE)} for "
                    "others: name another folder with --data-root"
                )
            write_mapped(target, content, _KEY, progress("write", needed) if progress else None)
        except OSError as error:
            raise InputError(
                f"the data folder {folder} cannot be written: {error.strerror or error}; name another with --data-root"
            ) from None
        return _registered(target), True

    def remove(self, dataset: str, name: str) -> Registered:
        """Remove a registered file, also one that is damaged; raises InputError where there is none."""
        file = self.find(dataset, name)
        try:
            file.path.unlink(missing_ok=True)
        except OSError as error:
            raise InputError(f"{file.path} cannot be removed: {error.strerror}") from None
        with suppress(OSError):
            file.path.parent.rmdir()
        return file


def _limit(spec: DatasetSpec, label_range: float | None) -> float:
    if spec.generate:
        raise InputError(f"dataset {spec.name!r} makes its own data; there is nothing to add")
    limit = spec.label_range if label_range is None else label_range
    if limit is None:
        raise InputError(f"dataset {spec.name!r} needs --label-range: 3 where labels lie between -3 and 3")
    if not limit > 0:
        raise InputError(f"--label-range must be a positive number, got {limit:g}")
    return limit


def _registered(path: Path) -> Registered:
    dataset, name = path.parent.name, path.name.removesuffix(_SUFFIX)
    found = path.stat().st_size
    try:
        content = read_mapped(path, _KEY, arrays=False)
        if content.get("format") != FORMAT:
            again = f"benchmark data add {dataset} {shlex.quote(str(content.get('source', 'FILE')))}"
            fault = f"{path} is of another version: type `{again}` once more"
            return Registered(path, dataset, name, found, fault=fault)
        known = {key: content[key] for key in _FACTS}
        clips = {split: len(arrays["ids"]) for split, arrays in content["splits"].items()}
        return Registered(path, dataset, name, found, **known, clips=clips)
    except Exception:  # damaged, which can make any step fail
        return Registered(path, dataset, name, found, fault=_damaged(path, dataset))


def _damaged(path: Path, dataset: str) -> str:
    return f"{path} is damaged or cut short: type `benchmark data add {dataset} FILE` once more, with the original"


def _names(files: Collection[Registered]) -> str:
    return ", ".join(f"{file.name}{' (aligned)' if file.aligned else ''}" for file in files)
