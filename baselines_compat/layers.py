"""What several baselines share: their text, means and states over real steps, and the networks of TFN."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from importlib.resources import files
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import batch_norm, relu

from registry import Batch, Config, DataInfo

FROZEN, FINE_TUNED = "BERT-base, frozen", "BERT-base, fine-tuned"
"""which text encoder upstream's hyper-parameters were published for"""


def presets(
    model: str, *, instead: Mapping[str, Any] | None = None, **more: Any
) -> dict[str, dict[str, dict[str, Any]]]:
    """Return upstream's hyper-parameters: `corrected`, and `mmsa` with upstream's behaviour as well.

    Args:
        model: upstream's name of it.
        instead: values of `mmsa` that upstream uses instead of those it publishes.
        more: further values of both presets, for every dataset.
    """
    published = json.loads((files("baselines_compat") / "presets" / "mmsa.json").read_text("utf-8"))[model]
    corrected = {dataset: {**values, **more} for dataset, values in published.items()}
    return {
        "corrected": corrected,
        "mmsa": {dataset: {**values, **(instead or {}), "as_upstream": True} for dataset, values in corrected.items()},
    }


def search(model: str) -> dict[str, list[Any]]:
    """Return what upstream's tuner chooses from for a model, by our key; what it never varies is left out."""
    return json.loads((files("baselines_compat") / "presets" / "search.json").read_text("utf-8"))["models"][model]


def one_rate(by_preset: dict[str, dict[str, dict[str, Any]]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return presets that train the text encoder as everything else, where upstream has one rate and decay for both."""
    return {
        preset: {
            dataset: {
                **values,
                "learning_rate_bert": values["learning_rate"],
                "weight_decay_bert": values["weight_decay"],
            }
            for dataset, values in by_dataset.items()
        }
        for preset, by_dataset in by_preset.items()
    }


class TextConfig(Config):
    """Keys of every baseline: how it reads text, and how fast it learns."""

    finetune_text: bool = Field(False, description="train the text encoder too; else its features are frozen")
    learning_rate: float = Field(1e-3, ge=0, description="learning rate of everything but the text encoder")
    weight_decay: float = Field(0.0, ge=0, description="L2 of everything but the text encoder")
    learning_rate_bert: float = Field(5e-5, ge=0, description="learning rate of a fine-tuned text encoder")
    weight_decay_bert: float = Field(1e-3, ge=0, description="L2 of it, biases and LayerNorms excepted")


class BaselineConfig(TextConfig):
    """Keys of every baseline that upstream has."""

    as_upstream: bool = Field(False, description="keep what upstream gets wrong, as its padding (docs/differences.md)")


def needs(config: BaselineConfig) -> tuple[str, ...]:
    """Return what a baseline needs of the data: text as its config has it, audio and vision."""
    padding = ("padding",) if config.as_upstream else ()
    return ("text" if config.finetune_text else "text_features", "audio", "vision", *padding)


class TextInput(nn.Module):
    """Token states (B, L, `width`) and the number of real ones (B).

    They come from a text encoder that is trained with the model, or are the batch's features of a frozen one.
    """

    def __init__(self, config: TextConfig, data: DataInfo, *, pooler: bool = False) -> None:
        super().__init__()
        self.width = data.dims["text"]
        self.encoder = None
        if config.finetune_text:
            assert data.text_encoder is not None
            self.encoder = data.text_encoder.build(pooler=pooler)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        if self.encoder is not None:
            assert batch.text_mask is not None
            states = self.encoder(batch.text_ids, batch.text_mask, batch.text_segments, batch.text_rows)
            return states, batch.text_mask.sum(1)
        assert batch.text is not None
        if batch.text_lengths is None:
            return batch.text, torch.full_like(batch.index, batch.text.shape[1])
        return batch.text, batch.text_lengths

    def parameter_groups(self, config: TextConfig) -> list[dict[str, Any]]:
        """Return the optimiser's groups of the text encoder; they are empty where it is frozen."""
        return text_groups(self, config)


def text_groups(encoder: nn.Module, config: TextConfig) -> list[dict[str, Any]]:
    """Return a text encoder's groups: its biases and LayerNorms are not decayed."""
    decayed: list[Tensor] = []
    spared: list[Tensor] = []
    for name, parameter in encoder.named_parameters():
        (spared if "bias" in name or "norm" in name.lower() else decayed).append(parameter)
    return [
        {"params": decayed, "lr": config.learning_rate_bert, "weight_decay": config.weight_decay_bert},
        {"params": spared, "lr": config.learning_rate_bert, "weight_decay": 0.0},
    ]


class Baseline(nn.Module):
    """A model with a `TextInput` called `text`; what else it has is trained at `learning_rate`."""

    text: TextInput

    def parameter_groups(self, config: Any) -> list[dict[str, Any]]:
        """Return the optimiser's groups: the text encoder's, then `other_groups`."""
        return [*self.text.parameter_groups(config), *self.other_groups(config)]

    def other_groups(self, config: Any) -> list[dict[str, Any]]:
        """Return the groups of everything but the text encoder; hooks' parameters join the last."""
        others = self.parameters_but(self.text.parameters())
        return [{"params": others, "lr": config.learning_rate, "weight_decay": config.weight_decay}]

    def parameters_but(self, taken: Iterable[Tensor]) -> list[nn.Parameter]:
        """Return the parameters that are not among `taken`."""
        there = {id(parameter) for parameter in taken}
        return [parameter for parameter in self.parameters() if id(parameter) not in there]


def real_steps(lengths: Tensor, steps: int) -> Tensor:
    """Return (B, steps), True at a sequence's real steps, of lengths (B)."""
    return torch.arange(steps, device=lengths.device) < lengths[:, None]


def mean_over_steps(sequence: Tensor, lengths: Tensor | None) -> Tensor:
    """Return the mean (B, d) of a sequence (B, L, d) over its real steps or, without lengths, over padding too."""
    if lengths is None:
        return sequence.mean(1)
    real = real_steps(lengths, sequence.shape[1])
    return torch.where(real[:, :, None], sequence, 0.0).sum(1) / lengths[:, None]


def at_end(states: Tensor, lengths: Tensor | None) -> Tensor:
    """Return the state (B, d) at the last real step of states (B, L, d) or, without lengths, after padding."""
    if lengths is None:
        return states[:, -1]
    return states.gather(1, (lengths - 1)[:, None, None].expand(-1, 1, states.shape[2])).squeeze(1)


def last_state(rnn: nn.LSTM, sequence: Tensor, lengths: Tensor | None) -> Tensor:
    """Return the state (B, d) of a one-directional LSTM after the last real step or, without lengths, after padding."""
    return at_end(rnn(sequence)[0], lengths)


def align(sequence: Tensor, lengths: Tensor, to: Tensor, steps: int) -> Tensor:
    """Spread a sequence over the steps of another: step j gets the mean of the part of it that falls there.

    Sequences that are aligned already stay as they are; padding is 0.

    Args:
        sequence: (B, L, d), its lengths (B).
        lengths: real steps of it.
        to: (B) real steps of the other, usually the text.
        steps: the other's padded length.

    Returns:
        (B, steps, d).
    """
    real = real_steps(lengths, sequence.shape[1])
    sums = torch.where(real[:, :, None], sequence, 0.0).double().cumsum(1)
    sums = torch.cat([torch.zeros_like(sums[:, :1]), sums], dim=1)
    step = torch.arange(steps, device=lengths.device)[None]
    start = (step * lengths[:, None]).div(to[:, None], rounding_mode="floor").minimum(lengths[:, None] - 1)
    end = -(-((step + 1) * lengths[:, None])).div(to[:, None], rounding_mode="floor")
    end = end.minimum(lengths[:, None])
    width = sequence.shape[2]
    total = sums.gather(1, end[:, :, None].expand(-1, -1, width))
    total = total - sums.gather(1, start[:, :, None].expand(-1, -1, width))
    means = (total / (end - start).clamp(min=1)[:, :, None]).to(sequence.dtype)
    return torch.where(real_steps(to, steps)[:, :, None], means, 0.0)


def fold(sequence: Tensor, steps: int) -> Tensor:
    """Upstream's alignment of (B, L, d): step j gets the mean of steps j, j + steps, j + 2·steps …, padding or not.

    Where they do not fill the last round, the last step is repeated.
    """
    missing = -sequence.shape[1] % steps
    filled = torch.cat([sequence, sequence[:, -1:].expand(-1, missing, -1)], dim=1)
    return filled.unflatten(1, (-1, steps)).mean(1)


def on_text_steps(
    batch: Batch, text: Tensor, lengths: Tensor, *, as_upstream: bool
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Return text, audio and vision (B, L, d) on the text's steps, for models that read them step by step.

    Args:
        batch: has audio and vision.
        text: token states (B, L, d), of which `lengths` (B) are real.
        as_upstream: padding is read like anything else, and audio and vision are folded.

    Returns:
        the sequences, and how many of their steps are real: None if all are to be read.
    """
    assert batch.audio is not None
    assert batch.vision is not None
    steps = text.shape[1]
    if as_upstream:
        return {"text": text, "audio": fold(batch.audio, steps), "vision": fold(batch.vision, steps)}, None
    assert batch.audio_lengths is not None
    assert batch.vision_lengths is not None
    lengths = lengths.clamp(min=1)
    audio = align(batch.audio, batch.audio_lengths, lengths, steps)
    return {"text": text, "audio": audio, "vision": align(batch.vision, batch.vision_lengths, lengths, steps)}, lengths


class Normalise(nn.BatchNorm1d):
    """Batch normalisation that takes the running statistics for a batch of one, which has no variance."""

    def forward(self, features: Tensor) -> Tensor:
        if self.training and len(features) == 1:
            return batch_norm(features, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(features)


class FeatureNet(nn.Module):
    """TFN's network for audio and vision: normalisation → dropout → three linear layers with ReLU, on (B, d)."""

    def __init__(self, in_features: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm = Normalise(in_features)
        self.dropout = nn.Dropout(dropout)
        self.layer_1 = nn.Linear(in_features, hidden)
        self.layer_2 = nn.Linear(hidden, hidden)
        self.layer_3 = nn.Linear(hidden, hidden)

    def forward(self, features: Tensor) -> Tensor:
        return relu(self.layer_3(relu(self.layer_2(relu(self.layer_1(self.dropout(self.norm(features))))))))


class TextNet(nn.Module):
    """TFN's network for text, MFM's for each modality: the last state of an LSTM over (B, L, d) → dropout → linear."""

    def __init__(self, in_features: int, hidden: int, out: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.rnn = nn.LSTM(in_features, hidden, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(hidden, out)

    def forward(self, states: Tensor, lengths: Tensor | None) -> Tensor:
        return self.linear(self.dropout(last_state(self.rnn, states, lengths)))


class Head(nn.Module):
    """Dropout → linear → ReLU → linear → ReLU → linear, on joined features (B, d)."""

    def __init__(self, in_features: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.layer_1 = nn.Linear(in_features, hidden)
        self.layer_2 = nn.Linear(hidden, hidden)
        self.layer_3 = nn.Linear(hidden, 1)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the prediction (B) and the first layer's output (B, hidden)."""
        representation = relu(self.layer_1(self.dropout(features)))
        return self.layer_3(relu(self.layer_2(representation))).squeeze(-1), representation


class ModalityNets(nn.Module):
    """TFN's three networks, which LF_DNN, LMF and the multi-task models share: a vector for each modality.

    Upstream averages audio and vision over padding, lets the text's LSTM read padding, and never applies its dropout;
    here only real steps count and the dropout is applied, unless `as_upstream`.

    Args:
        hidden_dims: widths of text, audio and vision.
        text_out: width of the text's vector.
        dropouts: of audio, vision and text, in this order.
    """

    def __init__(
        self,
        dims: Mapping[str, int],
        hidden_dims: tuple[int, int, int],
        text_out: int,
        dropouts: tuple[float, float, float],
        *,
        as_upstream: bool,
    ) -> None:
        super().__init__()
        text, audio, vision = hidden_dims
        self.as_upstream = as_upstream
        self.text = TextNet(dims["text"], text, text_out, 0.0 if as_upstream else dropouts[2])
        self.audio = FeatureNet(dims["audio"], audio, dropouts[0])
        self.vision = FeatureNet(dims["vision"], vision, dropouts[1])
        self.widths = {"text": text_out, "audio": audio, "vision": vision}

    def forward(self, batch: Batch, states: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        """Return the vectors (B, d) of a batch whose text has these token states (B, L, d) and lengths (B)."""
        assert batch.audio is not None
        assert batch.vision is not None
        padded = self.as_upstream
        return {
            "text": self.text(states, None if padded else lengths),
            "audio": self.audio(mean_over_steps(batch.audio, None if padded else batch.audio_lengths)),
            "vision": self.vision(mean_over_steps(batch.vision, None if padded else batch.vision_lengths)),
        }
