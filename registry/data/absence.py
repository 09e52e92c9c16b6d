"""Modalities that are not there: silent in every clip, or missing in some, in whole or step by step."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from registry.contract import MODALITIES

from .splits import FeatureFile, SplitArrays


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


@dataclass(frozen=True)
class Rules:
    """What stands in the place of what is missing, for one model.

    Args:
        unknown: token id of a word that is missing.
        special: token ids that are never missing.
        nothing: token ids, mask and segments (3, l) of an empty text.
        fills: (d) for audio, vision and text features; 0 where there is none.
        keeps_lengths: whether a modality that is missing whole keeps its length, as aligned ones must.
    """

    unknown: int = 0
    special: Collection[int] = ()
    nothing: np.ndarray | None = None
    fills: Mapping[str, np.ndarray] = field(default_factory=dict)
    keeps_lengths: bool = False


Part = tuple[SplitArrays, "np.ndarray | None"]
"""Some clips, and their tokens (N, 3, L) where a text encoder reads them."""


def lose_steps(part: Part, rate: float, seed: int, modalities: Collection[str], rules: Rules) -> Part:
    """Return clips of which each word and each step of audio and vision is missing with a rate.

    A token becomes the unknown one, but for special tokens; features become the fill. Lengths stay, and so does
    padding. What is missing at a rate is missing at every higher one with the same seed, whatever else is.
    """
    arrays, tokens = part
    lost = {}
    for name in modalities:
        shape = _steps_of(part, name)
        lost[name] = _draws(seed, name, shape) < rate
    return _without_steps(arrays, tokens, lost, rules)


def lose_modalities(
    part: Part, rate: float, seed: int, modalities: Collection[str], rules: Rules, read: Collection[str]
) -> Part:
    """Return clips each of which lacks each modality with a rate; of those that a model `read`s, one at least stays.

    Audio and vision that are missing are one step of the fill, text is special tokens only; where `keeps_lengths`, all
    steps are missing instead. As above, what is missing stays missing at higher rates.
    """
    arrays, tokens = part
    draws = np.stack([_draws(seed, name, (len(arrays.ids),)) for name in modalities], axis=1)
    lost = draws < rate
    if {*read} <= {*modalities}:
        whole = lost.all(axis=1)
        lost[whole, draws[whole].argmax(axis=1)] = False
    for column, name in enumerate(modalities):
        rows = lost[:, column]
        if rules.keeps_lengths:
            every = np.broadcast_to(rows[:, None], _steps_of((arrays, tokens), name))
            arrays, tokens = _without_steps(arrays, tokens, {name: every}, rules)
        elif name == "text" and tokens is not None:
            assert rules.nothing is not None
            tokens = tokens.copy()
            tokens[rows] = 0
            tokens[rows, :, : rules.nothing.shape[1]] = rules.nothing
        else:
            array, lengths = getattr(arrays, name).copy(), getattr(arrays, f"{name}_lengths")
            array[rows] = 0
            array[rows, 0] = rules.fills.get(name, 0)
            ends = None if lengths is None else np.where(rows, 1, lengths)
            arrays = replace(arrays, **{name: array, f"{name}_lengths": ends})
    return arrays, tokens


def _steps_of(part: Part, name: str) -> tuple[int, int]:
    """Return how many clips and steps, padding included, a modality has."""
    arrays, tokens = part
    if name == "text" and tokens is not None:
        return len(tokens), tokens.shape[2]
    return getattr(arrays, name).shape[:2]


def _draws(seed: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return what decides, in [0, 1), of one modality: what others have does not matter."""
    return np.random.default_rng([seed, MODALITIES.index(name)]).random(shape)


def _without_steps(
    arrays: SplitArrays, tokens: np.ndarray | None, lost: Mapping[str, np.ndarray], rules: Rules
) -> Part:
    for name, steps in lost.items():
        if name == "text" and tokens is not None:
            ids, mask = tokens[:, 0], tokens[:, 1]
            word = (mask == 1) & ~np.isin(ids, list(rules.special))
            tokens = tokens.copy()
            tokens[:, 0] = np.where(steps & word, rules.unknown, ids)
            continue
        array, lengths = getattr(arrays, name).copy(), getattr(arrays, f"{name}_lengths")
        real = (
            np.arange(array.shape[1]) < (np.full(len(array), array.shape[1]) if lengths is None else lengths)[:, None]
        )
        array[steps & real] = rules.fills.get(name, 0)
        arrays = replace(arrays, **{name: array})
    return arrays, tokens
