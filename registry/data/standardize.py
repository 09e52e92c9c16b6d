"""Audio and vision standardised by what the train split says of each feature."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from .splits import SplitArrays

SCALED = ("audio", "vision")
_CLIPS_AT_ONCE = 64
_CONSTANT = 1e-6
"""A feature whose deviation is at most this share of its mean has float32's rounding for a deviation."""


class Scale(nn.Module):
    """Mean and standard deviation (d) of each feature of audio and vision; buffers `NAME_mean`, `NAME_deviation`."""

    def __init__(self, statistics: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.names = tuple(statistics)
        for name, (mean, deviation) in statistics.items():
            self.register_buffer(f"{name}_mean", mean)
            self.register_buffer(f"{name}_deviation", deviation)

    @classmethod
    def of(cls, train: SplitArrays, names: Iterable[str]) -> Scale:
        """Return the scale of the inputs in `SCALED` that `names` has, over the real steps of a split.

        The split is read a few clips at a time; a deviation of 0 counts as 1.
        """
        found = {}
        for name in SCALED:
            array, lengths = getattr(train, name), getattr(train, f"{name}_lengths")
            if name in names and array is not None and lengths is not None:
                found[name] = _mean_and_deviation(array, lengths)
        return cls(found)

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Scale:
        """Return a scale from its state dict."""
        return cls(
            {
                n: (state[f"{n}_mean"], state[f"{n}_deviation"])
                for n in SCALED
                if {f"{n}_mean", f"{n}_deviation"} <= {*state}
            }
        )

    def mean(self, name: str) -> np.ndarray:
        """Return the mean (d) of an input's features."""
        return self.get_buffer(f"{name}_mean").cpu().numpy()

    def forward(self, name: str, sequences: Tensor, lengths: Tensor) -> Tensor:
        """Return sequences (B, L, d) with their real steps, by lengths (B), standardised, and padding as it is."""
        mean, deviation = self.get_buffer(f"{name}_mean"), self.get_buffer(f"{name}_deviation")
        real = torch.arange(sequences.shape[1], device=sequences.device) < lengths[:, None]
        return torch.where(real[:, :, None], (sequences - mean) / deviation, sequences)


def _mean_and_deviation(array: np.ndarray, lengths: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return both (d) over the real steps of (N, L, d); parts are joined as Chan, Golub and LeVeque have it (1983)."""
    count, mean, squares = 0, np.zeros(array.shape[2]), np.zeros(array.shape[2])
    for start in range(0, len(array), _CLIPS_AT_ONCE):
        rows = slice(start, start + _CLIPS_AT_ONCE)
        real = array[rows][np.arange(array.shape[1]) < lengths[rows, None]].astype(np.float64)
        step = real.mean(axis=0) - mean
        squares += ((real - real.mean(axis=0)) ** 2).sum(axis=0) + step**2 * count * len(real) / (count + len(real))
        count += len(real)
        mean += step * len(real) / count
    deviation = np.sqrt(squares / count)
    deviation[deviation <= _CONSTANT * np.abs(mean)] = 1
    return torch.from_numpy(mean.astype(np.float32)), torch.from_numpy(deviation.astype(np.float32))
