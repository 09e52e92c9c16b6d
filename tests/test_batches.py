"""The shared loader: trimming, order, what a model may see, and groups of micro-batches."""

from __future__ import annotations

from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from registry import FusionOutput
from registry.data import batches
from registry.data.batches import Split, forward, groups, predict
from registry.data.feature_file import read_feature_file
from tests.helpers import feature_file

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def arrays(tmp_path_factory):
    path = feature_file(tmp_path_factory.mktemp("data"), sizes={"train": 20, "valid": 4, "test": 4})
    return read_feature_file(path, label_range=3.0).splits["train"]


@pytest.fixture
def split(arrays) -> Split:
    return Split(arrays, arrays.text_bert, CPU, train=True)


def test_a_batch_is_the_files_rows_trimmed_to_the_longest(split, arrays):
    rows = torch.tensor([7, 2, 11, 5, 0])
    batch = split.batch(rows)
    at = rows.numpy()
    longest = arrays.text_bert[at, 1].sum(axis=1).max()
    np.testing.assert_array_equal(batch.text_ids, arrays.text_bert[at, 0, :longest])
    np.testing.assert_array_equal(batch.text_mask, arrays.text_bert[at, 1, :longest])
    for name in ("audio", "vision"):
        lengths = getattr(arrays, f"{name}_lengths")[at]
        inside = np.arange(lengths.max()) < lengths[:, None]
        expected = np.where(inside[..., None], getattr(arrays, name)[at, : lengths.max()], 0)  # the file's has noise
        np.testing.assert_array_equal(getattr(batch, name), expected)
        assert not inside.all()
        np.testing.assert_array_equal(getattr(batch, f"{name}_lengths"), lengths)
    assert torch.equal(batch.index, rows)
    np.testing.assert_array_equal(batch.labels["M"], arrays.labels["M"][at])


def test_outside_training_there_are_no_labels_and_no_row_numbers(arrays):
    batch = Split(arrays, arrays.text_bert, CPU, train=False).batch(torch.tensor([3, 4]))
    assert batch.labels == {}
    assert batch.index.tolist() == [-1, -1]


def test_padding_on_the_left_is_kept(arrays):
    """A tokenizer may pad before the text: trimming looks for the last real token, not for their number."""
    tokens = arrays.text_bert[:, :, ::-1].copy()
    batch = Split(arrays, tokens, CPU, train=True).batch(torch.tensor([0, 1]))
    np.testing.assert_array_equal(batch.text_mask, tokens[:2, 1])


@pytest.mark.parametrize("steps", [9, 7])
def test_text_features_where_they_are_asked_for(tmp_path, steps):
    """They are trimmed where they are of the tokens of `text_bert`."""
    few = {split: {"text": np.ones((n, steps, 6))} for split, n in {"train": 8, "valid": 4, "test": 4}.items()}
    arrays = read_feature_file(feature_file(tmp_path, **few), label_range=3.0).splits["test"]
    assert Split(arrays, None, CPU, train=False).batch(torch.arange(2)).text is None
    batch = Split(arrays, None, CPU, train=False, needs=("text_features",)).batch(torch.arange(2))
    lengths = arrays.text_bert[:2, 1].sum(axis=1)
    assert batch.audio is None
    assert batch.text.shape == (2, lengths.max() if steps == 9 else steps, 6)
    assert (batch.text_lengths.tolist() == lengths.tolist()) if steps == 9 else (batch.text_lengths is None)


def test_a_model_that_needs_padding_gets_all_of_it(arrays):
    batch = Split(arrays, arrays.text_bert, CPU, train=False, needs=("audio", "padding")).batch(torch.tensor([1]))
    assert batch.text_ids.shape[1] == arrays.text_bert.shape[2] > batch.text_mask.sum()
    np.testing.assert_array_equal(batch.audio, arrays.audio[1:2])


class Lengths(nn.Module):
    """Predicts a number that tells the clip, and writes down how long its batches were."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[int]] = []

    def forward(self, batch) -> FusionOutput:
        self.seen.append(batch.text_mask.sum(1).tolist())
        return FusionOutput(prediction=batch.audio[:, 0, 0], features={"audio": batch.audio[:, 0]})


def test_evaluation_sorts_by_length_and_restores_the_order(split, arrays):
    model = Lengths()
    rows = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    output = forward(model, split, rows, chunk=6)
    np.testing.assert_array_equal(output.prediction, arrays.audio[rows.numpy(), 0, 0])
    np.testing.assert_array_equal(output.features["audio"], arrays.audio[rows.numpy(), 0])
    assert [len(chunk) for chunk in model.seen] == [6, 6, 6, 2]
    assert [length for chunk in model.seen for length in chunk] == sorted(
        arrays.text_bert[:, 1].sum(axis=1), reverse=True
    )


def test_predict_is_in_evaluation_mode_without_gradients(split, arrays):
    model = Lengths().train()
    prediction = predict(model, split)
    assert not model.training
    assert not prediction.requires_grad
    np.testing.assert_array_equal(prediction, arrays.audio[:, 0, 0])


@given(n=st.integers(1, 60), batch_size=st.integers(1, 9), update_epochs=st.integers(1, 5), seed=st.integers(0, 99))
def test_groups_hold_every_row_once(n, batch_size, update_epochs, seed):
    made = [
        list(groups(n, batch_size, update_epochs, tail, torch.Generator().manual_seed(seed)))
        for tail in ("step", "drop")
    ]
    rows = [row for group in made[0] for micro_batch in group.micro_batches for row in micro_batch.tolist()]
    assert sorted(rows) == list(range(n))
    assert rows == [row for group in made[1] for micro_batch in group.micro_batches for row in micro_batch.tolist()]
    assert all(len(group.micro_batches) == update_epochs for group in made[0][:-1])
    assert all(group.step for group in made[0])
    complete = [len(group.micro_batches) == update_epochs for group in made[1]]
    assert [group.step for group in made[1]] == ([True] if len(complete) == 1 else complete)


@given(st.lists(st.integers(0, 19), min_size=1, max_size=20))
def test_rounded_batches_hold_all_that_is_real_and_have_few_shapes(arrays, clips):
    split, rows = Split(arrays, arrays.text_bert, CPU, train=True), torch.tensor(clips)
    exact, rounded = split.sizes(rows), split.sizes(rows, rounded=True)
    whole = {"tokens": 9, "audio": 6, "vision": 4}
    assert all(exact[name] <= rounded[name] <= whole[name] for name in whole)
    quarters = [[-(-n * quarter // 4) for n in whole.values()] for quarter in (1, 2, 3, 4)]
    assert [rounded[name] for name in whole] in quarters
    batch = split.batch(rows, rounded)
    assert batch.audio.shape[1] == rounded["audio"]
    real = batch.text_mask.flatten().nonzero().flatten()
    found = real if batch.text_rows is None else batch.text_rows[: len(real)]
    assert torch.equal(found, real)


def test_where_no_token_is_padding_there_are_no_rows_to_choose(arrays):
    tokens = arrays.text_bert.copy()
    tokens[:, 1] = 1
    split = Split(arrays, tokens, CPU, train=True)
    assert split.batch(torch.arange(4)).text_rows is None


def test_what_needs_padding_is_not_told_to_skip_it(arrays):
    split = Split(arrays, arrays.text_bert, CPU, train=True, needs=("audio", "padding"))
    assert split.batch(torch.arange(4)).text_rows is None
    assert split.sizes(torch.arange(4), rounded=True) == {"audio": 6, "tokens": 9}


def test_a_split_is_predicted_in_smaller_chunks_where_a_gpu_is_short_of_memory(monkeypatch):
    def forward(model: nn.Module, split: Split, rows: torch.Tensor, chunk: int) -> FusionOutput:
        if chunk > 32:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return FusionOutput(rows * 2)

    monkeypatch.setattr(batches, "forward", forward)
    split = MagicMock(Split, device=torch.device("cuda"), __len__=lambda _: 3)
    assert predict(nn.Identity(), split).tolist() == [0.0, 2.0, 4.0]
