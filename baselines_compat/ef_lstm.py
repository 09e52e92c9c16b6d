"""EF-LSTM: text, audio and vision joined step by step, and one LSTM that reads them.

Upstream normalises each step over all features, so that large ones drown the rest; here each feature is normalised
over the real steps of the batch. Upstream's LSTM reads padding, and upstream folds unaligned audio and vision
(`layers.fold`); here they are spread over the text's real tokens, and the LSTM ends with them. Both remain under
`as_upstream`.

No modality has a vector of its own in it, so there are no features to train unimodal heads on.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import pad, relu

from registry import Batch, DataInfo, FusionOutput, ModelSpec, Training

from .layers import (
    FROZEN,
    Baseline,
    BaselineConfig,
    TextInput,
    at_end,
    needs,
    on_text_steps,
    presets,
    real_steps,
    search,
)

MOMENTUM = 0.1
"""how fast running statistics follow a batch's, as torch has it"""


class EFLSTMConfig(BaselineConfig):
    """Upstream's names; the defaults are upstream's for CMU-MOSI."""

    weight_decay: float = Field(0.005, ge=0, description="L2 of everything but the text encoder")
    hidden_dims: int = Field(128, ge=1, description="width of the LSTM and of the head")
    num_layers: int = Field(4, ge=1, description="layers of the LSTM")
    dropout: float = Field(0.5, ge=0, lt=1, description="dropout between LSTM layers, after the last and in the head")


class NormaliseSteps(nn.BatchNorm1d):
    """Batch normalisation of each feature of sequences (B, L, d) over the real steps of a batch."""

    running_mean: Tensor
    running_var: Tensor

    def forward(self, sequence: Tensor, lengths: Tensor) -> Tensor:  # type: ignore[override]
        mean, variance = self.running_mean, self.running_var
        if self.training:
            real = real_steps(lengths, sequence.shape[1])[:, :, None]
            count = lengths.sum()
            mean = torch.where(real, sequence, 0.0).sum((0, 1)) / count
            variance = torch.where(real, (sequence - mean).square(), 0.0).sum((0, 1)) / count
            with torch.no_grad():
                self.running_mean.lerp_(mean, MOMENTUM)
                self.running_var.lerp_(variance * count / (count - 1).clamp(min=1), MOMENTUM)
        return (sequence - mean) * (variance + self.eps).rsqrt() * self.weight + self.bias


class EFLSTM(Baseline):
    """Early fusion of text, audio and vision."""

    def __init__(self, config: EFLSTMConfig, data: DataInfo) -> None:
        super().__init__()
        self.text = TextInput(config, data)
        self.as_upstream = config.as_upstream
        self.feature_dims: dict[str, int] = {}
        joined = self.text.width + data.dims["audio"] + data.dims["vision"]
        self.norm = nn.BatchNorm1d(data.max_lengths["text"]) if self.as_upstream else NormaliseSteps(joined)
        between = config.dropout if config.num_layers > 1 else 0.0
        self.rnn = nn.LSTM(joined, config.hidden_dims, config.num_layers, dropout=between, batch_first=True)
        self.dropout = nn.Dropout(config.dropout)
        self.layer_1 = nn.Linear(config.hidden_dims, config.hidden_dims)
        self.layer_2 = nn.Linear(config.hidden_dims, 1)

    def forward(self, batch: Batch) -> FusionOutput:
        states, lengths = self.text(batch)
        if self.as_upstream:  # a split's tokens may be padded to less than another's
            states = pad(states, (0, 0, 0, self.norm.num_features - states.shape[1]))
        aligned, lengths = on_text_steps(batch, states, lengths, as_upstream=self.as_upstream)
        joined = torch.cat([aligned["text"], aligned["audio"], aligned["vision"]], dim=-1)
        normal = self.norm(joined) if lengths is None else self.norm(joined, lengths)
        state = at_end(self.rnn(normal)[0], lengths)
        hidden = relu(self.layer_1(self.dropout(state)))
        return FusionOutput(prediction=self.layer_2(self.dropout(hidden)).squeeze(-1))


SPEC = ModelSpec(
    name="ef_lstm",
    summary="EF-LSTM: early fusion, one LSTM over text, audio and vision",
    build=EFLSTM,
    config=EFLSTMConfig,
    presets=presets("ef_lstm"),
    training=Training(batch_size=32),
    needs=needs,
    tuned_for=FROZEN,
    search=search("ef_lstm"),
    citation=(
        "Jennifer Williams, Steven Kleinegesse, Ramona Comanescu, Oana Radu: Recognizing Emotions in Video Using "
        "Multimodal DNN Feature Fusion. Challenge-HML 2018."
    ),
    url="https://aclanthology.org/W18-3302",
)
