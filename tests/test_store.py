"""Registered feature files: what is taken, what is found again, and what cannot be used any more."""

from __future__ import annotations

import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from registry import DatasetSpec, InputError, load_run, run
from registry.data import feature_file as reader
from registry.data import mapped
from registry.data import store as module
from registry.data.feature_file import file_sha256, read_feature_file
from registry.data.store import Store, data_root
from registry.jobs import make_plan
from registry.training import Watcher
from tests.helpers import feature_file, make_split, write_features
from tests.test_cache import assert_same
from tests.test_feature_file import contents

MINE = DatasetSpec(name="mine", summary="", label_range=3.0)


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "registered")


def aligned_file(folder: Path, name: str = "aligned.pkl") -> Path:
    """A file whose audio and vision have a step for each of the nine tokens, and no lengths."""
    content = {split: make_split(n, prefix=split) for split, n in {"train": 8, "valid": 4, "test": 4}.items()}
    for arrays in content.values():
        arrays["audio"] = arrays["audio"][:, [0] * 9]
        arrays["vision"] = arrays["vision"][:, [0] * 9]
        del arrays["audio_lengths"], arrays["vision_lengths"]
    return write_features(folder / name, content)


def refusal(call, *arguments, **options) -> str:
    with pytest.raises(InputError) as caught:
        call(*arguments, **options)
    return str(caught.value)


# --- where


def test_where_registered_files_lie(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data_root("~/given") == tmp_path / "given"
    assert data_root() == Path(os.environ["MMSA_DATA"])
    monkeypatch.delenv("MMSA_DATA")
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert data_root() == Path("/data/mmsa")
    for empty in ("", "relative"):
        monkeypatch.setenv("XDG_DATA_HOME", empty)
        assert data_root() == tmp_path / ".local/share/mmsa"


# --- what comes back


@settings(deadline=None, max_examples=30)
@given(data=contents())
def test_what_is_registered_is_what_was_read(tmp_path_factory, data):
    place = tmp_path_factory.mktemp("files")
    path = write_features(place / "x.pkl", data[1])
    found, is_new = Store(place).add(MINE, path)
    expected = read_feature_file(path, label_range=3.0)
    path.unlink()
    assert is_new
    assert found.clips == {name: len(split.ids) for name, split in expected.splits.items()}
    assert_same(Store(place).find("mine").read(label_range=3.0), expected)


def test_the_header_tells_it_apart_and_safetensors_reads_it(tmp_path, store):
    path = feature_file(tmp_path, audio_lengths=lambda n: [0, *n[1:]])
    store.add(MINE, path)
    (found,) = store.files()
    assert (found.dataset, found.name, found.aligned, found.verified) == ("mine", "features.pkl", False, False)
    assert (found.sha256, found.source) == (file_sha256(path), str(path))
    assert len(found.notes) == 3
    assert found.path == store.root / "mine" / "features.pkl.safetensors"
    assert load_file(found.path)["splits.valid.audio"].shape == (4, 6, 5)


def test_a_run_has_the_same_identity_from_a_path_and_from_the_store(tmp_path, store, encoder):
    path = feature_file(tmp_path)
    plan = make_plan("text_only", "mosi")
    from_path = plan.read(path, encoder, Watcher())
    store.add(plan.dataset, path)
    path.unlink()
    for data in (None, "features.pkl", "features"):
        job = plan.read(data, encoder, Watcher(), data_root=store.root)
        assert (job.identity(), job.settings()) == (from_path.identity(), from_path.settings())


def test_a_run_needs_no_file_any_more(tmp_path, store, encoder):
    path = feature_file(tmp_path)
    store.add(make_plan("tfn", "mosi").dataset, path)
    path.unlink()
    result = run(
        "tfn", "mosi", text_encoder=encoder, config={"epochs": 1}, runs=tmp_path / "runs", data_root=store.root
    )
    assert result.runs[0].status == "ok"
    assert load_run(result.runs[0].folder).environment["data_file"] == "features.pkl"
    assert "the data is features.pkl" in (result.runs[0].folder / "log.txt").read_text()


def test_what_is_written_to_an_array_stays_in_the_process(tmp_path, store):
    store.add(MINE, feature_file(tmp_path))
    file = store.find("mine").read(label_range=3.0)
    before = file.splits["train"].audio.copy()
    file.splits["train"].audio[:] = 0
    assert torch.from_numpy(store.find("mine").read(label_range=3.0).splits["train"].audio).equal(torch.tensor(before))


def test_the_label_range_of_custom_data_is_given_once(tmp_path, store):
    def limit(**data) -> float:
        return make_plan("text_only", "custom", data_root=store.root, **data).label_range

    one = feature_file(tmp_path)
    custom = make_plan("text_only", "custom", label_range=3.0).dataset
    store.add(custom, one, label_range=3.5)
    assert (limit(), limit(data="features"), limit(label_range=4.0)) == (3.5, 3.5, 4.0)
    assert "registered with labels within ±3.5, not ±3: pass --replace" in refusal(
        store.add, custom, one, label_range=3
    )
    store.add(custom, feature_file(tmp_path, name="b.pkl", audio=lambda audio: audio + 1), label_range=3.0)
    assert limit(data="b.pkl") == 3.0
    for data in (None, one, "x"):
        assert "needs --label-range" in refusal(limit, data=data)


# --- the published files


def known(path: Path, name: str = "features.pkl") -> DatasetSpec:
    return DatasetSpec(name="mine", summary="", label_range=3.0, sha256={name: file_sha256(path)})


def test_the_published_file_is_verified(tmp_path, store):
    path = feature_file(tmp_path)
    found, _ = store.add(known(path), path)
    assert found.verified
    file = found.read(label_range=3.0, known_sha256=known(path).sha256)
    assert file.notes == ["features.pkl is the published file (SHA-256 verified)"]


def test_it_is_verified_by_its_content_under_another_name(tmp_path, store):
    path = feature_file(tmp_path)
    assert store.add(known(path, "unaligned_50.pkl"), path)[0].verified


def test_other_content_under_a_published_name_is_refused(tmp_path, store):
    spec = known(feature_file(tmp_path))
    path = feature_file(tmp_path, audio=lambda audio: audio + 1)
    theirs = DatasetSpec(name="theirs", summary="", label_range=3.0, sha256={"features.pkl": file_sha256(path)})
    message = refusal(store.add, spec, path, others=[theirs])
    assert "(it is the published features.pkl of theirs)" in message
    assert file_sha256(path) in message
    assert spec.sha256["features.pkl"] in message
    assert "--unverified" in message
    assert not store.root.exists()
    assert not store.add(spec, path, unverified=True)[0].verified


# --- again


def test_adding_twice_is_harmless(tmp_path, store):
    path = feature_file(tmp_path)
    first, _ = store.add(MINE, path)
    assert store.add(MINE, path) == (first, False)
    copy = shutil.copy(path, tmp_path / "copy.pkl")
    assert store.add(MINE, copy) == (first, False)
    assert len(store.files()) == 1


def test_other_content_asks_for_replace(tmp_path, store):
    store.add(MINE, feature_file(tmp_path))
    path = feature_file(tmp_path, audio=lambda audio: audio + 1)
    assert "pass --replace, or rename the file" in refusal(store.add, MINE, path)
    found, is_new = store.add(MINE, path, replace=True)
    assert (is_new, found.sha256) == (True, file_sha256(path))
    assert len(store.files()) == 1


# --- which one is meant


def test_a_model_gets_the_file_that_fits_it(tmp_path, store):
    for path in (feature_file(tmp_path), aligned_file(tmp_path)):
        store.add(MINE, path)
    assert store.find("mine", aligned=True).name == "aligned.pkl"
    assert store.find("mine", aligned=False).name == "features.pkl"
    store.remove("mine", "features")
    assert store.find("mine", aligned=False).name == "aligned.pkl"


def test_several_that_fit_are_listed(tmp_path, store):
    for name, shift in {"a.pkl": 0, "b.pkl": 1}.items():
        store.add(MINE, feature_file(tmp_path, name=name, audio=lambda audio, shift=shift: audio + shift))
    message = refusal(store.find, "mine")
    assert message == "2 registered files of mine fit: name one with --data: a.pkl, b.pkl"
    assert store.find("mine", "b").name == "b.pkl"


def test_none_that_fits(tmp_path, store):
    assert "'mine' needs --data FILE" in refusal(store.find, "mine")
    assert refusal(store.find, "mine", "x").endswith("has that name (nothing is registered)")
    store.add(MINE, feature_file(tmp_path))
    assert refusal(store.find, "mine", "x").endswith("has that name (registered are features.pkl)")
    assert "no registered file" in refusal(store.find, "../registered/mine", "features")


def test_a_path_wins_over_a_name(tmp_path, store, encoder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store.add(MINE, feature_file(tmp_path))
    place = make_plan("text_only", "mosi").place_of("features.pkl", store.root)
    assert place == Path("features.pkl")


# --- what is not taken


def test_a_file_with_faults_leaves_nothing(tmp_path, store):
    assert "cannot be used" in refusal(store.add, MINE, feature_file(tmp_path, audio="x"))
    assert "does not exist" in refusal(store.add, MINE, tmp_path / "none.pkl")
    assert not store.root.exists()


def test_datasets_that_take_no_file(tmp_path, store):
    path = feature_file(tmp_path)
    demo, custom = (make_plan("text_only", name, label_range=3.0).dataset for name in ("demo", "custom"))
    assert "makes its own data" in refusal(store.add, demo, path)
    assert "needs --label-range" in refusal(store.add, custom, path)
    assert "positive" in refusal(store.add, custom, path, label_range=-1.0)
    assert store.add(custom, path, label_range=3.0)[1]


def test_a_file_that_changes_while_it_is_read(tmp_path, store, monkeypatch):
    load = reader.load_pickle
    monkeypatch.setattr(reader, "load_pickle", lambda path: os.utime(path, ns=(0, 0)) or load(path))
    assert "changed while it was read" in refusal(store.add, MINE, feature_file(tmp_path))
    assert store.files() == []


def test_a_full_disk(tmp_path, store, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(1 << 30))
    assert "has 1.1 GB free, and features.pkl needs" in refusal(store.add, MINE, feature_file(tmp_path))
    assert store.files() == []


def test_a_folder_that_cannot_be_written(tmp_path, store, monkeypatch):
    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    path = feature_file(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        assert "cannot be written: No space left on device" in refusal(store.add, MINE, path)
    assert list((store.root / "mine").iterdir()) == []
    with monkeypatch.context() as patch:
        patch.setattr(mapped, "_LONGEST_HEADER", 1000)
        assert "its ids and texts are too long" in refusal(store.add, MINE, path)
    store.root.joinpath("mine").rmdir()
    (store.root / "mine").write_text("")
    assert "cannot be written" in refusal(store.add, MINE, path)


def test_labels_beyond_the_range_that_is_asked_for(tmp_path, store):
    found, _ = store.add(MINE, feature_file(tmp_path))
    assert "labels from -1 to 1" in refusal(found.read, label_range=1.0)


# --- what cannot be used any more


@settings(deadline=None, max_examples=150)
@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255), cut=st.booleans())
def test_what_is_damaged_is_said(tmp_path_factory, place, value, cut):
    folder = tmp_path_factory.mktemp("files")
    store = Store(folder)
    path = store.add(MINE, feature_file(folder, sizes={"train": 2, "valid": 1, "test": 1}))[0].path
    content = bytearray(path.read_bytes())
    at = int(place * (8 + int.from_bytes(content[:8], "little")))
    changed = content[:at] if cut else content[:at] + bytes([value]) + content[at + 1 :]
    path.write_bytes(changed)
    (found,) = store.files()
    if found.fault is None:  # the byte was what it was, or is a space of the header
        assert found.read(label_range=3.0).splits["train"].audio.shape == (2, 6, 5)
    else:
        assert refusal(store.find, "mine") == found.fault
        assert found.fault == (
            f"{path} is damaged or cut short: type `benchmark data add mine FILE` once more, with the original"
        )


@pytest.mark.parametrize("content", [b"", b"\xff" * 7, b"\xff" * 100, (1 << 40).to_bytes(8, "little") + b"{" * 50])
def test_a_length_that_no_header_has_is_not_read(tmp_path, store, content):
    path = store.add(MINE, feature_file(tmp_path))[0].path
    path.write_bytes(content)
    assert "damaged or cut short" in store.files()[0].fault


def test_arrays_that_are_cut_while_a_run_begins(tmp_path, store):
    found, _ = store.add(MINE, feature_file(tmp_path))
    found.path.write_bytes(found.path.read_bytes()[:-4])
    assert "damaged or cut short" in refusal(found.read, label_range=3.0)


def test_another_version_is_said_and_taken_anew(tmp_path, store, monkeypatch):
    path = feature_file(tmp_path, name="my features.pkl")
    with monkeypatch.context() as patch:
        patch.setattr(module, "FORMAT", module.FORMAT + 1)
        store.add(MINE, path)
    (found,) = store.files()
    assert found.fault == f"{found.path} is of another version: type `benchmark data add mine '{path}'` once more"
    assert refusal(store.find("mine", "my features").read, label_range=3.0) == found.fault
    assert store.add(MINE, path)[1]
    assert store.files()[0].fault is None


def test_a_file_of_the_form_that_lacks_facts_is_damaged(tmp_path, store):
    store.add(MINE, feature_file(tmp_path))
    (path,) = store.root.glob("*/*.safetensors")
    content = module.read_mapped(path, module._KEY)
    del content["sha256"]
    module.write_mapped(path, content, module._KEY)
    assert "is damaged" in store.files()[0].fault


def test_one_that_is_damaged_can_be_removed_and_does_not_hide_others(tmp_path, store):
    path = store.add(MINE, feature_file(tmp_path))[0].path
    path.write_bytes(b"")
    store.add(MINE, feature_file(tmp_path, name="b.pkl", audio=lambda audio: audio + 1))
    assert store.find("mine").name == "b.pkl"
    store.remove("mine", "features.pkl")
    store.remove("mine", "b")
    assert not (store.root / "mine").exists()


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be read: Not a directory" in refusal(Store(tmp_path / "file").files)
