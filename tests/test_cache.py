"""What is kept of feature files: the same as what was read, found at once, and never in the way."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections import namedtuple
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from registry.data import cache as module
from registry.data import feature_file as reader
from registry.data.feature_file import read_feature_file
from registry.data.splits import FeatureFile, SplitArrays
from registry.errors import InputError
from tests.helpers import feature_file, write_features
from tests.test_feature_file import contents


@pytest.fixture(autouse=True, scope="module")
def _small_files_are_kept():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "WORTH_KEEPING", 0)
        yield


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "runs" / ".cache"


def read(path: Path, cache: Path | None, label_range: float = 3.0, **options) -> FeatureFile:
    return read_feature_file(path, label_range=label_range, cache=cache, **options)


def used(monkeypatch) -> list[str]:
    """Return a list that grows by "hash" when a file is hashed and by "pickle" when one is opened."""
    calls: list[str] = []

    def watch(name, function):
        return lambda path: calls.append(name) or function(path)

    monkeypatch.setattr(reader, "file_sha256", watch("hash", reader.file_sha256))
    monkeypatch.setattr(reader, "load_pickle", watch("pickle", reader.load_pickle))
    return calls


def assert_same(file: FeatureFile, expected: FeatureFile) -> None:
    assert (file.name, file.aligned, file.sha256) == (expected.name, expected.aligned, expected.sha256)
    assert file.notes == [note for note in expected.notes if "is kept in" not in note]
    assert list(file.splits) == list(expected.splits)
    for name, split in expected.splits.items():
        for field in fields(SplitArrays):
            found, wanted = getattr(file.splits[name], field.name), getattr(split, field.name)
            if isinstance(wanted, dict):
                assert list(found) == list(wanted)  # their order is part of a run's identity
                found, wanted = list(found.values()), list(wanted.values())
            np.testing.assert_equal(found, wanted, strict=True)
            if isinstance(wanted, np.ndarray):
                assert found.flags.writeable
                assert found.flags.c_contiguous


# --- what is kept


@settings(deadline=None, max_examples=50)
@given(data=contents())
def test_what_is_kept_is_what_was_read(tmp_path_factory, data):
    place = tmp_path_factory.mktemp("files")
    path = write_features(place / "x.pkl", data[1])
    plain, first, again = (read(path, cache) for cache in (None, place, place))
    assert_same(plain, first)
    assert_same(again, first)


def test_notes_come_back(tmp_path, folder):
    path = feature_file(tmp_path, train={"audio": lambda audio: audio * np.nan, "vision_lengths": [0] * 8})
    first = read(path, folder)
    assert len(first.notes) == 3
    assert_same(read(path, folder), first)


def test_labels_keep_their_order(tmp_path, folder):
    sizes = {"train": 4, "valid": 4, "test": 4}
    path = feature_file(tmp_path, sizes=sizes, **{f"regression_labels_{task}": [0.5] * 4 for task in "VAT"})
    assert [list(read(path, folder).splits["test"].labels) for _ in range(2)] == [["M", "T", "A", "V"]] * 2


def test_safetensors_reads_it(tmp_path, folder):
    file = read(feature_file(tmp_path), folder)
    arrays = load_file(next(folder.glob("*.safetensors")))
    np.testing.assert_array_equal(arrays["splits.valid.audio"], file.splits["valid"].audio)
    np.testing.assert_array_equal(arrays["splits.test.labels.M"], file.splits["test"].labels["M"])


def test_what_is_written_to_an_array_stays_in_the_process(tmp_path, folder):
    path = feature_file(tmp_path)
    expected = read(path, folder)
    read(path, folder).splits["train"].audio[:] = 0
    assert_same(read(path, folder), expected)


def test_a_field_that_is_added_changes_the_format():
    """If this fails, raise `FORMAT`: what is kept of files is not what would be read of them now."""
    names = "ids labels raw_text text_bert text text_lengths audio audio_lengths vision vision_lengths"
    assert (reader.FORMAT, [field.name for field in fields(SplitArrays)]) == (2, names.split())


# --- when it is used


def test_the_second_read_neither_hashes_nor_opens_the_file(tmp_path, folder, monkeypatch):
    path, calls = feature_file(tmp_path), used(monkeypatch)
    first = read(path, folder)
    assert (calls, len(first.notes)) == (["hash", "pickle"], 1)
    assert first.notes[0].startswith(f"features.pkl is kept in {folder} for a quick start next time (")
    assert read(path, folder).notes == []
    assert calls == ["hash", "pickle"]


def test_a_file_that_is_touched_or_renamed_is_hashed_once_more(tmp_path, folder, monkeypatch):
    path, calls = feature_file(tmp_path), used(monkeypatch)
    read(path, folder)
    os.utime(path, ns=(0, 0))
    for _ in range(2):
        assert read(path, folder).name == "features.pkl"
    assert calls == ["hash", "pickle", "hash"]
    renamed = path.rename(tmp_path / "other.pkl")
    for _ in range(2):
        assert read(renamed, folder).name == "other.pkl"
    assert calls == ["hash", "pickle", "hash", "hash"]


def test_a_link_is_the_file_it_leads_to(tmp_path, folder, monkeypatch):
    path, calls = feature_file(tmp_path), used(monkeypatch)
    (tmp_path / "link.pkl").symlink_to(path)
    read(path, folder)
    assert read(tmp_path / "link.pkl", folder).name == "link.pkl"
    assert calls == ["hash", "pickle"]


def test_changed_content_is_read_again_and_takes_the_place_of_the_former(tmp_path, folder):
    former = read(feature_file(tmp_path), folder)
    changed = feature_file(tmp_path, audio=lambda audio: audio + 1)
    os.utime(changed, ns=(1, 1))
    file = read(changed, folder)
    assert file.splits["train"].audio[0, 0, 0] == former.splits["train"].audio[0, 0, 0] + 1
    assert len(list(folder.glob("*.safetensors"))) == len(list(folder.glob("*.json"))) == 1


def test_another_label_range_is_read_again(tmp_path, folder, monkeypatch):
    path, calls = feature_file(tmp_path), used(monkeypatch)
    read(path, folder)
    with pytest.raises(InputError, match="labels from -1 to 1"):
        read(path, folder, label_range=1.0)
    for label_range in (4, 4.0, 3.0):
        read(path, folder, label_range=label_range)
    assert calls == ["hash", "pickle", "pickle", "pickle"]


def test_another_format_is_read_again(tmp_path, folder, monkeypatch):
    path, calls = feature_file(tmp_path), used(monkeypatch)
    read(path, folder)
    monkeypatch.setattr(reader, "FORMAT", reader.FORMAT + 1)
    for _ in range(2):
        read(path, folder)
    assert calls == ["hash", "pickle", "pickle"]
    assert len(list(folder.glob("*.safetensors"))) == 1


def test_whether_a_file_is_the_published_one_is_not_kept(tmp_path, folder):
    path = feature_file(tmp_path)
    read(path, folder, known_sha256={path.name: "0" * 64})
    assert read(path, folder).notes == []
    assert "SHA-256 verified" in read(path, folder, known_sha256={path.name: read(path, None).sha256}).notes[0]


# --- when nothing is kept


def test_small_files_are_not_kept(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(module, "WORTH_KEEPING", 32 << 20)
    assert read(feature_file(tmp_path), folder).notes == []
    assert not folder.exists()


def test_a_file_with_faults_leaves_nothing(tmp_path, folder):
    with pytest.raises(InputError):
        read(feature_file(tmp_path, audio="x"), folder)
    with pytest.raises(InputError, match="does not exist"):
        read(tmp_path / "none.pkl", folder)
    assert not folder.exists()


def test_a_file_that_changes_while_it_is_read_is_not_kept(tmp_path, folder, monkeypatch):
    path, load = feature_file(tmp_path), reader.load_pickle
    monkeypatch.setattr(reader, "load_pickle", lambda path: os.utime(path, ns=(0, 0)) or load(path))
    assert read(path, folder).notes == []
    assert not folder.exists()


def test_a_full_disk_is_left_alone(tmp_path, folder, monkeypatch):
    path = feature_file(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(1 << 30))
    assert read(path, folder).notes == []
    assert list(folder.glob("features-*")) == []


@pytest.mark.parametrize("failing", ["replace", "fsync", "mkdir"])
def test_a_folder_that_cannot_be_written_is_no_fault(tmp_path, folder, monkeypatch, failing):
    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    path = feature_file(tmp_path)
    monkeypatch.setattr(os, failing, refuse)
    assert read(path, folder).notes == []
    assert list(folder.glob("*")) == []


def test_a_file_in_the_place_of_the_folder_is_no_fault(tmp_path):
    (tmp_path / "runs").write_text("")
    assert read(feature_file(tmp_path), tmp_path / "runs").notes == []


# --- what is damaged


@settings(deadline=None, max_examples=200)
@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255), cut=st.booleans())
def test_what_is_damaged_is_made_again(tmp_path_factory, place, value, cut):
    folder = tmp_path_factory.mktemp("files")
    path = feature_file(folder, sizes={"train": 2, "valid": 1, "test": 1})
    expected = read(path, folder)
    kept = next(folder.glob("*.safetensors"))
    content = bytearray(kept.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")  # a flipped bit of an array is not looked for
    if cut:
        content = content[: int(place * len(content))]
    else:
        content[int(place * header)] = value
    kept.write_bytes(content)
    assert_same(read(path, None), read(path, folder))
    assert_same(read(path, folder), expected)


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b"{}", b'{"file": 1, "sha256": "../x"}', b'{"sha256": 3}'])
def test_a_damaged_memory_of_a_hash_is_made_again(tmp_path, folder, monkeypatch, content):
    path, calls = feature_file(tmp_path), used(monkeypatch)
    read(path, folder)
    memory = next(folder.glob("*.json"))
    memory.write_bytes(content)
    for _ in range(2):
        read(path, folder)
    assert calls == ["hash", "pickle", "hash"]
    assert json.loads(memory.read_text())["file"]["path"] == str(path.resolve())


def test_what_is_kept_of_another_file_is_not_taken_for_it(tmp_path, folder):
    one, two = feature_file(tmp_path), feature_file(tmp_path, name="two.pkl", audio=lambda audio: audio + 1)
    read(one, folder)
    kept = next(folder.glob("*.safetensors"))
    content = kept.read_bytes()
    read(two, folder)
    for path in folder.glob("*.safetensors"):
        path.write_bytes(content)
    assert_same(read(two, None), read(two, folder))


# --- others at work


def test_many_at_once(tmp_path, folder):
    path, files = feature_file(tmp_path), []
    threads = [threading.Thread(target=lambda: files.append(read(path, folder))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(files) == 8
    assert_same(read(path, folder), files[0])
    assert sorted(kept.suffix for kept in folder.iterdir()) == [".json", ".safetensors"]


def test_arrays_in_use_outlive_what_they_were_mapped_from(tmp_path, folder):
    path = feature_file(tmp_path)
    read(path, folder)
    file = read(path, folder)
    shutil.rmtree(folder)
    assert_same(file, read(path, None))


def test_an_unfinished_file_of_a_killed_process_is_removed_after_a_day(tmp_path, folder):
    folder.mkdir(parents=True)
    old, new, other = (folder / f"{name}.part" for name in ("a" * 32, "b" * 32, "a download of the user's"))
    for part, age in ((old, 25), (new, 1), (other, 25)):
        part.write_text("")
        os.utime(part, (0, time.time() - age * 3600))
    read(feature_file(tmp_path), folder)
    assert (old.exists(), new.exists(), other.exists()) == (False, True, True)
