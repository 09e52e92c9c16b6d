"""Features of single modalities from other files, joined by the clips' ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from MMSA.data_loader import MMDataset

from registry import FeatureFile, InputError
from registry.data.feature_file import read_feature_file
from registry.data.modality_files import with_features
from registry.jobs import make_plan
from registry.training import Watcher
from tests.helpers import SIZES, feature_file, make_split, write_features
from tests.test_cache import assert_same
from tests.test_store import aligned_file


def base(folder: Path) -> FeatureFile:
    return read_feature_file(feature_file(folder), label_range=3.0)


def part(folder: Path, *, name: str = "part.pkl", seed: int = 5, **changes: Any) -> Path:
    """Write another file of the same clips, in another order and with other features."""
    content = {split: make_split(n, prefix=split, seed=seed) for split, n in SIZES.items()}
    for arrays in content.values():
        arrays |= {key: arrays[key][::-1] for key in arrays}
        arrays.update({key: value(arrays) if callable(value) else value for key, value in changes.items()})
        for key in [key for key, value in arrays.items() if value is None]:
            del arrays[key]
    return write_features(folder / name, content)


def joined(file: FeatureFile, **features: Path) -> FeatureFile:
    return with_features(file, features, label_range=3.0)


def refusal(file: FeatureFile, **features: Path) -> str:
    with pytest.raises(InputError) as caught:
        joined(file, **features)
    return str(caught.value)


def test_rows_are_joined_by_id_and_nothing_else_changes(tmp_path):
    file = base(tmp_path)
    made, wanted = joined(file, audio=part(tmp_path)).splits, make_split(8, prefix="train", seed=5)
    np.testing.assert_array_equal(made["train"].audio, wanted["audio"])
    assert made["train"].audio_lengths.tolist() == wanted["audio_lengths"]
    for key in ("vision", "text_bert", "vision_lengths"):
        np.testing.assert_array_equal(getattr(made["test"], key), getattr(file.splits["test"], key))
    assert made["valid"].labels["M"].tolist() == file.splits["valid"].labels["M"].tolist()
    assert made["valid"].ids == file.splits["valid"].ids


@settings(deadline=None, max_examples=25)
@given(order=st.permutations(range(16)), cuts=st.tuples(st.integers(0, 16), st.integers(0, 16)))
def test_neither_order_nor_split_of_a_modality_s_file_matters(tmp_path_factory, order, cuts):
    folder = tmp_path_factory.mktemp("files")
    file = base(folder)
    clips = [(clip, row) for split in file.splits.values() for clip, row in zip(split.ids, split.vision, strict=True)]
    parts = np.split(np.array(order), sorted(cuts))
    content = {
        name: {"id": [clips[at][0] for at in of], "vision": [clips[at][1][: at % 4 + 1] * 2 for at in of]}
        for name, of in zip(("train", "valid", "test"), parts, strict=True)
    }
    for arrays in content.values():
        arrays["vision_lengths"] = [len(row) for row in arrays["vision"]]
    made = joined(file, vision=write_features(folder / "part.pkl", content))
    row = 0
    for name, split in file.splits.items():
        for at in range(len(split.ids)):
            length = row % 4 + 1
            assert made.splits[name].vision_lengths[at] == length
            np.testing.assert_array_equal(made.splits[name].vision[at, :length], split.vision[at, :length] * 2)
            assert not made.splits[name].vision[at, length:].any()
            row += 1


def test_the_same_features_from_other_files_are_the_same_data(tmp_path):
    file = base(tmp_path)
    same = part(tmp_path, seed=0)
    for split, seed in {"valid": 1, "test": 2}.items():
        assert file.splits[split].ids == make_split(4, prefix=split, seed=seed)["id"]
    made = joined(file, text=same, audio=same, vision=same)
    assert_same(FeatureFile("features.pkl", {"train": made.splits["train"]}, made.aligned, file.sha256),
                FeatureFile("features.pkl", {"train": file.splits["train"]}, file.aligned, file.sha256))  # fmt: skip


def test_the_content_of_every_file_enters_the_identity_and_no_path_does(tmp_path, encoder):
    data, plan = feature_file(tmp_path), make_plan("tfn", "mosi")

    def identity(**features: Path) -> str:
        return plan.read(data, encoder, Watcher(), features=features).identity()

    one, two = part(tmp_path), part(tmp_path, name="two.pkl", seed=6)
    made = [identity(), identity(audio=one), identity(audio=two), identity(vision=one), identity(audio=one, vision=one)]
    assert len(set(made)) == 5
    assert identity(audio=one.rename(tmp_path / "moved.pkl")) == made[1]
    job = plan.read(data, encoder, Watcher(), features={"audio": two})
    assert job.protocol()["data"] == "unaligned, audio of two.pkl"
    assert "audio is that of two.pkl: 16 of its 16 clips, joined by id" in job.notes


def test_in_the_same_order_it_is_what_upstream_makes_of_it(tmp_path):
    data = feature_file(tmp_path)
    other = feature_file(
        tmp_path, name="other.pkl", audio=lambda audio: audio[:, :, :2] + 1, audio_lengths=lambda n: n[::-1]
    )
    options = {
        "dataset_name": "mosi",
        "custom_feature": "",
        "featurePath": data,
        "use_bert": True,
        "need_data_aligned": 0,
    }
    options |= {"feature_dims": [0, 0, 0], "feature_T": "", "feature_A": other, "feature_V": ""}
    for split, ours in joined(base(tmp_path), audio=other).splits.items():
        theirs = MMDataset(options, mode=split)
        np.testing.assert_array_equal(theirs.audio, ours.audio)
        np.testing.assert_array_equal(theirs.audio_lengths, ours.audio_lengths)


# --- text


def test_new_words_take_the_place_of_all_text(tmp_path):
    file = read_feature_file(feature_file(tmp_path, text=lambda _: None), label_range=3.0)
    made = joined(file, text=part(tmp_path, text_bert=None))
    assert made.splits["train"].text_bert is None
    assert made.splits["train"].raw_text == make_split(8, prefix="train", seed=5)["raw_text"]


def test_text_features_alone_leave_the_words(tmp_path):
    def features(steps):
        return lambda arrays: np.ones((len(arrays["id"]), steps, 2))

    content = {split: make_split(n, prefix=split) for split, n in SIZES.items()}
    content = {split: {**arrays, "text": features(9)(arrays)} for split, arrays in content.items()}
    file = read_feature_file(write_features(tmp_path / "features.pkl", content), label_range=3.0)
    for steps in (9, 5):
        path = part(tmp_path, raw_text=None, text_bert=None, text=features(steps))
        made = joined(file, text=path)
        assert made.splits["train"].raw_text == file.splits["train"].raw_text
        assert made.splits["train"].text.shape == (8, steps, 2)
        assert (made.splits["train"].text_lengths is None) == (steps == 5)
    assert "part.pkl has text features alone: the words stay those of features.pkl" in made.notes


# --- aligned data


def test_features_with_lengths_end_an_alignment_and_the_others_keep_their_lengths(tmp_path):
    file = read_feature_file(aligned_file(tmp_path), label_range=3.0)
    made = joined(file, audio=part(tmp_path))
    assert not made.aligned
    np.testing.assert_array_equal(made.splits["train"].vision_lengths, file.splits["train"].vision_lengths)


def test_aligned_features_keep_it(tmp_path):
    file = read_feature_file(aligned_file(tmp_path), label_range=3.0)
    other = aligned_file(tmp_path, "other.pkl")
    assert joined(file, audio=other).aligned
    assert joined(file, text=other, audio=other, vision=other).aligned


# --- what is refused


def test_every_clip_must_be_there_and_all_faults_are_listed(tmp_path):
    file = base(tmp_path)
    ids = part(tmp_path, id=lambda arrays: [f"{clip}x" for clip in arrays["id"]])
    no_lengths = part(tmp_path, name="b.pkl", vision="x")
    message = refusal(file, audio=ids, vision=no_lengths)
    assert "no 'train$_$0' of train (8 clips)" in message
    assert "no 'test$_$0' of test (4 clips)" in message
    assert f"{no_lengths} cannot be used" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"audio": None}, "at least one of audio, found none"),
        ({"id": None}, "train: id: expected one a clip, found nothing"),
        ({"audio_lengths": [7] * 8}, "expected 1 to 6, found 7 (8 clips outside)"),
        ({"audio_lengths": None}, "audio_lengths: expected it, since valid has it, found nothing"),
        ({"audio": np.zeros((8, 6, 4))}, "valid: audio: expected 4 features as in train, found 5"),
        ({"id": ["a"] * 8}, "expected every id once"),
    ],
)
def test_a_fault_of_one_split(tmp_path, change, message):
    content = {split: make_split(n, prefix=split) for split, n in SIZES.items()}
    content["train"].update(change)
    content["train"] = {key: value for key, value in content["train"].items() if value is not None}
    assert message in refusal(base(tmp_path), audio=write_features(tmp_path / "part.pkl", content))


@pytest.mark.parametrize("content", [[], {}, {"train": 1}, {"train": {"id": []}}, {"dev": {"id": ["a"]}}])
def test_what_is_no_modality_s_file(tmp_path, content):
    assert "expected a dict of train, valid, test" in refusal(
        base(tmp_path), audio=write_features(tmp_path / "part.pkl", content)
    )


def test_paths_are_looked_at_first(tmp_path):
    file = base(tmp_path)
    assert refusal(file, audio=tmp_path / "none.pkl").endswith("none.pkl does not exist")
    assert refusal(file, audio=tmp_path).endswith("is a folder, expected a file")
    assert "unknown modality 'video'" in refusal(file, video=tmp_path)


def test_features_without_lengths_beside_unaligned_data(tmp_path):
    message = refusal(base(tmp_path), audio=part(tmp_path, audio_lengths=None))
    assert "features.pkl with audio of part.pkl cannot be used" in message
    assert "audio_lengths: expected one length a clip, since audio has 6 steps" in message
