"""MTFN: TFN, and a head for each modality that learns its human label.

Upstream's optimiser leaves out the published `weight_decay` of fusion and heads; here it counts, unless `as_upstream`.
See also `tfn` (the range of predictions) and `layers.ModalityNets`.
"""

from __future__ import annotations

from registry import DataInfo, ModelSpec, Training

from .layers import FROZEN, BaselineConfig, presets, search
from .multi_task import (
    CITATION,
    URL,
    Dropouts,
    FusionWidth,
    HeadDropouts,
    HeadWidth,
    LearningRate,
    MultiTask,
    NetDecay,
    OtherDecay,
    TaskWeight,
    TextWidth,
    Widths,
    needs,
    of_single_task,
)
from .tfn import TFN, TFNConfig


class MTFNConfig(BaselineConfig):
    """Upstream's names; the defaults are those for CH-SIMS v2, as the ones for CH-SIMS make 139 million weights."""

    learning_rate: LearningRate = 0.0005
    weight_decay: OtherDecay = 0.01
    text_weight_decay: NetDecay = 1e-05
    audio_weight_decay: NetDecay = 0.0001
    video_weight_decay: NetDecay = 0.0001
    hidden_dims: Widths = (64, 16, 64)
    text_out: TextWidth = 32
    post_fusion_dim: FusionWidth = 64
    post_text_dim: HeadWidth = 16
    post_audio_dim: HeadWidth = 5
    post_video_dim: HeadWidth = 64
    dropouts: Dropouts = (0.3, 0.3, 0.3)
    post_dropouts: HeadDropouts = (0.5, 0.5, 0.5, 0.5)
    M: TaskWeight = 1.0
    T: TaskWeight = 0.4
    A: TaskWeight = 0.4
    V: TaskWeight = 0.8


class MTFN(MultiTask):
    """Tensor fusion, and unimodal sentiment of text, audio and vision."""

    def __init__(self, config: MTFNConfig, data: DataInfo) -> None:
        super().__init__(TFN(of_single_task(config, TFNConfig), data), config)


SPEC = ModelSpec(
    name="mtfn",
    summary="MTFN: tensor fusion that learns human labels of each modality too",
    build=MTFN,
    config=MTFNConfig,
    presets=presets("mtfn", instead={"weight_decay": 0.0}),
    training=Training(batch_size=32),
    needs=needs,
    tuned_for=FROZEN,
    search=search("mtfn"),
    citation=CITATION,
    url=URL,
)
