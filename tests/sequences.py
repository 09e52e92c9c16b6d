"""Small computational sequences of five videos."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from registry.data.computational_sequences import ComputationalSequence
from tests.helpers import TOKENS

FOLDS = {"train": ["v0", "v1", "v2"], "valid": ["v3"], "test": ["v4"]}
Videos = dict[str, dict[str, np.ndarray]]
WORDS_OF_A_CLIP, CLIPS_OF_A_VIDEO = 4, 2
METADATA = (
    "root name",
    "computational sequence description",
    "computational sequence version",
    "alignment compatible",
    "dataset name",
    "dataset version",
    "creator",
    "contact",
    "featureset bib citation",
    "dataset bib citation",
)


def make_videos() -> dict[str, Videos]:
    """Return words, labels, audio and vision of five videos of two clips of four seconds.

    A word takes a second, and a pause of half a second follows each clip; audio has 10 steps a second and vision 4.
    """
    rng = np.random.default_rng(0)
    made: dict[str, Videos] = {role: {} for role in ("words", "labels", "audio", "vision")}
    for video in (video for videos in FOLDS.values() for video in videos):
        starts = np.concatenate([clip * 4.5 + np.arange(WORDS_OF_A_CLIP + 1) for clip in range(CLIPS_OF_A_VIDEO)])
        said = rng.choice(list(TOKENS), size=(CLIPS_OF_A_VIDEO, WORDS_OF_A_CLIP)).tolist()
        words = np.array([word for clip in said for word in (*clip, "sp")], dtype="S")
        lasts = np.where(words == b"sp", 0.5, 1.0)
        segments = np.arange(CLIPS_OF_A_VIDEO) * 4.5
        made["words"][video] = _entry(starts, starts + lasts, words[:, None])
        made["labels"][video] = _entry(segments, segments + 4, rng.uniform(-3, 3, (CLIPS_OF_A_VIDEO, 1)))
        for role, rate, width in (("audio", 10, 5), ("vision", 4, 3)):
            at = np.arange(9 * rate) / rate
            made[role][video] = _entry(at, at + 1 / rate, rng.normal(size=(len(at), width)).astype(np.float32))
    return made


def _entry(start: Any, end: Any, features: Any) -> dict[str, np.ndarray]:
    return {"intervals": np.stack([start, end], axis=1).astype(np.float64), "features": np.asarray(features)}


def make_sequences() -> dict[str, ComputationalSequence]:
    """Return the same in memory."""
    return {role: ComputationalSequence(role, videos) for role, videos in make_videos().items()}


def write_csd(path: Path, videos: Videos, root: str = "root") -> Path:
    """Write a `.csd` file as the SDK writes them: metadata as JSON."""
    with h5py.File(path, "w") as file:
        for video, entry in videos.items():
            group = file.create_group(f"{root}/data/{video}")
            for name, array in entry.items():
                group[name] = array
        for key in METADATA:
            text = file.create_dataset(f"{root}/metadata/{key}", (1,), dtype=h5py.string_dtype())
            text[0] = json.dumps(root)
    return path


def write_all(folder: Path) -> dict[str, Path]:
    """Write the four files."""
    return {role: write_csd(folder / f"{role}.csd", videos, role) for role, videos in make_videos().items()}
