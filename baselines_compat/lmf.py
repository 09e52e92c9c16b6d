"""LMF, Low-rank Multimodal Fusion: TFN's tensor and the layer on it, as a sum of `rank` products of modality factors.

The weights of that sum and its bias, which upstream's optimiser leaves out, are trained unless `as_upstream`. See also
`layers.ModalityNets`.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field
from torch import nn
from torch.nn.functional import pad

from registry import Batch, DataInfo, FusionOutput, ModelSpec, Training

from .layers import FROZEN, Baseline, BaselineConfig, ModalityNets, TextInput, needs, presets, search


class LMFConfig(BaselineConfig):
    """Upstream's names; the defaults are upstream's for CMU-MOSI."""

    factor_lr: float = Field(1e-3, ge=0, description="learning rate of the modalities' factors")
    weight_decay: float = Field(0.005, ge=0, description="L2 of everything but the text encoder")
    hidden_dims: tuple[int, int, int] = Field(
        (128, 16, 128), description="widths of text, audio and vision; the text's vector has half its own"
    )
    rank: int = Field(3, ge=1, description="products in the sum")
    dropouts: tuple[float, float, float, float] = Field(
        (0.3, 0.3, 0.3, 0.3), description="dropout of audio, vision and text; the fourth is read nowhere, as upstream"
    )


class LMF(Baseline):
    """Low-rank fusion of text, audio and vision; "fusion" is the vector of the `rank` products before their sum."""

    def __init__(self, config: LMFConfig, data: DataInfo) -> None:
        super().__init__()
        self.text = TextInput(config, data)
        self.modalities = ModalityNets(
            data.dims,
            config.hidden_dims,
            config.hidden_dims[0] // 2,
            config.dropouts[:3],
            as_upstream=config.as_upstream,
        )
        widths = self.modalities.widths
        self.factors = nn.ModuleDict(
            {name: nn.Linear(width + 1, config.rank, bias=False) for name, width in widths.items()}
        )
        self.sum = nn.Linear(config.rank, 1).requires_grad_(not config.as_upstream)
        for weight in (*self.factors.parameters(), self.sum.weight):
            nn.init.xavier_normal_(weight)
        nn.init.zeros_(self.sum.bias)
        self.feature_dims = {**widths, "fusion": config.rank}

    def forward(self, batch: Batch) -> FusionOutput:
        features = self.modalities(batch, *self.text(batch))
        product = 1.0
        for name, factor in self.factors.items():
            product = product * factor(pad(features[name], (1, 0), value=1.0))
        prediction = self.sum(product).squeeze(-1)
        return FusionOutput(prediction=prediction, features={**features, "fusion": product})

    def other_groups(self, config: LMFConfig) -> list[dict[str, Any]]:
        factors = list(self.factors.parameters())
        others = self.parameters_but([*self.text.parameters(), *factors])
        return [
            {"params": factors, "lr": config.factor_lr, "weight_decay": config.weight_decay},
            {"params": others, "lr": config.learning_rate, "weight_decay": config.weight_decay},
        ]


SPEC = ModelSpec(
    name="lmf",
    summary="LMF: a low-rank form of TFN's outer product",
    build=LMF,
    config=LMFConfig,
    presets=presets("lmf"),
    training=Training(batch_size=64),
    needs=needs,
    tuned_for=FROZEN,
    search=search("lmf"),
    citation=(
        "Zhun Liu, Ying Shen, Varun Bharadhwaj Lakshminarasimhan, Paul Pu Liang, AmirAli Bagher Zadeh, Louis-Philippe "
        "Morency: Efficient Low-rank Multimodal Fusion with Modality-Specific Factors. ACL 2018."
    ),
    url="https://arxiv.org/abs/1806.00064",
)
