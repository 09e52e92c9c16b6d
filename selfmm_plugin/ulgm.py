"""ULGM, the unimodal label generation module of Self-MM (Yu et al., AAAI 2021).

    generator = UnimodalLabelGenerator(labels, {"fusion": 128, "text": 32, "audio": 16}, label_range=3.0)
    generator.weights(index)["text"]                # how much each clip's text label counts in the loss
    generator.update(features, index, epoch)        # after backward, for every micro-batch

B is the batch size, N the number of training clips, T that of tasks (fusion first, then the modalities), d a task's
feature width and D the widest.

A GPU takes as long to start such small operations as to do them, so every step here is one operation for all tasks;
only callables of users are called task by task. Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from numbers import Integral
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from .parts import (
    BOUNDS,
    CENTERS,
    DISTANCES,
    MEMBERSHIPS,
    RELATIVES,
    WEIGHTINGS,
    WITHOUT_BETWEEN,
    Bound,
    Centers,
    Combination,
    Distance,
    Membership,
    Momentum,
    Relative,
    Weighting,
    by_task,
    growing_momentum,
    moving_average,
    newest,
    part_of,
    ratio_and_difference,
)

LARGEST = 1e15
"""Features above it count as missing: neither their squares nor their sums overflow below."""
LIMIT, COUNTS, STORED, LABEL = 0, -3, -2, -1
"""Columns before and behind the features of a clip in `UnimodalLabelGenerator.clips`."""


class TaskMemory(NamedTuple):
    """What the generator remembers of a task."""

    labels: Tensor
    """(N) as they stand."""
    features: Tensor
    """(N, d), as of each clip's last update."""
    centers: Tensor
    """(2, d), of the positive class and of the negative one."""


class UnimodalLabelGenerator(nn.Module):
    """Derives a label for each modality from the multimodal one, by distances to class centres.

    For features F of a clip in one task, and the class centres C⁺ and C⁻ of that task (means of the stored features of
    the clips whose label there is above and below 0):

    1. relative distance δ = (‖F − C⁻‖ − ‖F − C⁺‖) / (‖F − C⁺‖ + 1e-8)
    2. proposal = ½ · δ_s / δ_f · y + ½ · (y + δ_s − δ_f), clamped to ±range, for modality s, fusion f, human label y
    3. y_s ← (n − 1)/(n + 1) · y_s + 2/(n + 1) · proposal, in epoch n > 1

    and in the loss a clip's label counts with tanh|y_s − y|.

    (Yu et al. 2021, section 3.4, with the distance of the authors' code.) All state is buffers in float32: it moves
    with `.to(device)`, is saved in `state_dict`, and needs no gradient. While a class of a task has no clip, labels
    stay as they are (of that modality, or all of them if the task is fusion), and its centre starts anew afterwards. A
    proposal that is not finite moves no label.

    Args:
        labels: (N) human multimodal labels of the train split.
        feature_dims: feature width of `"fusion"` and of each modality, any names and number.
        label_range: generated labels are bounded to ±this.
        exclude_zero: whether a label of 0 belongs to neither class; else it counts as positive.
        known: (N) human unimodal labels by modality, NaN where unknown; known labels never move.
        distance: `"l2"` (the authors' code), `"squared"` (‖·‖²/√d), or `"cosine"`. Near a centre the relative distance
            grows without bound, with the last two soonest: expect labels to jump to ±range.
        membership: which label decides a clip's class: its `"own"` one in each task as it stands, or the multimodal one
            in every task (`"fusion"`).
        centers: the means after every micro-batch (`"step"`); those at the end of the epoch before (`"epoch"`, none in
            the first); or after every micro-batch decay · C + (1 − decay) · mean (`"ema"`, the first mean whole).
        center_decay: the decay of `"ema"`.
        relative: δ is the difference of the distances, relative to that to the `"positive"` centre or to that between
            the `"centers"`, or the `"difference"` itself.
        combination: the proposal from δ_s, δ_f and y.
        bound: `"clamp"` or `"tanh"` (range · tanh(proposal / range)).
        momentum: the share of the old label in epoch n.
        weighting: `"tanh"` (tanh|y_s − y|), `"relu"` (|y_s − y| itself), or `"ones"`.

    Each part from `distance` on, `center_decay` aside, may be a callable; its type in `parts.py` says of what.

    Raises:
        ValueError: labels are not a finite (N) tensor, `"fusion"` is missing, `known` does not fit, or there is no part
            of such a name.
    """

    clips: Tensor
    """(N, T, D + 4), of each clip and task: a limit, 0 if the label never moves; features, padded with zeros; 1 if the
    clip counts for a centre and 1 if features were stored, else 0; the label."""
    class_centers: Tensor
    """(T, 2, D), positive first, padded with zeros."""
    has_center: Tensor
    """(T, 2), whether the class had clips."""
    last_epoch: Tensor
    """() of centres that are taken once an epoch."""
    paddings: Tensor
    widths: Tensor
    sides: Tensor
    classes_of_zero: Tensor

    def __init__(
        self,
        labels: Tensor,
        feature_dims: Mapping[str, int],
        label_range: float,
        *,
        exclude_zero: bool = True,
        known: Mapping[str, Tensor] | None = None,
        distance: Literal["l2", "squared", "cosine"] | Distance = "l2",
        membership: Literal["own", "fusion"] | Membership = "own",
        centers: Literal["step", "epoch", "ema"] | Centers = "step",
        center_decay: float = 0.9,
        relative: Literal["positive", "centers", "difference"] | Relative = "positive",
        combination: Combination = ratio_and_difference,
        bound: Literal["clamp", "tanh"] | Bound = "clamp",
        momentum: Momentum = growing_momentum,
        weighting: Literal["tanh", "relu", "ones"] | Weighting = "tanh",
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
        if not 0 <= center_decay < 1:
            raise ValueError(f"center_decay must be at least 0 and below 1, got {center_decay}")
        for name, values in known.items():
            if name not in feature_dims or name == "fusion" or values.shape != labels.shape or values.isinf().any():
                shape = tuple(labels.shape)
                raise ValueError(f"known[{name!r}] must be a modality with finite labels of shape {shape}")
        self.label_range = float(label_range)
        self.exclude_zero = exclude_zero
        self.distance: Distance = part_of("distance", distance, DISTANCES)
        self.membership: Membership = part_of("membership", membership, MEMBERSHIPS)
        rules: dict[str, Centers] = {**CENTERS, "ema": partial(moving_average, decay=center_decay)}
        self.center_rule: Centers = part_of("centers", centers, rules)
        self.once_an_epoch = centers == "epoch"
        self.relative: Relative = part_of("relative", relative, RELATIVES)
        self.combination: Combination = part_of("combination", combination, {})
        self.bound: Bound = part_of("bound", bound, BOUNDS)
        self.momentum: Momentum = part_of("momentum", momentum, {})
        self.weighting: Weighting = part_of("weighting", weighting, WEIGHTINGS)
        self.modalities = tuple(name for name in feature_dims if name != "fusion")
        self.tasks = ("fusion", *self.modalities)
        self.dims = [feature_dims[name] for name in self.tasks]
        self.widest = max(self.dims)
        unknown = torch.full_like(labels, torch.nan)
        given = torch.stack([labels, *(known.get(name, unknown) for name in self.modalities)], dim=1)
        clips = labels.new_zeros(len(labels), len(self.tasks), self.widest + 4)
        clips[..., COUNTS] = 1  # as upstream, whose features are 0 before a clip's first update
        clips[..., LABEL] = torch.where(given.isnan(), labels[:, None], given)
        clips[..., LIMIT] = torch.where(given.isnan(), torch.finfo(torch.float32).max, 0.0)
        self.register_buffer("clips", clips)
        self.register_buffer("class_centers", labels.new_zeros(len(self.tasks), 2, self.widest))
        self.register_buffer("has_center", torch.zeros(len(self.tasks), 2, dtype=torch.bool, device=labels.device))
        self.register_buffer("last_epoch", torch.zeros((), dtype=torch.long, device=labels.device))
        # What stands behind each task's features in a new row: zeros, that it counts, that it is stored, and no label.
        behind = [x for d in self.dims for x in (*[0.0] * (self.widest - d), 1.0, 1.0, 0.0)]
        self.register_buffer("paddings", labels.new_tensor(behind), persistent=False)
        self.register_buffer("widths", labels.new_tensor(self.dims)[:, None], persistent=False)
        self.register_buffer("sides", labels.new_tensor([1.0, -1.0]), persistent=False)
        self.register_buffer("classes_of_zero", labels.new_tensor([float(not exclude_zero), 0.0]), persistent=False)

    @property
    def memory(self) -> dict[str, TaskMemory]:
        """The labels, the stored features and the centres of each task; they share the generator's memory."""
        return {
            name: TaskMemory(
                self.clips[:, task, LABEL], self.clips[:, task, 1 : 1 + d], self.class_centers[task, :, :d]
            )
            for task, (name, d) in enumerate(zip(self.tasks, self.dims, strict=True))
        }

    @property
    def labels(self) -> dict[str, Tensor]:
        """The labels (N) as they stand, of "fusion" (the human ones) and of each modality."""
        return {name: memory.labels for name, memory in self.memory.items()}

    @property
    def centers(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The positive and the negative class centre (d) of each task."""
        return {name: (memory.centers[0], memory.centers[1]) for name, memory in self.memory.items()}

    def weights(self, index: Tensor) -> dict[str, Tensor]:
        """Return per modality (B): how much the label counts, by its distance from the multimodal one; 1 if known."""
        _, weights = self.targets(index)
        return dict(zip(self.modalities, weights.unbind(1)[1:], strict=True))

    def targets(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return the labels (B, T) and their weights (B, T) of all tasks; those of fusion weigh 1."""
        index = torch.as_tensor(index, device=self.clips.device)
        rows = self.clips[index]
        labels = rows[..., LABEL]
        weights = by_task(self.weighting, (labels - labels[:, :1]).abs(), skip=1)
        return labels, weights.masked_fill_(rows[..., LIMIT] == 0, 1.0)

    @torch.no_grad()
    def update(
        self,
        features: Mapping[str, Tensor],
        index: Tensor,
        epoch: int | Tensor,
        mask: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Move these clips' labels by the centres as they stand, then store the features and refresh the centres.

        Features that are not finite, as of a step that loss scaling skips, or beyond ±1e15 count as missing.

        Args:
            features: (B, d) of every task.
            index: (B) rows in the train split.
            epoch: counts from 1; no label moves in epoch 1. As an integer tensor () on the labels' device it may change
                between replays of a CUDA graph; then nobody checks it, nor what `momentum` gives.
            mask: per modality (B), False where a clip lacks it: its label stays, its features are not stored, and it
                counts for a centre only by those stored before.

        Raises:
            ValueError: a task's features are missing or have another shape, epoch is none, or `mask` does not fit.
        """
        index = torch.as_tensor(index, device=self.clips.device)
        _check_epoch(epoch, self.clips.device)
        for name, width in zip(self.tasks, self.dims, strict=True):
            if name not in features or features[name].shape != (len(index), width):
                got = f"shape {tuple(features[name].shape)}" if name in features else "nothing"
                raise ValueError(f"features[{name!r}] must have shape ({len(index)}, {width}), got {got}")
        masked = self.checked_mask(mask, index)
        with torch.autocast(self.clips.device.type, enabled=False):
            if self.once_an_epoch:
                self._refresh_centers_if_new(epoch)
            new = self._rows(features)
            present = torch.linalg.vector_norm(new, torch.inf, dim=-1) < LARGEST
            for name, given in masked.items():
                present[:, self.tasks.index(name)].logical_and_(given)
            old = self.clips[index]
            # Of a clip that is missing, what was stored before still counts.
            stored = torch.where(present[..., None], new, old[..., 1:] * old[..., STORED, None])
            if isinstance(epoch, Tensor) or epoch > 1:
                moves, moved = self._moved_labels(new, old, epoch, present)
                torch.where(moves, moved, old[..., LABEL], out=stored[..., LABEL])
            else:
                stored[..., LABEL] = old[..., LABEL]
            self.clips[..., 1:][index] = stored
            if not self.once_an_epoch:
                self._refresh_centers()

    def checked_mask(self, mask: Mapping[str, Tensor] | None, index: Tensor) -> dict[str, Tensor]:
        """Return `mask` as boolean tensors (B) beside the labels; raises ValueError for any other name or shape."""
        checked = {name: torch.as_tensor(given) for name, given in (mask or {}).items()}
        for name, given in checked.items():
            if name not in self.modalities or given.shape != (len(index),):
                raise ValueError(
                    f"mask[{name!r}] must be a modality ({', '.join(self.modalities)}) and have shape ({len(index)},), "
                    f"got shape {tuple(given.shape)}"
                )
        return {name: given.to(self.clips.device, torch.bool) for name, given in checked.items()}

    def _rows(self, features: Mapping[str, Tensor]) -> Tensor:
        """Return new rows of `clips` (B, T, D + 3), without limits and with labels of 0."""
        given = [features[name].detach().to(self.clips.device) for name in self.tasks]
        paddings = self.paddings.to(given[0].dtype).expand(len(given[0]), -1)  # `cat` converts piece by piece
        behind = paddings.split([self.widest - d + 3 for d in self.dims], dim=1)
        rows = torch.cat([part for parts in zip(given, behind, strict=True) for part in parts], dim=1)
        return rows.to(self.clips.dtype).view(len(rows), len(self.tasks), -1)

    def _moved_labels(self, new: Tensor, old: Tensor, epoch: int | Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """Return which labels move (B, T) and where to (B, T), from the clips' new and old rows."""
        share = self.momentum(epoch)
        if isinstance(epoch, Tensor):
            share = share.to(self.clips) if isinstance(share, Tensor) else share
        else:
            share = float(share)
            if not 0 <= share <= 1:
                raise ValueError(f"momentum must give a share from 0 to 1, got {share} for epoch {epoch}")
        labels, limit = old[..., LABEL], old[..., LIMIT]
        relative = self._relative_distances(new[..., :COUNTS])
        proposal = by_task(self.combination, relative, relative[:, :1], labels[:, :1], skip=1)
        # share · old + (1 − share) · bounded proposal, never beyond both by rounding
        moved = by_task(self.bound, proposal, self.label_range, skip=1).lerp(labels, share)
        ready = self.has_center.all(-1)
        if isinstance(epoch, Tensor):
            ready = ready & (epoch > 1)
        usable = present & ready
        # What users' parts give need not be finite; the hypotenuse is if both are.
        return (torch.hypot(proposal, moved) < limit) & usable & usable[:, :1], moved

    def _relative_distances(self, features: Tensor) -> Tensor:
        """Return for padded features (B, T, D) how much nearer the positive centre is than the negative one (B, T)."""
        to_positive, to_negative = self._distances(features).unbind(-1)
        between = None
        if self.relative not in WITHOUT_BETWEEN:
            between = self._distances(self.class_centers[None, :, 0])[0, :, 1]
        return by_task(self.relative, to_positive, to_negative, between)

    def _distances(self, features: Tensor) -> Tensor:
        """Return for padded features (B, T, D) the distances to the positive and to the negative centre (B, T, 2)."""
        if self.distance in DISTANCES.values():
            return self.distance(features[:, :, None], self.class_centers, self.widths)  # type: ignore[call-arg]
        of_tasks = [
            [self.distance(features[:, task, :d].contiguous(), center[:d]) for center in self.class_centers[task]]
            for task, d in enumerate(self.dims)
        ]
        return torch.stack([torch.stack(of_task, dim=-1) for of_task in of_tasks], dim=1)

    def _refresh_centers(self) -> None:
        """Take the class means of all stored features as new centres, by the rule for them."""
        labels = self.clips[..., LABEL]
        deciding = by_task(self.membership, labels, labels[:, :1]).to(labels.dtype).expand_as(labels)
        classes = torch.heaviside(deciding[..., None] * self.sides, self.classes_of_zero)
        # One matrix product takes the classes of each task with the rows of each, and its diagonal is what is wanted: a
        # GPU spreads one over clips, and reads them once, however few rows come out.
        with _in_float32():
            sums = (classes.flatten(1).T @ self.clips.flatten(1)).view(-1, 2, *self.clips.shape[1:])
        sums = sums.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        counts = sums[..., COUNTS]
        centers = sums[..., 1:COUNTS] / counts[..., None]
        if self.center_rule is newest:
            torch.gt(counts, 0, out=self.has_center)
        else:
            centers = self._by_rule(centers.masked_fill_(counts[..., None] == 0, 0.0))
            finite = torch.linalg.vector_norm(centers, torch.inf, dim=-1) < torch.inf
            torch.logical_and(counts > 0, finite, out=self.has_center)
        torch.where(self.has_center[..., None], centers, self.class_centers, out=self.class_centers)

    def _by_rule(self, means: Tensor) -> Tensor:
        """Return new centres (T, 2, D) from class means; the first mean after a class had no clip is taken whole."""
        centers = means.clone()
        for task, d in enumerate(self.dims):
            mean, center = means[task, :, :d], self.class_centers[task, :, :d]
            centers[task, :, :d] = torch.where(self.has_center[task, :, None], self.center_rule(center, mean), mean)
        return centers

    def _refresh_centers_if_new(self, epoch: int | Tensor) -> None:
        """Refresh the centres in the first update of an epoch, unless it is the first one ever."""
        due = (self.last_epoch > 0) & (self.last_epoch < epoch)
        standing, stood = self.class_centers.clone(), self.has_center.clone()
        self._refresh_centers()
        torch.where(due, self.class_centers, standing, out=self.class_centers)
        torch.where(due, self.has_center, stood, out=self.has_center)
        self.last_epoch.fill_(epoch)


@contextmanager
def _in_float32() -> Iterator[None]:
    """Keep a matrix product from rounding its factors to TF32: sums over all clips would lose three digits."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


def _check_epoch(epoch: int | Tensor, device: torch.device) -> None:
    if isinstance(epoch, Tensor):
        if epoch.dim() or epoch.dtype not in (torch.int32, torch.int64) or epoch.device != device:
            raise ValueError(
                f"an epoch given as a tensor must be one integer on {device}, got {epoch.dtype} of shape "
                f"{tuple(epoch.shape)} on {epoch.device}"
            )
    elif not isinstance(epoch, Integral) or epoch < 1:
        raise ValueError(f"epoch counts from 1, got {epoch}")
