"""The parts of ULGM: how distances, classes, centres, proposals, bounds and weights are made.

Each is a function of tensors, one of a table's by name or a user's own of the same form. B is the batch size, N the
number of training clips, d a task's feature width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

EPSILON = 1e-8

Distance = Callable[[Tensor, Tensor], Tensor]
"""From features (B, d) and one class centre (d) to distances (B)."""
Membership = Callable[[Tensor, Tensor], Tensor]
"""From a task's labels as they stand and the human multimodal ones, (N) each, to those (N) whose sign is the class."""
Centers = Callable[[Tensor, Tensor], Tensor]
"""From the centres as they stand and the means of the classes, (2, d) each, positive first, to new centres (2, d)."""
Relative = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From distances (B) to the positive and (B) to the negative centre and the one () between them to δ (B)."""
Combination = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From δ of a modality (B), δ of the fusion task (B) and human labels (B) to proposed labels (B)."""
Bound = Callable[[Tensor, float], Tensor]
"""From proposed labels (B) and the label range to labels (B) within it."""
Momentum = Callable[[Any], Any]
"""From the epoch, 2 or later, to the share of the old label in the new one, 0 to 1. If `update` gets the epoch as a
tensor, so does this, also in epoch 1, and it may return one."""
Weighting = Callable[[Tensor], Tensor]
"""From |unimodal − multimodal label| (B) to weights (B)."""


def _l2(features: Tensor, center: Tensor, width: Tensor | None = None) -> Tensor:
    return (features - center).norm(dim=-1)


def _squared(features: Tensor, center: Tensor, width: Tensor | None = None) -> Tensor:
    return (features - center).square().sum(-1) / (features.shape[-1] if width is None else width) ** 0.5


def _cosine(features: Tensor, center: Tensor, width: Tensor | None = None) -> Tensor:
    similarity = torch.cosine_similarity(features, center, dim=-1)
    return (1 - similarity).clamp(min=0)  # rounding must not turn the sign of what is divided by it


def _by_own_label(own: Tensor, multimodal: Tensor) -> Tensor:
    return own


def _by_multimodal_label(own: Tensor, multimodal: Tensor) -> Tensor:
    return multimodal


def newest(centers: Tensor, means: Tensor) -> Tensor:
    """Return the means of the classes as new centres (2, d)."""
    return means


def moving_average(centers: Tensor, means: Tensor, decay: float) -> Tensor:
    """Return new centres (2, d) that keep the share `decay` of the old."""
    return decay * centers + (1 - decay) * means


def _to_positive(to_positive: Tensor, to_negative: Tensor, between: Tensor) -> Tensor:
    return (to_negative - to_positive) / (to_positive + EPSILON)


def _to_centers(to_positive: Tensor, to_negative: Tensor, between: Tensor) -> Tensor:
    return (to_negative - to_positive) / (between + EPSILON)


def _plain_difference(to_positive: Tensor, to_negative: Tensor, between: Tensor) -> Tensor:
    return to_negative - to_positive


def ratio_and_difference(relative: Tensor, relative_of_fusion: Tensor, multimodal: Tensor) -> Tensor:
    """Return the proposal (B) of the paper: half by the ratio δ_s / δ_f, half by the difference δ_s − δ_f.

    Not finite where δ_f is −1e-8.
    """
    ratio = relative / (relative_of_fusion + EPSILON)
    # ½ · (ratio · y + y) + ½ · (δ_s − δ_f)
    return torch.addcmul(multimodal, ratio, multimodal).lerp(relative - relative_of_fusion, 0.5)


def _clamp(proposal: Tensor, label_range: float) -> Tensor:
    return proposal.clamp(-label_range, label_range)


def _tanh(proposal: Tensor, label_range: float) -> Tensor:
    return label_range * torch.tanh(proposal / label_range)


def growing_momentum(epoch: Any) -> Any:
    """Return (n − 1)/(n + 1), the paper's share of the old label in epoch n."""
    return (epoch - 1) / (epoch + 1)


DISTANCES: dict[str, Distance] = {"l2": _l2, "squared": _squared, "cosine": _cosine}
MEMBERSHIPS: dict[str, Membership] = {"own": _by_own_label, "fusion": _by_multimodal_label}
CENTERS: dict[str, Callable[..., Tensor]] = {"step": newest, "epoch": newest, "ema": moving_average}
RELATIVES: dict[str, Relative] = {"positive": _to_positive, "centers": _to_centers, "difference": _plain_difference}
BOUNDS: dict[str, Bound] = {"clamp": _clamp, "tanh": _tanh}
WEIGHTINGS: dict[str, Weighting] = {"tanh": torch.tanh, "relu": torch.relu, "ones": torch.ones_like}
WITHOUT_BETWEEN = (_to_positive, _plain_difference)
"""What does not ask for the distance between the centres."""
_FOR_ALL_TASKS: tuple[Callable[..., Tensor], ...] = (
    ratio_and_difference,
    *(part for table in (MEMBERSHIPS, RELATIVES, BOUNDS, WEIGHTINGS) for part in table.values()),
)


def part_of(name: str, value: Any, table: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """Return a part by its name in a table, or the callable itself; raises ValueError where it is neither."""
    if callable(value):
        return value
    if not isinstance(value, str) or value not in table:
        names = f" or one of {', '.join(table)}" if table else ""
        raise ValueError(f"{name} must be a callable{names}, got {value!r}")
    return table[value]


def by_task(part: Callable[..., Tensor], *given: Any, skip: int = 0) -> Tensor:
    """Return what a part makes of columns (…, T), one for each task or one for all.

    A part of this module takes all columns at once. What a user passes is called task by task; for the first `skip`
    tasks, which it is not for, the first of `given` stands instead.
    """
    if part in _FOR_ALL_TASKS:
        return part(*given)
    n = given[0].shape[-1]
    columns = [x.expand(*x.shape[:-1], n).unbind(-1) if isinstance(x, Tensor) else [x] * n for x in given]
    return torch.stack([x[0] if task < skip else part(*x) for task, x in enumerate(zip(*columns, strict=True))], -1)
