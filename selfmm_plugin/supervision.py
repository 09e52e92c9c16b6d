"""Unimodal supervision for any fusion model: heads on its modality features, labels from ULGM.

supervision = UnimodalSupervision(train_labels, {"fusion": 64, "text": 300, "audio": 32}, label_range=3.0)
loss = criterion(prediction, target) + supervision.loss(features, index)
loss.backward()
supervision.observe(index, epoch)
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, create_model
from torch import Tensor, nn

from registry import Batch, Config, FusionOutput, InputError, TrainingData, TrainingHook

from .heads import PredictionHead, module_key
from .parts import (
    Bound,
    Centers,
    Combination,
    Distance,
    Membership,
    Momentum,
    Relative,
    Weighting,
    growing_momentum,
    ratio_and_difference,
)
from .ulgm import UnimodalLabelGenerator

TASKS = {"text": "T", "audio": "A", "vision": "V"}


class UnimodalSupervision(nn.Module):
    """A prediction head for each modality and a `UnimodalLabelGenerator` that supplies its labels.

    Args:
        labels: (N) human multimodal labels of the train split.
        feature_dims: width of the features that `loss` gets: `"fusion"`, used as it is, and each modality.
        label_range: generated labels are bounded to ±this.
        head_dims: hidden width of each modality's head, one for all or by modality.
        head_dropouts: dropout before each head, one for all or by modality.
        exclude_zero, known, and what follows: as for `UnimodalLabelGenerator`.

    Raises:
        ValueError: `head_dims` or `head_dropouts` leave a modality out, or the generator refuses an argument.
    """

    def __init__(
        self,
        labels: Tensor,
        feature_dims: Mapping[str, int],
        label_range: float,
        *,
        head_dims: int | Mapping[str, int] = 32,
        head_dropouts: float | Mapping[str, float] = 0.0,
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
        modalities = [name for name in feature_dims if name != "fusion"]
        dims = head_dims if isinstance(head_dims, Mapping) else dict.fromkeys(modalities, head_dims)
        dropouts = head_dropouts if isinstance(head_dropouts, Mapping) else dict.fromkeys(modalities, head_dropouts)
        for what, given in (("head_dims", dims), ("head_dropouts", dropouts)):
            if missing := [name for name in modalities if name not in given]:
                raise ValueError(f"{what} must name every modality, {', '.join(missing)} is missing")
        self.heads = nn.ModuleDict(
            {module_key(name): PredictionHead(feature_dims[name], dims[name], dropouts[name]) for name in modalities}
        )
        self.generator = UnimodalLabelGenerator(
            labels,
            {name: width if name == "fusion" else dims[name] for name, width in feature_dims.items()},
            label_range,
            exclude_zero=exclude_zero,
            known=known,
            distance=distance,
            membership=membership,
            centers=centers,
            center_decay=center_decay,
            relative=relative,
            combination=combination,
            bound=bound,
            momentum=momentum,
            weighting=weighting,
        )
        self._unobserved: deque[tuple[Tensor, dict[str, Tensor], Mapping[str, Tensor]]] = deque()

    def predict(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the unimodal sentiments (B) of features (B, d)."""
        return {name: self.heads[module_key(name)](features[name])[0] for name in self.generator.modalities}

    def loss(self, features: Mapping[str, Tensor], index: Tensor, mask: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the scalar Σ over modalities of mean(weight · |prediction − label|).

        Args:
            features: (B, d) by name, with gradients.
            index: (B) rows in the train split.
            mask: per modality (B), False where a clip lacks it: it adds no loss, and its features are not looked at.

        Raises:
            ValueError: features of the fusion task or of a modality are missing, or `mask` does not fit.
            RuntimeError: twice as many clips as the train split has wait for `observe`.
        """
        index = torch.as_tensor(index)
        for name in self.generator.tasks:
            if name not in features:
                raise ValueError(f"features[{name!r}] is missing, got {', '.join(features) or 'none'}")
        present = self.generator.checked_mask(mask, index)
        labels, weights = self.generator.targets(index)
        predictions = []
        representations = {"fusion": features["fusion"].detach()}
        for task, name in enumerate(self.generator.modalities, 1):
            of_modality = features[name]
            if name in present:  # what stands in for a missing modality may be anything, NaN too
                of_modality = torch.where(present[name][:, None], of_modality, 0.0)
                weights[:, task] *= present[name]
            prediction, representation = self.heads[module_key(name)](of_modality)
            predictions.append(prediction)
            representations[name] = representation.detach()
        if predictions:
            errors = (torch.stack(predictions, dim=1) - labels[:, 1:]).abs()
            total = (weights[:, 1:] * errors).mean(0).sum()
        else:
            total = features["fusion"].new_zeros(())
        if self.training:
            self._unobserved.append((index, representations, present))
            waiting = sum(len(rows) for rows, *_ in self._unobserved)
            if waiting > 2 * max(len(index), len(self.generator.labels["fusion"])):
                self._unobserved.clear()
                raise RuntimeError(f"observe must follow every loss in training mode; {waiting} clips wait for it")
        return total

    def observe(self, index: Tensor, epoch: int | Tensor) -> None:
        """Let the generator see a micro-batch that `loss` was called with; `epoch` counts from 1.

        It may be an integer tensor () beside the labels, which a CUDA graph reads anew at every replay.
        Call it once for every `loss` in training mode, in the same order, after the backward pass.

        Raises:
            RuntimeError: no `loss` with this index (on a GPU: of this size) is waiting.
        """
        if not self._unobserved:
            raise RuntimeError("observe(index, epoch) must follow loss(features, index) in training mode")
        index = torch.as_tensor(index)
        seen, representations, present = self._unobserved.popleft()
        # Comparing values would make a GPU wait, so there only the sizes are compared.
        if len(seen) != len(index) or (index.device.type == "cpu" and not torch.equal(seen.cpu(), index)):
            self._unobserved.clear()
            raise RuntimeError("observe got another index than the loss before it; call them in the same order")
        self.generator.update(representations, seen, epoch, present)


class UlgmConfig(Config):
    """Keys of the hook `ulgm`, given as `hook.KEY`."""

    tasks: str | None = Field(None, description="losses to train: M and initials of modalities, MTAV; all by default")
    supervision: Literal["self", "human", "multimodal"] = Field(
        "self", description="labels: generated by ULGM, the data's human unimodal ones, or the human multimodal one"
    )
    exclude_zero: bool = Field(True, description="a label of 0 belongs to neither class; else it counts as positive")
    distance: Literal["l2", "squared", "cosine"] = Field(
        "l2", description="distance between features and class centre; labels move more by the last two"
    )
    membership: Literal["own", "fusion"] = Field(
        "own", description="label that decides a clip's class: the modality's own as it stands, or the multimodal one"
    )
    centers: Literal["step", "epoch", "ema"] = Field(
        "step", description="class centres: means after every micro-batch, of the epoch before, or a moving average"
    )
    center_decay: float = Field(0.9, ge=0, lt=1, description="share of the old centre in each step of centers=ema")
    relative: Literal["positive", "centers", "difference"] = Field(
        "positive",
        description="difference of a clip's distances to both centres: divided by that to the positive one, by that "
        "between the centers, or as it is",
    )
    bound: Literal["clamp", "tanh"] = Field(
        "clamp", description="how proposed labels are kept within ± label_range: cut off, or range·tanh(label/range)"
    )
    weighting: Literal["tanh", "relu", "ones"] = Field(
        "tanh", description="how much a label counts in the loss: tanh|y_s − y|, |y_s − y| itself, or 1"
    )
    label_range: float | None = Field(None, gt=0, description="generated labels are bounded to ± this; the data's own")
    head_dims: dict[str, Annotated[int, Field(ge=1)]] = Field(
        {"text": 32, "audio": 16, "vision": 32}, description="hidden width of each unimodal head"
    )
    head_dropouts: dict[str, Annotated[float, Field(ge=0, lt=1)]] = Field(
        {"text": 0.1, "audio": 0.1, "vision": 0.0}, description="dropout before each unimodal head"
    )


_OF_HEADS = {key: UlgmConfig.model_fields[key] for key in ("tasks", "head_dims", "head_dropouts")}
HeadsConfig = create_model(
    "HeadsConfig",
    __base__=Config,
    __doc__="Keys of the hook `heads`, given as `hook.KEY`: what they mean for `ulgm`, they mean here.",
    **{key: (info.annotation, info) for key, info in _OF_HEADS.items()},  # type: ignore[call-overload]
)


class UlgmHook(TrainingHook):
    """`UnimodalSupervision` as a training hook; it records every epoch's labels.

    Args:
        config: with `supervision="multimodal"` no label is generated: the control that ULGM is compared with.
        train: the labels of the train split.
        feature_dims: widths of the model's features.
        name: of the hook, for messages.

    Raises:
        InputError: `tasks` names a modality the model gives no features of, or human labels are asked for and absent.
    """

    capturable = True

    def __init__(
        self, config: UlgmConfig, train: TrainingData, feature_dims: Mapping[str, int], *, name: str = "ulgm"
    ) -> None:
        super().__init__()
        modalities = _modalities_of(config.tasks, feature_dims, name)
        for key in ("head_dims", "head_dropouts"):
            if unread := set(getattr(config, key)) - {*TASKS, *feature_dims}:
                raise InputError(f"'hook.{key}' names {', '.join(sorted(unread))}, and the model has no such features")
        known = None
        if config.supervision == "human":
            if absent := [name for name in modalities if TASKS.get(name) not in train.labels]:
                raise InputError(
                    f"supervision='human' needs the data's own labels for {', '.join(absent)}, "
                    f"and {train.info.name} has only {', '.join(sorted(train.labels))}"
                )
            known = {name: train.labels[TASKS[name]] for name in modalities}
        elif config.supervision == "multimodal":  # what is known weighs 1 and never moves
            known = dict.fromkeys(modalities, train.labels["M"])
        self.human = {name: train.labels[TASKS[name]].cpu() for name in modalities if TASKS.get(name) in train.labels}
        self.generates = known is None
        self.supervision = UnimodalSupervision(
            train.labels["M"],
            {name: feature_dims[name] for name in ("fusion", *modalities)},
            config.label_range or train.info.label_range,
            head_dims={name: config.head_dims.get(name, 32) for name in modalities},
            head_dropouts={name: config.head_dropouts.get(name, 0.0) for name in modalities},
            exclude_zero=config.exclude_zero,
            known=known,
            distance=config.distance,
            membership=config.membership,
            centers=config.centers,
            center_decay=config.center_decay,
            relative=config.relative,
            bound=config.bound,
            weighting=config.weighting,
        )
        self.history: list[dict[str, Tensor]] = []

    def loss(self, output: FusionOutput, batch: Batch) -> Tensor:
        return self.supervision.loss(output.features, batch.index)

    def observe(self, output: FusionOutput, batch: Batch, epoch: int | Tensor) -> None:
        self.supervision.observe(batch.index, epoch)

    def end_epoch(self, epoch: int) -> None:
        self.history.append({name: values.cpu().clone() for name, values in self.supervision.generator.labels.items()})

    def progress_state(self) -> dict[str, Tensor]:
        if not self.history:
            return {}
        return {name: torch.stack([labels[name] for labels in self.history]) for name in self.history[0]}

    def load_progress_state(self, state: Mapping[str, Tensor]) -> None:
        names = list(self.supervision.generator.labels)
        epochs = zip(*(state[name].unbind() for name in names), strict=True)
        self.history = [dict(zip(names, labels, strict=True)) for labels in epochs]

    def unimodal(self, output: FusionOutput) -> dict[str, Tensor]:
        return self.supervision.predict(output.features)

    def artifacts(self) -> dict[str, dict[str, Any]]:
        """Return `labels`, every epoch's labels, and, of labels that were generated, what is known of them.

        `label_movement` has a row an epoch and modality: `moved`, the mean change since the epoch before (in epoch 1
        since the multimodal label, so 0); `distance`, the mean distance from the multimodal label; `changed sign`, the
        share of clips whose label has another sign (of −1, 0, +1) than the multimodal one; `Corr multimodal`, the
        correlation with it. Where the data has true unimodal labels: `Corr true`, the correlation with them, beside
        that of the multimodal label; `true_labels` by clip; and `agreement_with_true_labels` of the labels that stand.
        History covers every epoch trained, also those after the best one.
        """
        tables: dict[str, dict[str, Any]] = {}
        if self.history:
            n = len(self.history[0]["fusion"])
            tables["labels"] = {
                "epoch": torch.arange(1, len(self.history) + 1).repeat_interleave(n).tolist(),
                "index": torch.arange(n).repeat(len(self.history)).tolist(),
                **{name: torch.cat([epoch[name] for epoch in self.history]).numpy() for name in self.history[0]},
            }
        if self.history and self.generates:
            tables["label_movement"] = self._movement()
        if self.human and self.generates:
            tables["true_labels"] = {
                "index": list(range(len(self.supervision.generator.labels["fusion"]))),
                **{name: true.numpy() for name, true in self.human.items()},
            }
            labels = {name: values.cpu() for name, values in self.supervision.generator.labels.items()}
            multimodal = labels["fusion"]
            tables["agreement_with_true_labels"] = {
                "modality": list(self.human),
                "Corr generated": [_correlation(labels[m], true) for m, true in self.human.items()],
                "Corr multimodal": [_correlation(multimodal, true) for m, true in self.human.items()],
                "MAE generated": [float((labels[m] - true).abs().mean()) for m, true in self.human.items()],
                "MAE multimodal": [float((multimodal - true).abs().mean()) for m, true in self.human.items()],
            }
        return tables

    def _movement(self) -> dict[str, list[Any]]:
        rows = []
        multimodal = self.history[0]["fusion"]
        before = dict.fromkeys(self.history[0], multimodal)
        for epoch, labels in enumerate(self.history, 1):
            for name in self.supervision.generator.modalities:
                row = {
                    "epoch": epoch,
                    "modality": name,
                    "moved": float((labels[name] - before[name]).abs().mean()),
                    "distance": float((labels[name] - multimodal).abs().mean()),
                    "changed sign": float((labels[name].sign() != multimodal.sign()).float().mean()),
                    "Corr multimodal": _correlation(labels[name], multimodal),
                }
                if self.human:
                    true = self.human.get(name)
                    row["Corr true"] = math.nan if true is None else _correlation(labels[name], true)
                    row["Corr true, multimodal"] = math.nan if true is None else _correlation(multimodal, true)
                rows.append(row)
            before = labels
        return {key: [row[key] for row in rows] for key in rows[0]} if rows else {}


def heads_hook(config: Config, train: TrainingData, feature_dims: Mapping[str, int]) -> UlgmHook:
    """Return the hook `heads`: the heads of `ulgm`, each trained on the human multimodal label with weight 1."""
    return UlgmHook(UlgmConfig(supervision="multimodal", **config.model_dump()), train, feature_dims, name="heads")


def _modalities_of(tasks: str | None, feature_dims: Mapping[str, int], hook: str) -> list[str]:
    modalities = [name for name in feature_dims if name != "fusion"]
    if "fusion" not in feature_dims or not modalities:
        raise InputError(
            f"the hook {hook!r} needs a model that returns features named 'fusion' and one name for each modality "
            f"(their widths in `feature_dims`, the tensors in `FusionOutput.features`), "
            f"this one gives {sorted(feature_dims) or 'none'}"
        )
    if tasks is None:
        return modalities
    initials = {TASKS.get(name, name[0].upper()): name for name in modalities}
    if len(initials) < len(modalities) or "M" in initials:
        raise InputError(f"tasks cannot tell {', '.join(modalities)} apart by their initials; leave tasks out")
    wrong = [letter for letter in tasks if letter != "M" and letter not in initials]
    if "M" not in tasks or wrong or len(set(tasks)) != len(tasks):
        raise InputError(f"tasks must be M and any of {''.join(initials)}, each once, got {tasks!r}")
    return [name for letter, name in initials.items() if letter in tasks]


def _correlation(a: Tensor, b: Tensor) -> float:
    if a.min() == a.max() or b.min() == b.max():
        return 0.0
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])
