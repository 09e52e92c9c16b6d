"""Published results against the facts they were copied from."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from baselines_compat.published import PUBLISHED
from registry import PublishedResult, metrics
from registry.plugins import Plugins

FACTS = json.loads((Path(__file__).parent / "facts" / "published_results.json").read_text("utf-8"))


def test_they_are_found():
    assert Plugins().load("published", "mmsa") is PUBLISHED


def test_every_figure_is_the_published_one():
    assert len(PUBLISHED.results) == len(FACTS)
    for ours, fact in zip(PUBLISHED.results, FACTS, strict=True):
        for key in ("source", "task", "dataset", "model", "data_setting", "metrics"):
            assert getattr(ours, key) == fact[key], (ours, key)
        assert ours.std == fact.get("std", {})
        assert fact.get("note") in (None, ours.note)


def test_seeds_are_those_that_the_source_names():
    for ours, fact in zip(PUBLISHED.results, FACTS, strict=True):
        named = re.search(r"(\d+) seeds", fact.get("seeds", ours.source))
        assert ours.seeds == (int(named[1]) if named else None), ours
        assert ("spread not published" in fact.get("seeds", "")) == (ours.note == "spread not published")


def test_what_was_read_second_hand_says_so():
    marked = [result for result in PUBLISHED.results if result.second_hand]
    assert marked
    assert all(result.second_hand == ("second-hand" in result.source) for result in PUBLISHED.results)


def test_each_source_is_of_one_kind():
    kinds = {result.source.split()[0]: result.kind for result in PUBLISHED.results}
    assert kinds == {"MMSA": "upstream", "Self-MM": "paper", "independent": "re-run", "one": "re-run"}
    assert len({(result.source, result.kind) for result in PUBLISHED.results}) == len(kinds)


def test_metrics_have_the_registrys_names_and_are_fractions():
    numbers = np.array([-1.0, 0.0, 2.0])
    families = {family: metrics.regression(numbers, numbers, family).keys() for family in ("mosi", "sims")}
    of_classes = metrics.classification(np.eye(3), np.arange(3)).keys()
    for result in PUBLISHED.results:
        family = "sims" if result.dataset.startswith("sims") else "mosi"
        known = families[family] if result.task == "regression" else of_classes
        assert result.metrics.keys() <= known, result
        assert result.std.keys() <= result.metrics.keys(), result
        assert all(0 < value < 1 for value in result.metrics.values()), result


def test_a_result_twice_is_of_two_sources():
    keys = [(r.source, r.task, r.dataset, r.model, r.data_setting) for r in PUBLISHED.results]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("fault", [{"metrics": {"MAE": "low"}}, {"task": "ranking"}, {"std_": {}}])
def test_a_wrong_record_is_refused(fault: dict[str, Any]):
    with pytest.raises(ValidationError):
        PublishedResult(**{"source": "", "kind": "paper", "dataset": "mosi", "model": "tfn", "metrics": {}, **fault})
