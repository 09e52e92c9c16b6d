"""Files that MMSA-FET, the authors' tool for feature extraction, writes: built here in the steps that it takes.

It lists the clips in the order in which its processes end, pads each modality with float64 zeros to mean + 3 standard
deviations of its lengths (and cuts what is longer), and leaves out what it did not extract. Aligned features have no
lengths.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from registry import InputError
from registry.data.feature_file import read_feature_file
from registry.data.modality_files import with_features
from registry.jobs import make_plan
from registry.training import Watcher
from tests.helpers import TOKENS, feature_file, write_features

CLIPS = {"train": 8, "valid": 4, "test": 4}
WIDTHS = {"audio": 5, "vision": 3, "text": 6}


def padded(sequences: list[np.ndarray]) -> np.ndarray:
    lengths = [len(sequence) for sequence in sequences]
    longest = int(np.mean(lengths) + 3 * np.std(lengths))
    made = np.zeros([len(sequences), longest, sequences[0].shape[-1]])
    for row, sequence in enumerate(sequences):
        made[row, : len(sequence)] = sequence[:longest]
    return made


def extracted(*, aligned: bool = False, tokens: bool = True, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return what MMSA-FET's `run_dataset` does of 16 clips: with `tokens` by a BERT, else by another encoder."""
    rng = np.random.default_rng(0)
    data: dict[str, list[Any]] = {}
    modes = [mode for mode, clips in CLIPS.items() for _ in range(clips)]
    for at in rng.permutation(16):
        mode = modes[at]
        words = rng.choice(list(TOKENS), size=1 + at % 5).tolist()
        ids = np.array([101, *(TOKENS[word] for word in words), 102])
        steps = {
            "text": len(ids),
            "audio": len(ids) if aligned else 3 + at % 7,
            "vision": len(ids) if aligned else at % 4,
        }
        clip: dict[str, Any] = {
            name: rng.normal(size=(n, WIDTHS[name])).astype(np.float32) for name, n in steps.items()
        }
        clip["text_bert"] = np.stack([ids, np.ones_like(ids), np.zeros_like(ids)], axis=1)
        clip |= {"audio_lengths": steps["audio"], "vision_lengths": steps["vision"], "raw_text": " ".join(words)}
        start = {"train": 0, "valid": 8, "test": 12}[mode]
        clip |= {"id": f"{mode}$_${at - start}", "annotations": "Positive", "regression_labels": rng.uniform(-3, 3)}
        for key, value in {**clip, "mode": mode}.items():
            data.setdefault(key, []).append(value)
    for key in without + (("audio_lengths", "vision_lengths") if aligned else ()) + (() if tokens else ("text_bert",)):
        del data[key]
    made: dict[str, Any] = {key: padded(data[key]) for key in ("audio", "vision", "text", "text_bert") if key in data}
    for key in ("audio", "vision"):
        if f"{key}_lengths" in data:
            data[f"{key}_lengths"] = [min(n, made[key].shape[1]) for n in data[f"{key}_lengths"]]
    if "text_bert" in made:
        made["text_bert"] = made["text_bert"].transpose(0, 2, 1)
    data |= made
    of_mode = np.array(data.pop("mode"))
    rows = {mode: np.flatnonzero(of_mode == mode) for mode in CLIPS}
    return {
        mode: {key: (value if key in made else np.array(value))[found.tolist()] for key, value in data.items()}
        for mode, found in rows.items()
    }


def write(folder: Path, content: Any) -> Path:
    return write_features(folder / "feature.pkl", content, protocol=pickle.HIGHEST_PROTOCOL)


def test_unaligned_features(tmp_path):
    content = extracted()
    assert content["train"]["audio"].dtype == np.float64
    assert not content["train"]["text_bert"].flags.c_contiguous  # numpy keeps the layout of what was transposed
    file = read_feature_file(write(tmp_path, content), label_range=3.0)
    train = file.splits["train"]
    assert not file.aligned
    assert sorted(train.ids) == sorted(f"train$_${clip}" for clip in range(8))
    np.testing.assert_array_equal(train.audio, content["train"]["audio"].astype(np.float32))
    assert train.audio_lengths.tolist() == content["train"]["audio_lengths"].tolist()
    assert train.text_lengths.tolist() == train.text_bert[:, 1].sum(axis=1).tolist()
    assert train.raw_text == content["train"]["raw_text"].tolist()
    assert any("vision_lengths" in note and "lifted to 1" in note for note in file.notes)  # no face was found


def test_aligned_features(tmp_path):
    file = read_feature_file(write(tmp_path, extracted(aligned=True)), label_range=3.0)
    train = file.splits["train"]
    assert file.aligned
    for lengths in (train.text_lengths, train.audio_lengths, train.vision_lengths):
        assert lengths.tolist() == train.text_bert[:, 1].sum(axis=1).tolist()


def test_aligned_features_without_token_ids_end_where_text_does(tmp_path):
    with_ids = read_feature_file(write(tmp_path, extracted(aligned=True)), label_range=3.0).splits["valid"]
    file = read_feature_file(write(tmp_path, extracted(aligned=True, tokens=False)), label_range=3.0)
    assert file.aligned
    assert file.splits["valid"].audio_lengths.tolist() == with_ids.audio_lengths.tolist()
    assert file.splits["valid"].text_lengths.tolist() == with_ids.text_lengths.tolist()
    assert "train: lengths are those of text, whose padding is zero" in file.notes


def test_token_ids_as_early_versions_wrote_them(tmp_path):
    content, turned = extracted(), extracted()
    for arrays in turned.values():
        arrays["text_bert"] = arrays["text_bert"].transpose(0, 2, 1)
    first = read_feature_file(write(tmp_path, content), label_range=3.0)
    second = read_feature_file(write(tmp_path, turned), label_range=3.0)
    np.testing.assert_array_equal(first.splits["test"].text_bert, second.splits["test"].text_bert)
    assert "train: text_bert: shape (N, L, 3) was turned into (N, 3, L)" in second.notes


@pytest.mark.parametrize("model", ["self_mm", "mult"])
def test_models_are_trained_on_them(tmp_path, encoder, model):
    job = make_plan(model, "mosi").read(write(tmp_path, extracted()), encoder, Watcher())
    assert dict(job.info.dims).items() >= {"audio": 5, "vision": 3}.items()


def test_one_modality_of_it_beside_another_file(tmp_path):
    content = extracted(without=("vision", "vision_lengths", "text", "text_bert"))
    path = write(tmp_path, content)
    file = read_feature_file(feature_file(tmp_path), label_range=3.0)
    made = with_features(file, {"audio": path}, label_range=3.0)
    for name, split in made.splits.items():
        order = [content[name]["id"].tolist().index(clip) for clip in split.ids]
        np.testing.assert_array_equal(split.audio, content[name]["audio"][order].astype(np.float32))
        assert split.audio_lengths.tolist() == content[name]["audio_lengths"][order].tolist()
        assert split.labels["M"].tolist() == file.splits[name].labels["M"].tolist()


def test_tensors_are_refused_with_what_to_do(tmp_path):
    content = extracted()
    content["train"]["audio"] = torch.from_numpy(content["train"]["audio"])
    with pytest.raises(InputError, match="return_type='np'"):
        read_feature_file(write(tmp_path, content), label_range=3.0)


def test_ragged_sequences_and_text_lengths(tmp_path):
    """Not of MMSA-FET's own, but of those who collect its single clips."""
    content = extracted()
    for arrays in content.values():
        lengths = arrays["text_bert"][:, 1].sum(axis=1).astype(int)
        arrays["text"] = [clip[:length] for clip, length in zip(arrays["text"], lengths, strict=True)]
        arrays["audio"] = np.array([*map(list, arrays["audio"]), None], dtype=object)[:-1]
        arrays["text_lengths"] = lengths
        del arrays["text_bert"]
    train = read_feature_file(write(tmp_path, content), label_range=3.0).splits["train"]
    assert train.text.shape[1] == train.text_lengths.max()
    assert train.text_lengths.tolist() == content["train"]["text_lengths"].tolist()
