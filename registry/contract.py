"""Everything a plugin author must know: what a model gets, what it returns, and how it is described.

A model is an `nn.Module` with `forward(batch: Batch) -> FusionOutput` and `feature_dims: dict[str, int]`;
it may add `parameter_groups(config) -> list[dict]` in the form `torch.optim` takes. Without it, the text encoder is
trained at `learning_rate_bert` and the rest at `learning_rate` (see `Rates`). torch, numpy and `random` are seeded for
each run. `data.text_encoder.build()` is the text encoder: called with a batch's `text_ids, text_mask, text_segments,
text_rows` it gives (B, L, width). B is the batch size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SkipValidation
from pydantic.dataclasses import dataclass as pydantic_dataclass
from torch import Tensor, nn

if TYPE_CHECKING:
    from registry.data.text import TextEncoder


class Config(BaseModel):
    """Base of every config: unknown keys are errors, types are strict, values do not change."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=True, allow_inf_nan=False)


MODALITIES = ("text", "audio", "vision")


def _some_modalities(given: tuple[str, ...]) -> tuple[str, ...]:
    if wrong := [name for name in given if name not in MODALITIES]:
        raise ValueError(f"must be any of {', '.join(MODALITIES)}, and has {wrong[0]!r}")
    if {*given} == {*MODALITIES}:
        raise ValueError("must leave one modality")
    return tuple(name for name in MODALITIES if name in given)


class Training(Config):
    """How a model is trained; every field is a config key of every model."""

    criterion: Literal["l1", "mse"] = Field("l1", description="loss between prediction and multimodal label")
    batch_size: int = Field(32, ge=1, le=2**31, description="clips in a micro-batch; a loss is a mean over one")
    update_epochs: int = Field(
        1, ge=1, le=2**31, description="micro-batches whose gradients are summed before one update"
    )
    clip_value: float | None = Field(None, gt=0, description="gradients are clipped to this absolute value")
    scheduler: Literal["none", "plateau"] = Field(
        "none", description="plateau lowers the learning rate when the validation MAE stalls"
    )
    scheduler_patience: int | None = Field(
        None, ge=0, description="epochs that plateau waits for a better validation MAE; half of early_stop by default"
    )
    scheduler_factor: float = Field(0.5, gt=0, lt=1, description="what plateau multiplies the learning rate by")
    early_stop: int = Field(8, ge=1, description="epochs without a better validation MAE before training ends")
    epochs: int | None = Field(None, ge=1, description="most epochs to train; no cap by default")
    tail: Literal["step", "drop"] = Field("step", description="update on an epoch's incomplete last group, or drop it")
    standardize: bool = Field(
        False, description="audio and vision less the mean of each feature, by its deviation, over train's real steps"
    )
    without: Annotated[tuple[str, ...], AfterValidator(_some_modalities)] = Field(
        (), description="modalities that are silent: a step of zeros for audio or vision, no words for text"
    )


class Rates(Config):
    """Keys of a model that declares no config, and what the optimiser reads where there are no `parameter_groups`."""

    learning_rate: float = Field(1e-3, ge=0, description="learning rate of everything but the text encoder")
    learning_rate_bert: float = Field(5e-5, ge=0, description="learning rate of the text encoder")
    weight_decay: float = Field(0.0, ge=0, description="L2 of every parameter")


class _Dims(dict[str, int]):
    """Feature widths by modality; one that is not there says why."""

    def __missing__(self, name: str) -> int:
        raise KeyError(f"{name} is not among the inputs that the model's needs name: {', '.join(self) or 'none'}")


@dataclass(frozen=True)
class DataInfo:
    """What a model may know of the data before it is built.

    `dims` maps each modality that the model needs to its feature width, `max_lengths` to the file's sequence length;
    `tasks` are the labels the train split has (`"M"`, and `"T" "A" "V"` where known).
    """

    name: str
    dims: Mapping[str, int]
    max_lengths: Mapping[str, int]
    n_train: int
    label_range: float
    tasks: tuple[str, ...]
    aligned: bool
    text_encoder: TextEncoder | None

    def __post_init__(self) -> None:
        object.__setattr__(self, "dims", _Dims(self.dims))
        object.__setattr__(self, "max_lengths", dict(self.max_lengths))


@dataclass(frozen=True)
class Batch:
    """Some clips of one split, padded to the longest of them; a modality that the data lacks is None.

    Outside training `labels` is empty and `index` is -1, so that a model cannot peek.
    """

    index: Tensor
    """(B) row in the train split"""
    text_ids: Tensor | None = None
    """(B, L) token ids"""
    text_mask: Tensor | None = None
    """(B, L) 1 at real tokens, 0 at padding"""
    text_segments: Tensor | None = None
    """(B, L)"""
    text_rows: Tensor | None = None
    """(T) places of the real tokens in the flattened (B·L), then of a few others: an encoder that is given them does
    not compute the rest. None where padding is to be computed; whoever changes the tokens sets it to None."""
    text: Tensor | None = None
    """(B, Lt, d) features of a frozen text encoder, for models that need `"text_features"`"""
    text_lengths: Tensor | None = None
    """(B) 1…Lt; None where a file has text features and does not say which tokens they are of"""
    audio: Tensor | None = None
    """(B, La, da), 0 behind each clip's end; a model that needs `"padding"` gets what the file has there"""
    audio_lengths: Tensor | None = None
    """(B) 1…La"""
    vision: Tensor | None = None
    """(B, Lv, dv), likewise"""
    vision_lengths: Tensor | None = None
    """(B) 1…Lv"""
    labels: dict[str, Tensor] = field(default_factory=dict)
    """`"M"` and, where known, `"T" "A" "V"`: (B) each"""

    def __len__(self) -> int:
        return len(self.index)

    def tensors(self) -> dict[str, Tensor]:
        """Return everything in it by name, a label as `labels.TASK`."""
        found = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return found | {f"labels.{task}": values for task, values in self.labels.items()}

    @staticmethod
    def of(tensors: Mapping[str, Tensor]) -> Batch:
        """Return the batch that has these `tensors()`."""
        labels = {name.removeprefix("labels."): value for name, value in tensors.items() if name.startswith("labels.")}
        return Batch(**{name: value for name, value in tensors.items() if "." not in name}, labels=labels)

    def __getitem__(self, rows: slice) -> Batch:
        """Return some of the clips, padded as before; `text_rows` are those of all clips, and left out."""
        if len(range(*rows.indices(len(self)))) == len(self):
            return self
        return Batch.of({name: value[rows] for name, value in self.tensors().items() if name != "text_rows"})


@dataclass(frozen=True)
class FusionOutput:
    """What a model returns."""

    prediction: Tensor
    """(B) multimodal sentiment"""
    features: dict[str, Tensor] = field(default_factory=dict)
    """(B, d) each: per modality the encoder's output, and "fusion", the first layer of the fusion head"""
    unimodal: dict[str, Tensor] = field(default_factory=dict)
    """(B) each: unimodal sentiment, where the model predicts it itself"""
    losses: dict[str, Tensor] = field(default_factory=dict)
    """scalars that are added to the training loss"""

    def __getitem__(self, rows: slice | Tensor) -> FusionOutput:
        """Return the output of some clips; `losses` are batch-level and stay."""
        return FusionOutput(
            prediction=self.prediction[rows],
            features={name: values[rows] for name, values in self.features.items()},
            unimodal={name: values[rows] for name, values in self.unimodal.items()},
            losses=self.losses,
        )

    @staticmethod
    def concatenate(parts: Sequence[FusionOutput]) -> FusionOutput:
        """Join outputs along the batch; `losses` are batch-level and do not survive it.

        Raises:
            ValueError: losses that training would need are there.
        """
        if torch.is_grad_enabled() and any(part.losses for part in parts):
            raise ValueError("a model with per_sample=True returns batch-level losses, which cannot be joined")
        return FusionOutput(
            prediction=torch.cat([p.prediction for p in parts]),
            features={k: torch.cat([p.features[k] for p in parts]) for k in parts[0].features},
            unimodal={k: torch.cat([p.unimodal[k] for p in parts]) for k in parts[0].unimodal},
        )


@dataclass(frozen=True)
class TrainingData:
    """What a hook may know of the train split."""

    labels: Mapping[str, Tensor]
    """(N) each, on the run's device: `"M"` and, where known, `"T" "A" "V"`"""
    info: DataInfo


class TrainingHook(nn.Module):
    """Adds a loss to any model's training and watches it; every method may be left out.

    Parameters join the optimiser, in the group that the model's `parameter_groups` lists last;
    buffers are saved with the best weights. `loss` and `observe` see one micro-batch at a time; with a `per_sample`
    model all of a group's losses come before the first `observe`.

    On a GPU a step can be recorded once and replayed from then on (see graphs.py) if every hook allows it.
    """

    capturable = False
    """True promises that `loss` and `observe` are made of tensor operations that are the same in every step, whatever
    Python has done between steps (as in `end_epoch`), and that `observe` reads no parameters, which move meanwhile;
    `epoch` is then a tensor () on the device, which must not be asked for its value."""

    def loss(self, output: FusionOutput, batch: Batch) -> Tensor:
        """Return a scalar, a mean over the micro-batch, that is added to the training loss."""
        return output.prediction.new_zeros(())

    def observe(self, output: FusionOutput, batch: Batch, epoch: int | Tensor) -> None:
        """Look at a micro-batch after its backward pass; `epoch` counts from 1, a tensor () only if `capturable`."""

    def end_epoch(self, epoch: int) -> None:
        """Called when an epoch's last update is done."""

    def progress_state(self) -> dict[str, Tensor]:
        """Return what it has gathered beside parameters and buffers, for a training that is interrupted and resumed.

        A hook without it may have nothing such: where its attributes change, an interrupted training begins anew.
        """
        return {}

    def load_progress_state(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `progress_state` returned, as CPU tensors."""

    def unimodal(self, output: FusionOutput) -> dict[str, Tensor]:
        """Return the sentiment (B) by modality that the hook's own heads, if it has some, see in a model's output."""
        return {}

    def artifacts(self) -> dict[str, dict[str, Any]]:
        """Return tables `{name: {column: sequence or array of values}}` to save with the run as `NAME.csv`.

        A column `index` (train rows) is written as the clips' ids; small tables without it and without a column `epoch`
        are also printed. `benchmark labels` reads `labels`, `label_movement` and `true_labels` (see labels.py).
        """
        return {}


_CHECKED = ConfigDict(arbitrary_types_allowed=True, extra="forbid")
"""A spec's fields are what they should be, or importing its plugin says which is not."""

Presets = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""`{preset: {dataset: {config key: value}}}`; the first preset is the default."""


@pydantic_dataclass(frozen=True, config=_CHECKED)
class Range:
    """The numbers from `low` to `high`, both included, that a config key is searched over; `log` of their logarithm."""

    low: int | float
    high: int | float
    log: bool = False

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"a range goes from low to high, got {self.low} to {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"a range with log must be of positive numbers, got {self.low} to {self.high}")


Space = Mapping[str, Range | tuple[Any, ...]]
"""What `benchmark tune` searches, by config key (of a table `KEY.ENTRY`, of a hook `hook.KEY`): a `Range`, in JSON
`{"low": 1e-4, "high": 1e-2, "log": true}`, or the values that may be chosen."""


@pydantic_dataclass(frozen=True, kw_only=True, config=_CHECKED)
class ModelSpec:
    """A model as the registry sees it.

    Args:
        name: what users type after `--model`.
        summary: one line for `benchmark list`.
        build: `build(config, data: DataInfo) -> nn.Module`; `config` also has the fields of `Training`.
        config: the model's own keys; those of `Rates` by default.
        presets: published hyper-parameters by preset and dataset.
        training: defaults of the training loop.
        hooks: names of hooks the model is always trained with.
        hook_config: `hook_config(config) -> dict` of `hook.…` defaults derived from the model's own keys.
        needs: what the data must have, and all that the model gets of its inputs: `"text"` (tokens), `"audio"`,
            `"vision"`, `"text_features"` (the file's own or, where a text encoder is named or the file has none, the
            states of a frozen one); also `"alignment"`, `"padding"` (batches as long as the file's arrays, for a model
            whose results depend on it), or tasks such as `"T"`.
        per_sample: no batch statistics and no clipping inside a group: a group may run as one forward.
        tuned_for: the text encoder that the presets were published for, as `"BERT-base, frozen"`.
        search: what `benchmark tune` searches where the user names nothing else.
        import_checkpoint: `import_checkpoint(state)` translates a foreign state dict into a dict of `"config"` (keys
            read off its shapes), `"dims"` (feature widths), `"model"` and `"hooks"` (state dicts, hooks by name).
        version: part of a run's identity; raise it when the same config starts to mean another model.
    """

    name: str
    summary: str
    build: Callable[..., nn.Module]
    config: type[Config] = Rates
    presets: Presets = field(default_factory=dict)
    training: Training = field(default_factory=Training)
    hooks: tuple[str, ...] = ()
    hook_config: Callable[[Any], dict[str, Any]] | None = None
    needs: SkipValidation[tuple[str, ...] | Callable[[Any], tuple[str, ...]]] = ()
    per_sample: bool = False
    tuned_for: str = ""
    search: Space = field(default_factory=dict)
    import_checkpoint: Callable[..., Any] | None = None
    citation: str = ""
    url: str = ""
    version: str = "1"


@pydantic_dataclass(frozen=True, kw_only=True, config=_CHECKED)
class HookSpec:
    """A training hook; `build(config, train: TrainingData, feature_dims: dict[str, int]) -> TrainingHook`.

    `excludes` are the hooks that no model can have besides it, each with the reason; `control` is the hook
    that replaces it in the run that shows what it adds; in a model that always has it, `control_setting` as
    `"key=value"` makes that run.
    """

    name: str
    summary: str
    build: Callable[..., TrainingHook]
    config: type[Config] = Config
    excludes: Mapping[str, str] = field(default_factory=dict)
    control: str = ""
    control_setting: str = ""
    version: str = "1"


@pydantic_dataclass(frozen=True, kw_only=True, config=_CHECKED)
class DatasetSpec:
    """A dataset's facts; its sizes come from the file.

    Args:
        label_range: labels lie in ±this; None where the user must say.
        metrics: which family of `registry.metrics.regression`; None for `sims` where labels lie in ±1, else `mosi`.
        text_encoder: the default for `--text-encoder`; None where the user must choose.
        splits: published sizes; a note says where a file has others.
        sha256: known files by name.
        published_at: where their authors publish them, in words.
        presets_of: the dataset whose published hyper-parameters are used; its own by default.
        generate: makes the data, a `registry.FeatureFile`, for a dataset that needs no file.
        epochs: most epochs where the user sets none.
        caption: what every table of it must say.
        version: is raised where `generate` makes other data than before.
    """

    name: str
    summary: str
    label_range: float | None
    metrics: Literal["mosi", "sims"] | None = None
    text_encoder: str | None = None
    splits: Mapping[Literal["train", "valid", "test"], int] = field(default_factory=dict)
    sha256: Mapping[str, str] = field(default_factory=dict)
    published_at: str = ""
    presets_of: str | None = None
    generate: Callable[[], Any] | None = None
    epochs: int | None = None
    caption: str = ""
    version: str = "1"


@pydantic_dataclass(frozen=True, kw_only=True, config=_CHECKED)
class PublishedResult:
    """A model's published figures on one dataset.

    Args:
        source: where they stand.
        kind: a paper's table, MMSA's table, or somebody's repetition.
        metrics: names as in `registry.metrics`; accuracies and F1 scores are fractions, MAE is in label units.
        std: spread over seeds of some of the metrics.
        data_setting: None where the source does not say.
        text_encoder: as `ModelSpec.tuned_for`; empty where the source does not say.
        seeds: how many the figures are a mean of; None where the source does not say.
        second_hand: read in another publication than the one that they are from.
    """

    source: str
    kind: Literal["paper", "upstream", "re-run"]
    dataset: str
    model: str
    metrics: Mapping[str, float]
    std: Mapping[str, float] = field(default_factory=dict)
    task: Literal["regression", "classification"] = "regression"
    data_setting: Literal["aligned", "unaligned"] | None = None
    text_encoder: str = ""
    seeds: int | None = None
    note: str = ""
    second_hand: bool = False


@pydantic_dataclass(frozen=True, kw_only=True, config=_CHECKED)
class PublishedResults:
    """Figures that others have published, to stand beside one's own; found through entry points in `mmsa.published`."""

    name: str
    summary: str
    results: tuple[PublishedResult, ...]


def register_model(name: str, *, summary: str = "", **options: Any) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Describe a class `Model(config, data)` as a model: `@register_model("name", summary=…)`; options as `ModelSpec`.

    The class is found by its module's entry point in `mmsa.models` or by `--plugin FILE.py`.
    """

    def decorate(model: type[nn.Module]) -> type[nn.Module]:
        model.spec = ModelSpec(name=name, summary=summary, build=model, **options)  # type: ignore[attr-defined]
        return model

    return decorate
