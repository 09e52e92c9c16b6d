"""The reader of `.csd` files: what it reads, what it refuses, and that it looks at no other file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from registry.data.computational_sequences import ComputationalSequence, as_sequence, open_sequence
from registry.errors import InputError
from tests.sequences import make_videos, write_csd


def read_all(path: Path, what: str = "numbers") -> list[Any]:
    with open_sequence(path) as sequence:
        return [getattr(sequence, what)(video) for video in sequence.videos]


def refusal(path: Path, what: str = "numbers") -> str:
    with pytest.raises(InputError) as caught:
        read_all(path, what)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(path), "FILE")


def one(tmp_path: Path, **changes: Any) -> Path:
    """Write a file of one video of three steps of two features, with changes to its two arrays."""
    entry = {"features": np.arange(6.0).reshape(3, 2), "intervals": np.array([[0, 1], [1, 2], [2, 3.0]])} | changes
    return write_csd(tmp_path / "one.csd", {"v": {key: value for key, value in entry.items() if value is not None}})


# --- what is read


def test_a_file_gives_its_videos(tmp_path):
    videos = make_videos()
    with open_sequence(write_csd(tmp_path / "audio.csd", videos["audio"], "COVAREP")) as audio:
        assert (audio.name, audio.width, list(audio.videos)) == ("COVAREP", 5, ["v0", "v1", "v2", "v3", "v4"])
        steps = audio.numbers("v1")
        assert audio.numbers("elsewhere").features.shape == (0, 5)
    np.testing.assert_array_equal(steps.features, videos["audio"]["v1"]["features"])
    np.testing.assert_array_equal(steps.intervals, videos["audio"]["v1"]["intervals"])
    assert steps.features.dtype == np.float32


@pytest.mark.parametrize("kind", ["S", object], ids=["fixed length", "any length"])
def test_words(tmp_path, kind):
    words = np.array([b"it's", b"caf\xc3\xa9", b" two  words "], dtype=kind)[:, None]
    (steps,) = read_all(one(tmp_path, features=words), "words")
    assert steps.features.tolist() == ["it's", "café", "two words"]


def test_steps_come_in_order_of_time_also_from_several_entries(tmp_path):
    """The SDK's `align` makes `VIDEO[0]`, `VIDEO[1]` … of a video."""
    parts = {
        f"v[{row}]": {"features": np.full((1, 1), row), "intervals": np.array([[9.0 - row, 10 - row]])}
        for row in range(3)
    }
    (steps,) = read_all(write_csd(tmp_path / "parts.csd", parts))
    assert steps.features[:, 0].tolist() == [2, 1, 0]
    assert steps.intervals[:, 0].tolist() == [7, 8, 9]


def test_one_feature_a_step_may_be_a_vector_and_packed(tmp_path):
    path = one(tmp_path)
    with h5py.File(path, "a") as file:
        del file["root/data/v/features"]
        file["root/data/v"].create_dataset("features", data=np.zeros(3), compression="gzip")
    (steps,) = read_all(path)
    assert steps.features.shape == (3, 1)


def test_a_video_without_steps_is_none(tmp_path):
    videos = make_videos()["vision"]
    videos["v0"] = {"features": np.zeros(0), "intervals": np.zeros((0, 2))}
    with open_sequence(write_csd(tmp_path / "vision.csd", videos)) as vision:
        assert list(vision.videos) == ["v1", "v2", "v3", "v4"]
        assert vision.numbers("v0").features.shape == (0, 3)


def test_an_interval_may_start_before_its_video(tmp_path):
    """As some of CMU-MOSEI's do."""
    (steps,) = read_all(one(tmp_path, intervals=np.array([[-0.48, 1], [1, 2], [2, 3.0]])))
    assert steps.intervals[0, 0] == -0.48


def test_sequences_of_the_sdk(tmp_path):
    mmdatasdk = pytest.importorskip("mmsdk.mmdatasdk")
    videos = make_videos()
    paths = {role: str(write_csd(tmp_path / f"{role}.csd", videos[role], role.upper())) for role in ("audio", "words")}
    theirs = mmdatasdk.mmdataset(paths)
    audio, words = as_sequence(theirs["audio"], "audio"), as_sequence(theirs["words"], "words")
    assert (audio.name, words.name) == ("AUDIO", "WORDS")
    np.testing.assert_array_equal(audio.numbers("v2").features, videos["audio"]["v2"]["features"])
    assert words.words("v0").features[4] == "sp"


def test_a_sequence_of_a_newer_sdk():
    """Its metadata are strings, and its entries plain arrays after `align`."""

    class Theirs:
        data = make_videos()["audio"]
        metadata = {"root name": "COVAREP"}  # noqa: RUF012

    made = as_sequence(Theirs, "audio")
    assert (made.name, made.numbers("v0").features.shape) == ("COVAREP", (90, 5))


# --- what is refused


@pytest.mark.parametrize(
    ("changes", "what", "reason"),
    [
        ({"features": None}, "numbers", "video 'v' has no features"),
        ({"intervals": None}, "numbers", "video 'v' has no intervals"),
        ({"features": np.zeros((2, 2))}, "numbers", "of as many rows, found (2, 2) and (3, 2)"),
        ({"intervals": np.zeros((3, 3))}, "numbers", "of as many rows, found (3, 2) and (3, 3)"),
        ({"features": np.float64(1)}, "numbers", "found () and (3, 2)"),
        ({"intervals": np.array([[0, 1], [5, 4], [5, 6.0]])}, "numbers", "found 5 to 4 (1 such)"),
        ({"intervals": np.array([[-9, -8], [0, 1], [5, 6.0]])}, "numbers", "found -9 to -8 (1 such)"),
        ({"intervals": np.array([[0, np.nan], [0, 1], [5, 6.0]])}, "numbers", "found 0 to nan (1 such)"),
        ({"intervals": np.full((3, 2), b"now")}, "numbers", "intervals: expected numbers, found |S3"),
        ({"features": np.full((3, 1), b"word")}, "numbers", "features: expected numbers, found |S4"),
        ({"features": np.zeros((3, 1))}, "words", "features: expected words, found float64"),
        ({"features": np.full((3, 2), b"word")}, "words", "expected one word a step, found 2 features"),
        ({"features": np.full((3, 1), b"\xff\xfe")}, "words", "the word b'\\xff\\xfe' is not UTF-8"),
    ],
)
def test_broken_entries(tmp_path, changes, what, reason):
    assert reason in refusal(one(tmp_path, **changes), what)


def test_widths_that_differ(tmp_path):
    videos = make_videos()["audio"]
    videos["v3"]["features"] = videos["v3"]["features"][:, :4]
    path = write_csd(tmp_path / "audio.csd", videos)
    assert refusal(path) == "FILE: video 'v3' has 4 features a step, those before it 5"


def test_files_that_are_none(tmp_path):
    path = tmp_path / "audio.csd"
    assert refusal(path) == "FILE does not exist"
    path.write_bytes(b"not HDF5")
    assert refusal(path) == "FILE is no computational sequence: it is not an HDF5 file"
    assert refusal(tmp_path).endswith("is a folder, expected a .csd file")
    with h5py.File(path, "w") as file:
        file["root/metadata/key"] = 1
    assert refusal(path) == "FILE: 'root' has no data"
    with h5py.File(path, "w") as file:
        file["root/data"] = [1, 2, 3]
    assert refusal(path) == "FILE: data: expected a group, found something else"
    with h5py.File(path, "w") as file:
        file["root/data/v"] = [1, 2, 3]
    assert "expected a group with features" in refusal(path)


def test_a_file_that_is_cut_anywhere(tmp_path):
    whole = one(tmp_path).read_bytes()
    path = tmp_path / "cut.csd"
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        assert "FILE is no computational sequence: it is" in refusal(path)


@pytest.mark.parametrize("packed", [None, "gzip"])
def test_declared_sizes_are_checked_before_anything_is_read(tmp_path, packed):
    path = one(tmp_path)
    with h5py.File(path, "a") as file:
        del file["root/data/v/features"]
        file["root/data/v"].create_dataset(
            "features", (3, 1 << 40), dtype=np.float32, chunks=(1, 1024), compression=packed
        )
    assert "more than the file holds: it is damaged" in refusal(path)


def test_one_array_under_many_names_is_not_read_as_many(tmp_path):
    path = one(tmp_path)
    with h5py.File(path, "a") as file:
        del file["root/data/v/features"], file["root/data/v/intervals"]
        options = {"chunks": (1 << 16, 1), "compression": "gzip"}
        for name, columns in (("features", 1), ("intervals", 2)):
            file["root/data/v"].create_dataset(name, (1 << 20, columns), np.float32, **options)
        for number in range(500):
            for name in ("features", "intervals"):
                file[f"root/data/w{number}/{name}"] = file[f"root/data/v/{name}"]
    assert "more than it can: it is damaged" in refusal(path)


@pytest.mark.parametrize("level", ["root", "root/data", "root/data/v", "root/data/v/features"])
def test_links_are_not_followed(tmp_path, level):
    """The external one leads to a file that has what is asked for."""
    (tmp_path / "other").mkdir()
    other, path = one(tmp_path / "other"), one(tmp_path)
    for link in (h5py.ExternalLink(str(other), level), h5py.SoftLink(f"/{level}_moved")):
        with h5py.File(path, "a") as file:
            del file[level]
            file[level] = link
        assert "is a link to somewhere else, which is not followed" in refusal(path)


def test_data_in_other_files_are_not_read(tmp_path):
    (tmp_path / "secret").write_bytes(bytes(48))
    path = one(tmp_path)
    with h5py.File(path, "a") as file:
        group = file["root/data/v"]
        del group["features"]
        group.create_dataset("features", (3, 2), dtype=float, external=[(str(tmp_path / "secret"), 0, 48)])
    assert "features is stored in other files, which are not read" in refusal(path)
    with h5py.File(path, "a") as file:
        group = file["root/data/v"]
        del group["features"]
        layout = h5py.VirtualLayout((3, 2), dtype=float)
        layout[:] = h5py.VirtualSource(str(tmp_path / "secret"), "features", shape=(3, 2))
        group.create_virtual_dataset("features", layout)
    assert "features is stored in other files, which are not read" in refusal(path)


def test_what_is_no_sequence():
    with pytest.raises(
        InputError, match=r"^audio: expected the path of a \.csd file or a computational sequence, found"
    ):
        as_sequence(3, "audio")
    with pytest.raises(InputError, match="audio holds no videos"):
        ComputationalSequence("audio", {})
