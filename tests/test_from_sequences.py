"""Feature files from computational sequences: what a clip is, what is left out, and who can read the file."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from registry.data.computational_sequences import ComputationalSequence
from registry.data.feature_file import read_feature_file
from registry.data.from_sequences import Converted, from_computational_sequences, read_folds, standard_folds
from registry.data.splits import FeatureFile
from registry.data.text import find_text_encoder, tokenise
from registry.errors import InputError
from tests.sequences import FOLDS, make_sequences, make_videos, write_all

SHARED = Path(__file__).parents[2] / "shared" / "data"


def convert(videos: dict[str, Any] | None = None, **options: Any) -> Converted:
    """Convert the small sequences, or others."""
    sequences = {role: ComputationalSequence(role, made) for role, made in (videos or make_videos()).items()}
    return from_computational_sequences(**{"folds": FOLDS, "label_range": 3.0, **sequences, **options})


def read_back(made: Converted, folder: Path) -> FeatureFile:
    made.write(folder / "made.pkl")
    return read_feature_file(folder / "made.pkl", label_range=3.0)


# --- what a clip is


def test_clips_are_numbered_by_their_start():
    videos = make_videos()
    labels = videos["labels"]["v0"]
    expected = labels["features"][:, 0].tolist()
    videos["labels"]["v0"] = {name: array[::-1] for name, array in labels.items()}
    train = convert(videos).splits["train"]
    assert train["id"] == [f"v{video}$_${clip}" for video in range(3) for clip in (1, 2)]
    np.testing.assert_allclose(train["regression_labels"][:2], expected, rtol=1e-6)
    assert train["interval"][:2].tolist() == [[0, 4], [4.5, 8.5]]


def test_the_text_is_the_words_that_lie_in_the_clip():
    videos = make_videos()
    made = convert(videos)
    words = videos["words"]["v1"]["features"][:, 0].astype(str).tolist()
    assert made.splits["train"]["raw_text"][2:4] == [" ".join(words[:4]), " ".join(words[5:9])]
    videos["labels"]["v1"]["intervals"][0] = [0.5, 4.2]  # a part of the first word, and of the pause
    made = convert(videos)
    assert made.splits["train"]["raw_text"][2] == " ".join(words[:4])
    assert made.notes == ["1 pauses ('sp') between words are left out"]


def test_only_the_first_label_counts():
    """CMU-MOSEI's others are emotions."""
    videos = make_videos()
    expected = convert(videos).splits["test"]["regression_labels"]
    for entry in videos["labels"].values():
        entry["features"] = np.hstack([entry["features"], np.full((2, 6), 9.0)])
    np.testing.assert_array_equal(convert(videos).splits["test"]["regression_labels"], expected)


# --- audio and vision


def test_unaligned_features_are_the_steps_in_the_clip(tmp_path):
    videos = make_videos()
    made = convert(videos)
    split = read_back(made, tmp_path).splits["valid"]
    assert (split.audio.shape, split.vision.shape) == ((2, 40, 5), (2, 16, 3))
    np.testing.assert_array_equal(split.audio[1], videos["audio"]["v3"]["features"][45:85])
    assert (split.audio_lengths.tolist(), split.vision_lengths.tolist()) == ([40, 40], [16, 16])


def test_what_is_too_long_is_cut_and_said(tmp_path):
    made = convert(max_audio=7)
    assert read_back(made, tmp_path).splits["train"].audio_lengths.tolist() == [7] * 6
    assert [note for note in made.notes if "audio" in note] == [
        "10 clips have more than 7 steps of audio: the first are kept (--max-audio, or --rate for fewer)"
    ]


def test_rate_brings_both_to_one_rate():
    videos = make_videos()
    made = convert(videos, rate=2)
    train = made.splits["train"]
    assert (train["audio_lengths"], train["vision_lengths"]) == ([8] * 6, [8] * 6)
    np.testing.assert_allclose(train["audio"][0][1], videos["audio"]["v0"]["features"][5:10].mean(0), rtol=1e-5)


def test_aligned_features_follow_the_pieces_of_words(tmp_path):
    videos = make_videos()
    videos["words"]["v0"]["features"] = videos["words"]["v0"]["features"].astype("S20")
    videos["words"]["v0"]["features"][1] = b"unaligned"
    encoder = find_text_encoder("minilm")
    file = read_back(convert(videos, aligned=True, text_encoder=encoder, max_length=12), tmp_path)
    train = file.splits["train"]
    pieces = encoder.tokenizer().tokenize("unaligned")
    assert file.aligned
    assert len(pieces) > 1
    assert train.audio.shape == (6, 12, 5)
    assert train.audio_lengths[0] == 4 + len(pieces) + 1
    audio = videos["audio"]["v0"]["features"]
    for token in range(2, 2 + len(pieces)):
        np.testing.assert_allclose(train.audio[0, token], audio[10:20].mean(0), rtol=1e-5)
    np.testing.assert_allclose(train.audio[0, 1], audio[:10].mean(0), rtol=1e-5)
    assert not train.audio[0, [0, train.audio_lengths[0] - 1]].any()  # [CLS] and [SEP]
    tokens, notes = tokenise(file, encoder, default_encoder=None, keep_alignment=True)
    np.testing.assert_array_equal(tokens["train"], train.text_bert)
    assert notes == []


def test_text_that_is_too_long_is_cut_and_said():
    encoder = find_text_encoder("minilm")
    made = convert(aligned=True, text_encoder=encoder, max_length=5)
    assert made.splits["train"]["text_bert"].shape == (6, 3, 5)
    assert made.notes == ["10 clips have more than 5 tokens: text_bert holds the first (--max-length)"]


@pytest.mark.parametrize("aligned_by_the_sdk", [False, True])
def test_members_of_an_mmdataset_give_the_same(tmp_path, capsys, aligned_by_the_sdk):
    mmdatasdk = pytest.importorskip("mmsdk.mmdatasdk")
    theirs = mmdatasdk.mmdataset({role: str(path) for role, path in write_all(tmp_path).items()})
    if aligned_by_the_sdk:
        theirs.align("labels")
        assert "v0[1]" in theirs["audio"].data
    made = from_computational_sequences(**{role: theirs[role] for role in theirs.keys()}, folds=FOLDS)  # noqa: SIM118
    for name, split in convert().splits.items():
        assert (made.splits[name]["id"], made.splits[name]["raw_text"]) == (split["id"], split["raw_text"])
        for key in ("audio", "audio_lengths", "vision", "regression_labels"):
            np.testing.assert_array_equal(made.splits[name][key], split[key])


# --- what is left out and mended


def test_every_clip_that_is_left_out_is_counted(tmp_path):
    videos = make_videos()
    labels, words, audio, vision = (videos[role] for role in ("labels", "words", "audio", "vision"))
    labels["v0"]["features"][0] = np.nan
    labels["v1"]["intervals"][0] = [2, 2]
    words["v1"]["features"][5:9] = b"sp"
    del audio["v2"]
    labels["v5"] = labels["v4"]
    vision["v3"] = {name: array[:16] for name, array in vision["v3"].items()}
    words["v4"]["intervals"][-1] = [8, 9]
    labels["v4"]["intervals"][0, 0] = -0.2
    audio["v4"]["features"][3:5, 1] = [-np.inf, np.nan]
    folds = {**FOLDS, "train": [*FOLDS["train"], "v9"]}
    made = convert(videos, folds=folds)
    assert [len(split["id"]) for split in made.splits.values()] == [1, 1, 2]
    assert made.notes == [
        "2 clips are left out: their videos are in no fold",
        "1 videos of the folds have no labels",
        "1 clips are left out: they end where they start",
        "1 clips are left out: they have no label",
        "1 clips are left out: no word lies in them",
        "2 clips are left out: no step of audio lies in them (--keep-empty keeps them)",
        "1 clips are left out: no step of vision lies in them (--keep-empty keeps them)",
        "2 values of audio that are not finite (NaN, ±inf) were replaced by 0",
        "1 segments start before their video does",
        "1 pauses ('sp') between words are left out",
    ]
    assert read_back(made, tmp_path).notes == []


@pytest.mark.parametrize("aligned", [False, True])
def test_clips_without_audio_can_be_kept(tmp_path, aligned):
    videos = make_videos()
    del videos["audio"]["v4"]
    encoder = find_text_encoder("minilm") if aligned else None
    made = convert(videos, keep_empty=True, aligned=aligned, text_encoder=encoder)
    test = read_back(made, tmp_path).splits["test"]
    assert not test.audio.any()
    assert test.audio_lengths.tolist() == ([6, 6] if aligned else [1, 1])
    assert "2 clips have one step of zeros for audio: none lies in them" in made.notes
    assert ("8 words have no step of audio in their interval: zeros" in made.notes) == aligned


def test_vision_may_be_left_out(tmp_path):
    videos = make_videos()
    del videos["vision"]
    assert read_back(convert(videos), tmp_path).splits["train"].vision is None


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"folds": {"train": ["v0"], "valid": ["v0"], "test": ["v1"]}}, "expected each video once, found 'v0' again"),
        ({"folds": {"train": ["v0"], "valid": ["v1"]}}, 'folds: expected {"train": [video'),
        ({"folds": {"train": ["v0"], "valid": ["v1"], "test": ["x"]}}, "no clip is left in test: expected folds and"),
        ({"folds": "sims"}, "dataset 'sims' has no standard folds (mosi, mosei have): pass --folds FILE.json"),
        ({"reduction": "average"}, "unknown reduction 'average' (available: first, last, max, mean, min)"),
        ({"aligned": True}, "aligned features have a row a token: pass --text-encoder"),
        ({"max_audio": 0}, "--max-audio must be more than 0 and at most 100,000, got 0"),
        ({"rate": float("nan")}, "--rate must be more than 0 and at most 100,000, got nan"),
        ({"label_range": 1.0}, "expected labels from -1 to 1, found"),
    ],
)
def test_options_that_do_not_fit(options, reason):
    with pytest.raises(InputError) as caught:
        convert(**options)
    assert reason in str(caught.value)


def test_options_that_need_an_encoder():
    encoder = find_text_encoder("minilm")
    with pytest.raises(InputError, match="--rate is for unaligned features"):
        convert(aligned=True, text_encoder=encoder, rate=20)
    with pytest.raises(InputError, match="--max-length must be from 3 to 512"):
        convert(text_encoder=encoder, max_length=513)


def test_a_video_name_that_no_table_can_hold():
    videos = make_videos()
    videos["labels"]["v\n0"] = videos["labels"]["v0"]
    with pytest.raises(InputError, match="is empty or holds control characters"):
        convert(videos, folds={**FOLDS, "train": ["v\n0"]})


def test_progress_is_told():
    told: list[tuple[int, int]] = []
    convert(progress=lambda done, total: told.append((done, total)))
    assert told == [(done, 5) for done in range(1, 6)]


# --- folds


def test_standard_folds_are_those_of_the_sdk():
    sizes = {name: [len(standard_folds(name)[split]) for split in FOLDS] for name in ("mosi", "mosei")}
    assert sizes == {"mosi": [52, 10, 31], "mosei": [2250, 300, 678]}
    mmdatasdk = pytest.importorskip("mmsdk.mmdatasdk")
    for name in ("mosi", "mosei"):
        theirs = getattr(mmdatasdk, f"cmu_{name}").standard_folds
        for split, videos in standard_folds(name).items():
            assert sorted(getattr(theirs, f"standard_{split}_fold")) == videos


@pytest.mark.parametrize("text", ["{", "[]", '{"train": "v0", "valid": [], "test": []}', '{"train": [1]}', "\xff"])
def test_folds_that_are_none(tmp_path, text):
    (tmp_path / "folds.json").write_bytes(text.encode("latin1"))
    with pytest.raises(InputError, match=r"folds\.json"):
        read_folds(tmp_path / "folds.json")


@pytest.mark.skipif(not (SHARED / "mosi.pkl").is_file(), reason="CMU-MOSI is not at hand")
def test_ids_text_and_tokens_are_mmsas_on_cmu_mosi():
    """Sequences that are made of the published text and labels give the published file back."""
    published = pickle.loads((SHARED / "mosi.pkl").read_bytes())
    clips = {
        clip: (text.lower().split(), label)
        for split in published.values()
        for clip, text, label in zip(split["id"], split["raw_text"], split["regression_labels"], strict=True)
    }
    words, labels = {}, {}
    for video in sorted({clip.partition("$_$")[0] for clip in clips}):
        number, said, segments, scores = 1, [], [], []
        while f"{video}$_${number}" in clips:
            text, score = clips[f"{video}$_${number}"]
            segments.append([len(said), len(said) + len(text)])
            said, scores, number = said + text, [*scores, [score]], number + 1
        at = np.arange(len(said), dtype=float)
        words[video] = {"features": np.array(said, "S")[:, None], "intervals": np.stack([at, at + 1], 1)}
        labels[video] = {"features": np.array(scores), "intervals": np.array(segments, dtype=float)}
    made = from_computational_sequences(
        words=ComputationalSequence("words", words),
        labels=ComputationalSequence("labels", labels),
        folds="mosi",
        text_encoder=find_text_encoder("minilm"),
    )
    for name, split in published.items():
        ours = dict(zip(made.splits[name]["id"], made.splits[name]["text_bert"], strict=True))
        assert ours.keys() == set(split["id"])
        np.testing.assert_array_equal([ours[clip] for clip in split["id"]], split["text_bert"])


# --- who reads the file


def test_the_example_in_the_docs(tmp_path, monkeypatch, capsys):
    """With other folds, which the small sequences have."""
    text = (Path(__file__).parents[1] / "docs" / "computational_sequences.md").read_text("utf-8")
    (code,) = re.findall(r"<!-- test: from python -->\n```python\n(.*?)```", text, re.DOTALL)
    for role, path in write_all(tmp_path).items():
        path.rename(tmp_path / f"{role[0].upper()}.csd")
    monkeypatch.chdir(tmp_path)
    exec(code.replace('folds="mosi"', f"folds={FOLDS}"), {})
    assert capsys.readouterr().out == "[] {'train': 6, 'valid': 2, 'test': 2}\n"
    assert (tmp_path / "mosi.pkl").is_file()


def test_upstreams_loader_reads_it(tmp_path):
    loader = pytest.importorskip("MMSA.data_loader")
    for aligned in (False, True):
        convert(aligned=aligned, text_encoder=find_text_encoder("minilm")).write(tmp_path / "made.pkl")
        args = {
            "dataset_name": "mosi",
            "custom_feature": str(tmp_path / "made.pkl"),
            "feature_dims": [0, 0, 0],
            "feature_T": "",
            "feature_A": "",
            "feature_V": "",
            "use_bert": True,
            "need_data_aligned": aligned,
            "batch_size": 6,
            "seq_lens": None,
        }
        (batch,) = loader.MMDataLoader(args, 0)["train"]
        assert (batch["text"].shape, batch["labels"]["M"].shape) == ((6, 3, 50), (6, 1))
        assert (args["feature_dims"], args["seq_lens"]) == ([768, 5, 3], (50, 50, 50) if aligned else (50, 40, 16))
        assert aligned or batch["audio_lengths"].tolist() == [40] * 6


def command(paths: dict[str, Path], *more: object) -> list[object]:
    options = [part for role, path in paths.items() for part in (f"--{role}", path)]
    return ["data", "from-csd", *options, *more]


def test_a_model_trains_on_what_the_command_writes(tmp_path, benchmark, encoder):
    (tmp_path / "folds.json").write_text(json.dumps(FOLDS))
    paths = write_all(tmp_path)
    options = ["--folds", tmp_path / "folds.json", "--aligned", "--text-encoder", encoder, "--max-length", 8]
    code, out, err = benchmark(*command(paths, *options, "-o", tmp_path / "made.pkl"))
    assert (code, err) == (0, "")
    assert "3 × 8" in out
    data = ["-d", "mosi", "--data", tmp_path / "made.pkl", "--text-encoder", encoder, "--runs", tmp_path / "runs"]
    code, out, _ = benchmark("run", "-m", "mfn", *data, "--epochs", 1, "--json")
    assert code == 0
    (run,) = json.loads(out)["runs"]
    assert run["status"] == "ok"


def test_the_command_says_what_it_left_out(tmp_path, benchmark):
    paths = write_all(tmp_path)
    (tmp_path / "folds.json").write_text(json.dumps({"train": ["v0", "v1"], "valid": ["v2"], "test": ["v3", "[red]"]}))
    code, out, _ = benchmark(*command(paths, "--folds", tmp_path / "folds.json", "-o", tmp_path / "made.pkl"))
    assert code == 0
    assert "note: 2 clips are left out: their videos are in no fold" in out
    assert "40 × 5" in out


@pytest.mark.parametrize(
    ("role", "content", "reason"),
    [
        ("words", b"no HDF5", "is no computational sequence"),
        ("audio", None, "does not exist"),
        ("folds", b"{}", "expected {"),
    ],
)
def test_a_broken_file_is_one_sentence_and_leaves_nothing(tmp_path, benchmark, role, content, reason):
    paths = write_all(tmp_path) | {"folds": tmp_path / "folds.json"}
    paths["folds"].write_text(json.dumps(FOLDS))
    paths[role].unlink() if content is None else paths[role].write_bytes(content)
    code, out, err = benchmark(*command(paths, "-o", tmp_path / "out" / "made.pkl"))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert reason in err
    assert not (tmp_path / "out").exists()


def test_the_command_does_not_write_over_what_it_reads(tmp_path, benchmark):
    paths = write_all(tmp_path)
    code, _, err = benchmark(*command(paths, "-o", paths["words"]))
    assert code == 2
    assert "is one of the files that are read" in err


def test_a_sequence_in_the_wrong_place():
    sequences = make_sequences()
    with pytest.raises(InputError, match="audio: video 'v0': expected one word a step, found 5 features"):
        from_computational_sequences(words=sequences["audio"], labels=sequences["labels"], folds=FOLDS)
