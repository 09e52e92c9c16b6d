"""A look at a feature file: what is in it, whether it is published, and what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from registry import DatasetSpec, InputError
from registry.data.feature_file import file_sha256
from registry.data.inspection import BINS, Inspection, Labels, inspect_feature_file
from registry.runs import finite
from tests.helpers import feature_file, make_split, write_features
from tests.test_feature_file import contents

MINE = DatasetSpec(name="mine", summary="", label_range=3.0, splits={"train": 8, "valid": 5, "test": 4})


def look(path: Path, *specs: DatasetSpec, **options: Any) -> Inspection:
    return inspect_feature_file(path, specs or [MINE], **options)


def test_what_is_in_it(tmp_path):
    found = look(feature_file(tmp_path, extra=[1, 2], audio=lambda a: a.astype(np.float64)), label_range=3.0)
    train, wanted = found.splits["train"], make_split(8, prefix="train", seed=0)
    assert (found.faults, found.published, found.aligned) == ([], None, False)
    assert vars(train.keys["audio"]) == {"shape": (8, 6, 5), "type": "float64", "bytes": 1920, "is_read": True}
    assert vars(train.keys["extra"]) == {"shape": (2,), "type": "list of int", "bytes": None, "is_read": False}
    assert not train.keys["annotations"].is_read
    lengths = wanted["vision_lengths"]
    assert train.lengths["vision"] == (min(lengths), np.median(lengths), max(lengths))
    assert train.lengths["text"] == (3, 5.5, 9)
    assert train.sample == wanted["raw_text"][0]


def test_figures_of_labels(tmp_path):
    labels = [-3, -3, 0, 0, 0, 1.5, 3, 3]
    path = feature_file(tmp_path, train={"regression_labels": labels})
    made = look(path, dataset="mine").splits["train"].labels["M"]
    assert (made.mean, made.low, made.high) == (pytest.approx(np.mean(labels)), -3, 3)
    assert made.sd == pytest.approx(np.std(labels, ddof=1))
    assert made.histogram == [2, 0, 0, 0, 0, 3, 0, 0, 1, 0, 2]
    assert len(made.histogram) == BINS


def test_the_histogram_as_text():
    assert Labels(0, 1, -1, 1, [0, 1, 4, 8], (-1, 1)).bars == " ▁▄█"


def test_a_published_file_is_known_by_its_content(tmp_path):
    path = feature_file(tmp_path)
    spec = DatasetSpec(name="mine", summary="", label_range=3.0, sha256={"unaligned_50.pkl": file_sha256(path)})
    found = look(path, spec)
    assert (found.published, found.dataset, found.label_range) == ("unaligned_50.pkl of mine", "mine", 3.0)
    other = feature_file(tmp_path, name="unaligned_50.pkl", audio=lambda audio: audio + 1)
    assert spec.sha256["unaligned_50.pkl"] in look(other, spec, dataset="mine").notes[-1]


def test_what_may_not_be_meant(tmp_path):
    path = feature_file(tmp_path, audio_lengths=lambda n: [1] * len(n), vision=lambda v: v * 0)
    assert look(path, dataset="mine").notes == [
        "audio of 16 clips is not zero beyond its length: is it padded in front?",
        "vision says nothing: one value throughout train, valid, test",
        "valid has 4 clips, mine as published 5",
    ]
    assert look(path).notes[-1] == "labels were not checked against a range: pass --dataset or --label-range"


def test_faults_are_listed_and_the_rest_is_shown(tmp_path):
    path = feature_file(tmp_path, audio="x", train={"regression_labels": [4.0] + [0.0] * 7})
    found = look(path, dataset="mine")
    assert len(found.faults) == 4
    assert "labels from -3 to 3, found 4 at clip 'train$_$0'" in found.faults[0]
    assert found.splits["train"].labels["M"].high == 4
    assert found.splits["valid"].lengths.keys() == {"text", "vision"}


def test_a_split_that_is_missing(tmp_path):
    path = write_features(tmp_path / "x.pkl", {"train": make_split(3)})
    found = look(path)
    assert list(found.splits) == ["train"]
    assert len(found.faults) == 2


@pytest.mark.parametrize("content", [b"", b"text", b"cos\nsystem\n(V:\ntR.", b"\x80\x04]."])
def test_what_is_no_feature_file(tmp_path, content):
    path = tmp_path / "x.pkl"
    path.write_bytes(content)
    found = look(path)
    assert found.faults
    assert found.splits == {}
    with pytest.raises(InputError, match="does not exist"):
        look(tmp_path / "none.pkl")


@settings(deadline=None, max_examples=40)
@given(data=contents())
def test_any_file_that_is_read_can_be_looked_at(tmp_path_factory, data):
    path = write_features(tmp_path_factory.mktemp("files") / "x.pkl", data[1])
    found = look(path, dataset="mine")
    assert found.faults == []
    assert json.loads(json.dumps(finite(found.as_dict()), allow_nan=False))["sha256"] == file_sha256(path)
    for name, arrays in data[0].items():
        assert found.splits[name].clips == len(arrays["id"])
        assert sum(found.splits[name].labels["M"].histogram) == len(arrays["id"])
