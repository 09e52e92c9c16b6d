"""MISA: each modality in a space that all share and in one of its own, and attention over the six vectors.

Unless `as_upstream`:
- audio and vision are read to their own ends; upstream reads as many steps as the text has tokens;
- `weight_decay` counts; upstream publishes it and does not use it.

Upstream's adversarial loss (`use_cmd_sim=False`) ends in an error, and its moment loss has a gradient of NaN for a
batch of one clip; here both work.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.nn.functional import cross_entropy, mse_loss, relu
from torch.nn.utils.rnn import pack_padded_sequence

from registry import Batch, DataInfo, FusionOutput, ModelSpec, Training

from .layers import FINE_TUNED, Baseline, BaselineConfig, TextInput, mean_over_steps, needs, one_rate, presets, search

MODALITIES = ("text", "vision", "audio")
MOMENTS = 5


class MISAConfig(BaselineConfig):
    """Upstream's names; the defaults are upstream's for CMU-MOSI, which has one learning rate for everything."""

    finetune_text: bool = Field(True, description="train the text encoder too; else its features are frozen")
    learning_rate: float = Field(1e-4, ge=0, description="learning rate of everything but the text encoder")
    learning_rate_bert: float = Field(1e-4, ge=0, description="learning rate of a fine-tuned text encoder")
    weight_decay_bert: float = Field(0.0, ge=0, description="L2 of it, biases and LayerNorms excepted")
    rnncell: Literal["lstm", "gru"] = Field("lstm", description="what reads audio and vision")
    hidden_size: int = Field(128, ge=2, multiple_of=2, description="width of each of the six vectors")
    dropout: float = Field(0.2, ge=0, lt=1, description="dropout in the fusion head and the discriminator")
    use_cmd_sim: bool = Field(
        True, description="shared spaces are drawn together by their moments; else by a discriminator they must fool"
    )
    reverse_grad_weight: float = Field(0.8, ge=0, description="strength of the gradient that fools the discriminator")
    diff_weight: float = Field(0.1, ge=0, description="weight of the loss that keeps spaces apart")
    sim_weight: float = Field(0.3, ge=0, description="weight of the loss that draws the shared spaces together")
    sp_weight: float = Field(1.0, ge=0, description="published, and read nowhere: upstream has no loss that it weights")
    recon_weight: float = Field(1.0, ge=0, description="weight of the loss of reconstruction")


class SequenceNet(nn.Module):
    """Two bidirectional recurrent layers, a LayerNorm between them; their last states join to (B, 4·d)."""

    def __init__(self, width: int, cell: str) -> None:
        super().__init__()
        layer = nn.LSTM if cell == "lstm" else nn.GRU
        self.layer_1 = layer(width, width, batch_first=True, bidirectional=True)
        self.norm = nn.LayerNorm(2 * width)
        self.layer_2 = layer(2 * width, width, batch_first=True, bidirectional=True)

    def forward(self, sequence: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(sequence, lengths.cpu(), batch_first=True, enforce_sorted=False)
        steps, state_1 = self.layer_1(packed)
        _, state_2 = self.layer_2(steps._replace(data=self.norm(steps.data)))
        # An LSTM's state is a pair; the first of it is (2, B, d), as a GRU's.
        last = [state[0] if isinstance(state, tuple) else state for state in (state_1, state_2)]
        return torch.cat(last, dim=-1).transpose(0, 1).flatten(1)


class MISA(Baseline):
    """Modality-invariant and -specific representations; a modality's vector is the one that both are made of."""

    def __init__(self, config: MISAConfig, data: DataInfo) -> None:
        super().__init__()
        self.config = config
        self.text = TextInput(config, data)
        self.sequences = nn.ModuleDict(
            {name: SequenceNet(data.dims[name], config.rnncell) for name in ("vision", "audio")}
        )
        width = config.hidden_size
        read = {"text": self.text.width, "vision": 4 * data.dims["vision"], "audio": 4 * data.dims["audio"]}
        self.project = nn.ModuleDict(
            {name: nn.Sequential(nn.Linear(read[name], width), nn.ReLU(), nn.LayerNorm(width)) for name in MODALITIES}
        )
        self.private = nn.ModuleDict(
            {name: nn.Sequential(nn.Linear(width, width), nn.Sigmoid()) for name in MODALITIES}
        )
        self.shared = nn.Sequential(nn.Linear(width, width), nn.Sigmoid())
        self.reconstruct = nn.ModuleDict({name: nn.Linear(width, width) for name in MODALITIES})
        if not config.use_cmd_sim:
            self.discriminator = nn.Sequential(
                nn.Linear(width, width), nn.ReLU(), nn.Dropout(config.dropout), nn.Linear(width, len(MODALITIES))
            )
        self.attention = nn.TransformerEncoderLayer(width, nhead=2, batch_first=True)
        self.layer_1 = nn.Linear(6 * width, 3 * width)
        self.dropout = nn.Dropout(config.dropout)
        self.layer_2 = nn.Linear(3 * width, 1)
        self.feature_dims = {"text": width, "audio": width, "vision": width, "fusion": 3 * width}

    def forward(self, batch: Batch) -> FusionOutput:
        vectors = {name: self.project[name](vector) for name, vector in self._read(batch).items()}
        private = {name: self.private[name](vector) for name, vector in vectors.items()}
        shared = {name: self.shared(vector) for name, vector in vectors.items()}
        six = torch.stack([*private.values(), *shared.values()], dim=1)
        representation = relu(self.layer_1(self.attention(six).flatten(1)))
        return FusionOutput(
            prediction=self.layer_2(self.dropout(representation)).squeeze(-1),
            features={**vectors, "fusion": representation},
            losses=self._losses(vectors, private, shared) if self.training else {},
        )

    def _read(self, batch: Batch) -> dict[str, Tensor]:
        """Return the vector of each modality, as wide as it comes."""
        states, text_lengths = self.text(batch)
        vectors = {"text": mean_over_steps(states, text_lengths)}
        for name, net in self.sequences.items():
            sequence = getattr(batch, name)
            of_text = text_lengths.clamp(max=sequence.shape[1])
            vectors[name] = net(sequence, of_text if self.config.as_upstream else getattr(batch, f"{name}_lengths"))
        return vectors

    def _losses(
        self, vectors: Mapping[str, Tensor], private: Mapping[str, Tensor], shared: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the three auxiliary losses, weighted, of codes (B, d) by modality."""
        apart = [*((private[name], shared[name]) for name in MODALITIES), *combinations(private.values(), 2)]
        rebuilt = [mse_loss(self.reconstruct[n](private[n] + shared[n]), vectors[n]) for n in MODALITIES]
        similarity = self._moments(shared) if self.config.use_cmd_sim else self._confusion(shared)
        return {
            "difference": self.config.diff_weight * torch.stack([overlap(*pair) for pair in apart]).sum(),
            "similarity": self.config.sim_weight * similarity,
            "reconstruction": self.config.recon_weight * torch.stack(rebuilt).mean(),
        }

    def _moments(self, shared: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([moment_discrepancy(*pair) for pair in combinations(shared.values(), 2)]).mean()

    def _confusion(self, shared: Mapping[str, Tensor]) -> Tensor:
        """Return how badly the discriminator tells whose code it sees; the codes learn to make it worse."""
        codes = torch.cat([shared[name] for name in MODALITIES])
        logits = self.discriminator(_Reversed.apply(codes, self.config.reverse_grad_weight))
        whose = torch.arange(len(MODALITIES), device=codes.device).repeat_interleave(len(codes) // len(MODALITIES))
        return cross_entropy(logits, whose)


def overlap(first: Tensor, second: Tensor) -> Tensor:
    """Return 0 where each column of `first` (B, d) is orthogonal to each of `second`, with rows centred and scaled."""
    scaled = []
    for codes in (first, second):
        centred = codes - codes.mean(0)
        scaled.append(centred / (vector_norm(centred, dim=1, keepdim=True).detach() + 1e-6))
    return (scaled[0].T @ scaled[1]).square().mean()


def moment_discrepancy(first: Tensor, second: Tensor) -> Tensor:
    """Return the distance of two batches of codes (B, d) in [0, 1]: of their means, and central moments 2…`MOMENTS`."""
    means = first.mean(0), second.mean(0)
    centred = first - means[0], second - means[1]
    moments = [[codes.pow(k).mean(0) for codes in centred] for k in range(2, MOMENTS + 1)]
    # A norm's gradient is 0 where the moments are equal, as they are in a batch of one; a root's would be NaN.
    return torch.stack([vector_norm(a - b) for a, b in (means, *moments)]).sum()


class _Reversed(torch.autograd.Function):
    """The identity, whose gradient points the other way, times a weight."""

    @staticmethod
    def forward(context: Any, codes: Tensor, weight: float) -> Tensor:
        context.weight = weight
        return codes.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return -context.weight * gradient, None


SPEC = ModelSpec(
    name="misa",
    summary="MISA: what modalities share, what each has of its own, and attention over both",
    build=MISA,
    config=MISAConfig,
    presets=one_rate(presets("misa", instead={"weight_decay": 0.0}, tail="drop")),
    training=Training(criterion="mse", batch_size=16, update_epochs=2, clip_value=0.8),
    needs=needs,
    tuned_for=FINE_TUNED,
    search=search("misa"),
    citation=(
        "Devamanyu Hazarika, Roger Zimmermann, Soujanya Poria: MISA: Modality-Invariant and -Specific Representations "
        "for Multimodal Sentiment Analysis. ACM Multimedia 2020."
    ),
    url="https://arxiv.org/abs/2005.03545",
)
