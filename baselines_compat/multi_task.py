"""Multi-task models (Yu et al., ACL 2020): a fusion model, a head for each modality, and human labels for all of them.

The loss is M·L(M) + T·L(T) + A·L(A) + V·L(V). As the training loop adds L(M) once, the model adds (M − 1)·L(M).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, TypeVar

from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import l1_loss, mse_loss

from registry import Batch, FusionOutput

from .layers import Baseline, BaselineConfig, Head, ModalityNets
from .layers import needs as needs_of_inputs

TASKS = {"text": "T", "audio": "A", "vision": "V"}

LearningRate = Annotated[float, Field(ge=0, description="learning rate of everything but the text encoder")]
Widths = Annotated[tuple[int, int, int], Field(description="widths of text, audio and vision")]
TextWidth = Annotated[int, Field(ge=1, description="width of the text's vector")]
FusionWidth = Annotated[int, Field(ge=1, description="width of the fusion head")]
HeadWidth = Annotated[int, Field(ge=1, description="width of this modality's head")]
Dropouts = Annotated[tuple[float, float, float], Field(description="dropout of audio, vision and text")]
HeadDropouts = Annotated[
    tuple[float, float, float, float], Field(description="dropout before the heads of text, audio, vision and fusion")
]
TaskWeight = Annotated[float, Field(ge=0, description="weight of the loss of label M (multimodal), T, A or V")]
NetDecay = Annotated[float, Field(ge=0, description="L2 of this modality's network")]
OtherDecay = Annotated[float, Field(ge=0, description="L2 of fusion and heads")]

CITATION = (
    "Wenmeng Yu, Hua Xu, Fanyang Meng, Yilin Zhu, Yixiao Ma, Jiele Wu, Jiyun Zou, Kaicheng Yang: CH-SIMS: A Chinese "
    "Multimodal Sentiment Analysis Dataset with Fine-grained Annotation of Modality. ACL 2020."
)
URL = "https://aclanthology.org/2020.acl-main.343"

C = TypeVar("C", bound=BaselineConfig)


def needs(config: BaselineConfig) -> tuple[str, ...]:
    """Return what the models need of the data: besides the inputs, the labels of each modality."""
    return (*needs_of_inputs(config), *TASKS.values())


def of_single_task(config: Any, single: type[C]) -> C:
    """Return the config of the fusion model alone, whose `dropouts` have a fourth: that of the fusion."""
    values = {**config.model_dump(), "dropouts": (*config.dropouts, config.post_dropouts[3])}
    return single(**{key: values[key] for key in single.model_fields})


class MultiTask(nn.Module):
    """A head for each modality on the vectors that a fusion model makes.

    Args:
        single_task: the fusion model; its `modalities` are `ModalityNets`.
        config: one of the multi-task models', with the fields of `Training`.
    """

    def __init__(self, single_task: Baseline, config: Any) -> None:
        super().__init__()
        self.single_task = single_task
        widths = self.nets.widths
        self.heads = nn.ModuleDict(
            {
                "text": Head(widths["text"], config.post_text_dim, config.post_dropouts[0]),
                "audio": Head(widths["audio"], config.post_audio_dim, config.post_dropouts[1]),
                "vision": Head(widths["vision"], config.post_video_dim, config.post_dropouts[2]),
            }
        )
        self.weights = {"M": config.M - 1, "T": config.T, "A": config.A, "V": config.V}
        self.criterion = l1_loss if config.criterion == "l1" else mse_loss
        self.feature_dims: Mapping[str, int] = single_task.feature_dims  # type: ignore[assignment]

    @property
    def nets(self) -> ModalityNets:
        """The modalities' networks, which the fusion and the heads share."""
        return self.single_task.modalities  # type: ignore[return-value]

    def forward(self, batch: Batch) -> FusionOutput:
        output = self.single_task(batch)
        unimodal = {name: head(output.features[name])[0] for name, head in self.heads.items()}
        predictions = {"M": output.prediction, **{TASKS[name]: values for name, values in unimodal.items()}}
        return replace(output, unimodal=unimodal, losses=self._losses(predictions, batch.labels))

    def _losses(self, predictions: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not labels:
            return {}
        return {task: self.weights[task] * self.criterion(values, labels[task]) for task, values in predictions.items()}

    def parameter_groups(self, config: Any) -> list[dict[str, Any]]:
        """Return the optimiser's groups: text encoder, each modality's network, and fusion with the heads."""
        decays = {
            "text": config.text_weight_decay,
            "audio": config.audio_weight_decay,
            "vision": config.video_weight_decay,
        }
        of_nets = [
            {"params": list(getattr(self.nets, name).parameters()), "lr": config.learning_rate, "weight_decay": decay}
            for name, decay in decays.items()
        ]
        taken = {id(parameter) for group in of_nets for parameter in group["params"]}
        others = self.single_task.other_groups(config)
        for group in others:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in taken]
        others[-1]["params"] += self.heads.parameters()
        return [*self.single_task.text.parameter_groups(config), *of_nets, *others]
