"""TFN, the Tensor Fusion Network: the outer product of three modality vectors, each with a 1 appended.

With upstream's output range, a sigmoid over ±3, published results on CH-SIMS predict beyond its ±1; here the range is
the data's, unless `as_upstream`. See also `layers.ModalityNets`.
"""

from __future__ import annotations

from pydantic import Field
from torch import einsum
from torch.nn.functional import pad

from registry import Batch, DataInfo, FusionOutput, ModelSpec, Training

from .layers import FROZEN, Baseline, BaselineConfig, Head, ModalityNets, TextInput, needs, presets, search


class TFNConfig(BaselineConfig):
    """Upstream's names; the defaults are upstream's for CMU-MOSI."""

    hidden_dims: tuple[int, int, int] = Field((128, 32, 128), description="widths of text, audio and vision")
    text_out: int = Field(32, ge=1, description="width of the text's vector")
    post_fusion_dim: int = Field(64, ge=1, description="width of the fusion head")
    dropouts: tuple[float, float, float, float] = Field(
        (0.3, 0.3, 0.3, 0.5), description="dropout of audio, vision, text and fusion"
    )


class TFN(Baseline):
    """Tensor fusion of text, audio and vision."""

    def __init__(self, config: TFNConfig, data: DataInfo) -> None:
        super().__init__()
        self.text = TextInput(config, data)
        self.modalities = ModalityNets(
            data.dims, config.hidden_dims, config.text_out, config.dropouts[:3], as_upstream=config.as_upstream
        )
        widths = self.modalities.widths
        fused = (widths["text"] + 1) * (widths["audio"] + 1) * (widths["vision"] + 1)
        self.fusion = Head(fused, config.post_fusion_dim, config.dropouts[3])
        self.range = 3.0 if config.as_upstream else data.label_range
        self.feature_dims = {**widths, "fusion": config.post_fusion_dim}

    def forward(self, batch: Batch) -> FusionOutput:
        features = self.modalities(batch, *self.text(batch))
        text, audio, vision = (pad(features[name], (1, 0), value=1.0) for name in ("text", "audio", "vision"))
        outer = einsum("ba,bv,bt->bavt", audio, vision, text).flatten(1)
        logit, representation = self.fusion(outer)
        prediction = self.range * (2 * logit.sigmoid() - 1)
        return FusionOutput(prediction=prediction, features={**features, "fusion": representation})


SPEC = ModelSpec(
    name="tfn",
    summary="TFN: the outer product of text, audio and vision",
    build=TFN,
    config=TFNConfig,
    presets=presets("tfn"),
    training=Training(batch_size=32),
    needs=needs,
    tuned_for=FROZEN,
    search=search("tfn"),
    citation=(
        "Amir Zadeh, Minghai Chen, Soujanya Poria, Erik Cambria, Louis-Philippe Morency: Tensor Fusion Network for "
        "Multimodal Sentiment Analysis. EMNLP 2017."
    ),
    url="https://arxiv.org/abs/1707.07250",
)
