"""What a feature file must be: a check of its content that lists every fault, and mends what can be mended."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from registry.errors import InputError

from .safe_pickle import Array, plain
from .splits import CLIPS, SPLITS, SplitArrays

_INPUTS = ("raw_text", "text_bert", "text", "audio", "vision")
LABELS = {"M": "regression_labels"} | {task: f"regression_labels_{task}" for task in "TAV"}
KEYS = ("id", *_INPUTS, "text_lengths", "audio_lengths", "vision_lengths", *LABELS.values())
"""what is read of a split"""
_AT_ONCE = 1 << 18
_MOST_FAULTS = 20
_MOST_PADDING = 100
"""times as long as they are may sequences become by padding"""
_LONGEST = 200
"""characters of what was found, in a fault"""
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class Check:
    """Reads splits out of a file's content and collects its faults and notes.

    Args:
        label_range: labels lie in ±this.
        complete: whether every split, ids and labels must be there.
        name: of a single clip that has none.
    """

    def __init__(self, label_range: float, *, complete: bool = True, name: str = "clip") -> None:
        self.label_range = label_range
        self.complete = complete
        self.name = name
        self.unpadded: set[str] = set()
        """features of a single clip, all of whose steps are real"""
        self.faults: list[str] = []
        self.notes: list[str] = []

    def refuse(self, what: object) -> None:
        """Raise an InputError that lists the faults, if there are any; `what` names the file that has them."""
        if self.faults:
            raise InputError(_listing(what, self.faults))

    def fault(self, where: str, expected: str, found: str) -> None:
        found = found if len(found) < _LONGEST else f"{found[:_LONGEST]}…"
        self.faults.append(f"{where}: expected {expected}, found {found}")

    def file(self, content: Any) -> tuple[dict[str, SplitArrays], bool]:
        """Return the splits and whether they are aligned; they are usable if there are no faults."""
        if not isinstance(content, dict):
            self.fault("content", f"a dict of {', '.join(SPLITS)}", _describe(plain(content)))
            return {}, False
        wanted: Sequence[str] = SPLITS
        if not self.complete:
            wanted = [split for split in SPLITS if split in content]
            if not wanted and not any(key in content for key in _INPUTS):
                inputs = f"any of {', '.join(SPLITS)}, or the keys of clips, such as {', '.join(_INPUTS)}"
                self.fault("content", inputs, ", ".join(map(repr, list(content)[:5])) or "an empty dict")
                return {}, False
            if not wanted:
                wanted, content = [CLIPS], {CLIPS: self.with_clips(content)}
        for split in wanted:
            if not isinstance(content.get(split), dict):
                self.fault(split, "a dict of arrays", _describe(plain(content.get(split))))
        raw = {split: content[split] for split in wanted if isinstance(content.get(split), dict)}
        for split in raw:
            raw[split] = {key: value for key, value in raw[split].items() if value is not None}
            if not self.complete and "id" not in raw[split] and (names := self.names(split, raw[split])):
                raw[split]["id"] = names
        self.presence(raw)
        content.clear()  # so that an array that is converted does not stay twice in memory
        splits = {split: self.split(split, arrays) for split, arrays in raw.items()}
        aligned = self.lengths(raw, splits)
        self.across(splits)
        return splits, aligned

    def presence(self, raw: dict[str, dict[str, Any]]) -> None:
        for split, arrays in raw.items():
            for key in ("id", LABELS["M"]) if self.complete else ():
                if key not in arrays:
                    self.fault(f"{split}: {key}", "one a clip", "nothing")
            if not any(key in arrays for key in _INPUTS):
                self.fault(split, f"at least one of {', '.join(_INPUTS)}", "none")
        for key in (*_INPUTS, *(list(LABELS.values())[1:] if self.complete else ())):
            having = [split for split in raw if key in raw[split]]
            for split in raw:
                if having and split not in having:
                    self.fault(f"{split}: {key}", f"it, since {having[0]} has it", "nothing")

    def with_clips(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
        """Return the keys of a split, with the dimension of clips where a single clip lacks it."""
        made = dict(arrays)
        alone = {"id": 0, "raw_text": 0, "text_bert": 2, "text": 2, "audio": 2, "vision": 2}
        alone |= dict.fromkeys((*LABELS.values(), "audio_lengths", "vision_lengths"), 0)
        for key, dims in alone.items():
            value = plain(made.get(key))
            if value is not None and _dims(value) == dims:
                made[key] = [value] if dims == 0 else np.asarray(value)[None]
                self.unpadded.add(key)
        return made

    def names(self, split: str, arrays: Mapping[str, Any]) -> list[str] | None:
        """Return names for the clips of a split that has none, as many as its first input has rows."""
        inputs = (plain(arrays[key]) for key in _INPUTS if key in arrays)
        clips = next((len(rows) for rows in inputs if _dims(rows)), 0)
        if split == CLIPS:
            return [self.name] if clips == 1 else [str(row) for row in range(clips)]
        return [f"{split}_{row}" for row in range(clips)]

    def split(self, split: str, arrays: dict[str, Any]) -> SplitArrays:
        ids = self.strings(f"{split}: id", arrays.pop("id", None)) or []
        clips = len(ids) if ids else None
        result = SplitArrays(ids=ids, labels={})
        for task, key in LABELS.items():
            labels = self.numbers(f"{split}: {key}", arrays.pop(key, None), 1, clips)
            if labels is not None:
                result.labels[task] = self.in_range(f"{split}: {key}", labels, ids)
        result.raw_text = self.strings(f"{split}: raw_text", arrays.pop("raw_text", None), clips)
        result.text_bert = self.tokens(f"{split}: text_bert", arrays.pop("text_bert", None), clips)
        for key in ("text", "audio", "vision"):
            value, steps = _padded(arrays.pop(key, None))
            if steps:
                arrays.setdefault(f"{key}_lengths", steps)
            setattr(result, key, self.features(f"{split}: {key}", value, clips))
        return result

    def strings(self, where: str, value: Any, clips: int | None = None) -> list[str] | None:
        if value is None:
            return None
        rows = plain(value)
        try:
            rows = rows.tolist() if isinstance(rows, np.ndarray) else rows
        except ValueError:  # not Unicode
            rows = None
        if not isinstance(rows, list) or not rows:
            empty = isinstance(rows, list | str) and not rows
            self.fault(where, "a list of strings", f"{_describe(rows)}{' of length 0' if empty else ''}")
            return None
        rows = [row[0] if isinstance(row, list) and len(row) == 1 else row for row in rows]
        allowed = str | bytes if where.endswith("raw_text") else str | bytes | int | float
        wrong = [row for row in rows if not isinstance(row, allowed)]
        if wrong:
            self.fault(where, "a list of strings", f"{_describe(wrong[0])} among them")
            return None
        if clips is not None and len(rows) != clips:
            self.fault(where, f"{clips} rows as in id", str(len(rows)))
            return None
        try:
            texts = [_clean(row) for row in rows]
        except ValueError:  # an integer of thousands of digits
            self.fault(where, "a list of strings", "a number too long to print")
            return None
        if where.endswith(": id") and (odd := [text for text in texts if not text or _CONTROL.search(text)]):
            # They would not survive a CSV file.
            self.fault(where, "ids that are not empty and hold no control characters", repr(odd[0]))
            return None
        return texts

    def numbers(self, where: str, value: Any, dims: int, clips: int | None, whole: bool = False) -> np.ndarray | None:
        """Return an array of `dims` dimensions and `clips` rows, float32 or, if `whole`, int64; None if it is not."""
        if value is None:
            return None
        rows = plain(value)
        if _holds_text(rows):  # numpy would give every item the longest one's room
            self.fault(where, "numbers", "text among them")
            return None
        try:
            array = np.asarray(rows)
        except (ValueError, OverflowError):  # rows of different lengths
            self.fault(where, f"an array of {dims} dimensions", "rows of different shapes")
            return None
        if array.dtype.kind not in "biuf":
            self.fault(where, "numbers", _describe(array))
            return None
        if dims == 1 and array.ndim == 2 and array.shape[1] == 1:
            array = array[:, 0]
        if array.ndim != dims or 0 in array.shape:
            self.fault(where, f"an array of {dims} dimensions, none of them empty", f"shape {array.shape}")
            return None
        if clips is not None and len(array) != clips:
            self.fault(where, f"{clips} rows as in id", str(len(array)))
            return None
        if whole and array.dtype.kind == "f" and not (np.isfinite(array) & (array == np.trunc(array))).all():
            self.fault(where, "whole numbers", "fractions or values that are not finite")
            return None
        with np.errstate(
            over="ignore", invalid="ignore"
        ):  # float64 beyond float32's range becomes inf, which the callers look for
            return np.require(array, np.int64 if whole else np.float32, ["C", "W"])

    def in_range(self, where: str, labels: np.ndarray, ids: list[str]) -> np.ndarray:
        wrong = np.flatnonzero(~(np.abs(labels) <= self.label_range + 1e-6) | ~np.isfinite(labels))
        if len(wrong):
            clip = f"clip {ids[wrong[0]]!r}" if ids else f"row {wrong[0]}"
            count = f" ({len(wrong)} such labels)" if len(wrong) > 1 else ""
            self.fault(
                where,
                f"labels from {-self.label_range:g} to {self.label_range:g}" if self.label_range < np.inf else "finite",
                f"{labels[wrong[0]]:.8g} at {clip}{count}",
            )
        return labels

    def tokens(self, where: str, value: Any, clips: int | None) -> np.ndarray | None:
        tokens = self.numbers(where, value, 3, clips, whole=True)
        if tokens is None:
            return None
        if tokens.shape[1] != 3 and tokens.shape[2] == 3:  # as early versions of MMSA-FET wrote it
            tokens = np.ascontiguousarray(tokens.swapaxes(1, 2))
            self.notes.append(f"{where}: shape (N, L, 3) was turned into (N, 3, L)")
        if tokens.shape[1] != 3:
            self.fault(where, "shape (N, 3, L): token ids, mask, segments", f"shape {tokens.shape}")
            return None
        ids, mask, segments = tokens.swapaxes(0, 1)
        if ids.min() < 0:
            self.fault(where, "token ids from 0", f"{ids.min()}")
        for name, part in (("mask", mask), ("segments", segments)):
            if part.min() < 0 or part.max() > 1:
                self.fault(where, f"{name} of 0 and 1", f"values from {part.min()} to {part.max()}")
        empty = int((~mask.any(axis=1)).sum())
        if empty:
            self.fault(where, "at least one token a clip", f"{empty} clips with an all-zero mask")
        if (mask[:, 1:] > mask[:, :-1]).any():
            self.fault(where, "a mask of ones, then zeros", "ones after zeros")
        return tokens

    def features(self, where: str, value: Any, clips: int | None) -> np.ndarray | None:
        array = self.numbers(where, value, 3, clips)
        if array is None:
            return None
        mended = 0
        rows = max(1, _AT_ONCE // array[0].size)
        for start in range(0, len(array), rows):  # a mask of the whole array would take a quarter of its memory
            part = array[start : start + rows]
            wrong = ~np.isfinite(part)
            if wrong.any():
                mended += int(wrong.sum())
                part[wrong] = 0
        if mended:
            self.notes.append(f"{where}: {mended} values that are not finite (NaN, ±inf) were replaced by 0")
        return array

    def lengths(self, raw: dict[str, dict[str, Any]], splits: dict[str, SplitArrays]) -> bool:
        """Set the lengths of text, audio and vision, and return whether the file is aligned."""
        given = any(f"{modality}_lengths" in arrays for arrays in raw.values() for modality in ("audio", "vision"))
        aligned = not given and all(_is_aligned(arrays) for arrays in splits.values())
        for split, arrays in splits.items():
            if arrays.text is not None:
                value = raw[split].pop("text_lengths", None)
                if value is not None:
                    arrays.text_lengths = self.given_lengths(f"{split}: text_lengths", value, arrays.text)
                elif arrays.text_bert is not None and arrays.text.shape[1] == arrays.text_bert.shape[2]:
                    arrays.text_lengths = arrays.text_bert[:, 1].sum(axis=1)
                elif aligned and arrays.text_bert is None:
                    arrays.text_lengths = np.array([_last_step(clip) for clip in arrays.text], dtype=np.int64)
                    self.notes.append(f"{split}: lengths are those of text, whose padding is zero")
            for modality in ("audio", "vision"):
                features = getattr(arrays, modality)
                if features is None:
                    continue
                where, value = f"{split}: {modality}_lengths", raw[split].pop(f"{modality}_lengths", None)
                if aligned and arrays.text_bert is not None:
                    lengths: np.ndarray | None = arrays.text_bert[:, 1].sum(axis=1)
                elif aligned and arrays.text_lengths is not None:
                    lengths = arrays.text_lengths.copy()
                elif value is not None:
                    lengths = self.given_lengths(where, value, features)
                elif features.shape[1] == 1 or modality in self.unpadded:
                    lengths = np.full(len(features), features.shape[1], dtype=np.int64)
                else:
                    self.fault(where, f"one length a clip, since {modality} has {features.shape[1]} steps", "nothing")
                    continue
                setattr(arrays, f"{modality}_lengths", lengths)
        return aligned

    def given_lengths(self, where: str, value: Any, features: np.ndarray) -> np.ndarray | None:
        lengths = self.numbers(where, value, 1, len(features), whole=True)
        if lengths is None:
            return None
        wrong = (lengths < 0) | (lengths > features.shape[1])
        if wrong.any():
            self.fault(where, f"1 to {features.shape[1]}", f"{lengths[wrong][0]} ({int(wrong.sum())} clips outside)")
        zero = lengths == 0
        if zero.any():
            self.notes.append(f"{where}: {int(zero.sum())} lengths of 0 were lifted to 1")
            lengths[zero] = 1
        return lengths

    def across(self, splits: dict[str, SplitArrays]) -> None:
        """Check that feature widths agree and that no clip comes twice."""
        for key in ("text", "audio", "vision"):
            widths = {s: getattr(a, key).shape[2] for s, a in splits.items() if getattr(a, key) is not None}
            first = next(iter(widths), "")
            for split, width in widths.items():
                if width != widths[first]:
                    self.fault(f"{split}: {key}", f"{widths[first]} features as in {first}", str(width))
        seen: dict[str, str] = {}
        for split, arrays in splits.items():
            twice = [clip for clip, count in Counter(arrays.ids).items() if count > 1]
            if twice:
                self.fault(f"{split}: id", "every id once", f"{twice[0]!r} again ({len(twice)} ids repeated)")
            leaked = [clip for clip in dict.fromkeys(arrays.ids) if clip in seen]
            if leaked:
                self.fault(
                    f"{split}: id",
                    "clips of no other split",
                    f"{leaked[0]!r} of {seen[leaked[0]]} ({len(leaked)} clips)",
                )
            seen.update(dict.fromkeys(arrays.ids, split))


def _listing(path: object, faults: list[str]) -> str:
    if len(faults) == 1:
        return f"{path} cannot be used: {faults[0]}"
    lines = [f"{path} cannot be used: {len(faults)} faults", *faults[:_MOST_FAULTS]]
    if len(faults) > _MOST_FAULTS:
        lines.append(f"and {len(faults) - _MOST_FAULTS} more")
    return "\n  ".join(lines)


def _dims(value: Any) -> int | None:
    """Return how many dimensions a value has; None of rows of different lengths."""
    try:
        return np.ndim(value)
    except ValueError:
        return None


def _describe(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{'objects' if value.dtype.hasobject else value.dtype} of shape {value.shape}"
    return "nothing" if value is None else f"a {type(value).__name__}"


def _holds_text(rows: Any) -> bool:
    if isinstance(rows, list):
        kinds = {*map(type, rows)}
        return bool(kinds & {str, bytes}) or (bool(kinds & {list, np.ndarray}) and any(map(_holds_text, rows)))
    return isinstance(rows, np.ndarray) and rows.dtype.kind in "SU"


def _clean(text: Any) -> str:
    """Return text that can be written as UTF-8."""
    text = text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)
    return text.encode("utf-8", "replace").decode("utf-8")


def _padded(value: Any) -> tuple[Any, list[int] | None]:
    """Return sequences (L, d) of different lengths as one array with zeros at the end, and their lengths.

    Anything else is returned as it is, with None.
    """
    if not isinstance(value, list | tuple | Array | np.ndarray):
        return value, None
    rows = plain(value)
    if not isinstance(rows, list):
        return rows, None
    try:
        arrays = [np.asarray(row) for row in rows]
    except (ValueError, OverflowError):
        return rows, None
    whole = [array for array in arrays if array.size]
    is_one = len({array.shape for array in arrays}) == 1
    if is_one or not whole or any(array.ndim != 2 or array.dtype.kind not in "biuf" for array in whole):
        return rows, None
    if len({array.shape[1] for array in whole}) > 1:
        return rows, None
    steps = [len(array) if array.size else 0 for array in arrays]
    if len(arrays) * max(steps) > max(_MOST_PADDING * sum(steps), 1_000_000):  # else a small file could fill the memory
        return rows, None
    with np.errstate(over="ignore", invalid="ignore"):
        result = np.zeros((len(arrays), max(steps), whole[0].shape[1]), dtype=np.float32)
        for row, (array, length) in enumerate(zip(arrays, steps, strict=True)):
            if length:
                result[row, :length] = array
    return result, steps


def _is_aligned(arrays: SplitArrays) -> bool:
    """Whether audio and vision have as many steps as the tokens, or as the text features where there are no tokens."""
    steps = {features.shape[1] for features in (arrays.audio, arrays.vision) if features is not None}
    if arrays.text_bert is not None:
        return steps == {arrays.text_bert.shape[2]}
    return arrays.text is not None and arrays.text.shape[1] > 1 and steps == {arrays.text.shape[1]}


def _last_step(clip: np.ndarray) -> int:
    """Return how many steps of (L, d) there are up to the last that is not all zeros, at least 1."""
    real = np.flatnonzero(clip.any(axis=1))
    return int(real[-1]) + 1 if len(real) else 1
