"""A feature file in memory: its splits as arrays."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

SPLITS = ("train", "valid", "test")
CLIPS = "clips"
"""the split that clips without splits are, where labels are not wanted"""


@dataclass
class SplitArrays:
    """One split's arrays, N rows in the file's order; a modality that the file lacks is None."""

    ids: list[str]
    labels: dict[str, np.ndarray]
    """`"M"` and, where known, `"T" "A" "V"`: float32 (N) each"""
    raw_text: list[str] | None = None
    text_bert: np.ndarray | None = None
    """int64 (N, 3, L): token ids, mask, segments"""
    text: np.ndarray | None = None
    """float32 (N, Lt, d)"""
    text_lengths: np.ndarray | None = None
    """int64 (N) 1…Lt, where the features are of the tokens of `text_bert`, or the file has them"""
    audio: np.ndarray | None = None
    """float32 (N, La, da)"""
    audio_lengths: np.ndarray | None = None
    """int64 (N) 1…La"""
    vision: np.ndarray | None = None
    """float32 (N, Lv, dv)"""
    vision_lengths: np.ndarray | None = None
    """int64 (N) 1…Lv"""


@dataclass
class FeatureFile:
    """A checked feature file, in memory."""

    name: str
    splits: dict[str, SplitArrays]
    """`"train"`, `"valid"`, `"test"`"""
    aligned: bool
    sha256: str
    notes: list[str] = field(default_factory=list)
    """what was mended or should be known, one line each"""
    parts: dict[str, str] = field(default_factory=dict)
    """the names of the files that a modality's features are from, by modality, where they are others"""
