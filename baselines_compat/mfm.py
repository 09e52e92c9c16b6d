"""MFM, the Multimodal Factorization Model: a factor that tells the sentiment, and one of each modality's own.

From the sentiment's factor, which MFN finds, comes the prediction; with a modality's own factor it gives the modality
back. Auxiliary losses: errors of these reconstructions, and how far the codes are from a standard normal.

Upstream's optimiser never gets the published learning rate, so that it is always 1e-3; here it gets it, unless
`as_upstream`. Upstream folds unaligned audio and vision (`layers.fold`), reads padding, and reconstructs it; here they
are spread over the text's real tokens, and only real steps are read and reconstructed, unless `as_upstream`.
"""

# ruff: noqa: N815 (the keys are upstream's)

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import relu

from registry import Batch, DataInfo, FusionOutput, ModelSpec, Training

from .layers import FROZEN, Baseline, TextInput, TextNet, needs, on_text_steps, presets, real_steps, search
from .mfn import MODALITIES, MemoryFusion, MFNConfig, Network, Sizes


class MFMConfig(MFNConfig):
    """Upstream's names; the defaults are upstream's for CMU-MOSI."""

    weight_decay: float = Field(1e-3, ge=0, description="L2 of everything but the text encoder")
    hidden_dims: tuple[int, int, int] = Field((128, 32, 128), description="widths of MFN's text, audio and vision LSTM")
    memsize: int = Field(64, ge=1, description="width of MFN's memory")
    NN1Config: Sizes = Field({"drop": 0.7, "shapes": 32}, description="MFN's network of the attention over cells")
    NN2Config: Sizes = Field({"drop": 0.0, "shapes": 64}, description="MFN's network that proposes the new memory")
    gamma1Config: Sizes = Field({"drop": 0.0, "shapes": 32}, description="MFN's gate that keeps memory")
    gamma2Config: Sizes = Field({"drop": 0.5, "shapes": 64}, description="MFN's gate that takes the proposal")
    outConfig: Sizes = Field({"drop": 0.2, "shapes": 128}, description="MFN's head, which MFM does without: not read")
    zy_size: int = Field(80, ge=1, description="width of the sentiment's code")
    zl_size: int = Field(64, ge=1, description="width of the text's code")
    za_size: int = Field(80, ge=1, description="width of the audio's code")
    zv_size: int = Field(80, ge=1, description="width of the vision's code")
    fy_size: int = Field(64, ge=1, description="width of the sentiment's factor")
    fl_size: int = Field(32, ge=1, description="width of the text's own factor")
    fa_size: int = Field(16, ge=1, description="width of the audio's own factor")
    fv_size: int = Field(64, ge=1, description="width of the vision's own factor")
    zy_to_fy_dropout: float = Field(0.5, ge=0, lt=1, description="dropout between the sentiment's code and factor")
    zl_to_fl_dropout: float = Field(0.5, ge=0, lt=1, description="dropout between the text's code and factor")
    za_to_fa_dropout: float = Field(0.7, ge=0, lt=1, description="dropout between the audio's code and factor")
    zv_to_fv_dropout: float = Field(0.5, ge=0, lt=1, description="dropout between the vision's code and factor")
    fy_to_y_dropout: float = Field(0.0, ge=0, lt=1, description="dropout in the head")
    lda_mmd: float = Field(100.0, ge=0, description="weight of the codes' distance from a standard normal")
    lda_xl: float = Field(0.5, ge=0, description="weight of the text's reconstruction")
    lda_xa: float = Field(0.01, ge=0, description="weight of the audio's reconstruction")
    lda_xv: float = Field(0.5, ge=0, description="weight of the vision's reconstruction")


class Decoder(nn.Module):
    """An LSTM that starts with factors (B, d) and then reads its own state → linear: a sequence (B, steps, out)."""

    def __init__(self, in_features: int, out: int) -> None:
        super().__init__()
        self.rnn = nn.LSTMCell(in_features, in_features)
        self.linear = nn.Linear(in_features, out)

    def forward(self, factors: Tensor, steps: int) -> Tensor:
        state, cell = self.rnn(factors)
        states = [state]
        for _ in range(steps - 1):
            state, cell = self.rnn(state, (state, cell))
            states.append(state)
        return self.linear(torch.stack(states, dim=1))


def distance_from_normal(codes: Tensor) -> Tensor:
    """Return the maximum mean discrepancy between codes (B, d) and as many draws of a standard normal."""
    draws = torch.randn_like(codes)
    return kernel(draws, draws).mean() + kernel(codes, codes).mean() - 2 * kernel(draws, codes).mean()


def kernel(a: Tensor, b: Tensor) -> Tensor:
    """Return exp(-‖a_i - b_j‖²/d²), (A, B), of vectors (A, d) and (B, d)."""
    squared = a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T
    return (-squared / a.shape[1] ** 2).exp()


def reconstruction_error(made: Tensor, sequence: Tensor, lengths: Tensor | None) -> Tensor:
    """Return the mean squared error of a sequence (B, L, d) over its real steps or, without lengths, all of them."""
    error = (made - sequence).square().mean(-1)
    if lengths is None:
        return error.mean()
    return torch.where(real_steps(lengths, error.shape[1]), error, 0.0).sum() / lengths.sum()


class MFM(Baseline):
    """Factorised fusion of text, audio and vision."""

    def __init__(self, config: MFMConfig, data: DataInfo) -> None:
        super().__init__()
        self.text = TextInput(config, data)
        self.as_upstream = config.as_upstream
        dims = data.dims
        codes = dict(zip(MODALITIES, (config.zl_size, config.za_size, config.zv_size), strict=True))
        factors = dict(zip(MODALITIES, (config.fl_size, config.fa_size, config.fv_size), strict=True))
        dropouts = (config.zl_to_fl_dropout, config.za_to_fa_dropout, config.zv_to_fv_dropout)
        self.mmd_weight = config.lda_mmd
        self.weights = dict(zip(MODALITIES, (config.lda_xl, config.lda_xa, config.lda_xv), strict=True))

        def factor(code: int, width: int, dropout: float) -> Network:
            return Network(code, {"drop": dropout, "shapes": width}, width)

        self.fusion = MemoryFusion(config, dims)
        self.code = nn.Linear(self.fusion.width, config.zy_size)
        self.factor = factor(config.zy_size, config.fy_size, config.zy_to_fy_dropout)
        self.head = Network(config.fy_size, {"drop": config.fy_to_y_dropout, "shapes": config.fy_size}, 1)
        self.encoders = nn.ModuleDict({name: TextNet(dims[name], codes[name], codes[name]) for name in MODALITIES})
        self.factors = nn.ModuleDict(
            {name: factor(codes[name], factors[name], p) for name, p in zip(MODALITIES, dropouts, strict=True)}
        )
        self.decoders = nn.ModuleDict(
            {name: Decoder(config.fy_size + factors[name], dims[name]) for name in MODALITIES}
        )
        self.feature_dims = {**codes, "fusion": config.fy_size}

    def forward(self, batch: Batch) -> FusionOutput:
        sequences, lengths = on_text_steps(batch, *self.text(batch), as_upstream=self.as_upstream)
        codes = {name: encoder(sequences[name], lengths) for name, encoder in self.encoders.items()}
        states, memory = self.fusion(sequences, lengths)
        code = self.code(torch.cat([*states.values(), memory], dim=-1))
        factor = relu(self.factor(code))
        first = self.head.layer_1(factor)
        losses = {}
        if self.training:  # they do not depend on the labels, and nothing else reads them
            losses["mmd"] = self.mmd_weight * sum(map(distance_from_normal, [*codes.values(), code]))
            for name, decoder in self.decoders.items():
                own = relu(self.factors[name](codes[name]))
                made = decoder(torch.cat([factor, own], dim=-1), sequences[name].shape[1])
                error = reconstruction_error(made, sequences[name].detach(), lengths)
                losses[f"{name}_reconstruction"] = self.weights[name] * error
        return FusionOutput(
            prediction=self.head.finish(first).squeeze(-1),
            features={**codes, "fusion": relu(first)},
            losses=losses,
        )


SPEC = ModelSpec(
    name="mfm",
    summary="MFM: a factor of the sentiment, factors of each modality's own, and reconstructions from them",
    build=MFM,
    config=MFMConfig,
    presets=presets("mfm", instead={"learning_rate": 1e-3}),
    training=Training(batch_size=64),
    needs=needs,
    tuned_for=FROZEN,
    search=search("mfm"),
    citation=(
        "Yao-Hung Hubert Tsai, Paul Pu Liang, Amir Zadeh, Louis-Philippe Morency, Ruslan Salakhutdinov: Learning "
        "Factorized Multimodal Representations. ICLR 2019."
    ),
    url="https://arxiv.org/abs/1806.06176",
)
