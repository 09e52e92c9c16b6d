"""What the entry points name: the model `self_mm` and the hooks `ulgm` and `heads`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from torch import Tensor

from registry import HookSpec, ModelSpec, Training

from .network import SelfMM, SelfMMConfig
from .supervision import HeadsConfig, UlgmConfig, UlgmHook, heads_hook
from .upstream import translate

CITATION = (
    "Wenmeng Yu, Hua Xu, Ziqi Yuan, Jiele Wu: Learning Modality-Specific Representations with Self-Supervised "
    "Multi-Task Learning for Multimodal Sentiment Analysis. AAAI 2021."
)
URL = "https://arxiv.org/abs/2102.04830"


def _preset(name: str) -> dict[str, Any]:
    return json.loads((files("selfmm_plugin") / "presets" / f"{name}.json").read_text("utf-8"))


def _import_checkpoint(state: Mapping[str, Tensor]) -> dict[str, Any]:
    found = translate(state)
    heads = {f"supervision.heads.{name}": tensor for name, tensor in found.heads.items()}
    return {"config": found.config, "dims": found.dims, "model": found.network, "hooks": {"ulgm": heads}}


SELF_MM = ModelSpec(
    name="self_mm",
    summary="Self-MM: late fusion, with unimodal labels that ULGM generates",
    build=SelfMM,
    config=SelfMMConfig,
    presets={"mmsa": _preset("mmsa"), "author": _preset("author")},
    training=Training(batch_size=16, update_epochs=4),
    hooks=("ulgm",),
    hook_config=SelfMMConfig.hook_values,
    needs=lambda config: config.modalities,
    per_sample=True,
    tuned_for="BERT-base, fine-tuned",
    search=_preset("search")["search"],
    import_checkpoint=_import_checkpoint,
    citation=CITATION,
    url=URL,
)

ULGM = HookSpec(
    name="ulgm",
    summary="unimodal heads on a model's modality features, trained on labels that it generates",
    build=UlgmHook,
    config=UlgmConfig,
    control="heads",
    control_setting="supervision=multimodal",
)

HEADS = HookSpec(
    name="heads",
    summary="the heads of ulgm, each trained on the human multimodal label: the control for ulgm",
    build=heads_hook,
    config=HeadsConfig,
    excludes={
        "ulgm": (
            "both train unimodal heads on the same features, so compare a run with the one and a run with the other "
            "(self_mm always trains its heads with ULGM: its control is --set supervision=multimodal)"
        )
    },
)
