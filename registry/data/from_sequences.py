"""A feature file in MMSA's layout from computational sequences.

A clip is a segment that the labels mark, `VIDEO$_$NUMBER`: a video's segments are numbered from 1 in order of their
start, as MMSA numbers CMU-MOSI's. What lies in it is what overlaps its interval, as in the SDK's `align`.
"""

from __future__ import annotations

import json
import pickle
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from registry.errors import InputError, blaming, unknown

from .alignment import REDUCTIONS
from .clips import Clip, Cutter
from .computational_sequences import ComputationalSequence, as_sequence, open_sequence
from .splits import SPLITS

if TYPE_CHECKING:
    from .text import TextEncoder

Folds = Mapping[str, Sequence[str]]

_MODALITIES = ("audio", "vision")


@dataclass
class Converted:
    """What `from_computational_sequences` made."""

    splits: dict[str, dict[str, Any]]
    """`"train"`, `"valid"`, `"test"`, as in a feature file; `interval` (N, 2) says where in its video a clip lies"""
    notes: list[str]
    """what was left out, cut or mended, a line each"""

    def write(self, path: Path) -> None:
        """Pickle the splits."""
        with open(path, "wb") as file:
            pickle.dump(self.splits, file, protocol=5)  # which writes arrays without a copy of them

    def rows(self) -> list[dict[str, str]]:
        """Return a row for each split: clips, videos, and each clip's shape by modality."""
        return [{"split": name, **_row(arrays)} for name, arrays in self.splits.items()]


def _row(arrays: dict[str, Any]) -> dict[str, str]:
    videos = {clip.rpartition("$_$")[0] for clip in arrays["id"]}
    shapes = {
        name: " × ".join(map(str, arrays[name].shape[1:])) for name in ("text_bert", *_MODALITIES) if name in arrays
    }
    return {"clips": str(len(arrays["id"])), "videos": str(len(videos)), **shapes}


def standard_folds(dataset: str) -> Folds:
    """Return the SDK's standard folds of `mosi` or `mosei`: the videos of each split.

    Raises:
        InputError: there are none of that name.
    """
    known = json.loads(resources.files("registry.data").joinpath("standard_folds.json").read_text("utf-8"))["folds"]
    if dataset not in known:
        raise InputError(f"dataset {dataset!r} has no standard folds ({', '.join(known)} have): pass --folds FILE.json")
    return known[dataset]


def read_folds(path: Path) -> Folds:
    """Read `{"train": [video, …], "valid": […], "test": […]}`.

    Raises:
        InputError: it is something else, or a video is in it twice.
    """
    try:
        folds = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise InputError(f"{path} is no JSON file") from None
    _check_folds(folds, str(path))
    return folds


def _check_folds(folds: Any, where: str) -> None:
    if not isinstance(folds, Mapping) or folds.keys() != set(SPLITS) or not all(map(_are_names, folds.values())):
        raise InputError(f'{where}: expected {{"train": [video, …], "valid": […], "test": […]}}, found something else')
    twice = [video for video, count in Counter(v for name in SPLITS for v in folds[name]).items() if count > 1]
    if twice:
        raise InputError(f"{where}: expected each video once, found {twice[0]!r} again ({len(twice)} videos repeated)")


def _are_names(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(video, str) for video in value)


def from_computational_sequences(
    *,
    words: Any,
    labels: Any,
    audio: Any = None,
    vision: Any = None,
    folds: str | Folds,
    aligned: bool = False,
    reduction: str = "mean",
    rate: float | None = None,
    max_length: int = 50,
    max_audio: int = 500,
    max_vision: int = 500,
    keep_empty: bool = False,
    text_encoder: TextEncoder | None = None,
    label_range: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Converted:
    """Return the splits of a feature file, cut out of sequences of whole videos.

    Each sequence is the path of a `.csd` file, a `ComputationalSequence`, or the SDK's `computational_sequence`, as a
    member of an `mmdataset` is.

    Args:
        words: a word a step; `sp`, a pause, is left out.
        labels: a segment a step; the first feature is the label.
        audio, vision: numbers; either may be left out.
        folds: the videos of `"train"`, `"valid"` and `"test"`, or the name of a dataset with standard ones.
        aligned: whether audio and vision get a row a token of `text_bert`, that of the token's word.
        reduction: what the steps in a word's interval, or in one of `rate`, come to: one of `REDUCTIONS`.
        rate: where they are not aligned, steps of a second that audio and vision are brought to; None leaves them as
            they are.
        max_length: tokens of a clip, special tokens included.
        max_audio, max_vision: steps of a clip, where they are not aligned.
        keep_empty: whether clips without any step of audio or vision stay, with a step of zeros.
        text_encoder: whose token ids `text_bert` holds; there is none without. Aligned features need one.
        label_range: labels lie in ±this.
        progress: is called with how many videos are done, and of how many.

    Raises:
        InputError: a sequence is broken, an option does not fit, or a split would be empty.
    """
    _check_options(aligned, reduction, rate, max_length, max_audio, max_vision, text_encoder)
    if label_range is not None and not label_range > 0:
        raise InputError(f"the label range must be a positive number, got {label_range:g}")
    folds = standard_folds(folds) if isinstance(folds, str) else folds
    _check_folds(folds, "folds")
    given = {"words": words, "labels": labels, "audio": audio, "vision": vision}
    with ExitStack() as stack:
        sequences: dict[str, ComputationalSequence] = {
            role: stack.enter_context(open_sequence(Path(source)))
            if isinstance(source, str | Path)
            else as_sequence(source, role)
            for role, source in given.items()
            if source is not None
        }
        cutter = Cutter(
            labels=sequences["labels"],
            words=sequences["words"],
            modalities={name: sequences[name] for name in _MODALITIES if name in sequences},
            aligned=aligned,
            reduction=reduction,
            rate=rate,
            most={"audio": max_audio, "vision": max_vision},
            keep_empty=keep_empty,
            label_range=label_range,
        )
        clips = cutter.clips({name: folds[name] for name in SPLITS}, progress)
    notes = cutter.notes()
    for name in SPLITS:
        if not clips[name]:
            why = f" ({'; '.join(notes)})" if notes else ""
            raise InputError(f"no clip is left in {name}: expected folds and sequences of one dataset{why}")
    splits = {name: _arrays(clips[name]) for name in SPLITS}
    tokens = {}
    if text_encoder:
        with blaming(f"the tokenizer of text encoder {text_encoder.name!r}"):
            tokens = {name: _tokens(clips[name], text_encoder, max_length) for name in SPLITS}
        cut = sum(
            int((of_word.max(axis=1) < [len(clip.words) - 1 for clip in clips[name]]).sum())
            for name, (_, of_word) in tokens.items()
        )
        if cut:
            notes.append(f"{cut:,} clips have more than {max_length} tokens: text_bert holds the first (--max-length)")
    for modality in cutter.modalities:
        longest = max(len(clip.features[modality]) for name in SPLITS for clip in clips[name])
        for name in SPLITS:
            if aligned:
                splits[name][modality] = _by_token(clips[name], modality, tokens[name][1])
            else:
                splits[name] |= _padded(clips[name], modality, longest)
    for name, (text_bert, _) in tokens.items():
        splits[name]["text_bert"] = text_bert
    return Converted(splits, notes)


def _check_options(
    aligned: bool,
    reduction: str,
    rate: float | None,
    max_length: int,
    max_audio: int,
    max_vision: int,
    text_encoder: TextEncoder | None,
) -> None:
    if reduction not in REDUCTIONS:
        raise InputError(unknown("reduction", reduction, REDUCTIONS))
    limits = {"--max-audio": max_audio, "--max-vision": max_vision, "--rate": rate}
    for option, limit in limits.items():
        if limit is not None and not 0 < limit <= 100_000:
            raise InputError(f"{option} must be more than 0 and at most 100,000, got {limit}")
    if aligned and text_encoder is None:
        raise InputError("aligned features have a row a token: pass --text-encoder")
    if aligned and rate is not None:
        raise InputError("--rate is for unaligned features; aligned ones have a row a token")
    if text_encoder and not 3 <= max_length <= text_encoder.max_tokens:
        most = f"{text_encoder.max_tokens}, the most tokens that {text_encoder.name!r} takes"
        raise InputError(f"--max-length must be from 3 to {most}, got {max_length}")


def _arrays(clips: list[Clip]) -> dict[str, Any]:
    return {
        "id": [clip.id for clip in clips],
        "raw_text": [" ".join(clip.words) for clip in clips],
        "regression_labels": np.array([clip.label for clip in clips], dtype=np.float32),
        "interval": np.stack([clip.interval for clip in clips]),
    }


def _tokens(clips: list[Clip], encoder: TextEncoder, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return token ids, mask and segments (N, 3, L), and each token's word (N, L), -1 where it has none."""
    tokenizer = encoder.tokenizer()
    words = [clip.words for clip in clips]
    options = {"return_token_type_ids": True, "truncation": True, "max_length": length, "padding": "max_length"}
    made = tokenizer(words, is_split_into_words=True, **options)
    tokens = np.stack([made["input_ids"], made["attention_mask"], made["token_type_ids"]], axis=1).astype(np.int64)
    of_word = [[-1 if word is None else word for word in made.word_ids(row)] for row in range(len(clips))]
    return tokens, np.array(of_word)


def _by_token(clips: list[Clip], modality: str, of_word: np.ndarray) -> np.ndarray:
    """Return float32 (N, L, d): each token's row is its word's, that of a special token zeros."""
    result = np.zeros((*of_word.shape, clips[0].features[modality].shape[1]), dtype=np.float32)
    for row, clip in enumerate(clips):
        real = np.flatnonzero(of_word[row] >= 0)
        result[row, real] = clip.features.pop(modality)[of_word[row, real]]
    return result


def _padded(clips: list[Clip], modality: str, longest: int) -> dict[str, Any]:
    """Return float32 (N, longest, d), padded with zeros at the end, and the N lengths."""
    lengths = [len(clip.features[modality]) for clip in clips]
    result = np.zeros((len(clips), longest, clips[0].features[modality].shape[1]), dtype=np.float32)
    for row, clip in enumerate(clips):
        result[row, : lengths[row]] = clip.features.pop(modality)  # so that nothing stays twice in memory
    return {modality: result, f"{modality}_lengths": lengths}
