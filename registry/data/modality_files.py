"""Features of single modalities from files of their own, joined to a feature file by the clips' ids."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from registry.errors import InputError, unknown

from .checks import Check
from .feature_file import file_sha256, size
from .own_file import layout_of
from .safe_pickle import load_pickle, plain
from .splits import SPLITS, FeatureFile, SplitArrays

KEYS = {
    "text": ("text_bert", "raw_text", "text", "text_lengths"),
    "audio": ("audio", "audio_lengths"),
    "vision": ("vision", "vision_lengths"),
}
"""what a modality's file may hold, besides `id`"""
_WORDS = ("text_bert", "raw_text")

Paths = Mapping[str, str | Path]


def checked_paths(features: Paths | None) -> dict[str, Path]:
    """Return the modalities' files, in the order of `KEYS`; raises InputError where one does not exist."""
    given = {name: Path(os.path.expanduser(path)) for name, path in (features or {}).items() if path is not None}
    for name, path in given.items():
        if name not in KEYS:
            raise InputError(unknown("modality", name, KEYS))
        if not path.is_file():
            raise InputError(f"{path} is a folder, expected a file" if path.is_dir() else f"{path} does not exist")
    return {name: given[name] for name in KEYS if name in given}


def with_features(file: FeatureFile, features: Paths, *, label_range: float) -> FeatureFile:
    """Return a feature file with some modalities taken from other files, clip by clip by their ids.

    A modality's file is a pickle of `{split: {"id": …, key: array}}` with the modality's keys: `audio` and
    `audio_lengths`, vision likewise, for text any of `text`, `text_bert` and `raw_text`. Other keys are ignored: it may
    be a whole feature file. Every clip of the data must be there, in whichever of its splits.

    Args:
        file: the data, with the labels.
        features: a file for each of some of `"text"`, `"audio"` and `"vision"`.
        label_range: labels lie in ± this.

    Raises:
        InputError: a file cannot be read, has faults, or lacks clips; all is listed.
    """
    paths = checked_paths(features)
    parts, faults = {}, []
    for modality, path in paths.items():
        try:
            parts[modality] = _read(path, modality, file)
        except InputError as error:
            faults.append(str(error))
    if faults:
        raise InputError("\n".join(faults))
    keys = {key for part, _ in parts.values() for key in part["train"]}
    if any(key in keys for key in (*_WORDS, "audio_lengths", "vision_lengths")):
        file = replace(file, aligned=False)  # unless the new words and features are aligned with each other
    layout, notes = layout_of(file), list(file.notes)
    for modality, (part, said) in parts.items():
        words = any(key in part["train"] for key in _WORDS)
        alone = modality == "text" and not words
        replaced = {*KEYS[modality]} - ({*_WORDS} if alone else set())
        if alone and any(key in layout["train"] for key in _WORDS):
            said = [*said, f"{paths[modality].name} has text features alone: the words stay those of {file.name}"]
        for split, arrays in part.items():
            layout[split] = {k: v for k, v in layout[split].items() if k not in replaced} | arrays
        notes += said
    check = Check(label_range)
    splits, aligned = check.file({name: dict(arrays) for name, arrays in layout.items()})
    check.refuse(f"{file.name} with {' and '.join(f'{name} of {path.name}' for name, path in paths.items())}")
    hashes = {modality: file_sha256(path) for modality, path in paths.items()}
    return FeatureFile(
        file.name,
        splits,
        aligned,
        hashlib.sha256(json.dumps([file.sha256, hashes]).encode()).hexdigest() if hashes else file.sha256,
        [*notes, *check.notes],
        {modality: path.name for modality, path in paths.items()},
    )


def _read(path: Path, modality: str, file: FeatureFile) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Return a modality's keys for each split of the data, its rows in the data's order, and notes."""
    check = Check(math.inf)
    try:
        parts = _parts(check, load_pickle(path), modality)
        check.across(parts)
        places = _places(check, parts, file)
        check.refuse(path)
        layout: dict[str, dict[str, Any]] = {split: {} for split in places}
        for key in KEYS[modality]:
            values = {split: getattr(part, key) for split, part in parts.items()}
            if all(value is not None for value in values.values()):
                for split, at in places.items():
                    layout[split][key] = _gathered(values, at)
    except MemoryError:
        raise InputError(f"{path} does not fit into memory ({size(path.stat().st_size)}), or is damaged") from None
    used, clips = (sum(map(len, found)) for found in (places.values(), [part.ids for part in parts.values()]))
    joined = f"{modality} is that of {path.name}: {used} of its {clips} clips, joined by id"
    return layout, [joined, *(f"{path.name}: {note}" for note in check.notes)]


def _parts(check: Check, content: Any, modality: str) -> dict[str, SplitArrays]:
    """Return what a modality's file has of the modality, split by split; the labels are empty."""
    found = content if isinstance(content, dict) else {}
    raw = {split: dict(found[split]) for split in SPLITS if isinstance(found.get(split), dict)}
    raw = {split: arrays for split, arrays in raw.items() if not _is_empty(arrays.get("id"))}
    if not raw:
        check.fault("content", f"a dict of {', '.join(SPLITS)}, each a dict with ids", "none")
    keys = KEYS[modality]
    parts = {}
    for split, given in raw.items():
        arrays = {key: given[key] for key in ("id", *keys) if given.get(key) is not None}
        for key in keys:
            having = [other for other in raw if raw[other].get(key) is not None]
            if having and split not in having:
                check.fault(f"{split}: {key}", f"it, since {having[0]} has it", "nothing")
        if "id" not in arrays:
            check.fault(f"{split}: id", "one a clip", "nothing")
        if not any(key in arrays for key in keys if not key.endswith("_lengths")):
            check.fault(split, f"at least one of {', '.join(key for key in keys if 'lengths' not in key)}", "none")
        parts[split] = check.split(split, arrays)
        lengths, features = arrays.get(f"{modality}_lengths"), getattr(parts[split], modality)
        if lengths is not None and features is not None:
            made = check.given_lengths(f"{split}: {modality}_lengths", lengths, features)
            setattr(parts[split], f"{modality}_lengths", made)
    return parts


def _is_empty(value: Any) -> bool:
    rows = plain(value)
    return isinstance(rows, list | np.ndarray) and np.shape(rows)[:1] == (0,)


def _places(check: Check, parts: Mapping[str, SplitArrays], file: FeatureFile) -> dict[str, list[tuple[str, int]]]:
    """Return where each clip of the data stands, as a split of the modality's file and a row."""
    known = {clip: (split, row) for split, part in parts.items() for row, clip in enumerate(part.ids)}
    for split, arrays in file.splits.items():
        lacking = [clip for clip in arrays.ids if clip not in known]
        if lacking and known:
            check.fault("id", f"every clip of {file.name}", f"no {lacking[0]!r} of {split} ({len(lacking)} clips)")
    return {split: [known[clip] for clip in arrays.ids if clip in known] for split, arrays in file.splits.items()}


def _gathered(values: Mapping[str, Any], places: list[tuple[str, int]]) -> Any:
    """Return the rows at the places, padded to one shape where their splits have others."""
    if not all(isinstance(value, np.ndarray) for value in values.values()):
        return [values[split][row] for split, row in places]
    shape = np.max([value.shape[1:] for value in values.values()], axis=0).astype(int)
    made = np.zeros((len(places), *shape), dtype=next(iter(values.values())).dtype)
    for split, value in values.items():
        at = [number for number, (of, _) in enumerate(places) if of == split]
        rows = [row for of, row in places if of == split]
        padding = [(0, most - there) for most, there in zip(shape, value.shape[1:], strict=True)]
        made[at] = np.pad(value[rows], [(0, 0), *padding])
    return made
