"""ULGM, the unimodal label generation module of Self-MM (Yu et al., AAAI 2021).

    generator = UnimodalLabelGenerator(labels, {"fusion": 128, "text": 32, "audio": 16}, label_range=3.0)
    generator.weights(index)["text"]                # how much each clip's text label counts in the loss
    generator.update(features, index, epoch)        # after backward, for every micro-batch

B is the batch size, N the number of training clips, d a task's feature width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from numbers import Integral
from typing import Literal

import torch
from torch import Tensor, nn

EPSILON = 1e-8

Distance = Callable[[Tensor, Tensor], Tensor]
"""From features (B, d) and one class centre (d) to distances (B)."""


def _l2(features: Tensor, center: Tensor) -> Tensor:
    return (features - center).norm(dim=-1)


def _squared(features: Tensor, center: Tensor) -> Tensor:
    return (features - center).square().sum(-1) / features.shape[-1] ** 0.5


def _cosine(features: Tensor, center: Tensor) -> Tensor:
    return 1 - torch.cosine_similarity(features, center.expand_as(features), dim=-1)


DISTANCES: dict[str, Distance] = {"l2": _l2, "squared": _squared, "cosine": _cosine}


class _TaskMemory(nn.Module):
    """What the generator remembers of one task: labels (N), features (N, d) and the two class centres (2, d)."""

    labels: Tensor
    features: Tensor
    present: Tensor
    fixed: Tensor
    centers: Tensor
    has_centers: Tensor

    def __init__(self, labels: Tensor, dim: int, known: Tensor | None = None) -> None:
        super().__init__()
        fixed = torch.zeros_like(labels, dtype=torch.bool) if known is None else ~known.isnan()
        self.register_buffer("labels", labels.clone() if known is None else torch.where(fixed, known, labels))
        self.register_buffer("fixed", fixed)
        self.register_buffer("features", labels.new_zeros(len(labels), dim))
        self.register_buffer("present", torch.ones_like(fixed))
        self.register_buffer("centers", labels.new_zeros(2, dim))
        self.register_buffer("has_centers", torch.tensor(False, device=labels.device))

    def store(self, features: Tensor, index: Tensor, present: Tensor) -> None:
        self.features[index] = torch.where(present[:, None], features, self.features[index])
        self.present[index] = present | self.features[index].any(-1)  # what was stored before still counts

    def refresh_centers(self, exclude_zero: bool) -> None:
        positive = self.labels > 0 if exclude_zero else self.labels >= 0
        members = (torch.stack([positive, self.labels < 0]) & self.present).to(self.features.dtype)
        counts = members.sum(1, keepdim=True)
        self.centers.copy_(members @ self.features / counts.clamp(min=1))
        self.has_centers.copy_((counts > 0).all())

    def relative_distance(self, features: Tensor, distance: Distance) -> Tensor:
        """Return (B): how much nearer the positive centre is than the negative one, relative to it."""
        to_positive, to_negative = (distance(features, center) for center in self.centers)
        return (to_negative - to_positive) / (to_positive + EPSILON)


class UnimodalLabelGenerator(nn.Module):
    """Derives a label for each modality from the multimodal one, by distances to class centres.

    For features F of a clip in one task, and the class centres C⁺ and C⁻ of that task (means of the stored features of
    the clips whose label there is above and below 0):

    1. relative distance δ = (‖F − C⁻‖ − ‖F − C⁺‖) / (‖F − C⁺‖ + 1e-8)
    2. proposal = ½ · δ_s / δ_f · y + ½ · (y + δ_s − δ_f), clamped to ±range, for modality s, fusion f, human label y
    3. y_s ← (n − 1)/(n + 1) · y_s + 2/(n + 1) · proposal, in epoch n > 1

    (Yu et al. 2021, section 3.4, with the distance of the authors' code.) All state is buffers in float32: it moves
    with `.to(device)`, is saved in `state_dict`, and needs no gradient.

    Args:
        labels: (N) human multimodal labels of the train split.
        feature_dims: feature width of `"fusion"` and of each modality, any names and number.
        label_range: generated labels are clamped to ±this.
        exclude_zero: whether a label of 0 belongs to neither class; else it counts as positive.
        distance: `"l2"` (the authors' code), `"squared"` (‖·‖²/√d), `"cosine"`, or a callable. Near a centre the
            relative distance grows without bound, with the last two soonest: expect labels to jump to ±range.
        known: (N) human unimodal labels by modality, NaN where unknown; known labels never move.

    Raises:
        ValueError: labels are not a finite (N) tensor, `"fusion"` is missing, or `known` does not fit.
    """

    def __init__(
        self,
        labels: Tensor,
        feature_dims: Mapping[str, int],
        label_range: float,
        *,
        exclude_zero: bool = True,
        distance: Literal["l2", "squared", "cosine"] | Distance = "l2",
        known: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        labels = torch.as_tensor(labels, dtype=torch.float32)
        known = {name: torch.as_tensor(values).to(labels) for name, values in (known or {}).items()}
        if labels.dim() != 1 or not labels.isfinite().all():
            raise ValueError(f"labels must be a finite tensor of shape (N), got shape {tuple(labels.shape)}")
        if "fusion" not in feature_dims:
            raise ValueError(f"feature_dims must name 'fusion', got {sorted(feature_dims)}")
        if not label_range > 0:
            raise ValueError(f"label_range must be positive, got {label_range}")
        if not callable(distance) and distance not in DISTANCES:
            raise ValueError(f"distance must be a callable or one of {sorted(DISTANCES)}, got {distance!r}")
        for name, values in known.items():
            if name not in feature_dims or name == "fusion" or values.shape != labels.shape or values.isinf().any():
                shape = tuple(labels.shape)
                raise ValueError(f"known[{name!r}] must be a modality with finite labels of shape {shape}")
        self.label_range = float(label_range)
        self.exclude_zero = exclude_zero
        self.distance = distance if callable(distance) else DISTANCES[distance]
        self.modalities = tuple(name for name in feature_dims if name != "fusion")
        self.memory = nn.ModuleDict({n: _TaskMemory(labels, d, known.get(n)) for n, d in feature_dims.items()})

    def _of(self, name: str) -> _TaskMemory:
        return self.memory[name]  # type: ignore[return-value]

    @property
    def labels(self) -> dict[str, Tensor]:
        """The labels (N) as they stand, of "fusion" (the human ones) and of each modality."""
        return {name: self._of(name).labels for name in self.memory}

    @property
    def centers(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The positive and the negative class centre (d) of each task."""
        return {name: (self._of(name).centers[0], self._of(name).centers[1]) for name in self.memory}

    def weights(self, index: Tensor) -> dict[str, Tensor]:
        """Return per modality (B): tanh|unimodal − multimodal label|, and 1 where it is known."""
        multimodal = self._of("fusion").labels[index]
        memories = {name: self._of(name) for name in self.modalities}
        return {
            name: torch.where(memory.fixed[index], 1.0, (memory.labels[index] - multimodal).abs().tanh())
            for name, memory in memories.items()
        }

    @torch.no_grad()
    def update(
        self,
        features: Mapping[str, Tensor],
        index: Tensor,
        epoch: int,
        mask: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Move these clips' labels by the centres as they stand, then store the features and refresh the centres.

        Features that are not finite, as of a step that loss scaling skips, count as missing.

        Args:
            features: (B, d) of every task.
            index: (B) rows in the train split.
            epoch: counts from 1; no label moves in epoch 1.
            mask: per modality (B), False where a clip lacks it: its label stays, its features are not stored, and it
                counts for a centre only by those stored before.

        Raises:
            ValueError: a task's features are missing or have another shape, epoch is none, or `mask` does not fit.
        """
        if not isinstance(epoch, Integral) or epoch < 1:
            raise ValueError(f"epoch counts from 1, got {epoch}")
        for name in self.memory:
            width = self._of(name).features.shape[1]
            if name not in features or features[name].shape != (len(index), width):
                got = f"shape {tuple(features[name].shape)}" if name in features else "nothing"
                raise ValueError(f"features[{name!r}] must have shape ({len(index)}, {width}), got {got}")
        rows = {name: features[name].detach().to(self._of(name).features) for name in self.memory}
        present = {name: row.isfinite().all(-1) for name, row in rows.items()}
        for name, given in self.checked_mask(mask, index).items():
            present[name] = present[name] & given
        with torch.autocast(rows["fusion"].device.type, enabled=False):
            if epoch > 1:
                self._move_labels(rows, index, epoch, present)
            for name, row in rows.items():
                self._of(name).store(row, index, present[name])
                self._of(name).refresh_centers(self.exclude_zero)

    def checked_mask(self, mask: Mapping[str, Tensor] | None, index: Tensor) -> dict[str, Tensor]:
        """Return `mask` as boolean tensors (B) beside the labels; raises ValueError for any other name or shape."""
        checked = {name: torch.as_tensor(given) for name, given in (mask or {}).items()}
        for name, given in checked.items():
            if name not in self.modalities or given.shape != (len(index),):
                raise ValueError(
                    f"mask[{name!r}] must be a modality ({', '.join(self.modalities)}) and have shape ({len(index)},), "
                    f"got shape {tuple(given.shape)}"
                )
        return {name: given.to(self._of(name).labels.device, torch.bool) for name, given in checked.items()}

    def _move_labels(
        self, features: Mapping[str, Tensor], index: Tensor, epoch: int, present: Mapping[str, Tensor]
    ) -> None:
        fusion = self._of("fusion")
        multimodal = fusion.labels[index]
        fusion_distance = fusion.relative_distance(features["fusion"], self.distance)
        denominator = fusion_distance + EPSILON
        denominator = torch.where(denominator == 0, EPSILON, denominator)
        for name in self.modalities:
            memory = self._of(name)
            relative = memory.relative_distance(features[name], self.distance)
            by_ratio = relative / denominator * multimodal
            by_difference = multimodal + relative - fusion_distance
            proposal = (0.5 * by_ratio + 0.5 * by_difference).clamp(-self.label_range, self.label_range)
            old = memory.labels[index]
            new = (epoch - 1) / (epoch + 1) * old + 2 / (epoch + 1) * proposal
            moves = fusion.has_centers & memory.has_centers & ~memory.fixed[index] & present["fusion"] & present[name]
            moves = moves & new.isfinite()  # distances of huge features overflow
            memory.labels[index] = torch.where(moves, new, old)
