"""MAG-BERT: a gate behind the text encoder's embeddings moves each token by what audio and vision say at it.

- Audio and vision that are not aligned are spread over the tokens (`layers.align`); upstream's way, kept under
  `as_upstream`, gives a token steps from all over the clip, and padding (`layers.fold`).
- There are no features: modalities are fused before anything encodes them, so none has a vector of its own, and
  hooks such as `ulgm` have nothing to train on.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn.functional import relu

from registry import Batch, DataInfo, FusionOutput, InputError, ModelSpec, Training

from .layers import (
    FINE_TUNED,
    Baseline,
    BaselineConfig,
    TextInput,
    align,
    fold,
    needs,
    one_rate,
    presets,
    search,
)

ENCODERS = ("bert", "camembert", "distilbert", "mpnet", "roberta", "xlm-roberta")
"""Hugging Face model types whose module `embeddings` gives the encoder (B, L, width)"""


class BertMAGConfig(BaselineConfig):
    """Upstream's names; the defaults are upstream's for CMU-MOSI, which has one learning rate for everything."""

    finetune_text: bool = Field(True, description="the gate sits inside the text encoder, which is always trained")
    learning_rate: float = Field(2e-5, ge=0, description="learning rate of everything but the text encoder")
    learning_rate_bert: float = Field(2e-5, ge=0, description="learning rate of the text encoder")
    weight_decay_bert: float = Field(0.0, ge=0, description="L2 of it, biases and LayerNorms excepted")
    beta_shift: float = Field(1.0, ge=0, description="a token is moved at most so many times its embedding's length")
    dropout_prob: float = Field(0.3, ge=0, lt=1, description="dropout behind the gate")

    @field_validator("finetune_text")
    @classmethod
    def _is_trained(cls, value: bool) -> bool:
        if not value:
            raise ValueError(
                "must be true, as the gate sits inside the text encoder, and frozen features never pass it"
            )
        return value


class Gate(nn.Module):
    """The multimodal adaptation gate, on the embeddings (B, L, width) of tokens."""

    def __init__(self, dims: dict[str, int], width: int, limit: float, dropout: float) -> None:
        super().__init__()
        self.limit = limit
        self.gates = nn.ModuleDict({name: nn.Linear(dim + width, width) for name, dim in dims.items()})
        self.shifts = nn.ModuleDict({name: nn.Linear(dim, width) for name, dim in dims.items()})
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, beside: dict[str, Tensor]) -> Tensor:
        """Move tokens by the sequences (B, L, d) beside them."""
        shift = torch.zeros_like(tokens)
        for name, sequence in beside.items():
            gate = relu(self.gates[name](torch.cat([sequence, tokens], dim=-1)))
            shift = shift + gate * self.shifts[name](sequence)
        length = shift.norm(dim=-1, keepdim=True)
        scale = self.limit * tokens.norm(dim=-1, keepdim=True) / (length + 1e-6)
        return self.dropout(self.norm(tokens + scale.clamp(max=1.0) * shift))


class BertMAG(Baseline):
    """A text encoder with the gate inside, and a linear layer on its pooled first token.

    An encoder that has no pooler gets one of BERT's form, which starts at random.
    """

    def __init__(self, config: BertMAGConfig, data: DataInfo) -> None:
        super().__init__()
        self.text = TextInput(config, data, pooler=True)
        settings = self._encoder().config
        if settings.model_type not in ENCODERS:
            raise InputError(
                f"bert_mag has no place for its gate in a text encoder of type {settings.model_type!r}: "
                f"pass one of {', '.join(ENCODERS)}"
            )
        self.as_upstream = config.as_upstream
        width = self.text.width
        dims = {name: data.dims[name] for name in ("vision", "audio")}
        self.gate = Gate(dims, width, config.beta_shift, config.dropout_prob)
        self.pooler = None if getattr(self._encoder(), "pooler", None) else nn.Linear(width, width)
        self.dropout = nn.Dropout(getattr(settings, "hidden_dropout_prob", 0.1))
        self.head = nn.Linear(width, 1)
        for layer in (*self.gate.modules(), self.pooler, self.head):
            if isinstance(layer, nn.Linear):  # as the encoder's own layers start
                nn.init.normal_(layer.weight, std=settings.initializer_range)
                nn.init.zeros_(layer.bias)
        self.feature_dims: dict[str, int] = {}

    def _encoder(self) -> Any:
        """Return the Hugging Face model."""
        assert self.text.encoder is not None
        return self.text.encoder.model

    def forward(self, batch: Batch) -> FusionOutput:
        beside = {name: self._aligned(batch, name) for name in ("vision", "audio")}
        # The hook lives for this call only: what it gives is what the encoder's layers read.
        with self._encoder().embeddings.register_forward_hook(lambda *call: self._moved(call[-1], beside)):
            states, _ = self.text(replace(batch, text_rows=None))  # the gate reads (B, L)
        pooled = self._encoder().pooler(states) if self.pooler is None else self.pooler(states[:, 0]).tanh()
        return FusionOutput(prediction=self.head(self.dropout(pooled)).squeeze(-1))

    def _moved(self, tokens: Tensor, beside: dict[str, Tensor]) -> Tensor:
        """Return token embeddings through the gate, which computes in float32, in their own precision."""
        return self.gate(tokens.float(), beside).to(tokens.dtype)

    def _aligned(self, batch: Batch, name: str) -> Tensor:
        """Return a modality (B, L, d) beside the text's L tokens."""
        assert batch.text_mask is not None
        sequence, steps = getattr(batch, name), batch.text_mask.shape[1]
        if self.as_upstream:
            return fold(sequence, steps)
        return align(sequence, getattr(batch, f"{name}_lengths"), batch.text_mask.sum(1), steps)


SPEC = ModelSpec(
    name="bert_mag",
    summary="MAG-BERT: audio and vision move the text encoder's token embeddings",
    build=BertMAG,
    config=BertMAGConfig,
    presets=one_rate(presets("bert_mag")),
    training=Training(batch_size=32),
    needs=needs,
    per_sample=True,
    tuned_for=FINE_TUNED,
    search=search("bert_mag"),
    citation=(
        "Wasifur Rahman, Md Kamrul Hasan, Sangwu Lee, AmirAli Bagher Zadeh, Chengfeng Mao, Louis-Philippe Morency, "
        "Ehsan Hoque: Integrating Multimodal Information in Large Pretrained Transformers. ACL 2020."
    ),
    url="https://aclanthology.org/2020.acl-main.214/",
)
