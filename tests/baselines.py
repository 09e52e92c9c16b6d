"""What the tests of the baselines share: small random batches, upstream's model, and its weights in ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from easydict import EasyDict
from MMSA.models.AMIO import AMIO
from pydantic import create_model
from torch import Tensor, nn

from registry.config import resolve
from registry.contract import Batch, DataInfo, DatasetSpec, FusionOutput, ModelSpec
from registry.data.text import TextEncoder
from tests.helpers import TINY_BERT

DIMS = {"text": 16, "audio": 5, "vision": 7}
LENGTHS = {"text": 9, "audio": 14, "vision": 11}
ALIGNED = dict.fromkeys(LENGTHS, 9)
CLIPS = 6


def info(lengths: Mapping[str, int] = LENGTHS, label_range: float = 3.0, tasks: str = "M") -> DataInfo:
    """Return facts of data that has a tiny random BERT of width 16."""
    encoder = TextEncoder.from_config(TINY_BERT, name="tiny")
    aligned = len(set(lengths.values())) == 1
    return DataInfo("mosi", DIMS, lengths, 100, label_range, tuple(tasks), aligned, encoder)


def configured(spec: ModelSpec, preset: str | None = None, dataset: str = "mosi", **overrides: Any) -> Any:
    """Return a model's config: a preset's values, and others."""
    of = DatasetSpec(name=dataset, summary="", label_range=3.0)
    return resolve(spec, [], of, preset=preset, overrides=overrides).model


def fine_tuned(spec: ModelSpec) -> ModelSpec:
    """Return a spec whose text encoder is trained by default, for `check_model`."""
    return replace(spec, config=create_model("tuned", __base__=spec.config, finetune_text=(bool, True)))


def as_upstream(spec: ModelSpec) -> ModelSpec:
    """Return a spec whose default keeps upstream's behaviour, for `check_model`."""
    return replace(spec, config=create_model("upstream", __base__=spec.config, as_upstream=(bool, True)), presets={})


def batch(
    lengths: Mapping[str, int] = LENGTHS, *, seed: int = 0, full: bool = False, tasks: str = "M", clips: int = CLIPS
) -> Batch:
    """Return random clips with frozen text features, token ids and zeros behind random (or full) lengths."""
    g = torch.Generator().manual_seed(seed)
    aligned = len(set(lengths.values())) == 1
    arrays: dict[str, Tensor] = {}
    real = None
    for name, steps in lengths.items():
        if real is None or not aligned:
            real = torch.randint(2, steps + 1, (clips,), generator=g)
            real[0] = steps
            real = torch.full_like(real, steps) if full else real
        mask = torch.arange(steps) < real[:, None]
        arrays[name] = torch.randn(clips, steps, DIMS[name], generator=g) * mask[:, :, None]
        arrays[f"{name}_lengths"] = real
    mask = (torch.arange(lengths["text"]) < arrays["text_lengths"][:, None]).long()
    ids = torch.randint(5, TINY_BERT["vocab_size"], mask.shape, generator=g) * mask
    labels = {task: torch.empty(clips).uniform_(-3, 3, generator=g) for task in tasks}
    tokens = {"text_ids": ids, "text_mask": mask, "text_segments": torch.zeros_like(ids)}
    return Batch(index=torch.arange(clips), labels=labels, **arrays, **tokens)


def upstream(name: str, lengths: Mapping[str, int] = LENGTHS, **arguments: Any) -> nn.Module:
    """Return upstream's model, with weights large enough that a slip shows, in evaluation mode."""
    fixed = {
        **{"model_name": name, "dataset_name": "mosi", "train_mode": "regression", "device": torch.device("cpu")},
        **{"feature_dims": list(DIMS.values()), "seq_lens": list(lengths.values()), "use_bert": False},
    }
    torch.manual_seed(0)
    model = AMIO(EasyDict(fixed, **arguments)).eval()
    enlarge(model.Model)
    return model


def enlarge(model: nn.Module) -> None:
    """Draw every trainable weight anew, and the running statistics of normalisations."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2)
            elif tensor.dtype.is_floating_point and not name.endswith(("output_range", "output_shift")):
                tensor.normal_(std=0.3)


def give_weights(ours: nn.Module, theirs: nn.Module, names: Mapping[str, str], unused: tuple[str, ...] = ()) -> None:
    """Load upstream's weights into our model; every weight of both must find its place.

    Args:
        ours, theirs: the models.
        names: our prefix or name to theirs; the longest prefix counts.
        unused: prefixes of upstream's weights that nothing reads.
    """
    foreign = theirs.state_dict()
    used, state = set(), {}
    for name, tensor in ours.state_dict().items():
        prefix = max((p for p in names if name == p or name.startswith(f"{p}.")), key=len)
        source = names[prefix] + name[len(prefix) :]
        used.add(source)
        state[name] = foreign[source].reshape(tensor.shape)
    left = [name for name in foreign if name not in used and not name.startswith(unused)]
    assert not left, f"upstream's {left} are nowhere in ours"
    ours.load_state_dict(state)


FEATURE_NET = {"norm": "norm", "layer_1": "linear_1", "layer_2": "linear_2", "layer_3": "linear_3"}


def modality_nets(
    text: str = "text_subnet", audio: str = "audio_subnet", vision: str = "video_subnet"
) -> dict[str, str]:
    """Return the names of `layers.ModalityNets`, called `modalities`, and upstream's."""
    names = {"modalities.text.rnn": f"{text}.rnn", "modalities.text.linear": f"{text}.linear_1"}
    for ours, theirs in (("audio", audio), ("vision", vision)):
        names |= {f"modalities.{ours}.{layer}": f"{theirs}.{other}" for layer, other in FEATURE_NET.items()}
    return names


def means(data: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Return text, and audio and vision (B, 1, d) averaged over padding, as upstream's loader gives them."""
    assert data.text is not None
    assert data.audio is not None
    assert data.vision is not None
    return data.text, data.audio.mean(1, keepdim=True), data.vision.mean(1, keepdim=True)


def assert_same(
    ours: FusionOutput, theirs: Mapping[str, Tensor], features: Mapping[str, str], limit: float = 1e-5
) -> None:
    """Compare predictions, and features by our name and upstream's."""
    torch.testing.assert_close(ours.prediction, theirs["M"].flatten(), atol=limit, rtol=limit)
    for name, foreign in features.items():
        torch.testing.assert_close(ours.features[name], theirs[foreign], atol=limit, rtol=limit)
