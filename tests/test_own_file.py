"""Feature files made from arrays: what is written, what upstream makes of it, and what is refused."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from MMSA.data_loader import MMDataset

from registry import InputError, write_feature_file
from registry.data.feature_file import read_feature_file
from registry.data.splits import FeatureFile
from tests.helpers import make_split
from tests.test_cache import assert_same
from tests.test_feature_file import contents

SIZES = {"train": 8, "valid": 4, "test": 4}


def arrays(**changes: Any) -> dict[str, dict[str, Any]]:
    splits = {name: make_split(clips, prefix=name) for name, clips in SIZES.items()}
    return {name: {**split, **changes} for name, split in splits.items()}


def ragged(clips: int, width: int = 3) -> list[np.ndarray]:
    return [np.full((1 + clip % 3, width), clip + 1.0) for clip in range(clips)]


def read(path: Path, label_range: float = 3.0) -> FeatureFile:
    return read_feature_file(path, label_range=label_range)


def refusal(splits: Any, path: Path, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        write_feature_file(path, splits, **options)
    assert not path.exists()
    return str(caught.value)


@settings(deadline=None, max_examples=30)
@given(data=contents())
def test_what_is_written_is_what_was_given(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("files") / "x.pkl"
    written = write_feature_file(path, data[1], label_range=3.0)
    assert_same(read(path), written)


def test_sequences_of_different_lengths_are_padded(tmp_path):
    splits = {name: {**make_split(n, prefix=name), "audio": ragged(n)} for name, n in SIZES.items()}
    for split in splits.values():
        del split["audio_lengths"]
    splits["test"]["audio"] = splits["test"]["audio"][:1] * 4
    write_feature_file(tmp_path / "x.pkl", splits)
    train, _, test = read(tmp_path / "x.pkl").splits.values()
    assert (train.audio.shape, test.audio.shape) == ((8, 3, 3), (4, 3, 3))
    assert test.audio_lengths.tolist() == [1, 1, 1, 1]
    assert train.audio_lengths.tolist() == [1, 2, 3, 1, 2, 3, 1, 2]
    assert train.audio[1, :, 0].tolist() == [2, 2, 0]


def test_labels_may_be_given_by_task_and_other_keys_are_kept(tmp_path):
    splits = arrays()
    for split in splits.values():
        values = split.pop("regression_labels")
        split["labels"] = {"M": values, "T": torch.tensor(values), "V": values.tolist()}
    write_feature_file(tmp_path / "x.pkl", splits)
    assert list(read(tmp_path / "x.pkl").splits["train"].labels) == ["M", "T", "V"]
    assert pickle.loads((tmp_path / "x.pkl").read_bytes())["valid"]["annotations"] == ["Positive"] * 4


def test_an_aligned_file_stays_aligned(tmp_path):
    splits = arrays()
    for split in splits.values():
        split["audio"], split["vision"] = split["audio"][:, [0] * 9], split["vision"][:, [0] * 9]
        del split["audio_lengths"], split["vision_lengths"]
    file = write_feature_file(tmp_path / "x.pkl", splits)
    assert file.aligned
    assert_same(read(tmp_path / "x.pkl"), file)


def test_what_is_mended_is_not_the_callers(tmp_path):
    splits = arrays()
    splits["train"]["audio"][0, 0, 0] = np.nan
    splits["train"]["audio_lengths"] = np.zeros(8, dtype=np.int64)
    file = write_feature_file(tmp_path / "x.pkl", splits)
    assert len(file.notes) == 2
    assert np.isnan(splits["train"]["audio"][0, 0, 0])
    assert splits["train"]["audio_lengths"].sum() == 0
    assert set(splits["train"]) == set(make_split(1))


def test_upstream_reads_it(tmp_path):
    splits = {name: {**make_split(n, prefix=name), "vision": ragged(n)} for name, n in SIZES.items()}
    for split in splits.values():
        del split["vision_lengths"]
    file = write_feature_file(tmp_path / "x.pkl", splits)
    options = {"dataset_name": "mosi", "custom_feature": "", "featurePath": tmp_path / "x.pkl", "use_bert": True}
    options |= {
        "feature_dims": [0, 0, 0],
        "feature_T": "",
        "feature_A": "",
        "feature_V": "",
        "need_data_aligned": False,
    }
    theirs = MMDataset(options, mode="train")
    ours = file.splits["train"]
    assert theirs.ids == ours.ids
    np.testing.assert_array_equal(theirs.vision, ours.vision)
    np.testing.assert_array_equal(theirs.vision_lengths, ours.vision_lengths)
    np.testing.assert_array_equal(theirs.labels["M"], ours.labels["M"])
    assert theirs[3]["text"].shape == (3, 9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"audio_length": [1]}, "unknown key 'audio_length', did you mean 'audio_lengths'?"),
        ({"labels": {"X": [1]}}, "train: labels: unknown task 'X'"),
        ({"labels": [1.0]}, "labels M and regression_labels say the same thing; give one"),
        ({"regression_labels": [float("inf")] * 8}, "expected finite, found inf"),
        ({"audio": [np.zeros((2, 3)), np.zeros((1, 4))]}, "rows of different shapes"),
        ({"audio": torch.zeros(8, 6, 5, requires_grad=True)}, "train: audio: cannot be made an array: RuntimeError"),
        ({"id": None}, "train: id: expected one a clip, found nothing"),
    ],
)
def test_what_is_refused(tmp_path, change, message):
    splits = arrays()
    splits["train"].update(change)
    assert message in refusal(splits, tmp_path / "x.pkl")


def test_all_faults_are_listed_and_a_split_is_named(tmp_path):
    splits = arrays(audio_lengths=[99])
    splits["dev"] = splits.pop("valid")
    message = refusal(splits, tmp_path / "x.pkl")
    assert "unknown split 'dev'" in message
    assert "valid: expected a dict of arrays, found nothing" in message
    assert "test: audio_lengths: expected 4 rows" in message
    assert "must be a dict" in refusal([], tmp_path / "x.pkl")
    assert "labels from -1 to 1" in refusal(arrays(), tmp_path / "x.pkl", label_range=1.0)
    with pytest.raises(InputError, match="is not a file"):
        write_feature_file(tmp_path, arrays())
