"""The shared loader: a split as tensors on one device, batches by row, trimmed to the longest clip in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from registry.contract import Batch, FusionOutput
from registry.errors import RunFailed

from .feature_file import SplitArrays


def arrays_of(needs: Sequence[str]) -> list[str]:
    """Return the arrays of a split, `"text"` (features), `"audio"` and `"vision"`, that a model's needs ask for."""
    return [need.removesuffix("_features") for need in needs if need in ("text_features", "audio", "vision")]


class Split:
    """One split of a feature file on a device.

    Args:
        arrays: the split as read.
        tokens: (N, 3, L) token ids, mask and segments made for the text encoder in use, or None.
        device: where the tensors live.
        train: whether batches show labels and row numbers; outside training a model sees neither.
        needs: which of `"audio"`, `"vision"` and `"text_features"` batches carry; with `"padding"` they are not
            trimmed.
    """

    def __init__(
        self,
        arrays: SplitArrays,
        tokens: np.ndarray | None,
        device: torch.device,
        *,
        train: bool,
        needs: Sequence[str] = ("audio", "vision"),
    ) -> None:
        def put(array: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device)

        self.train = train
        self.device = device
        self.trims = "padding" not in needs
        self.labels = {task: torch.from_numpy(values).to(device) for task, values in arrays.labels.items()}
        self._tokens = None if tokens is None else put(tokens)
        given = arrays_of(needs)
        sequences = {name: getattr(arrays, name) for name in given}
        lengths = {name: getattr(arrays, f"{name}_lengths") for name in given}
        self._sequences = {name: put(array) for name, array in sequences.items() if array is not None}
        # Lengths stay on the host too: trimming must not ask the device for a number.
        self._lengths = {name: array for name, array in lengths.items() if array is not None}
        self._token_lengths = None if tokens is None else _last_real(tokens[:, 1])
        self._device_lengths = {f"{name}_lengths": put(array) for name, array in self._lengths.items()}

    def __len__(self) -> int:
        return len(self.labels["M"])

    def batch(self, rows: Tensor) -> Batch:
        """Return the clips at `rows` (B, int64, on the host), padded to the longest among them."""
        at = rows.to(self.device)
        host = rows.numpy()
        tensors: dict[str, Any] = {}
        if self._tokens is not None:
            assert self._token_lengths is not None
            longest = self._token_lengths[host].max() if self.trims else None
            tokens = self._tokens[at, :, :longest]
            tensors |= {"text_ids": tokens[:, 0], "text_mask": tokens[:, 1], "text_segments": tokens[:, 2]}
        for name, sequence in self._sequences.items():
            lengths = self._lengths.get(name)
            longest = lengths[host].max() if self.trims and lengths is not None else None
            tensors[name] = sequence[at, :longest]
        tensors |= {name: lengths[at] for name, lengths in self._device_lengths.items()}
        if self.train:
            return Batch(index=at, labels={task: values[at] for task, values in self.labels.items()}, **tensors)
        return Batch(index=torch.full_like(at, -1), **tensors)

    def by_length(self, rows: Tensor) -> Tensor:
        """Return the order that sorts `rows` from the longest clip to the shortest; text counts most."""
        keys = [lengths for lengths in (*self._lengths.values(), self._token_lengths) if lengths is not None]
        if not keys:
            return torch.arange(len(rows))
        return torch.from_numpy(np.lexsort([-key[rows.numpy()] for key in keys]))


def _last_real(mask: np.ndarray) -> np.ndarray:
    """Return the position after the last 1 of each row (N, L), wherever a tokenizer puts its padding."""
    return mask.shape[1] - np.argmax(mask[:, ::-1] != 0, axis=1)


def output_of(model: nn.Module, batch: Batch) -> FusionOutput:
    """Return a model's output; raises RunFailed where it is none, or has not one prediction a clip."""
    output = model(batch)
    if not isinstance(output, FusionOutput):
        raise RunFailed(f"the model's forward returned a {type(output).__name__}, not a registry.FusionOutput")
    if output.prediction.shape != (len(batch),):  # it would be broadcast
        raise RunFailed(f"the model's prediction has shape {tuple(output.prediction.shape)}, not ({len(batch)},)")
    return output


def forward(model: nn.Module, split: Split, rows: Tensor, chunk: int) -> FusionOutput:
    """Run a model on `rows` in chunks of like length, and return the output in the order of `rows`.

    Only for models whose output for a clip does not depend on its company (evaluation, or `per_sample`).
    """
    order = split.by_length(rows) if chunk < len(rows) else torch.arange(len(rows))
    parts = [output_of(model, split.batch(rows[order[start : start + chunk]])) for start in range(0, len(rows), chunk)]
    return FusionOutput.concatenate(parts)[torch.argsort(order).to(split.device)]


@torch.no_grad()
def predict(model: nn.Module, split: Split) -> Tensor:
    """Return the predictions (N) of a whole split, float32, in evaluation mode, in the file's order."""
    model.eval()
    chunk = 256 if split.device.type == "cuda" else 32
    return forward(model, split, torch.arange(len(split)), chunk).prediction.float()


@dataclass(frozen=True)
class Group:
    """Micro-batches (rows each) whose gradients are summed; `step` says whether an update follows."""

    micro_batches: Sequence[Tensor]
    step: bool


def groups(n: int, batch_size: int, update_epochs: int, tail: str, generator: torch.Generator) -> Iterator[Group]:
    """Yield one epoch of shuffled groups.

    An epoch's incomplete last group is stepped or, with `tail="drop"`, only looked at; an epoch that has
    no complete group always steps.
    """
    micro_batches = torch.randperm(n, generator=generator).split(batch_size)
    for start in range(0, len(micro_batches), update_epochs):
        members = micro_batches[start : start + update_epochs]
        yield Group(members, step=tail == "step" or len(members) == update_epochs or start == 0)
