"""MLMF: LMF, and a head for each modality that learns its human label.

See `lmf` (untrained weights) and `layers.ModalityNets` for what differs from upstream.
"""

from __future__ import annotations

from pydantic import Field

from registry import DataInfo, ModelSpec, Training

from .layers import FROZEN, BaselineConfig, presets, search
from .lmf import LMF, LMFConfig
from .multi_task import (
    CITATION,
    URL,
    Dropouts,
    HeadDropouts,
    HeadWidth,
    LearningRate,
    MultiTask,
    NetDecay,
    OtherDecay,
    TaskWeight,
    Widths,
    needs,
    of_single_task,
)


class MLMFConfig(BaselineConfig):
    """Upstream's names; the defaults are upstream's for CH-SIMS."""

    learning_rate: LearningRate = 0.001
    weight_decay: OtherDecay = 0.005
    factor_lr: float = Field(0.001, ge=0, description="learning rate of the modalities' factors")
    text_weight_decay: NetDecay = 0.0001
    audio_weight_decay: NetDecay = 0.0
    video_weight_decay: NetDecay = 0.0001
    hidden_dims: Widths = (256, 32, 256)
    post_text_dim: HeadWidth = 8
    post_audio_dim: HeadWidth = 4
    post_video_dim: HeadWidth = 32
    rank: int = Field(3, ge=1, description="products in the sum")
    dropouts: Dropouts = (0.3, 0.3, 0.3)
    post_dropouts: HeadDropouts = (0.4, 0.4, 0.4, 0.4)
    M: TaskWeight = 0.2
    T: TaskWeight = 1.0
    A: TaskWeight = 0.4
    V: TaskWeight = 0.8


class MLMF(MultiTask):
    """Low-rank fusion, and unimodal sentiment of text, audio and vision."""

    def __init__(self, config: MLMFConfig, data: DataInfo) -> None:
        super().__init__(LMF(of_single_task(config, LMFConfig), data), config)


SPEC = ModelSpec(
    name="mlmf",
    summary="MLMF: low-rank fusion that learns human labels of each modality too",
    build=MLMF,
    config=MLMFConfig,
    presets=presets("mlmf"),
    training=Training(batch_size=128),
    needs=needs,
    tuned_for=FROZEN,
    search=search("mlmf"),
    citation=CITATION,
    url=URL,
)
