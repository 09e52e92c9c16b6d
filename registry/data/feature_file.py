"""Read and check MMSA's feature files: pickles of `{split: {key: array}}` that come from people's drives."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from registry.errors import InputError

from .cache import Cache
from .checks import Check
from .mapped import Told
from .safe_pickle import load_pickle
from .splits import SPLITS, FeatureFile, SplitArrays

FORMAT = 2
"""raised when files are read otherwise than before, or hold other things: what was kept of them is then not used"""


def read_feature_file(
    path: Path, *, label_range: float, known_sha256: Mapping[str, str] | None = None, cache: Path | None = None
) -> FeatureFile:
    """Return the file's splits, checked and with what can be mended mended.

    Keys of a split as MMSA's `data_loader.py` reads them: `id`, `regression_labels` (required), `raw_text, text_bert,
    text, audio, vision` (at least one), `text_lengths, audio_lengths, vision_lengths, regression_labels_T/A/V`; others
    are ignored. Sequences of different lengths are padded. A file without lengths whose sequences are as long as
    `text_bert` is aligned: its lengths are the mask's sums. Where it has no `text_bert` and they are as long as `text`,
    they end where `text` has zeros alone.

    Args:
        path: the pickle.
        label_range: labels lie in ±this.
        known_sha256: published hashes by file name; a note says whether the file is the published one.
        cache: a folder that keeps what was read of a large file; the next time its arrays are mapped into memory from
            there, and read from the disk where they are used.

    Raises:
        InputError: the file cannot be read, asks for more than arrays and containers, or has faults; all are listed.
    """
    path = Path(path)
    if not label_range > 0:
        raise InputError(f"the label range must be a positive number, got {label_range}: pass --label-range")
    kept = Cache(cache, path, variant=str(float(label_range)), version=FORMAT)
    sha256 = kept.sha256() or file_sha256(path)
    content = kept.load(sha256)
    if content is None or not is_content(content):
        content = read_content(path, label_range)
        if kept_bytes := kept.save(sha256, content):
            content["notes"].append(f"{path.name} is kept in {cache} for a quick start next time ({size(kept_bytes)})")
    return made_of(content, path.name, sha256, known_sha256 or {})


def made_of(content: Mapping[str, Any], name: str, sha256: str, known_sha256: Mapping[str, str]) -> FeatureFile:
    """Return the file whose content `read_content` returned, with a note on whether it is the published one."""
    splits = {split: SplitArrays(**arrays) for split, arrays in content["splits"].items()}
    published, notes = known_sha256.get(name), list(content["notes"])
    if published == sha256:
        notes.append(f"{name} is the published file (SHA-256 verified)")
    elif published:
        notes.append(f"{name} is not the published file of that name (its SHA-256 is {sha256})")
    return FeatureFile(name, splits, content["aligned"], sha256, notes)


def read_content(path: Path, label_range: float) -> dict[str, Any]:
    """Return `aligned`, `notes`, and in `splits` each split's fields; raises InputError."""
    content = _read(path, Check(label_range))
    content["splits"] = {name: vars(split) for name, split in content["splits"].items()}
    return content


def read_clips(source: Path | Mapping[str, Any], *, label_range: float) -> FeatureFile:
    """Return clips whose sentiment is asked for, as checked as a file to train on; ids and labels may be missing.

    What is in it may be any of the splits, or the keys of one: then the split is called `CLIPS`. There one clip may
    lack the dimension of clips, as MMSA-FET writes a single video: audio and vision (L, d), `text_bert` (3, L); all of
    its steps are real where no length says otherwise. Clips without `id` are called by the file or their row.

    Args:
        source: a pickle, or its content.
        label_range: labels, where there are some, lie in ±this.

    Raises:
        InputError: as `read_feature_file`.
    """
    if isinstance(source, Mapping):
        return FeatureFile(
            "the clips", **_checked(_copy(source), "the clips", Check(label_range, complete=False)), sha256=""
        )
    path = Path(source)
    sha256 = file_sha256(path)
    return FeatureFile(path.name, **_read(path, Check(label_range, complete=False, name=path.stem)), sha256=sha256)


def _copy(value: Any) -> Any:
    """Return what a caller gives, as the checker may change it: new dicts, and arrays in place of tensors."""
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    value = value.detach().cpu().numpy() if hasattr(value, "detach") else value
    return value.copy() if isinstance(value, np.ndarray) else value


def _read(path: Path, check: Check) -> dict[str, Any]:
    """Return `aligned`, `notes`, and in `splits` each split's arrays; raises InputError."""
    try:
        return _checked(load_pickle(path), path, check)
    except MemoryError:
        raise InputError(f"{path} does not fit into memory ({size(path.stat().st_size)}), or is damaged") from None


def _checked(content: Any, name: object, check: Check) -> dict[str, Any]:
    splits, aligned = check.file(content)
    check.refuse(name)
    return {"splits": splits, "aligned": aligned, "notes": check.notes}


def is_content(content: dict[str, Any]) -> bool:
    """Whether what was kept has the form of what `read_content` returns, whatever its features and tokens are."""
    try:
        splits = [SplitArrays(**arrays) for arrays in content["splits"].values()]
        texts = [content["notes"], *(split.ids for split in splits), *(split.raw_text or [] for split in splits)]
        are_texts = all(isinstance(some, list) and all(isinstance(text, str) for text in some) for some in texts)
        is_whole = [*content["splits"]] == [*SPLITS] and isinstance(content["aligned"], bool)
        return is_whole and are_texts and all(map(_is_split, splits))
    except Exception:  # it may be anything
        return False


def _is_split(split: SplitArrays) -> bool:
    clips, tokens = len(split.ids), split.text_bert
    fits = clips > 0 and "M" in split.labels and all(labels.shape == (clips,) for labels in split.labels.values())
    fits &= tokens is None or (tokens.shape[:2] == (clips, 3) and tokens.ndim == 3 and tokens.dtype == np.int64)
    for modality in ("text", "audio", "vision"):
        features, lengths = getattr(split, modality), getattr(split, f"{modality}_lengths")
        if features is not None:
            fits &= features.ndim == 3 and len(features) == clips and features.dtype == np.float32
            fits &= lengths is not None or modality == "text"
        if lengths is not None:
            fits &= lengths.shape == (clips,) and bool((lengths >= 1).all() and (lengths <= features.shape[1]).all())
    return fits


def size(count: int) -> str:
    """Return a number of bytes for people."""
    if count < 1e6:
        return f"{count / 1e3:.0f} kB"
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def file_sha256(path: Path, told: Told | None = None) -> str:
    """Return the file's SHA-256 in hex, read piece by piece; raises InputError where it cannot be read."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
                if told:
                    told(len(piece))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder, expected a file") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    return digest.hexdigest()
