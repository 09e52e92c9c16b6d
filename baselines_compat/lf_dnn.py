"""LF_DNN: three modality vectors, joined, and a deep network on them. See `layers.ModalityNets` for what differs."""

from __future__ import annotations

import torch
from pydantic import Field

from registry import Batch, DataInfo, FusionOutput, ModelSpec, Training

from .layers import FROZEN, Baseline, BaselineConfig, Head, ModalityNets, TextInput, needs, presets, search


class LFDNNConfig(BaselineConfig):
    """Upstream's names; the defaults are upstream's for CMU-MOSI."""

    weight_decay: float = Field(0.01, ge=0, description="L2 of everything but the text encoder")
    hidden_dims: tuple[int, int, int] = Field((128, 16, 128), description="widths of text, audio and vision")
    text_out: int = Field(256, ge=1, description="width of the text's vector")
    post_fusion_dim: int = Field(128, ge=1, description="width of the fusion head")
    dropouts: tuple[float, float, float, float] = Field(
        (0.2, 0.2, 0.2, 0.2), description="dropout of audio, vision, text and fusion"
    )


class LFDNN(Baseline):
    """Late fusion of text, audio and vision."""

    def __init__(self, config: LFDNNConfig, data: DataInfo) -> None:
        super().__init__()
        self.text = TextInput(config, data)
        self.modalities = ModalityNets(
            data.dims, config.hidden_dims, config.text_out, config.dropouts[:3], as_upstream=config.as_upstream
        )
        widths = self.modalities.widths
        self.fusion = Head(sum(widths.values()), config.post_fusion_dim, config.dropouts[3])
        self.feature_dims = {**widths, "fusion": config.post_fusion_dim}

    def forward(self, batch: Batch) -> FusionOutput:
        features = self.modalities(batch, *self.text(batch))
        joined = torch.cat([features["audio"], features["vision"], features["text"]], dim=-1)
        prediction, representation = self.fusion(joined)
        return FusionOutput(prediction=prediction, features={**features, "fusion": representation})


SPEC = ModelSpec(
    name="lf_dnn",
    summary="LF_DNN: late fusion by a deep network",
    build=LFDNN,
    config=LFDNNConfig,
    presets=presets("lf_dnn"),
    training=Training(batch_size=128),
    needs=needs,
    tuned_for=FROZEN,
    search=search("lf_dnn"),
    citation=(
        "Erik Cambria, Devamanyu Hazarika, Soujanya Poria, Amir Hussain, R. B. V. Subramanyam: Benchmarking Multimodal "
        "Sentiment Analysis. CICLing 2017."
    ),
    url="https://arxiv.org/abs/1707.09538",
)
