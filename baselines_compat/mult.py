"""MulT, the Multimodal Transformer: each modality attends to the two others, as they are, without word alignment.

Unless `as_upstream`:
- padding is not attended to, and a stream's vector is its state at the last real step; upstream reads padding as steps;
- steps have positions, as in the paper; upstream switches them off, so that only causality tells steps apart;
- every modality passes its convolution; upstream skips it where the input happens to be as wide as the model;
- `weight_decay` counts; upstream publishes it and does not use it.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn.functional import linear, pad, relu, scaled_dot_product_attention

from registry import Batch, DataInfo, FusionOutput, ModelSpec, Training

from .layers import FROZEN, Baseline, BaselineConfig, TextInput, at_end, needs, presets, real_steps, search

MODALITIES = ("text", "audio", "vision")


class MulTConfig(BaselineConfig):
    """Upstream's names; the defaults are upstream's for CMU-MOSI."""

    learning_rate: float = Field(2e-3, ge=0, description="learning rate of everything but the text encoder")
    weight_decay: float = Field(0.005, ge=0, description="L2 of everything but the text encoder")
    dst_feature_dim_nheads: tuple[int, int] = Field((50, 10), description="width of the attention, and its heads")
    nlevels: int = Field(4, ge=1, description="layers from one modality to another; within one there are 3 or more")
    attn_mask: bool = Field(True, description="a step sees no later ones")
    conv1d_kernel_size_l: int = Field(5, ge=1, description="steps that the convolution of text joins")
    conv1d_kernel_size_a: int = Field(5, ge=1, description="steps that the convolution of audio joins")
    conv1d_kernel_size_v: int = Field(5, ge=1, description="steps that the convolution of vision joins")
    text_dropout: float = Field(0.5, ge=0, lt=1, description="dropout of the text's features")
    embed_dropout: float = Field(0.2, ge=0, lt=1, description="dropout of sequences before their first layer")
    attn_dropout: float = Field(0.3, ge=0, lt=1, description="dropout of attention to text, and within a modality")
    attn_dropout_a: float = Field(0.2, ge=0, lt=1, description="dropout of attention to audio")
    attn_dropout_v: float = Field(0.0, ge=0, lt=1, description="dropout of attention to vision")
    relu_dropout: float = Field(0.0, ge=0, lt=1, description="dropout inside a layer's feed-forward part")
    res_dropout: float = Field(0.0, ge=0, lt=1, description="dropout of what a layer adds")
    output_dropout: float = Field(0.5, ge=0, lt=1, description="dropout in the head")

    @field_validator("dst_feature_dim_nheads")
    @classmethod
    def _divides(cls, value: tuple[int, int]) -> tuple[int, int]:
        width, heads = value
        if not (heads >= 1 and width >= 1 and width % heads == 0):
            raise ValueError("must be a width and a number of heads that divides it")
        return value


class Attention(nn.Module):
    """Multi-head attention of a target (B, L, width) to keys and values (B, S, width)."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.inputs = _linear(width, 3 * width)
        self.output = _linear(width, width)

    def forward(self, target: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        """`bias` (B, 1, L or 1, S) is added to the scores; see `bias_of`."""
        width = target.shape[-1] // self.heads
        weights, biases = self.inputs.weight.chunk(3), self.inputs.bias.chunk(3)
        query, key, value = (
            _fill(linear(sequence, *projection).unflatten(-1, (self.heads, width))).transpose(1, 2)
            for sequence, *projection in zip((target, keys, values), weights, biases, strict=True)
        )
        dropout = self.dropout if self.training else 0.0
        heads = scaled_dot_product_attention(query, key, value, bias, dropout, scale=width**-0.5)
        return self.output(heads[..., :width].transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Attention and a feed-forward part, each on normalised steps and added to its input."""

    def __init__(self, width: int, dropout: float, config: MulTConfig) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, config.dst_feature_dim_nheads[1], dropout)
        self.layer_1 = _linear(width, 4 * width)
        self.layer_2 = _linear(4 * width, width)
        self.inner_dropout = nn.Dropout(config.relu_dropout)
        self.dropout = nn.Dropout(config.res_dropout)

    def forward(self, target: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        steps = self.norm_1(target)
        keys, values = (steps if other is target else self.norm_1(other) for other in (keys, values))
        target = target + self.dropout(self.attention(steps, keys, values, bias))
        inner = self.inner_dropout(relu(self.layer_1(self.norm_2(target))))
        return target + self.dropout(self.layer_2(inner))


class Transformer(nn.Module):
    """Layers of one width."""

    def __init__(self, width: int, layers: int, dropout: float, config: MulTConfig) -> None:
        super().__init__()
        self.dropout = nn.Dropout(config.embed_dropout)
        self.layers = nn.ModuleList(Layer(width, dropout, config) for _ in range(layers))
        self.norm = nn.LayerNorm(width)


class Crossmodal(Transformer):
    """A modality attends to another one, which is the same at every layer."""

    def forward(self, target: Tensor, source: Tensor, bias: Tensor) -> Tensor:
        """Return (B, L, width): a target (B, L, width) after what it saw of a source (B, S, width)."""
        keys, values = self.dropout(source), self.dropout(source)
        target = self.dropout(target)
        for layer in self.layers:
            target = layer(target, keys, values, bias)
        return self.norm(target)


class Memory(Transformer):
    """A modality attends to itself; the last layer computes only the step that is read."""

    def forward(self, sequence: Tensor, lengths: Tensor, bias: Tensor) -> Tensor:
        """Return (B, width): the last real step of a sequence (B, L, width) after what it saw of the sequence."""
        *layers, top = self.layers
        sequence = self.dropout(sequence)
        for layer in layers:
            sequence = layer(sequence, sequence, sequence, bias)
        last, bias = at_end(sequence, lengths)[:, None], at_end(bias[:, 0], lengths)[:, None, None]
        return self.norm(top(last, sequence, sequence, bias))[:, 0]


class MulT(Baseline):
    """Multimodal Transformer; the vector of a modality is the last state of its own stream."""

    def __init__(self, config: MulTConfig, data: DataInfo) -> None:
        super().__init__()
        self.text = TextInput(config, data)
        self.as_upstream, self.causal = config.as_upstream, config.attn_mask
        width = config.dst_feature_dim_nheads[0]
        kernels = (config.conv1d_kernel_size_l, config.conv1d_kernel_size_a, config.conv1d_kernel_size_v)
        self.kernels = dict(zip(MODALITIES, kernels, strict=True))
        dropouts = (config.attn_dropout, config.attn_dropout_a, config.attn_dropout_v)
        attention_dropout = dict(zip(MODALITIES, dropouts, strict=True))
        self.text_dropout = nn.Dropout(config.text_dropout)
        self.convolutions = nn.ModuleDict(
            {
                name: nn.Conv1d(data.dims[name], width, kernel, bias=False)
                for name, kernel in self.kernels.items()
                if not (config.as_upstream and data.dims[name] == width)
            }
        )
        self.crossmodal = nn.ModuleDict(
            {
                f"{target}_from_{source}": Crossmodal(width, config.nlevels, attention_dropout[source], config)
                for target in MODALITIES
                for source in MODALITIES
                if source != target
            }
        )
        self.memory = nn.ModuleDict(
            {name: Memory(2 * width, max(config.nlevels, 3), config.attn_dropout, config) for name in MODALITIES}
        )
        self.layer_1 = nn.Linear(6 * width, 6 * width)
        self.dropout = nn.Dropout(config.output_dropout)
        self.layer_2 = nn.Linear(6 * width, 6 * width)
        self.layer_3 = nn.Linear(6 * width, 1)
        self.feature_dims = {**dict.fromkeys(MODALITIES, 2 * width), "fusion": 6 * width}

    def forward(self, batch: Batch) -> FusionOutput:
        sequences, lengths = {}, {}
        for name, (sequence, length) in self._inputs(batch).items():
            convolved, lengths[name] = self._convolve(name, sequence, length)
            sequences[name] = self._embed(convolved)
        features = {name: self._stream(name, sequences, lengths) for name in MODALITIES}
        joined = torch.cat([features[name] for name in MODALITIES], dim=-1)
        representation = relu(self.layer_1(joined))
        prediction = self.layer_3(joined + self.layer_2(self.dropout(representation))).squeeze(-1)
        return FusionOutput(prediction=prediction, features={**features, "fusion": representation})

    def _inputs(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """Return sequences (B, L, d) and their lengths (B), which cover padding where upstream reads it."""
        assert batch.audio is not None
        assert batch.audio_lengths is not None
        assert batch.vision is not None
        assert batch.vision_lengths is not None
        states, text_lengths = self.text(batch)
        sequences = (self.text_dropout(states), batch.audio, batch.vision)
        lengths = [text_lengths, batch.audio_lengths, batch.vision_lengths]
        if self.as_upstream:
            lengths = [torch.full_like(batch.index, sequence.shape[1]) for sequence in sequences]
        return dict(zip(MODALITIES, zip(sequences, lengths, strict=True), strict=True))

    def _convolve(self, name: str, sequence: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return (B, L - kernel + 1, width) and lengths; a clip that is shorter than the kernel has one step."""
        if name not in self.convolutions:
            return sequence, lengths
        kernel = self.kernels[name]
        real = real_steps(lengths, sequence.shape[1])
        sequence = pad(torch.where(real[:, :, None], sequence, 0.0), (0, 0, 0, max(kernel - sequence.shape[1], 0)))
        return self.convolutions[name](sequence.transpose(1, 2)).transpose(1, 2), (lengths - kernel + 1).clamp(min=1)

    def _embed(self, sequence: Tensor) -> Tensor:
        """Scale a sequence (B, L, d) and add its positions."""
        scaled = math.sqrt(sequence.shape[2]) * sequence
        return scaled if self.as_upstream else scaled + positions(sequence)

    def _stream(self, target: str, sequences: dict[str, Tensor], lengths: dict[str, Tensor]) -> Tensor:
        """Return the last state (B, 2·width) of a modality that has attended to the others, then to itself."""

        def bias(source: str) -> Tensor:
            steps = sequences[target].shape[1], sequences[source].shape[1]
            return bias_of(visible(lengths[target], lengths[source], *steps, causal=self.causal))

        streams = [
            self.crossmodal[f"{target}_from_{source}"](sequences[target], sequences[source], bias(source))
            for source in MODALITIES
            if source != target
        ]
        joined = self._embed(torch.cat(streams, dim=-1))
        return self.memory[target](joined, lengths[target], bias(target))


def visible(target: Tensor, source: Tensor, target_steps: int, source_steps: int, *, causal: bool) -> Tensor:
    """Return (B, target_steps, source_steps), True where a step of the target may look at one of the source.

    It may look at real steps; if causal, at none that is ahead of it by more than the sequences' lengths differ.

    Args:
        target, source: (B) real steps of each, at least 1.
        target_steps, source_steps: padded lengths.
        causal: whether order counts.
    """
    seen = real_steps(source, source_steps)[:, None].expand(-1, target_steps, -1)
    if causal:
        last_seen = torch.arange(target_steps, device=target.device) + (target - source).abs()[:, None]
        seen = seen & (torch.arange(source_steps, device=target.device) <= last_seen[:, :, None])
    return seen


def bias_of(seen: Tensor) -> Tensor:
    """Return (B, 1, L, S), what is added to scores of attention: 0 where (B, L, S) is True, else -inf."""
    room = torch.full_like(_fill(seen), -math.inf, dtype=torch.float32)
    return room[..., : seen.shape[-1]].masked_fill_(seen, 0.0)[:, None]


def _fill(values: Tensor) -> Tensor:
    """Fill the last axis with zeros to a multiple of 8, as a GPU's attention asks that does not keep its scores."""
    return pad(values, (0, -values.shape[-1] % 8))


def positions(sequence: Tensor) -> Tensor:
    """Return the sinusoidal positions (L, d), from 1, of a sequence (B, L, d): d/2 sines, d/2 cosines."""
    steps, width = sequence.shape[1:]
    half = width // 2
    wave = torch.arange(half, device=sequence.device) * (-math.log(10000) / max(half - 1, 1))
    angle = torch.arange(1, steps + 1, device=sequence.device)[:, None] * wave.exp()
    return pad(torch.cat([angle.sin(), angle.cos()], dim=1), (0, width - 2 * half)).to(sequence.dtype)


def _linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


SPEC = ModelSpec(
    name="mult",
    summary="MulT: crossmodal transformers over unaligned sequences",
    build=MulT,
    config=MulTConfig,
    presets=presets("mult", instead={"weight_decay": 0.0}, tail="drop"),
    training=Training(
        batch_size=16,
        update_epochs=8,
        clip_value=0.6,
        scheduler="plateau",
        scheduler_factor=0.1,
        scheduler_patience=5,
    ),
    needs=needs,
    per_sample=True,
    tuned_for=FROZEN,
    search=search("mult"),
    citation=(
        "Yao-Hung Hubert Tsai, Shaojie Bai, Paul Pu Liang, J. Zico Kolter, Louis-Philippe Morency, Ruslan "
        "Salakhutdinov: Multimodal Transformer for Unaligned Multimodal Language Sequences. ACL 2019."
    ),
    url="https://arxiv.org/abs/1906.00295",
)
