"""The shared loader: a split as tensors on one device, batches by row, trimmed to the longest clip in them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from registry.contract import Batch, FusionOutput
from registry.errors import RunFailed

from .splits import SplitArrays
from .standardize import Scale
from .text_model import SPARE

SHARE_OF_MEMORY = 0.5
"""of what is free on a GPU, that one split may fill"""


def arrays_of(needs: Sequence[str]) -> list[str]:
    """Return the arrays of a split, `"text"` (features), `"audio"` and `"vision"`, that a model's needs ask for."""
    return [need.removesuffix("_features") for need in needs if need in ("text_features", "audio", "vision")]


class Split:
    """One split of a feature file, on a device.

    Args:
        arrays: the split as read.
        tokens: (N, 3, L) token ids, mask and segments made for the text encoder in use, or None.
        device: where batches are wanted. What would take more than `SHARE_OF_MEMORY` of a GPU's free memory stays on
            the host, and is sent batch by batch while the device computes.
        train: whether batches show labels and row numbers; outside training a model sees neither.
        needs: which of `"audio"`, `"vision"` and `"text_features"` batches carry; with `"padding"` they are not
            trimmed.
        scale: standardises the real steps of the inputs that it knows, batch by batch.
    """

    def __init__(
        self,
        arrays: SplitArrays,
        tokens: np.ndarray | None,
        device: torch.device,
        *,
        train: bool,
        needs: Sequence[str] = ("audio", "vision"),
        scale: Scale | None = None,
    ) -> None:
        self.train = train
        self._clips = len(arrays.ids)
        self.device = device
        self.trims = "padding" not in needs
        self.labels = {task: _tensor(values).to(device) for task, values in arrays.labels.items()}
        given = {name: array for name in arrays_of(needs) if (array := getattr(arrays, name)) is not None}
        lengths = {name: of for name in given if (of := getattr(arrays, f"{name}_lengths")) is not None}
        self._device_lengths = {f"{name}_lengths": _tensor(of).to(device) for name, of in lengths.items()}
        self._whole = {name: array.shape[1] for name, array in given.items()}
        if tokens is not None:
            self._whole["tokens"] = tokens.shape[2]
            lengths["tokens"] = _last_real(tokens[:, 1])
        # Lengths stay on the host too: trimming must not ask the device for a number.
        self._lengths = lengths if self.trims else {}
        self._varying = [name for name, of in self._lengths.items() if of.min() < self._whole[name]]
        self._real_tokens = None if tokens is None or not self.trims else tokens[:, 1].sum(axis=1)
        real = {name: self._lengths.get(name, np.full(len(self), self._whole[name])) for name in given}
        sizes = [of.sum() * given[name][0, 0].nbytes for name, of in real.items()]
        self._home = _home(sizes if tokens is None else [*sizes, tokens.nbytes], device)
        self._tokens = None if tokens is None else _tensor(tokens).to(self._home)
        self._sequences = {name: _Sequences.of(array, real[name], self._home) for name, array in given.items()}
        self._scale = scale.to(device) if scale else None

    def __len__(self) -> int:
        return self._clips

    def sizes(self, rows: Tensor, *, rounded: bool = False) -> dict[str, int]:
        """Return how long the sequences of a batch of `rows` (B, int64, on the host) are, padding included.

        The keys are the inputs', `"tokens"` that of text, and `"rows"`: the number of tokens that an encoder computes
        where there is padding that it need not. With `rounded` batches have few shapes: all inputs are cut at the same
        quarter of their full lengths.
        """
        host = rows.numpy()
        sizes = self._whole | {name: int(of[host].max()) for name, of in self._lengths.items()}
        if rounded:
            quarters = (math.ceil(4 * sizes[name] / self._whole[name]) for name in self._varying)
            quarter = max(quarters, default=4)
            sizes |= {name: math.ceil(quarter * self._whole[name] / 4) for name in self._lengths}
        if self._real_tokens is not None:
            real, all_tokens = int(self._real_tokens[host].sum()), len(rows) * sizes["tokens"]
            if real < all_tokens:
                sizes["rows"] = min(-(-(real + 1) // SPARE) * SPARE, all_tokens) if rounded else real + 1
        return sizes

    def batch(self, rows: Tensor, sizes: Mapping[str, int] | None = None) -> Batch:
        """Return the clips at `rows` (B, int64, on the host), as long as `sizes` says, by default as the longest.

        Audio, vision and text features are 0 behind a clip's own end, except in a split that is not trimmed.
        """
        sizes = self.sizes(rows) if sizes is None else sizes
        at = self._sent(rows)
        at_home = at if self._home == self.device else rows
        tensors: dict[str, Any] = {
            name: self._sent(sequences.of_clips(at_home, sizes[name])) for name, sequences in self._sequences.items()
        }
        if self._scale is not None:
            for name in tensors.keys() & {*self._scale.names}:
                tensors[name] = self._scale(name, tensors[name], self._device_lengths[f"{name}_lengths"][at])
        if self._tokens is not None:
            tokens = self._sent(self._tokens[..., : sizes["tokens"]][at_home])
            tensors |= {"text_ids": tokens[:, 0], "text_mask": tokens[:, 1], "text_segments": tokens[:, 2]}
            if "rows" in sizes:
                # Sorted, since how many tokens are real would have to be asked of the device.
                tensors["text_rows"] = (tokens[:, 1] == 0).flatten().sort(stable=True).indices[: sizes["rows"]]
        tensors |= {name: lengths[at] for name, lengths in self._device_lengths.items()}
        if self.train:
            return Batch(index=at, labels={task: values[at] for task, values in self.labels.items()}, **tensors)
        return Batch(index=torch.full_like(at, -1), **tensors)

    def _sent(self, tensor: Tensor) -> Tensor:
        """Return a tensor on the device; a GPU is not waited for."""
        if tensor.device.type == self.device.type:
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def by_length(self, rows: Tensor) -> Tensor:
        """Return the order that sorts `rows` from the longest clip to the shortest; text counts most."""
        keys = list(self._lengths.values())
        if not keys:
            return torch.arange(len(rows))
        return torch.from_numpy(np.lexsort([-key[rows.numpy()] for key in keys]))


@dataclass(frozen=True)
class _Sequences:
    """Sequences of one kind in one row (S, d): a clip's are those from its start (N) on, as many as it is long (N)."""

    row: Tensor
    starts: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, array: np.ndarray, lengths: np.ndarray, device: torch.device) -> _Sequences:
        """Return the sequences of an array (N, L, d); a GPU gets them without what is behind each clip's end."""
        n, longest, width = array.shape
        if device.type == "cpu" or lengths.min() == longest:  # as they are, perhaps in a file that is mapped
            row, starts = array.reshape(n * longest, width), np.arange(n) * longest
        else:
            row, starts = array[np.arange(longest) < lengths[:, None]], lengths.cumsum() - lengths
        return cls(*(_tensor(part).to(device) for part in (row, starts, lengths)))

    def of_clips(self, at: Tensor, size: int) -> Tensor:
        """Return the sequences (B, size, d) of clips (B), 0 behind their ends."""
        steps = torch.arange(size, device=at.device)
        inside = steps < self.lengths[at][:, None]
        places = torch.where(inside, self.starts[at][:, None] + steps, 0)
        found = self.row.index_select(0, places.flatten()).unflatten(0, inside.shape)
        return found.mul_(inside[:, :, None])  # all is finite; filling takes longer


def _tensor(array: np.ndarray) -> Tensor:
    """Return an array that nobody will write to as a tensor, without a copy."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of an array that is mapped from a file
        return torch.from_numpy(np.ascontiguousarray(array))


def _home(sizes: Iterable[int], device: torch.device) -> torch.device:
    """Return where arrays of so many bytes are to lie: on the device, or on the host where they would fill it."""
    if device.type != "cuda":
        return device
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's own, and unused
    fits = sum(sizes) <= SHARE_OF_MEMORY * free
    return device if fits else torch.device("cpu")


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
    if chunk >= len(rows):
        return output_of(model, split.batch(rows))
    order = split.by_length(rows)
    parts = [output_of(model, split.batch(rows[order[start : start + chunk]])) for start in range(0, len(rows), chunk)]
    return FusionOutput.concatenate(parts)[torch.argsort(order).to(split.device)]


@torch.no_grad()
def output_on(model: nn.Module, split: Split) -> FusionOutput:
    """Return a model's output for a whole split, in evaluation mode, in the file's order."""
    model.eval()
    rows = torch.arange(len(split))
    if split.device.type == "cuda":
        with suppress(torch.OutOfMemoryError):
            return forward(model, split, rows, 256)
    return forward(model, split, rows, 32)


def predict(model: nn.Module, split: Split) -> Tensor:
    """Return the predictions (N) of a whole split, float32, in evaluation mode, in the file's order."""
    return output_on(model, split).prediction.float()


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
