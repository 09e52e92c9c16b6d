"""Clips cut out of computational sequences of whole videos, and a count of what is left out, cut and mended."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from registry.errors import InputError

from .alignment import EPSILON, Steps, reduce_steps, steps_within
from .computational_sequences import ComputationalSequence

SILENCE = "sp"
"""the word that stands for a pause"""

_MOST_CELLS = 1_000_000
"""of `rate` in one clip"""

_NOTES = {
    "no fold": "{} clips are left out: their videos are in no fold",
    "lacking": "{} videos of the folds have no labels",
    "no length": "{} clips are left out: they end where they start",
    "no label": "{} clips are left out: they have no label",
    "no words": "{} clips are left out: no word lies in them",
}
_NOTES_OF_MODALITY = {
    "no": "{} clips are left out: no step of MODALITY lies in them (--keep-empty keeps them)",
    "kept": "{} clips have one step of zeros for MODALITY: none lies in them",
    "cut": "{} clips have more than {most} steps of MODALITY: the first are kept (--max-MODALITY, or --rate for fewer)",
    "silent": "{} words have no step of MODALITY in their interval: zeros",
    "mended": "{} values of MODALITY that are not finite (NaN, ±inf) were replaced by 0",
}
_MORE_NOTES = {
    "early": "{} segments start before their video does",
    "pauses": "{} pauses ('sp') between words are left out",
}


@dataclass
class Clip:
    """A labelled segment of a video, and what lies in it."""

    id: str
    interval: np.ndarray
    label: float
    spoken: np.ndarray
    """which of the video's words lie in it, without pauses"""
    words: list[str] = field(default_factory=list)
    features: dict[str, np.ndarray] = field(default_factory=dict)
    """by modality, float32 (n, d): a row a word where they are aligned, else a row a step, one at least"""


@dataclass
class Cutter:
    """Cuts clips; `notes` says what happened to them.

    Args:
        labels, words: a segment, and a word, a step.
        modalities: `"audio"`, `"vision"` or both.
        aligned: whether a clip's features get a row a word.
        reduction: one of `REDUCTIONS`.
        rate: where they are not aligned, steps of a second, or None to leave them as they are.
        most: where they are not aligned, steps of a clip by modality.
        keep_empty: whether clips without any step of a modality stay.
        label_range: labels lie in ±this, where it is known.
    """

    labels: ComputationalSequence
    words: ComputationalSequence
    modalities: Mapping[str, ComputationalSequence]
    aligned: bool
    reduction: str
    rate: float | None
    most: Mapping[str, int]
    keep_empty: bool
    label_range: float | None
    count: Counter[str] = field(default_factory=Counter)

    def clips(
        self, folds: Mapping[str, Sequence[str]], progress: Callable[[int, int], None] | None = None
    ) -> dict[str, list[Clip]]:
        """Return each fold's clips, by video and number."""
        fold_of = {video: fold for fold, videos in folds.items() for video in videos}
        self.count["lacking"] = len(fold_of.keys() - self.labels.videos.keys())
        clips: dict[str, list[Clip]] = {fold: [] for fold in folds}
        videos = sorted(self.labels.videos)
        for done, video in enumerate(videos, 1):
            if video in fold_of:
                clips[fold_of[video]] += self.video(video)
            else:
                self.count["no fold"] += sum(self.labels.shapes[key][0] for key in self.labels.videos[video])
            if progress:
                progress(done, len(videos))
        return clips

    def notes(self) -> list[str]:
        """Return what was left out, cut and mended, a line each."""
        notes = dict(_NOTES)
        for kind, note in _NOTES_OF_MODALITY.items():
            for name in self.modalities:
                notes[f"{kind} {name}"] = note.replace("MODALITY", name).replace("{most}", str(self.most[name]))
        notes |= _MORE_NOTES
        return [note.format(f"{self.count[key]:,}") for key, note in notes.items() if self.count[key]]

    def video(self, video: str) -> list[Clip]:
        """Return a video's clips."""
        if not video or not video.isprintable():
            raise InputError(f"{self.labels.where}: the video name {video!r} is empty or holds control characters")
        segments, words = self.labels.numbers(video), self.words.words(video)
        self.count["early"] += int((segments.intervals[:, 0] < 0).sum())
        inside = _by_interval(segments.intervals, words.intervals)
        said = (words.features != SILENCE) & (words.features != "")
        clips: dict[int, Clip] = {}
        for row, (interval, label) in enumerate(zip(segments.intervals, segments.features[:, 0], strict=True)):
            spoken = inside[row][said[inside[row]]]
            if fault := self._fault(interval, label, spoken, video):
                self.count[fault] += 1
            else:
                clips[row] = Clip(f"{video}$_${row + 1}", interval, float(label), spoken)
        steps = {name: self._finite(name, sequence.numbers(video)) for name, sequence in self.modalities.items()}
        found = {name: _by_interval(segments.intervals, of_modality.intervals) for name, of_modality in steps.items()}
        for name in self.modalities:
            self._drop_empty(name, clips, found[name])
        for row, clip in clips.items():
            clip.words = words.features[clip.spoken].tolist()
            self.count["pauses"] += len(inside[row]) - len(clip.words)
        for name, of_modality in steps.items():
            if self.aligned:
                self._by_word(name, clips, words, of_modality)
            else:
                for row, clip in clips.items():
                    clip.features[name] = self._steps_of(name, clip, of_modality, found[name][row])
        return list(clips.values())

    def _by_word(self, name: str, clips: dict[int, Clip], words: Steps, steps: Steps) -> None:
        """Give each clip a row a word."""
        rows, filled = reduce_steps(steps.features, *steps_within(words.intervals, steps.intervals), self.reduction)
        for clip in clips.values():
            clip.features[name] = rows[clip.spoken]
            self.count[f"silent {name}"] += int((~filled[clip.spoken]).sum())

    def _fault(self, interval: np.ndarray, label: float, words: np.ndarray, video: str) -> str | None:
        """Return why a segment makes no clip, apart from audio and vision."""
        if interval[1] - interval[0] <= EPSILON:
            return "no length"
        if not np.isfinite(label):
            return "no label"
        if self.label_range is not None and abs(label) > self.label_range + 1e-6:
            raise InputError(
                f"{self.labels.where}: video {video!r}: expected labels from {-self.label_range:g} to "
                f"{self.label_range:g}, found {label:g}: are these the dataset's sentiment labels?"
            )
        return None if len(words) else "no words"

    def _finite(self, name: str, steps: Steps) -> Steps:
        wrong = ~np.isfinite(steps.features)
        if wrong.any():
            self.count[f"mended {name}"] += int(wrong.sum())
            steps.features[wrong] = 0
        return steps

    def _drop_empty(self, name: str, clips: dict[int, Clip], inside: list[np.ndarray]) -> None:
        for row in [row for row in clips if not len(inside[row])]:
            if self.keep_empty:
                self.count[f"kept {name}"] += 1
            else:
                self.count[f"no {name}"] += 1
                del clips[row]

    def _steps_of(self, name: str, clip: Clip, steps: Steps, inside: np.ndarray) -> np.ndarray:
        """Return a clip's own steps, at the rate that is asked for; one of zeros where it has none."""
        if not len(inside):
            return np.zeros((1, steps.features.shape[1]), np.float32)
        features, rows = steps.features, inside
        if self.rate is not None:
            cells = _cells(clip.interval, self.rate)
            pairs = steps_within(cells, steps.intervals[inside])
            features, filled = reduce_steps(steps.features[inside], *pairs, self.reduction)
            rows = np.flatnonzero(filled)
        self.count[f"cut {name}"] += len(rows) > self.most[name]
        return features[rows[: self.most[name]]]


def _by_interval(intervals: np.ndarray, steps: np.ndarray) -> list[np.ndarray]:
    """Return the numbers of the steps in each interval."""
    found, begin = steps_within(intervals, steps)
    return np.split(found, begin[1:-1]) if len(intervals) else []


def _cells(interval: np.ndarray, rate: float) -> np.ndarray:
    """Return the intervals of 1/rate seconds that an interval is made of; the last may be shorter."""
    start, end = interval
    count = (end - start) * rate
    if count > _MOST_CELLS:
        raise InputError(f"a clip of {end - start:g} seconds has more than {_MOST_CELLS:,} steps at --rate {rate:g}")
    edges = np.append(start + np.arange(max(1, np.ceil(count - EPSILON))) / rate, end)
    return np.stack([edges[:-1], edges[1:]], axis=1)
