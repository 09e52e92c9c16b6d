"""Presets and the catalogue of datasets against the published figures, copied into `facts/`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from registry.data import catalog
from selfmm_plugin.plugin import SELF_MM

FACTS = Path(__file__).parent / "facts"
NOT_OURS = {
    *("need_data_aligned", "need_model_aligned", "need_normalized", "use_bert", "use_finetune", "save_labels"),
    *("text_out", "t_bert_dropout", "transformers", "pretrained", "H"),
}
"""what something else settles, see docs/differences.md"""


def facts(name: str) -> dict[str, Any]:
    return json.loads((FACTS / f"{name}.json").read_text("utf-8"))


def flat(published: dict[str, Any]) -> dict[str, Any]:
    """Return published hyper-parameters under our names."""
    names = {"excludeZero": "exclude_zero"}
    by_part = {"lr": "learning_rate_{}", "weight_decay": "weight_decay_{}"}
    by_part |= {"post_dim": "post_{}_dim", "post_dropout": "post_{}_dropout"}
    values: dict[str, Any] = {}
    for key, value in published.items():
        if key in by_part:
            values |= {by_part[key].format(part): figure for part, figure in value.items()}
        else:
            values[names.get(key, key)] = value
    return {key: value for key, value in values.items() if key not in NOT_OURS}


@pytest.mark.parametrize("preset", ["mmsa", "author"])
def test_presets_are_the_published_ones(preset):
    published = facts(preset)
    per_dataset = published.get("per_dataset") or {k: v for k, v in published.items() if k in ("mosi", "mosei", "sims")}
    ours = SELF_MM.presets[preset]
    assert ours.keys() == per_dataset.keys()
    for dataset, values in per_dataset.items():
        assert ours[dataset] == {**flat({**published["common"], **values}), "tail": "drop"}, dataset


@pytest.mark.parametrize("dataset", ["mosi", "mosei", "sims", "simsv2"])
def test_the_catalogue_has_the_published_facts(dataset):
    ours, published = getattr(catalog, dataset.upper()), facts("datasets")
    expected = published["datasets"][dataset]
    assert [-ours.label_range, ours.label_range] == expected["label_range"]
    assert (ours.splits, ours.text_encoder, ours.metrics) == (
        expected["splits"],
        expected["text_encoder"],
        expected["metrics"],
    )
    files = {name.partition("/"): value["sha256"] for name, value in published["files"].items()}
    assert ours.sha256 == {file: sha256 for (folder, _, file), sha256 in files.items() if folder == dataset}


def test_the_demo_stops_after_15_epochs():
    assert catalog.DEMO.epochs == 15
