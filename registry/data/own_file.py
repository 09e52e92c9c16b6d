"""Feature files of your own: from arrays to a pickle in MMSA's layout.

registry.write_feature_file("mine.pkl", {"train": {"id": […], "labels": […], "raw_text": […], "audio": […]}, …})
"""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from registry.errors import InputError, one_line, unknown
from registry.runs import require_file, write_file

from .checks import KEYS, LABELS, Check
from .feature_file import file_sha256
from .splits import SPLITS, FeatureFile, SplitArrays

_UNREAD = ("annotations", "classification_labels")
"""keys of MMSA's files that are read by nobody here, and kept"""


def write_feature_file(
    path: str | Path, splits: Mapping[str, Mapping[str, Any]], *, label_range: float | None = None
) -> FeatureFile:
    """Check arrays as a feature file's are, and write them as one, whole or not at all.

    Upstream reads it too, where it has what upstream's model wants: `text_bert` or `text`, `audio` and `vision`.

    Args:
        path: the pickle to write; a file that is there is replaced.
        splits: `"train"`, `"valid"` and `"test"`, each a dict of N clips:

            - `id`: N strings, none twice.
            - `labels`: (N) numbers, or a dict of `"M"` and, where known, `"T" "A" "V"`, (N) each; MMSA's own keys
              `regression_labels` and `regression_labels_T`, `_A`, `_V` will do as well.
            - at least one of `raw_text` (N strings), `text_bert` (N, 3, L), `text`, `audio` and `vision` (N, L, d).
              The last three may be lists of N arrays (L, d) of different lengths.
            - `audio_lengths`, `vision_lengths`, `text_lengths`: (N) numbers, of arrays (N, L, d).
        label_range: labels lie in ± this; not looked at where it is None.

    Returns:
        What a reader of the file gets, with notes on what was mended.

    Raises:
        InputError: there are faults, all of them listed, or the file cannot be written.
    """
    path = Path(os.path.expanduser(path))
    require_file(path, "path")
    check = Check(math.inf if label_range is None else label_range)
    if label_range is not None and not label_range > 0:
        raise InputError(f"label_range must be a positive number, got {label_range}")
    if not isinstance(splits, Mapping):
        raise InputError(f"splits must be a dict of {', '.join(SPLITS)}, got a {type(splits).__name__}")
    for name in splits:
        if name not in SPLITS:
            check.faults.append(unknown("split", str(name), SPLITS))
    content = {name: _flat(check, name, arrays) for name, arrays in splits.items() if isinstance(arrays, Mapping)}
    unread = {name: {key: arrays.pop(key) for key in _UNREAD if key in arrays} for name, arrays in content.items()}
    made, aligned = check.file(content)
    check.refuse(path)
    if not aligned:
        _to_one_length(made)
    file = FeatureFile(path.name, made, aligned, "", check.notes)
    layout = layout_of(file)
    for name, arrays in unread.items():
        layout[name].update(arrays)

    def write(place: Path) -> None:
        with open(place, "wb") as out:
            pickle.dump(layout, out, protocol=4)

    write_file(path, write)
    file.sha256 = file_sha256(path)
    return file


def _to_one_length(splits: Mapping[str, SplitArrays]) -> None:
    """Pad each modality whose lengths are known to one length in all splits: upstream takes it from train alone."""
    for key in ("text", "audio", "vision"):
        having = [split for split in splits.values() if getattr(split, f"{key}_lengths") is not None]
        longest = max((getattr(split, key).shape[1] for split in having), default=0)
        for split in having:
            features = getattr(split, key)
            if features.shape[1] < longest:
                setattr(split, key, np.pad(features, ((0, 0), (0, longest - features.shape[1]), (0, 0))))


def layout_of(file: FeatureFile) -> dict[str, dict[str, Any]]:
    """Return a file's content in MMSA's layout, where an aligned file is one without lengths of audio and vision."""
    layout: dict[str, dict[str, Any]] = {}
    for name, split in file.splits.items():
        arrays: dict[str, Any] = {key: value for key, value in vars(split).items() if value is not None}
        arrays["id"] = arrays.pop("ids")
        arrays |= {LABELS[task]: values for task, values in arrays.pop("labels").items()}
        if file.aligned:
            arrays = {key: value for key, value in arrays.items() if key not in ("audio_lengths", "vision_lengths")}
        layout[name] = arrays
    return layout


def _flat(check: Check, split: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a split under MMSA's keys, with arrays of its own, for what is mended must not be the caller's."""
    arrays = dict(given)
    if (labels := arrays.pop("labels", None)) is not None:
        by_task = labels if isinstance(labels, Mapping) else {"M": labels}
        for task, values in by_task.items():
            if task not in LABELS:
                check.faults.append(f"{split}: labels: {unknown('task', str(task), LABELS)}")
            elif LABELS[task] in arrays:
                check.faults.append(f"{split}: labels {task} and {LABELS[task]} say the same thing; give one")
            else:
                arrays[LABELS[task]] = values
    for key in arrays.keys() - {*KEYS, *_UNREAD}:
        check.faults.append(f"{split}: {unknown('key', str(key), (*KEYS, 'labels'))}")
    for key in arrays.keys() - set(_UNREAD):
        try:
            arrays[key] = _own(arrays[key])
        except Exception as error:  # of another library's array, as one on a GPU
            check.faults.append(f"{split}: {key}: cannot be made an array: {one_line(error)}")
            arrays[key] = None
    return arrays


def _own(value: Any) -> Any:
    """Return a copy of an array, also of another library's, and of a list of them; anything else as it is."""
    if isinstance(value, list | tuple):
        return [np.asarray(item) if hasattr(item, "__array__") else item for item in value]
    return np.asarray(value).copy() if hasattr(value, "__array__") else value
