"""ULGM, the unimodal label generation module of Self-MM (Yu et al., AAAI 2021).

    generator = UnimodalLabelGenerator(labels, {"fusion": 128, "text": 32, "audio": 16}, label_range=3.0)
    generator.weights(index)["text"]                # how much each clip's text label counts in the loss
    generator.update(features, index, epoch)        # after backward, for every micro-batch

B is the batch size, N the number of training clips, d a task's feature width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor, nn

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
Momentum = Callable[[int], float]
"""From the epoch, 2 or later, to the share of the old label in the new one, 0 to 1."""
Weighting = Callable[[Tensor], Tensor]
"""From |unimodal − multimodal label| (B) to weights (B)."""


def _l2(features: Tensor, center: Tensor) -> Tensor:
    return (features - center).norm(dim=-1)


def _squared(features: Tensor, center: Tensor) -> Tensor:
    return (features - center).square().sum(-1) / features.shape[-1] ** 0.5


def _cosine(features: Tensor, center: Tensor) -> Tensor:
    similarity = torch.cosine_similarity(features, center.expand_as(features), dim=-1)
    return (1 - similarity).clamp(min=0)  # rounding must not turn the sign of what is divided by it


def _by_own_label(own: Tensor, multimodal: Tensor) -> Tensor:
    return own


def _by_multimodal_label(own: Tensor, multimodal: Tensor) -> Tensor:
    return multimodal


def _newest(centers: Tensor, means: Tensor) -> Tensor:
    return means


def _moving_average(centers: Tensor, means: Tensor, decay: float) -> Tensor:
    return decay * centers + (1 - decay) * means


def _to_positive(to_positive: Tensor, to_negative: Tensor, between: Tensor) -> Tensor:
    return (to_negative - to_positive) / (to_positive + EPSILON)


def _to_centers(to_positive: Tensor, to_negative: Tensor, between: Tensor) -> Tensor:
    return (to_negative - to_positive) / (between + EPSILON)


def _plain_difference(to_positive: Tensor, to_negative: Tensor, between: Tensor) -> Tensor:
    return to_negative - to_positive


def ratio_and_difference(relative: Tensor, relative_of_fusion: Tensor, multimodal: Tensor) -> Tensor:
    """Return the proposal (B) of the paper: half by the ratio δ_s / δ_f, half by the difference δ_s − δ_f."""
    denominator = relative_of_fusion + EPSILON
    denominator = torch.where(denominator == 0, EPSILON, denominator)
    by_ratio = relative / denominator * multimodal
    by_difference = multimodal + relative - relative_of_fusion
    return 0.5 * by_ratio + 0.5 * by_difference


def _clamp(proposal: Tensor, label_range: float) -> Tensor:
    return proposal.clamp(-label_range, label_range)


def _tanh(proposal: Tensor, label_range: float) -> Tensor:
    return label_range * torch.tanh(proposal / label_range)


def growing_momentum(epoch: int) -> float:
    """Return (n − 1)/(n + 1), the paper's share of the old label in epoch n."""
    return (epoch - 1) / (epoch + 1)


DISTANCES: dict[str, Distance] = {"l2": _l2, "squared": _squared, "cosine": _cosine}
MEMBERSHIPS: dict[str, Membership] = {"own": _by_own_label, "fusion": _by_multimodal_label}
CENTERS: dict[str, Callable[..., Tensor]] = {"step": _newest, "epoch": _newest, "ema": _moving_average}
RELATIVES: dict[str, Relative] = {"positive": _to_positive, "centers": _to_centers, "difference": _plain_difference}
BOUNDS: dict[str, Bound] = {"clamp": _clamp, "tanh": _tanh}
WEIGHTINGS: dict[str, Weighting] = {"tanh": torch.tanh, "relu": torch.relu, "ones": torch.ones_like}


def _part(name: str, value: Any, table: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    if callable(value):
        return value
    if not isinstance(value, str) or value not in table:
        names = f" or one of {', '.join(table)}" if table else ""
        raise ValueError(f"{name} must be a callable{names}, got {value!r}")
    return table[value]


_TAKEN = frozenset(dir(nn.ModuleDict()))


def module_key(name: str) -> str:
    """Return a task's key in an `nn.ModuleDict`, which takes neither dots nor names of its own, such as `type`."""
    key = name.replace(".", "·")
    return f"{key}·" if key in _TAKEN else key


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
        self.register_buffer("has_centers", torch.zeros(2, 1, dtype=torch.bool, device=labels.device))

    def store(self, features: Tensor, index: Tensor, present: Tensor) -> None:
        self.features[index] = torch.where(present[:, None], features, self.features[index])
        self.present[index] = present | self.features[index].any(-1)  # what was stored before still counts

    def refresh_centers(self, classes: Tensor, rule: Centers, due: Tensor | None) -> None:
        """Derive the centres of two classes, given as booleans (2, N), by `rule`, unless `due` is given and False."""
        members = (classes & self.present).to(self.features.dtype)
        counts = members.sum(1, keepdim=True)
        means = members @ self.features / counts.clamp(min=1)
        centers = torch.where(self.has_centers, rule(self.centers, means), means)
        found = (counts > 0) & centers.isfinite().all(1, keepdim=True)  # sums of huge features overflow
        if due is not None:
            centers, found = torch.where(due, centers, self.centers), torch.where(due, found, self.has_centers)
        self.centers.copy_(torch.where(found, centers, self.centers))
        self.has_centers.copy_(found)

    def distances(self, features: Tensor, distance: Distance) -> tuple[Tensor, Tensor, Tensor]:
        """Return the distances (B) to the positive centre, (B) to the negative one, and () between the two."""
        positive, negative = self.centers
        return distance(features, positive), distance(features, negative), distance(positive[None], negative)[0]


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

    Each part from `distance` on, `center_decay` aside, may be a callable; this module's type of its name says of what.

    Raises:
        ValueError: labels are not a finite (N) tensor, `"fusion"` is missing, `known` does not fit, or there is no part
            of such a name.
    """

    last_epoch: Tensor

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
        moving_average = partial(_moving_average, decay=center_decay)
        self.distance: Distance = _part("distance", distance, DISTANCES)
        self.membership: Membership = _part("membership", membership, MEMBERSHIPS)
        self.center_rule: Centers = _part("centers", centers, {**CENTERS, "ema": moving_average})
        self.once_an_epoch = centers == "epoch"
        self.relative: Relative = _part("relative", relative, RELATIVES)
        self.combination: Combination = _part("combination", combination, {})
        self.bound: Bound = _part("bound", bound, BOUNDS)
        self.momentum: Momentum = _part("momentum", momentum, {})
        self.weighting: Weighting = _part("weighting", weighting, WEIGHTINGS)
        self.tasks = tuple(feature_dims)
        self.modalities = tuple(name for name in self.tasks if name != "fusion")
        self.memory = nn.ModuleDict(
            {module_key(name): _TaskMemory(labels, width, known.get(name)) for name, width in feature_dims.items()}
        )
        self.register_buffer("last_epoch", torch.zeros((), dtype=torch.long, device=labels.device))

    def _of(self, name: str) -> _TaskMemory:
        return self.memory[module_key(name)]  # type: ignore[return-value]

    @property
    def labels(self) -> dict[str, Tensor]:
        """The labels (N) as they stand, of "fusion" (the human ones) and of each modality."""
        return {name: self._of(name).labels for name in self.tasks}

    @property
    def centers(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The positive and the negative class centre (d) of each task."""
        return {name: (self._of(name).centers[0], self._of(name).centers[1]) for name in self.tasks}

    def weights(self, index: Tensor) -> dict[str, Tensor]:
        """Return per modality (B): how much the label counts, by its distance from the multimodal one; 1 if known."""
        multimodal = self._of("fusion").labels[index]
        memories = {name: self._of(name) for name in self.modalities}
        return {
            name: torch.where(memory.fixed[index], 1.0, self.weighting((memory.labels[index] - multimodal).abs()))
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
        for name in self.tasks:
            width = self._of(name).features.shape[1]
            if name not in features or features[name].shape != (len(index), width):
                got = f"shape {tuple(features[name].shape)}" if name in features else "nothing"
                raise ValueError(f"features[{name!r}] must have shape ({len(index)}, {width}), got {got}")
        rows = {name: features[name].detach().to(self._of(name).features) for name in self.tasks}
        present = {name: row.isfinite().all(-1) for name, row in rows.items()}
        for name, given in self.checked_mask(mask, index).items():
            present[name] = present[name] & given
        with torch.autocast(rows["fusion"].device.type, enabled=False):
            if self.once_an_epoch:
                self._refresh_centers(due=(self.last_epoch > 0) & (self.last_epoch < epoch))
            if epoch > 1:
                self._move_labels(rows, index, epoch, present)
            for name, row in rows.items():
                self._of(name).store(row, index, present[name])
            if not self.once_an_epoch:
                self._refresh_centers()
            self.last_epoch.fill_(epoch)

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
        relative_of_fusion = self._relative_distance("fusion", features)
        share = float(self.momentum(epoch))
        if not 0 <= share <= 1:
            raise ValueError(f"momentum must give a share from 0 to 1, got {share} for epoch {epoch}")
        for name in self.modalities:
            memory = self._of(name)
            relative = self._relative_distance(name, features)
            proposal = self.combination(relative, relative_of_fusion, multimodal)
            old = memory.labels[index]
            # share · old + (1 − share) · bounded proposal, never beyond both by rounding
            new = self.bound(proposal, self.label_range).lerp(old, share)
            can_move = fusion.has_centers.all() & memory.has_centers.all() & ~memory.fixed[index]
            finite = proposal.isfinite() & new.isfinite()  # distances of huge features overflow
            moves = can_move & present["fusion"] & present[name] & finite
            memory.labels[index] = torch.where(moves, new, old)

    def _relative_distance(self, name: str, features: Mapping[str, Tensor]) -> Tensor:
        """Return (B): how much nearer the positive centre is than the negative one."""
        return self.relative(*self._of(name).distances(features[name], self.distance))

    def _refresh_centers(self, due: Tensor | None = None) -> None:
        multimodal = self._of("fusion").labels
        for name in self.tasks:
            memory = self._of(name)
            labels = self.membership(memory.labels, multimodal)
            positive = labels > 0 if self.exclude_zero else labels >= 0
            memory.refresh_centers(torch.stack([positive, labels < 0]), self.center_rule, due)
