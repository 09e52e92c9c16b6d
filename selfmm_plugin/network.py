"""The Self-MM network: an encoder for each modality, late fusion, and a head on the joined features.

The unimodal heads belong to the hook `ulgm` (supervision.py), which any other model may borrow.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from registry import Batch, Config, DataInfo, FusionOutput

from .heads import PredictionHead
from .supervision import TASKS

MODALITIES = tuple(TASKS)


class SelfMMConfig(Config):
    """Upstream's flat names; the defaults are upstream's for CMU-MOSI."""

    modalities: tuple[str, ...] = Field(MODALITIES, description="inputs the network reads")
    tasks: str | None = Field(
        None, description="losses to train, as MTAV, MT or M; all of the modalities by default, M is no ULGM"
    )
    supervision: Literal["self", "human"] = Field("self", description="unimodal labels: generated, or human ones")
    exclude_zero: bool = Field(
        True,
        alias="excludeZero",
        description="a label of 0 belongs to neither class; else it counts as positive",
    )
    label_range: float | None = Field(
        None,
        gt=0,
        alias="H",
        description="generated labels are clamped to ± this; the data's own range by default",
    )
    learning_rate_bert: float = Field(5e-5, ge=0, description="learning rate of the text encoder")
    learning_rate_audio: float = Field(5e-3, ge=0, description="learning rate of the audio encoder")
    learning_rate_video: float = Field(5e-3, ge=0, description="learning rate of the vision encoder")
    learning_rate_other: float = Field(1e-3, ge=0, description="learning rate of the fusion head and unimodal heads")
    weight_decay_bert: float = Field(1e-3, ge=0, description="L2 of the text encoder, biases and LayerNorms excepted")
    weight_decay_audio: float = Field(1e-3, ge=0, description="L2 of the audio encoder")
    weight_decay_video: float = Field(1e-3, ge=0, description="L2 of the vision encoder")
    weight_decay_other: float = Field(1e-3, ge=0, description="L2 of the fusion head and unimodal heads")
    a_lstm_hidden_size: int = Field(16, ge=1, description="width of the audio LSTM")
    v_lstm_hidden_size: int = Field(32, ge=1, description="width of the vision LSTM")
    a_lstm_layers: int = Field(1, ge=1, description="layers of the audio LSTM")
    v_lstm_layers: int = Field(1, ge=1, description="layers of the vision LSTM")
    a_lstm_bidirectional: bool = Field(False, description="whether the audio LSTM reads both ways")
    v_lstm_bidirectional: bool = Field(False, description="whether the vision LSTM reads both ways")
    a_lstm_dropout: float = Field(0.0, ge=0, lt=1, description="dropout between audio LSTM layers and after the last")
    v_lstm_dropout: float = Field(0.0, ge=0, lt=1, description="dropout between vision LSTM layers and after the last")
    audio_out: int = Field(16, ge=1, description="width of the audio features")
    video_out: int = Field(32, ge=1, description="width of the vision features")
    post_fusion_dim: int = Field(128, ge=1, description="width of the fusion head")
    post_text_dim: int = Field(32, ge=1, description="width of the text head")
    post_audio_dim: int = Field(16, ge=1, description="width of the audio head")
    post_video_dim: int = Field(32, ge=1, description="width of the vision head")
    post_fusion_dropout: float = Field(0.0, ge=0, lt=1, description="dropout before the fusion head")
    post_text_dropout: float = Field(0.1, ge=0, lt=1, description="dropout before the text head")
    post_audio_dropout: float = Field(0.1, ge=0, lt=1, description="dropout before the audio head")
    post_video_dropout: float = Field(0.0, ge=0, lt=1, description="dropout before the vision head")

    @field_validator("modalities")
    @classmethod
    def _known_modalities(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or len(set(value)) != len(value) or not set(value) <= set(MODALITIES):
            raise ValueError(f"must be any of {', '.join(MODALITIES)}, each once")
        return tuple(name for name in MODALITIES if name in value)

    @field_validator("tasks")
    @classmethod
    def _tasks_of_modalities(cls, value: str | None, info: ValidationInfo) -> str | None:
        initials = "".join(TASKS[name] for name in info.data.get("modalities", MODALITIES))
        if value is not None and ("M" not in value or len(set(value)) < len(value) or set(value) - {"M", *initials}):
            raise ValueError(f"must be M and any of {initials}, each once")
        if value is None or len(value) == 1 + len(initials):
            return None
        return "".join(letter for letter in ("M", *initials) if letter in value)

    def hook_values(self) -> dict[str, Any]:
        """Return the keys of the hook `ulgm` that follow from these."""
        return {
            "tasks": self.tasks,
            "supervision": self.supervision,
            "exclude_zero": self.exclude_zero,
            "label_range": self.label_range,
            "head_dims": {"text": self.post_text_dim, "audio": self.post_audio_dim, "vision": self.post_video_dim},
            "head_dropouts": {
                "text": self.post_text_dropout,
                "audio": self.post_audio_dropout,
                "vision": self.post_video_dropout,
            },
        }


class SequenceEncoder(nn.Module):
    """An LSTM over (B, L, d) whose state at the last real step, in every direction, gives features (B, out)."""

    def __init__(
        self, in_features: int, hidden: int, out: int, *, layers: int, bidirectional: bool, dropout: float
    ) -> None:
        super().__init__()
        self.directions = 2 if bidirectional else 1
        self.rnn = nn.LSTM(
            in_features,
            hidden,
            num_layers=layers,
            bidirectional=bidirectional,
            dropout=dropout if layers > 1 else 0.0,
            batch_first=True,
        )
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(hidden * self.directions, out)

    def forward(self, sequence: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(sequence, lengths.cpu(), batch_first=True, enforce_sorted=False)
        _, (state, _) = self.rnn(packed)
        last_layer = torch.cat(list(state[-self.directions :]), dim=-1)
        return self.linear(self.dropout(last_layer))


class SelfMM(nn.Module):
    """Late fusion of text (first token), audio and vision, as upstream's Self-MM."""

    def __init__(self, config: SelfMMConfig, data: DataInfo) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict()
        widths: dict[str, int] = {}
        if "text" in config.modalities:
            assert data.text_encoder is not None
            self.encoders["text"] = data.text_encoder.build()
            widths["text"] = data.text_encoder.width
        for name, initial, width in (("audio", "a", config.audio_out), ("vision", "v", config.video_out)):
            if name in config.modalities:
                self.encoders[name] = SequenceEncoder(
                    data.dims[name],
                    getattr(config, f"{initial}_lstm_hidden_size"),
                    width,
                    layers=getattr(config, f"{initial}_lstm_layers"),
                    bidirectional=getattr(config, f"{initial}_lstm_bidirectional"),
                    dropout=getattr(config, f"{initial}_lstm_dropout"),
                )
                widths[name] = width
        self.fusion = PredictionHead(sum(widths.values()), config.post_fusion_dim, config.post_fusion_dropout)
        self.feature_dims = {**widths, "fusion": config.post_fusion_dim}

    def forward(self, batch: Batch) -> FusionOutput:
        features: dict[str, Tensor] = {}
        for name, encoder in self.encoders.items():
            if name == "text":
                features[name] = encoder(batch.text_ids, batch.text_mask, batch.text_segments)[:, 0]
            else:
                features[name] = encoder(getattr(batch, name), getattr(batch, f"{name}_lengths"))
        prediction, representation = self.fusion(torch.cat(list(features.values()), dim=-1))
        return FusionOutput(prediction=prediction, features={**features, "fusion": representation})

    def parameter_groups(self, config: SelfMMConfig) -> list[dict[str, Any]]:
        """Return the optimiser's groups as upstream has them; the last one also takes the unimodal heads."""
        groups: list[dict[str, Any]] = []
        if "text" in self.encoders:
            decayed: list[Tensor] = []
            spared: list[Tensor] = []
            for name, parameter in self.encoders["text"].named_parameters():
                (spared if "bias" in name or "norm" in name.lower() else decayed).append(parameter)
            groups += [
                {"params": decayed, "lr": config.learning_rate_bert, "weight_decay": config.weight_decay_bert},
                {"params": spared, "lr": config.learning_rate_bert, "weight_decay": 0.0},
            ]
        rates = {
            "audio": (config.learning_rate_audio, config.weight_decay_audio),
            "vision": (config.learning_rate_video, config.weight_decay_video),
        }
        groups += [
            {"params": list(self.encoders[name].parameters()), "lr": lr, "weight_decay": decay}
            for name, (lr, decay) in rates.items()
            if name in self.encoders
        ]
        groups.append(
            {
                "params": list(self.fusion.parameters()),
                "lr": config.learning_rate_other,
                "weight_decay": config.weight_decay_other,
            }
        )
        return groups
