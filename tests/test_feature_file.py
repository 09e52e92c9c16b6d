"""The reader of feature files: what it reads, mends, refuses and never runs."""

from __future__ import annotations

import builtins
import hashlib
import os
import pickle
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from registry.data.feature_file import read_clips, read_feature_file
from registry.data.splits import CLIPS, FeatureFile
from registry.errors import InputError
from tests.helpers import feature_file, make_split, write_features

SHARED = Path(__file__).parents[2] / "shared" / "data"


def read(path: Path, label_range: float = 3.0, **options: Any) -> FeatureFile:
    return read_feature_file(path, label_range=label_range, **options)


def refusal(path: Path, label_range: float = 3.0) -> str:
    with pytest.raises(InputError) as caught:
        read(path, label_range)
    assert caught.value.exit_code == 2
    return str(caught.value).replace(str(path), "FILE")


# --- what is read


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_every_protocol_reads_the_same(tmp_path, protocol):
    file = read(feature_file(tmp_path, protocol=protocol))
    expected = make_split(8, prefix="train", seed=0)
    train = file.splits["train"]
    assert (train.ids, train.raw_text) == (expected["id"], expected["raw_text"])
    np.testing.assert_array_equal(train.text_bert, expected["text_bert"])
    np.testing.assert_array_equal(train.audio, expected["audio"])
    np.testing.assert_array_equal(train.vision_lengths, expected["vision_lengths"])
    np.testing.assert_array_equal(train.labels["M"], expected["regression_labels"])
    assert not file.aligned
    assert file.notes == []


def test_arrays_have_fixed_types_and_can_be_written_to(tmp_path):
    train = read(feature_file(tmp_path, audio=lambda a: np.asfortranarray(a.astype(">f8")))).splits["train"]
    for key, kind in {"text_bert": np.int64, "audio": np.float32, "audio_lengths": np.int64}.items():
        array = getattr(train, key)
        assert array.dtype == kind
        assert array.flags.writeable
        assert array.flags.c_contiguous


def test_lists_and_other_spellings_of_arrays(tmp_path):
    path = feature_file(
        tmp_path,
        id=lambda ids: np.array(ids, dtype=object),
        raw_text=lambda texts: np.array(texts),
        audio=lambda a: a.tolist(),
        vision=lambda v: [list(row) for row in v],
        text_bert=lambda t: t.astype(np.float32),
        audio_lengths=lambda n: [np.int32(x) for x in n],
        regression_labels=lambda y: y.astype(np.float64)[:, None],
    )
    train, plain = read(path).splits["train"], make_split(8, prefix="train", seed=0)
    assert train.ids == plain["id"]
    assert train.raw_text == plain["raw_text"]
    np.testing.assert_array_equal(train.vision, plain["vision"])
    np.testing.assert_array_equal(train.text_bert, plain["text_bert"])
    assert train.labels["M"].shape == (8,)


def test_ids_that_are_numbers_become_strings(tmp_path):
    starts = {"train": 0, "valid": 100, "test": 200}
    changes = {
        split: {"id": lambda ids, start=start: np.arange(start, start + len(ids))} for split, start in starts.items()
    }
    assert read(feature_file(tmp_path, **changes)).splits["valid"].ids == ["100", "101", "102", "103"]


def test_object_arrays_of_numbers_and_plain_containers(tmp_path):
    def objects(array):
        result = np.empty(len(array), dtype=object)
        result[:] = list(array)
        return result

    path = feature_file(tmp_path, audio=objects, extra=OrderedDict(a={1, 2}, b=frozenset("x"), c=bytearray(b"x")))
    assert read(path).splits["test"].audio.shape == (4, 6, 5)


def test_python_2_pickle(tmp_path):
    """Protocol 2 as Python 2 wrote it: byte strings for text and for the data of arrays, numpy's old names."""

    def string(data: bytes) -> bytes:
        return b"T" + len(data).to_bytes(4, "little") + data

    def array(values: np.ndarray, code: bytes) -> bytes:
        shape = b"(" + b"".join(b"J" + n.to_bytes(4, "little") for n in values.shape) + b"t"
        dtype = b"cnumpy\ndtype\n(" + string(code) + b"I0\nI1\ntR(I3\n" + string(b"<") + b"NNNI-1\nI-1\nI0\ntb"
        made = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\nt" + string(b"b") + b"tR"
        return made + b"(I1\n" + shape + dtype + b"I00\n" + string(values.tobytes()) + b"tb"

    def split(name: bytes) -> bytes:
        ids = b"(" + string(name + b"_\xe9") + b"l"
        labels = array(np.array([1.5], dtype="<f4"), b"f4")
        audio = array(np.full((1, 1, 2), 7, dtype="<f8"), b"f8")
        pairs = string(b"id") + ids + string(b"regression_labels") + labels + string(b"audio") + audio
        return string(name) + b"(" + pairs + b"d"

    path = tmp_path / "old.pkl"
    path.write_bytes(b"\x80\x02(" + b"".join(map(split, [b"train", b"valid", b"test"])) + b"d.")
    file = read(path)
    assert file.splits["valid"].ids == ["valid_é"]
    np.testing.assert_array_equal(file.splits["test"].audio, [[[7, 7]]])


def test_numpy_2_names_are_read_and_written_alike(tmp_path):
    path = feature_file(tmp_path, protocol=2)
    content = path.read_bytes()
    other = content.replace(b"numpy._core.", b"numpy.core.")
    path.write_bytes(other if other != content else content.replace(b"numpy.core.", b"numpy._core."))
    assert len(read(path).splits["train"].ids) == 8


def test_other_keys_are_ignored(tmp_path):
    path = feature_file(tmp_path, pred_audio=np.zeros(3), annotations=["x"], classification_labels="?", mystery=1)
    assert read(path).notes == []


def test_text_alone_and_unimodal_labels(tmp_path):
    gone = dict.fromkeys(["audio", "audio_lengths", "vision", "vision_lengths", "text_bert"])
    human = {f"regression_labels_{task}": lambda _: [0.5, -0.5] for task in "TAV"}
    file = read(feature_file(tmp_path, sizes={"train": 2, "valid": 2, "test": 2}, **gone, **human))
    assert set(file.splits["train"].labels) == set("MTAV")
    assert file.splits["train"].audio is None
    assert not file.aligned


def test_aligned_file_takes_its_lengths_from_the_mask(tmp_path):
    path = feature_file(
        tmp_path,
        audio=lambda a: np.zeros((len(a), 9, 5)),
        vision=lambda v: np.zeros((len(v), 9, 3)),
        audio_lengths=None,
        vision_lengths=None,
    )
    file = read(path)
    train = file.splits["train"]
    assert file.aligned
    np.testing.assert_array_equal(train.audio_lengths, train.text_bert[:, 1].sum(axis=1))
    np.testing.assert_array_equal(train.vision_lengths, train.audio_lengths)


def test_utterance_features_need_no_lengths(tmp_path):
    one = {"audio": lambda a: a[:, :1], "vision": lambda v: v[:, :1]}
    file = read(feature_file(tmp_path, **one, audio_lengths=None, vision_lengths=None))
    assert not file.aligned
    assert file.splits["train"].audio_lengths.tolist() == [1] * 8


# --- what is mended


def test_values_that_are_not_finite_become_zero(tmp_path):
    def spoil(audio):
        audio[1, 2] = [np.nan, np.inf, -np.inf, 1, 2]
        return audio

    file = read(feature_file(tmp_path, train={"audio": spoil}))
    assert file.splits["train"].audio[1, 2].tolist() == [0, 0, 0, 1, 2]
    assert file.notes == ["train: audio: 3 values that are not finite (NaN, ±inf) were replaced by 0"]


def test_length_zero_is_lifted(tmp_path):
    file = read(feature_file(tmp_path, valid={"vision_lengths": [0, 4, 0, 1]}))
    assert file.splits["valid"].vision_lengths.tolist() == [1, 4, 1, 1]
    assert file.notes == ["valid: vision_lengths: 2 lengths of 0 were lifted to 1"]


def test_known_files_are_verified(tmp_path):
    path = feature_file(tmp_path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert read(path).sha256 == sha256
    assert "published file (SHA-256 verified)" in read(path, known_sha256={path.name: sha256}).notes[0]
    assert "is not the published file" in read(path, known_sha256={path.name: "0" * 64}).notes[0]
    assert read(path, known_sha256={"other.pkl": "0" * 64}).notes == []


# --- what is a fault


def replace(row: int, value: Any):
    def change(array):
        array = list(array) if isinstance(array, list) else array.copy()
        array[row] = value
        return array

    return change


def token(part: int, value: int, column: Any = 0):
    def change(tokens):
        tokens[1, part, column] = value
        return tokens

    return change


FAULTS = {
    "no labels": (
        {"train": {"regression_labels": None}},
        "train: regression_labels: expected one a clip, found nothing",
    ),
    "no ids": ({"test": {"id": None}}, "test: id: expected one a clip, found nothing"),
    "rows": ({"valid": {"audio": lambda a: a[:-1]}}, "valid: audio: expected 4 rows as in id, found 3"),
    "text rows": ({"valid": {"raw_text": ["x"]}}, "valid: raw_text: expected 4 rows as in id, found 1"),
    "dimensions": (
        {"train": {"audio": lambda a: a[0]}},
        "train: audio: expected an array of 3 dimensions, none of them",
    ),
    "ragged": (
        {"train": {"audio": [[[1.0]], [[1.0, 2.0]]]}},
        "train: audio: expected an array of 3 dimensions, found rows",
    ),
    "not numbers": ({"train": {"vision": ["a"] * 8}}, "train: vision: expected numbers, found text"),
    "objects": (
        {"train": {"vision": lambda v: np.array([None] * 8)}},
        "train: vision: expected numbers, found objects",
    ),
    "widths": ({"test": {"audio": lambda a: a[..., :4]}}, "test: audio: expected 5 features as in train, found 4"),
    "too long": ({"test": {"audio_lengths": [1, 7, 9, 1]}}, "test: audio_lengths: expected 1 to 6, found 7 (2 clips"),
    "negative length": ({"test": {"audio_lengths": [1, -1, 1, 1]}}, "test: audio_lengths: expected 1 to 6, found -1"),
    "half a step": ({"test": {"audio_lengths": [1, 1.5, 1, 1]}}, "test: audio_lengths: expected whole numbers"),
    "no lengths": ({"audio_lengths": None}, "expected one length a clip, since audio has 6 steps, found nothing"),
    "label": ({"test": {"regression_labels": replace(2, 3.5)}}, "from -3 to 3, found 3.5 at clip 'test$_$2'"),
    "NaN label": ({"test": {"regression_labels": replace(2, np.nan)}}, "from -3 to 3, found nan at clip 'test$_$2'"),
    "T label": (
        {"sizes": {"train": 2, "valid": 2, "test": 2}, "regression_labels_T": [0.5, 9.0]},
        "test: regression_labels_T: expected labels from -3 to 3, found 9 at clip 'test$_$1'",
    ),
    "same id": (
        {"train": {"id": replace(1, "train$_$0")}},
        "train: id: expected every id once, found 'train$_$0' again",
    ),
    "leak": (
        {"test": {"id": replace(1, "train$_$0")}},
        "test: id: expected clips of no other split, found 'train$_$0' of",
    ),
    "id": ({"test": {"id": replace(1, None)}}, "test: id: expected a list of strings, found nothing among them"),
    "token id": ({"valid": {"text_bert": token(0, -1)}}, "valid: text_bert: expected token ids from 0, found -1"),
    "mask": (
        {"valid": {"text_bert": token(1, 2)}},
        "valid: text_bert: expected mask of 0 and 1, found values from 0 to 2",
    ),
    "no token": ({"valid": {"text_bert": token(1, 0, slice(None))}}, "at least one token a clip, found 1 clips"),
    "hole": ({"valid": {"text_bert": token(1, 0)}}, "valid: text_bert: expected a mask of ones, then zeros"),
    "shape": ({"text_bert": lambda t: t[:, :2]}, "text_bert: expected shape (N, 3, L)"),
    "one split": ({"valid": {"audio": None}}, "valid: audio: expected it, since train has it, found nothing"),
    "no inputs": (dict.fromkeys(["raw_text", "text_bert", "audio", "vision"]), "expected at least one of raw_text"),
}


@pytest.mark.parametrize(("changes", "expected"), FAULTS.values(), ids=FAULTS.keys())
def test_fault(tmp_path, changes, expected):
    message = refusal(feature_file(tmp_path, **changes))
    assert message.startswith("FILE cannot be used: ")
    assert expected in message
    assert ("\n" in message) == bool(re.match(r"FILE cannot be used: \d+ faults\n", message))


def test_all_faults_are_listed(tmp_path):
    message = refusal(
        feature_file(tmp_path, train={"audio": "x", "id": None}, test={"regression_labels": replace(0, 4)})
    )
    first, *rest = message.splitlines()
    assert first == "FILE cannot be used: 3 faults"
    assert [line.split(":")[0].strip() for line in rest] == ["train", "train", "test"]


def test_a_long_list_is_cut(tmp_path):
    wrong = {f"regression_labels{task}": "x" for task in ["", "_T", "_A", "_V"]}
    message = refusal(feature_file(tmp_path, **wrong, text="x", audio="x", vision="x", id=[None], raw_text=3))
    assert len(message.splitlines()) == 22
    assert message.splitlines()[-1].strip() == "and 7 more"


@pytest.mark.parametrize("content", [[], None, {"train": {}}, {"train": 1, "valid": [], "test": None}])
def test_other_pickles(tmp_path, content):
    assert "cannot be used" in refusal(write_features(tmp_path / "x.pkl", content))


def test_label_range_must_be_known(tmp_path):
    assert "--label-range" in refusal(feature_file(tmp_path), label_range=float("nan"))


def test_labels_at_the_edge_of_the_range_are_fine(tmp_path):
    labels = {"regression_labels": lambda y: np.where(y > 0, 0.7, -0.7)}
    assert read(feature_file(tmp_path, **labels), label_range=0.7).notes == []


def test_what_is_no_pickle_is_one_sentence(tmp_path):
    whole = feature_file(tmp_path).read_bytes()
    path = tmp_path / "broken.pkl"
    cases = {b"": "is empty", whole[: len(whole) // 2]: "fetch it again", b"id,label\n": "fetch it again"}
    for content, expected in cases.items():
        path.write_bytes(content)
        message = refusal(path)
        assert expected in message
        assert "\n" not in message
    assert refusal(tmp_path / "none.pkl") == "FILE does not exist"
    assert "is a folder" in refusal(tmp_path)


def test_too_large_for_memory(tmp_path, monkeypatch):
    def full(*_):
        raise MemoryError

    monkeypatch.setattr("registry.data.safe_pickle.Unpickler.load", full)
    assert "does not fit into memory" in refusal(feature_file(tmp_path))


# --- what never runs


class Calls:
    """Pickles as a call of anything."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


def attacks(marker: Path) -> dict[str, tuple[bytes, str]]:
    command = f"touch {marker}"
    code = f"open({str(marker)!r}, 'w')"
    nested = np.empty(1, dtype=object)
    nested[0] = Calls(os.system, command)
    module = os.system.__module__
    return {
        "reduce": (pickle.dumps(Calls(os.system, command)), f"{module}.system"),
        "eval": (pickle.dumps(Calls(builtins.eval, code)), "builtins.eval"),
        "GLOBAL": (b"cos\nsystem\n(V" + command.encode() + b"\ntR.", "os.system"),
        "INST": (b"(V" + command.encode() + b"\nios\nsystem\n.", "os.system"),
        "OBJ": (b"(cos\nsystem\nV" + command.encode() + b"\no.", "os.system"),
        "STACK_GLOBAL": (
            b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c" + bytes([len(command)]) + command.encode() + b"\x85R.",
            "os.system",
        ),
        "Python 2 eval": (b"c__builtin__\neval\n(V" + code.encode() + b"\ntR.", "__builtin__.eval"),
        "dotted name": (b"\x80\x04\x8c\x05numpy\x8c\x13ndarray.__class__.x\x93.", "numpy.ndarray.__class__.x"),
        "in an object array": (pickle.dumps({"train": {"audio": nested}}), f"{module}.system"),
        "in an ignored key": (pickle.dumps({"train": {"mystery": Calls(os.system, command)}}), f"{module}.system"),
        "codecs": (b"c_codecs\nencode\n(Vx\nVrot13\ntR.", "_codecs.encode"),
        "persistent id": (b"Vx\nQ.", "an object outside the file"),
        "extension": (b"\x80\x02\x82\x01.", "extension 1"),
        "structured dtype": (pickle.dumps(np.zeros(1, dtype=[("a", "O")])), "numpy.dtype('V8')"),
        "numpy.load": (b"cnumpy\nload\n(V" + str(marker).encode() + b"\ntR.", "numpy.load"),
    }


@pytest.mark.parametrize("attack", attacks(Path("x")))
def test_attack(tmp_path, attack):
    marker, path = tmp_path / "marker", tmp_path / "x.pkl"
    content, asked = attacks(marker)[attack]
    path.write_bytes(content)
    message = refusal(path)
    assert message == (f"FILE asks to load {asked!r}; a feature file may hold numpy arrays and plain containers only")
    assert not marker.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"cnumpy\nndarray\n}Vmake\nI1\nsb.",  # an admitted name is given a state
        b"cnumpy\ndtype\n(N}V__class__\nI1\nstb.",
        b"cnumpy._core.multiarray\n_reconstruct\n)R(I1\n(I4\ntcnumpy\ndtype\n(VO8\ntRI00\nC\x08AAAAAAAAtb.",
        b"\x80\x04cnumpy._core.multiarray\nscalar\n(cnumpy\ndtype\n(VO8\ntRC\x08AAAAAAAAtR.",
        b"\x80\x04cnumpy._core.numeric\n_frombuffer\n(C\x08AAAAAAAAcnumpy\ndtype\n(VO8\ntRK\x01\x85VC\ntR.",
        b"\x80\x04cnumpy._core.multiarray\n_reconstruct\n)R(K\x01(J\xff\xff\xff\x7ftcnumpy\ndtype\n(Vf8\ntR\x89C\x08AAAAAAAAtb.",
        b"\x80\x02]r\xff\xff\xff\xff.",  # a memo of 64 GB
    ],
)
def test_forged_states_cannot_reach_memory(tmp_path, content):
    path = tmp_path / "x.pkl"
    path.write_bytes(content)
    refusal(path)


# --- properties


@st.composite
def contents(draw):
    """Valid files of any shape, as what the reader should make of them and as what is written."""
    modalities = draw(st.sets(st.sampled_from(["text", "audio", "vision", "text_bert", "raw_text"]), min_size=1))
    widths = {key: draw(st.integers(1, 4)) for key in ("text", "audio", "vision")}
    floats = draw(st.sampled_from(["<f4", ">f4", "<f8", "<f2"]))
    as_lists = draw(st.booleans())
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    expected: dict[str, dict[str, np.ndarray]] = {}
    for split in ("train", "valid", "test"):
        clips = draw(st.integers(1, 5))
        arrays: dict[str, Any] = {"id": [f"{split}{n}" for n in range(clips)]}
        arrays["regression_labels"] = rng.uniform(-3, 3, clips).astype(floats)
        for key in modalities & {"text", "audio", "vision"}:
            steps = draw(st.integers(1, 4))
            arrays[key] = rng.normal(size=(clips, steps, widths[key])).astype(floats)
            if key != "text":
                arrays[f"{key}_lengths"] = rng.integers(1, steps + 1, clips)
        if "text_bert" in modalities:
            arrays["text_bert"] = np.ones(
                (clips, 3, draw(st.integers(1, 4))), dtype=draw(st.sampled_from(["i4", "i8", "f4"]))
            )
        if "raw_text" in modalities:
            arrays["raw_text"] = [draw(st.text(max_size=5)) for _ in range(clips)]
        expected[split] = arrays
    if as_lists:
        written: Any = {
            s: {k: v if isinstance(v, list) else v.tolist() for k, v in a.items()} for s, a in expected.items()
        }
    else:
        written = expected
    return expected, written


@settings(deadline=None)
@given(data=contents(), protocol=st.integers(2, 5))
def test_valid_files_round_trip(tmp_path_factory, data, protocol):
    expected, written = data
    file = read(write_features(tmp_path_factory.mktemp("files") / "x.pkl", written, protocol=protocol))
    for split, arrays in expected.items():
        result = file.splits[split]
        np.testing.assert_array_equal(result.labels["M"], arrays["regression_labels"].astype(np.float32))
        for key in ("text", "audio", "vision", "text_bert", "audio_lengths", "vision_lengths"):
            value = getattr(result, key)
            assert (value is None) == (key not in arrays)
            if value is not None:
                np.testing.assert_array_equal(value, arrays[key].astype(value.dtype))
        assert result.raw_text == arrays.get("raw_text")


@settings(deadline=None, max_examples=300)
@given(
    protocol=st.integers(0, 5),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=6),
    cut=st.one_of(st.none(), st.floats(0, 1)),
    head=st.booleans(),
)
def test_damaged_files_read_or_are_refused(tmp_path_factory, protocol, changes, cut, head):
    folder = tmp_path_factory.mktemp("files")
    path = feature_file(folder, sizes={"train": 2, "valid": 1, "test": 1}, protocol=protocol)
    content = bytearray(path.read_bytes())
    for place, value in changes:  # half of the examples hit the head, which has more opcodes than data
        content[int(place * (min(len(content), 400) if head else len(content)))] = value
    path.write_bytes(content if cut is None else content[: int(cut * len(content))])
    try:
        assert isinstance(read(path), FeatureFile)
    except InputError as error:
        assert str(path) in str(error)  # noqa: PT017


@settings(deadline=None)
@given(data=contents(), wanted=st.sets(st.sampled_from(["train", "valid", "test"]), min_size=1), flat=st.booleans())
def test_parts_of_a_valid_file_are_clips_to_predict(data, wanted, flat):
    """Without labels and ids, as some splits, or as the keys of one."""
    expected, written = data
    parts = {s: {k: v for k, v in written[s].items() if k not in ("id", "regression_labels")} for s in sorted(wanted)}
    first = sorted(wanted)[0]
    file = read_clips(parts[first] if flat else parts, label_range=3.0)
    assert set(file.splits) == ({CLIPS} if flat else wanted)
    result, arrays = file.splits[CLIPS if flat else first], expected[first]
    assert (len(result.ids), result.labels) == (len(arrays["id"]), {})
    for key in ("text", "audio", "vision", "text_bert", "audio_lengths", "vision_lengths"):
        value = getattr(result, key)
        assert (value is None) == (key not in arrays)
        if value is not None:
            np.testing.assert_array_equal(value, np.asarray(arrays[key]).astype(value.dtype))


NUMBERS = st.integers(-3, 200) | st.floats(width=32) | st.booleans()
JUNK = st.recursive(
    st.none() | NUMBERS | st.text(max_size=3) | st.binary(max_size=3) | st.just(np.ones((1, 3, 2))),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=6,
)
KEYS = ("id", "raw_text", "text_bert", "text", "audio", "audio_lengths", "vision", "regression_labels", "test", "x")


@settings(deadline=None, max_examples=300)
@given(st.dictionaries(st.sampled_from(KEYS), JUNK))
def test_any_content_is_read_or_refused(content):
    try:
        assert isinstance(read_clips(content, label_range=3.0), FeatureFile)
    except InputError as error:
        assert "the clips cannot be used" in str(error)  # noqa: PT017


# --- real files


@pytest.mark.parametrize(
    ("name", "label_range", "sizes"), [("mosi", 3, (1284, 229, 686)), ("sims_labels", 1, (1368, 456, 457))]
)
def test_real_file(name, label_range, sizes):
    path = SHARED / f"{name}.pkl"
    if not path.is_file():
        pytest.skip(f"{path} is not there; it is not ours to ship")
    file = read(path, label_range)
    assert tuple(len(split.ids) for split in file.splits.values()) == sizes
    assert file.notes == []
    assert set(file.splits["test"].labels) == set("MTAV" if name == "sims_labels" else "M")


def test_an_archive_is_called_one(tmp_path):
    np.savez(tmp_path / "features.npz", audio=np.zeros(3))
    assert "is a zip archive" in refusal(tmp_path / "features.npz")


def test_a_label_a_little_out_of_range_is_told_apart(tmp_path):
    path = feature_file(tmp_path, regression_labels=lambda labels: labels * 0 + np.float32(3.00001))
    assert "from -3 to 3, found 3.00001 at clip" in refusal(path)


def test_a_small_file_that_unfolds_to_billions_is_refused_at_once(tmp_path):
    bomb: list = [1.0]
    for _ in range(3):
        bomb = [bomb] * 3000
    path = feature_file(tmp_path, audio=lambda audio: bomb)
    assert path.stat().st_size < 300_000
    assert "repeats parts of itself" in refusal(path)


def test_rows_that_are_one_object_are_fine(tmp_path):
    row = [[0.0] * 5] * 6
    file = read(feature_file(tmp_path, audio=lambda audio: [row] * len(audio)))
    assert not file.splits["train"].audio.any()


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("axes", [(0, 2, 1), (2, 0, 1), (1, 2, 0), (2, 1, 0)])
def test_arrays_whose_axes_are_in_another_order_in_memory(tmp_path, protocol, axes):
    def turned(array: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(array.transpose(axes)).transpose(np.argsort(axes))

    path = feature_file(tmp_path, protocol=protocol, audio=turned, text_bert=turned)
    train, expected = read(path).splits["train"], make_split(8, prefix="train", seed=0)
    np.testing.assert_array_equal(train.audio, expected["audio"])
    np.testing.assert_array_equal(train.text_bert, expected["text_bert"])


def test_a_forged_order_of_axes_is_refused(tmp_path):
    path = tmp_path / "x.pkl"
    for axes in (b"K\x00\x85", b"K\x05K\x00\x86", b"K\x00K\x00\x86", b"V1\n"):
        shape = b"K\x01K\x01\x86"
        path.write_bytes(
            b"\x80\x04cnumpy._core.numeric\n_frombuffer\n(C\x08AAAAAAAAcnumpy\ndtype\n(Vf8\ntR"
            + shape
            + b"VK\n"
            + axes
            + b"tR."
        )
        assert "is not a pickle, or is damaged" in refusal(path)


def test_a_small_file_cannot_become_large_by_padding(tmp_path):
    sequences = [np.zeros((1, 1), dtype=np.float32)] * 99_999 + [np.zeros((99_999, 1), dtype=np.float32)]
    content = {split: {"id": [], "regression_labels": [], "audio": sequences} for split in ("train", "valid", "test")}
    assert "rows of different shapes" in refusal(write_features(tmp_path / "x.pkl", content))
