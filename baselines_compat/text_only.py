"""The text encoder alone, and a head on it: what does fusion add?

A fine-tuned encoder gives its first token, as in Self-MM; a frozen one the mean over its tokens, since its first token
was not trained to say anything of sentiment.
"""

from __future__ import annotations

from pydantic import Field

from registry import Batch, DataInfo, FusionOutput, ModelSpec, Range, Training

from .layers import Baseline, Head, TextConfig, TextInput, mean_over_steps


class TextOnlyConfig(TextConfig):
    """Nobody has published figures for it: the head is Self-MM's on CMU-MOSI."""

    weight_decay: float = Field(1e-3, ge=0, description="L2 of everything but the text encoder")
    post_fusion_dim: int = Field(128, ge=1, description="width of the head")
    post_fusion_dropout: float = Field(0.1, ge=0, lt=1, description="dropout before the head")


class TextOnly(Baseline):
    """A text encoder and a head."""

    def __init__(self, config: TextOnlyConfig, data: DataInfo) -> None:
        super().__init__()
        self.text = TextInput(config, data)
        self.takes_first = config.finetune_text
        self.head = Head(self.text.width, config.post_fusion_dim, config.post_fusion_dropout)
        self.feature_dims = {"text": self.text.width, "fusion": config.post_fusion_dim}

    def forward(self, batch: Batch) -> FusionOutput:
        states, lengths = self.text(batch)
        text = states[:, 0] if self.takes_first else mean_over_steps(states, lengths)
        prediction, representation = self.head(text)
        return FusionOutput(prediction=prediction, features={"text": text, "fusion": representation})


SPEC = ModelSpec(
    name="text_only",
    summary="the text encoder alone: what does fusion add?",
    build=TextOnly,
    config=TextOnlyConfig,
    training=Training(batch_size=32),
    needs=lambda config: ("text" if config.finetune_text else "text_features",),
    per_sample=True,
    search={
        "learning_rate": Range(1e-4, 1e-2, log=True),
        "weight_decay": (0.0, 1e-4, 1e-3, 1e-2),
        "batch_size": (16, 32, 64),
        "post_fusion_dim": (32, 64, 128, 256),
        "post_fusion_dropout": Range(0.0, 0.5),
    },
)
