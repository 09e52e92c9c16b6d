"""LMF: the same numbers as upstream's, and what differs on purpose."""

from __future__ import annotations

import pytest
import torch

from baselines_compat.lmf import SPEC
from registry.testing import check_model
from registry.training import make_optimizer
from tests.baselines import (
    as_upstream,
    assert_same,
    batch,
    configured,
    fine_tuned,
    give_weights,
    info,
    means,
    modality_nets,
    upstream,
)  # fmt: skip

SIZES = {"hidden_dims": (8, 4, 6), "rank": 3}
DROPOUTS = (0.1, 0.2, 0.3, 0.4)
NAMES = {
    **modality_nets(),
    **{"factors.text": "text_factor", "factors.audio": "audio_factor", "factors.vision": "video_factor"},
    **{"sum.weight": "fusion_weights", "sum.bias": "fusion_bias"},
}
NAMES |= {f"{name}.weight": NAMES.pop(name) for name in list(NAMES) if name.startswith("factors.")}
FEATURES = {"text": "Feature_t", "audio": "Feature_a", "vision": "Feature_v", "fusion": "Feature_f"}


def pair(preset="mmsa", **changes):
    """Return upstream's model and ours, with the same weights."""
    sizes = {**SIZES, "dropouts": DROPOUTS, **changes}
    theirs = upstream("lmf", **sizes)
    ours = SPEC.build(configured(SPEC, preset, **sizes), info()).eval()
    give_weights(ours, theirs.Model, NAMES)
    return theirs, ours


@pytest.mark.parametrize("rank", [2, 3])
def test_equals_upstream(rank):
    theirs, ours = pair(rank=rank)
    data = batch()
    assert_same(ours(data), theirs(*means(data)), FEATURES)


def test_full_clips_equal_upstream():
    theirs, ours = pair("corrected")
    data = batch(full=True)
    assert_same(ours(data), theirs(*means(data)), FEATURES)


def test_padding_counts_upstream_and_not_here():
    data = batch()
    predictions = [pair(preset)[1](data).prediction for preset in ("mmsa", "corrected")]
    assert not torch.allclose(*predictions, atol=1e-3)


@pytest.mark.parametrize("change", [lambda spec: spec, fine_tuned, as_upstream], ids=["frozen", "tuned", "upstream"])
def test_keeps_the_contract(change):
    check_model(change(SPEC))


@pytest.mark.parametrize("trained", [True, False])
def test_the_sum_of_the_products_is_trained_here_only(trained):
    config = configured(SPEC, "corrected" if trained else "mmsa", weight_decay=0.0, dropouts=(0.0,) * 4)
    model = SPEC.build(config, info()).train()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = make_optimizer(model, [], config)
    model(batch()).prediction.sum().backward()
    optimizer.step()
    still = {name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])}
    assert still == (set() if trained else {"sum.weight", "sum.bias"})


def test_factors_have_a_rate_of_their_own():
    config = configured(SPEC, dataset="sims")
    model = SPEC.build(config, info())
    *_, factors, others = model.parameter_groups(config)
    assert (factors["lr"], factors["weight_decay"]) == (5e-4, 0.005)
    assert (others["lr"], others["weight_decay"]) == (2e-3, 0.005)
    assert [tuple(factor.shape) for factor in factors["params"]] == [(4, 33), (4, 17), (4, 65)]
    assert len(factors["params"]) + len(others["params"]) == len(list(model.parameters()))


def test_factors_start_as_upstream_s():
    theirs = torch.nn.init.xavier_normal_(torch.empty(3, 65, 1), generator=torch.Generator().manual_seed(0))
    ours = torch.nn.init.xavier_normal_(torch.empty(3, 65), generator=torch.Generator().manual_seed(0))
    assert torch.equal(theirs[..., 0], ours)
    weights = SPEC.build(configured(SPEC, hidden_dims=(2000, 2000, 2000)), info()).factors["audio"].weight
    assert weights.std().item() == pytest.approx((2 / (2001 + 3)) ** 0.5, rel=0.05)
