"""What is in a feature file, and what is wrong with it: for a look before anything is trained."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from registry.errors import InputError

from .checks import KEYS, Check
from .feature_file import file_sha256
from .safe_pickle import load_pickle, plain
from .splits import SPLITS, SplitArrays

if TYPE_CHECKING:
    from registry.contract import DatasetSpec

BINS = 11
"""of the histogram of labels"""
_BARS = " ▁▂▃▄▅▆▇█"


@dataclass
class Shape:
    """What stands under a key of a split, as it is in the file."""

    shape: tuple[int, ...]
    type: str
    bytes: int | None
    """of an array, None of a list"""
    is_read: bool
    """whether the key is one that is used"""


@dataclass
class Labels:
    """One task's labels in a split; `histogram` counts the clips in `BINS` equal steps of `edges`."""

    mean: float
    sd: float
    low: float
    high: float
    histogram: list[int]
    edges: tuple[float, float]

    @property
    def bars(self) -> str:
        """The histogram as a line of text."""
        most = max(self.histogram)
        return "".join(_BARS[math.ceil(count / most * (len(_BARS) - 1))] for count in self.histogram)


@dataclass
class SplitReport:
    """One split; what could not be read is left out."""

    clips: int
    keys: dict[str, Shape]
    lengths: dict[str, tuple[int, float, int]] = field(default_factory=dict)
    """smallest, median and largest of each modality; of text in tokens"""
    characters: tuple[int, float, int] | None = None
    """of raw_text"""
    labels: dict[str, Labels] = field(default_factory=dict)
    sample: str | None = None
    """the first clip's raw_text"""


@dataclass
class Inspection:
    """A feature file, looked at; it can be used where `faults` is empty."""

    path: str
    size: int
    sha256: str
    published: str | None
    """the published file that it is, as `unaligned_50.pkl of mosi`; None where it is none"""
    dataset: str | None
    """whose facts it was checked against"""
    label_range: float | None
    """None where labels were not checked against any"""
    aligned: bool = False
    splits: dict[str, SplitReport] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return asdict(self)


def inspect_feature_file(
    path: str | Path,
    datasets: Iterable[DatasetSpec],
    *,
    dataset: str | None = None,
    label_range: float | None = None,
) -> Inspection:
    """Look at a feature file; nothing is written.

    Args:
        path: the pickle.
        datasets: whose published files are known.
        dataset: what it is meant to be; by default that whose published file it is.
        label_range: labels lie in ± this; the dataset's own by default.

    Raises:
        InputError: there is no such file, or the label range is none.
    """
    path = Path(os.path.expanduser(path))
    specs = {spec.name: spec for spec in datasets}
    sha256 = file_sha256(path)
    known = [(spec.name, name) for spec in specs.values() for name, digest in spec.sha256.items() if digest == sha256]
    dataset = dataset or (known[0][0] if known else None)
    spec = specs.get(dataset or "")
    limit = label_range if label_range is not None else spec.label_range if spec else None
    if limit is not None and not limit > 0:
        raise InputError(f"--label-range must be a positive number, got {limit:g}")
    published = f"{known[0][1]} of {known[0][0]}" if known else None
    found = Inspection(str(path), path.stat().st_size, sha256, published, dataset, limit)
    check = Check(math.inf if limit is None else limit)
    try:
        content = load_pickle(path)
        shapes = _shapes(content)
        arrays, found.aligned = check.file(content)
    except InputError as error:
        found.faults.append(str(error))
        return found
    except MemoryError:
        found.faults.append(f"{path} does not fit into memory, or is damaged")
        return found
    found.faults, found.notes = check.faults, check.notes
    edge = limit or max(
        (float(np.abs(_finite(y)).max(initial=0)) for s in arrays.values() for y in s.labels.values()), default=1
    )
    for name, split in arrays.items():
        found.splits[name] = _report(split, shapes[name], edge or 1.0)
    found.notes += _oddities(arrays)
    if limit is None:
        found.notes.append("labels were not checked against a range: pass --dataset or --label-range")
    if spec and not known and path.name in spec.sha256:
        found.notes.append(
            f"it has the name of a published file of {spec.name}, whose SHA-256 is {spec.sha256[path.name]}"
        )
    for name, clips in (spec.splits if spec else {}).items():
        if name in arrays and len(arrays[name].ids) != clips:
            found.notes.append(
                f"{name} has {len(arrays[name].ids)} clips, {spec.name if spec else ''} as published {clips}"
            )
    return found


def _shapes(content: Any) -> dict[str, dict[str, Shape]]:
    """Return what stands under each key of each split, before anything is converted."""
    found: dict[str, dict[str, Shape]] = {}
    for split in SPLITS if isinstance(content, dict) else ():
        arrays = content.get(split)
        if isinstance(arrays, dict):
            found[split] = {str(key): _shape(str(key), value) for key, value in arrays.items()}
    return found


def _shape(key: str, value: Any) -> Shape:
    is_read = key in KEYS
    value = plain(value)
    if isinstance(value, np.ndarray):
        return Shape(value.shape, str(value.dtype), value.nbytes, is_read)
    if isinstance(value, list):
        inner = value[0] if value else None
        kind = (
            f"list of {inner.dtype} {inner.shape}"
            if isinstance(inner, np.ndarray)
            else f"list of {type(inner).__name__}"
        )
        return Shape((len(value),), kind, None, is_read)
    return Shape((), type(value).__name__, None, is_read)


def _report(split: SplitArrays, keys: dict[str, Shape], edge: float) -> SplitReport:
    report = SplitReport(len(split.ids), keys)
    tokens = {"text": None if split.text_bert is None else split.text_bert[:, 1].sum(axis=1)}
    for name in ("text", "audio", "vision"):
        lengths = tokens.get(name)
        lengths = getattr(split, f"{name}_lengths") if lengths is None else lengths
        if lengths is not None:
            report.lengths[name] = (int(lengths.min()), float(np.median(lengths)), int(lengths.max()))
    if split.raw_text:
        characters = list(map(len, split.raw_text))
        report.characters = (min(characters), float(np.median(characters)), max(characters))
        report.sample = split.raw_text[0]
    for task, values in split.labels.items():
        real = _finite(values).astype(np.float64)
        if len(real):
            counts, _ = np.histogram(real.clip(-edge, edge), BINS, (-edge, edge))
            sd = float(real.std(ddof=1)) if len(real) > 1 else 0.0
            report.labels[task] = Labels(
                float(real.mean()), sd, float(real.min()), float(real.max()), counts.tolist(), (-edge, edge)
            )
    return report


def _finite(values: np.ndarray) -> np.ndarray:
    return values[np.isfinite(values)]


def _oddities(splits: Mapping[str, SplitArrays]) -> list[str]:
    """Return what is no fault, and yet may not be meant."""
    notes = []
    for modality in ("text", "audio", "vision"):
        silent, beyond = [], 0
        for name, split in splits.items():
            features, lengths = getattr(split, modality), getattr(split, f"{modality}_lengths")
            if features is None:
                continue
            if all((clip == features.flat[0]).all() for clip in features):
                silent.append(name)
            elif lengths is not None and len(lengths) == len(features):
                beyond += sum(bool(clip[of:].any()) for clip, of in zip(features, lengths.tolist(), strict=True))
        if silent:
            notes.append(f"{modality} says nothing: one value throughout {', '.join(silent)}")
        if beyond:
            notes.append(f"{modality} of {beyond} clips is not zero beyond its length: is it padded in front?")
    return notes
