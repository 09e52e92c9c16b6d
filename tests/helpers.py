"""Builders of small test data."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from transformers import BertConfig, BertModel, BertTokenizerFast, DistilBertConfig, DistilBertModel

SIZES = {"train": 8, "valid": 4, "test": 4}
TOKENS = {"the": 1996, "movie": 3185, "was": 2001, "really": 2428, "good": 2204, "bad": 2919, "great": 2307}
"""Some words' ids in the vocabulary that bert-base-uncased and MiniLM share."""

Change = Any | Callable[[Any], Any]


def make_split(clips: int, *, prefix: str = "clip", seed: int = 0) -> dict[str, Any]:
    """Return one split in MMSA's layout: text_bert (N, 3, 9) of raw_text, audio (N, 6, 5), vision (N, 4, 3)."""
    rng = np.random.default_rng(seed)
    raw_text, tokens = [], np.zeros((clips, 3, 9), dtype=np.int64)
    for clip in range(clips):
        words = rng.choice(list(TOKENS), size=1 + clip % 7).tolist()
        raw_text.append(" ".join(words).upper())
        ids = [101, *(TOKENS[word] for word in words), 102]
        tokens[clip, 0, : len(ids)], tokens[clip, 1, : len(ids)] = ids, 1
    return {
        "id": [f"{prefix}$_${clip}" for clip in range(clips)],
        "raw_text": raw_text,
        "text_bert": tokens,
        "audio": rng.normal(size=(clips, 6, 5)).astype(np.float32),
        "audio_lengths": rng.integers(1, 7, size=clips).tolist(),
        "vision": rng.normal(size=(clips, 4, 3)).astype(np.float32),
        "vision_lengths": rng.integers(1, 5, size=clips).tolist(),
        "annotations": ["Positive"] * clips,
        "regression_labels": rng.uniform(-3, 3, size=clips).astype(np.float32),
    }


def write_features(path: Path, content: Any, *, protocol: int = 4) -> Path:
    """Pickle anything to `path`."""
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


def feature_file(
    tmp_path: Path,
    *,
    name: str = "features.pkl",
    sizes: Mapping[str, int] = SIZES,
    protocol: int = 4,
    **changes: Change,
) -> Path:
    """Write a small valid feature file, 8/4/4 clips, with changes.

    A change `key=value` applies to every split, `train={key: value}` to one; a value None drops the key
    and a callable gets the valid value and returns another.
    """
    content = {split: make_split(n, prefix=split, seed=i) for i, (split, n) in enumerate(sizes.items())}
    own = {split: changes.pop(split) for split in list(changes) if split in content}
    for split, arrays in content.items():
        for key, change in {**changes, **own.get(split, {})}.items():
            value = change(arrays.get(key)) if callable(change) else change
            arrays[key] = value
            if value is None:
                del arrays[key]
    return write_features(tmp_path / name, content, protocol=protocol)


TINY_BERT = {
    "model_type": "bert",
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}
"""A text encoder's config, for `TextEncoder.from_config`."""

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *TOKENS]
"""A vocabulary whose ids are not those of the test files' text_bert."""


def tiny_encoder(folder: Path, kind: str = "bert", **config: int) -> Path:
    """Write a text encoder of width 8 that knows `WORDS`."""
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast.from_pretrained(folder).save_pretrained(folder)
    sizes = {"vocab_size": len(WORDS), "max_position_embeddings": 16}
    if kind == "bert":
        options = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
        BertModel(BertConfig(**{**sizes, **options, **config})).save_pretrained(folder)
    else:
        options = {"dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 8}
        DistilBertModel(DistilBertConfig(**{**sizes, **options, **config})).save_pretrained(folder)
    return folder
