"""MLF_DNN: LF_DNN, and a head for each modality that learns its human label.

See `layers.ModalityNets` for what differs from upstream.
"""

from __future__ import annotations

from registry import DataInfo, ModelSpec, Training

from .layers import FROZEN, BaselineConfig, presets, search
from .lf_dnn import LFDNN, LFDNNConfig
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


class MLFDNNConfig(BaselineConfig):
    """Upstream's names; the defaults are upstream's for CH-SIMS."""

    learning_rate: LearningRate = 0.002
    weight_decay: OtherDecay = 0.0
    text_weight_decay: NetDecay = 0.0001
    audio_weight_decay: NetDecay = 0.001
    video_weight_decay: NetDecay = 0.0001
    hidden_dims: Widths = (64, 32, 64)
    text_out: TextWidth = 32
    post_fusion_dim: FusionWidth = 32
    post_text_dim: HeadWidth = 16
    post_audio_dim: HeadWidth = 4
    post_video_dim: HeadWidth = 32
    dropouts: Dropouts = (0.3, 0.3, 0.3)
    post_dropouts: HeadDropouts = (0.5, 0.5, 0.5, 0.5)
    M: TaskWeight = 0.6
    T: TaskWeight = 0.2
    A: TaskWeight = 0.8
    V: TaskWeight = 0.8


class MLFDNN(MultiTask):
    """Late fusion, and unimodal sentiment of text, audio and vision."""

    def __init__(self, config: MLFDNNConfig, data: DataInfo) -> None:
        super().__init__(LFDNN(of_single_task(config, LFDNNConfig), data), config)


SPEC = ModelSpec(
    name="mlf_dnn",
    summary="MLF_DNN: late fusion that learns human labels of each modality too",
    build=MLFDNN,
    config=MLFDNNConfig,
    presets=presets("mlf_dnn"),
    training=Training(batch_size=32),
    needs=needs,
    tuned_for=FROZEN,
    search=search("mlf_dnn"),
    citation=CITATION,
    url=URL,
)
