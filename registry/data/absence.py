"""Modalities that are not there: silent in every clip, or missing in some, in whole or step by step."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from .feature_file import FeatureFile, SplitArrays


def silenced(file: FeatureFile, without: Collection[str], widths: Mapping[str, int]) -> FeatureFile:
    """Return a file in which some of `"text"`, `"audio"` and `"vision"` say nothing, also where it lacks them.

    Audio and vision, and a file's own text features, are one step of zeros in every clip; raw text is empty, so that an
    encoder reads its special tokens only.

    Args:
        file: the data.
        without: the modalities.
        widths: of what is to be made; where a modality is not in it, the file's own, and 1 where the file has none.
    """
    splits = {}
    for name, split in file.splits.items():
        changes: dict[str, Any] = {}
        for modality in without:
            changes |= _silent(split, modality, widths.get(modality))
        splits[name] = replace(split, **changes)
    return replace(file, splits=splits)


def _silent(split: SplitArrays, modality: str, width: int | None) -> dict[str, Any]:
    clips, array = len(split.ids), getattr(split, modality)
    changes: dict[str, Any] = {"raw_text": [""] * clips, "text_bert": None} if modality == "text" else {}
    if modality != "text" or array is not None or width:
        width = width or (1 if array is None else array.shape[2])
        changes |= {modality: np.zeros((clips, 1, width), dtype=np.float32)}
        changes |= {f"{modality}_lengths": np.ones(clips, dtype=np.int64)}
    return changes
