"""The demo dataset: frozen to the bit, and as its description says."""

from __future__ import annotations

import numpy as np
import pytest

from registry.data.demo import SIZES, generate

FROZEN = "179944b6290d017d311c8734f863c4d04fffa746d02fb901a57a3a3fa81fecc1"


@pytest.fixture(scope="module")
def demo():
    return generate()


def test_it_is_frozen(demo):
    assert demo.sha256 == FROZEN
    assert generate().sha256 == FROZEN
    assert generate(seed=8).sha256 != FROZEN
    assert generate(conflict=0).sha256 != FROZEN


def test_sizes_labels_and_padding(demo):
    ids = [clip for split in demo.splits.values() for clip in split.ids]
    assert len(set(ids)) == len(ids) == sum(SIZES.values())
    for name, split in demo.splits.items():
        assert len(split.ids) == SIZES[name]
        assert sorted(split.labels) == ["A", "M", "T", "V"]
        for labels in split.labels.values():
            assert np.abs(labels).max() <= 3
            np.testing.assert_allclose(labels * 5, np.round(labels * 5), atol=1e-5)
        for sequence, lengths in ((split.audio, split.audio_lengths), (split.vision, split.vision_lengths)):
            behind = np.arange(sequence.shape[1]) >= lengths[:, None]
            assert (sequence[behind] == 0).all()
            assert lengths.min() >= 1
            assert len(set(lengths.tolist())) > 10


def test_without_conflict_the_modalities_agree():
    labels = generate(conflict=0).splits["train"].labels
    for modality in "AV":
        assert np.corrcoef(labels["T"], labels[modality])[0, 1] > 0.95


def test_a_conflict_turns_a_modality_round(demo):
    labels = demo.splits["train"].labels
    contrary = np.sign(labels["T"]) * np.sign(labels["A"]) < 0
    assert 0.15 < contrary.mean() < 0.3  # 3 of 4 conflicts are in the voice
    assert np.corrcoef(labels["T"], labels["A"])[0, 1] < 0.7


def test_every_modality_carries_its_own_sentiment(demo):
    """A ridge regression on the mean of a sequence explains its own label better than the multimodal one."""
    from sklearn.linear_model import Ridge

    train, test = demo.splits["train"], demo.splits["test"]
    for name, task in (("audio", "A"), ("vision", "V")):
        means = [getattr(s, name).sum(1) / getattr(s, f"{name}_lengths")[:, None] for s in (train, test)]
        scores = {t: Ridge().fit(means[0], train.labels[t]).score(means[1], test.labels[t]) for t in (task, "M", "T")}
        assert scores[task] > 0.5
        assert scores[task] > max(scores["M"], scores["T"]) + 0.1


def test_sentences_are_various_and_carry_the_text_label(demo):
    train = demo.splits["train"]
    assert len(set(train.raw_text)) > 0.95 * len(train.ids)
    good = [label for text, label in zip(train.raw_text, train.labels["T"], strict=True) if "brilliant" in text]
    bad = [label for text, label in zip(train.raw_text, train.labels["T"], strict=True) if "awful" in text]
    assert np.mean(good) > 0.5 > -0.5 > np.mean(bad)
