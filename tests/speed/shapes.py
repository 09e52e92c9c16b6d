"""Synthetic feature files in the shape of CMU-MOSI and CMU-MOSEI, and a BERT of random weights to read them.

Speed depends on shapes and lengths, not on what is said: sizes are those of the files `unaligned_50.pkl`, lengths are
drawn, values are noise.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BertConfig, BertModel, BertTokenizer
from transformers.utils import logging

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
"""The first ids of the vocabulary; every other id is a word, `w` and the id."""
CLS, SEP = SPECIAL.index("[CLS]"), SPECIAL.index("[SEP]")
NOISE_OF_LENGTHS = 0.3
LONGEST = 0.99
LABELS_STD = 1.5


@dataclass(frozen=True)
class Shape:
    """Sizes of a feature file and of a text encoder."""

    dataset: str
    """whose preset trains on it"""
    clips: Mapping[str, int]
    """by split"""
    tokens: int
    """length of `text_bert`, padding included"""
    audio: tuple[int, int]
    """length and width"""
    vision: tuple[int, int]
    words: tuple[float, float]
    """mean and standard deviation of the logarithm of a clip's tokens, [CLS] and [SEP] not counted"""
    encoder: Mapping[str, Any]
    """a BERT's configuration, where it is not BERT-base"""

    def of_sizes(self, **clips: int) -> Shape:
        """Return the same shape with other numbers of clips."""
        return replace(self, clips=clips)


SHAPES = {
    # The log-normal fits the 2199 segments of CMU-MOSI, tokenised for bert-base-uncased: mean 15.4, and at the
    # quantiles 5, 25, 50, 75, 90, 95 and 99 % 6, 9, 13, 19, 27, 32 and 50 tokens; the fit differs in 26 and 48.
    "mosi": Shape("mosi", {"train": 1284, "valid": 229, "test": 686}, 50, (375, 5), (500, 20), (2.40, 0.62), {}),
    # Lengths of CMU-MOSEI are assumed: a mean of 25 tokens, with the spread of CMU-MOSI.
    "mosei": Shape("mosei", {"train": 16326, "valid": 1871, "test": 4659}, 50, (500, 74), (500, 35), (3.00, 0.62), {}),
}


def tiny(shape: Shape) -> Shape:
    """Return a shape of a few short clips and a BERT of two narrow layers, which shows only that a script works."""
    encoder = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return replace(
        shape,
        clips={"train": 400, "valid": 20, "test": 20},
        tokens=16,
        audio=(20, shape.audio[1]),
        vision=(12, shape.vision[1]),
        words=(1.5, 0.5),
        encoder={**encoder, "intermediate_size": 64, "max_position_embeddings": 32},
    )


def make_features(shape: Shape, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Return the content of a feature file in MMSA's layout: what its loader and ours read."""
    rng = np.random.default_rng(seed)
    return {name: _split(shape, name, clips, rng) for name, clips in shape.clips.items()}


def facts(shape: Shape, content: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sizes that figures are divided by; `settings` are the preset's."""
    lengths = content["train"]["text_bert"][:, 1].sum(axis=1)
    config = BertConfig(**shape.encoder)
    with torch.device("meta"):
        encoder = BertModel(config, add_pooling_layer=False)
    parameters = sum(values.numel() for name, values in encoder.named_parameters() if "embeddings" not in name)
    arrays = [value for split in content.values() for value in split.values() if isinstance(value, np.ndarray)]
    return {
        "dataset": shape.dataset,
        "splits": dict(shape.clips),
        "clips": len(lengths),
        "clips_an_update": settings["batch_size"] * settings["update_epochs"],
        "tokens": int(lengths.sum()),
        "padded_to": shape.tokens,
        "bytes": sum(array.nbytes for array in arrays),
        "encoder_parameters": parameters,
        "operations": operations(lengths, config.num_hidden_layers, config.hidden_size, parameters),
    }


def operations(lengths: np.ndarray, layers: int, width: int, parameters: int) -> float:
    """Return the floating-point operations that a BERT needs to be trained on clips once, without padding.

    6 a parameter and token (2 forward, 4 backward), and 12 · layers · width · L² a clip for attention (a third of it
    forward: two products of 2 · width · L² each).

    Args:
        lengths: real tokens of each clip.
        layers, width: of the encoder.
        parameters: of the encoder, its embeddings not counted.
    """
    tokens, pairs = int(lengths.sum()), int((lengths**2).sum())
    return 6.0 * parameters * tokens + 12.0 * layers * width * pairs


def write_features(content: Mapping[str, Any], path: Path) -> Path:
    """Pickle the content to `path`."""
    with open(path, "wb") as file:
        pickle.dump(content, file, protocol=4)
    return path


def _split(shape: Shape, name: str, clips: int, rng: np.random.Generator) -> dict[str, Any]:
    words = np.exp(rng.normal(*shape.words, size=clips)).round().astype(int).clip(1, shape.tokens - 2)
    tokens = np.zeros((clips, 3, shape.tokens), dtype=np.int64)
    vocabulary = BertConfig(**shape.encoder).vocab_size
    raw_text = []
    for clip, count in enumerate(words):
        said = rng.integers(len(SPECIAL), vocabulary, size=count)
        tokens[clip, 0, : count + 2] = CLS, *said, SEP
        tokens[clip, 1, : count + 2] = 1
        raw_text.append(" ".join(f"w{word}" for word in said))
    audio, audio_lengths = _sequences(*shape.audio, words, rng)
    vision, vision_lengths = _sequences(*shape.vision, words, rng)
    return {
        "id": [f"{name}$_${clip}" for clip in range(clips)],
        "raw_text": raw_text,
        "text_bert": tokens,
        "audio": audio,
        "audio_lengths": audio_lengths.tolist(),
        "vision": vision,
        "vision_lengths": vision_lengths.tolist(),
        # In steps of 0.2, as the means of five annotators are.
        "regression_labels": (rng.normal(0, LABELS_STD, size=clips).clip(-3, 3) * 5).round().astype(np.float32) / 5,
    }


def _sequences(longest: int, width: int, words: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return noise (N, longest, width), zero behind each clip's end, and lengths that follow the text's."""
    duration = words * np.exp(rng.normal(0, NOISE_OF_LENGTHS, size=len(words)))
    # A file is as long as its longest clips; a single one must not make all others short.
    lengths = np.ceil(longest * duration / np.quantile(duration, LONGEST)).astype(int).clip(1, longest)
    values = rng.standard_normal((len(words), longest, width), dtype=np.float32)
    values[np.arange(longest) >= lengths[:, None]] = 0
    return values, lengths


def write_encoder(shape: Shape, folder: Path) -> Path:
    """Save a BERT of random weights, with a vocabulary in which every word is one token."""
    config = BertConfig(**shape.encoder)
    folder.mkdir()
    words = [f"w{word}" for word in range(len(SPECIAL), config.vocab_size)]
    (folder / "vocab.txt").write_text("\n".join([*SPECIAL, *words]))
    logging.disable_progress_bar()
    BertTokenizer.from_pretrained(folder).save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    return folder
