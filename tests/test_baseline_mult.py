"""MulT: the same numbers as upstream's, and what differs on purpose."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from MMSA.models.subNets.transformers_encoder.position_embedding import SinusoidalPositionalEmbedding
from torch.nn.functional import relu

from baselines_compat.mult import SPEC, positions, visible
from registry import Batch, InputError
from registry.testing import check_model
from registry.training import make_optimizer
from tests.baselines import (
    ALIGNED,
    DIMS,
    LENGTHS,
    as_upstream,
    assert_same,
    batch,
    configured,
    fine_tuned,
    give_weights,
    info,
    upstream,
)  # fmt: skip

SIZES = {
    **{"dst_feature_dim_nheads": (6, 3), "nlevels": 2, "attn_mask": True},
    **{"conv1d_kernel_size_l": 3, "conv1d_kernel_size_a": 4, "conv1d_kernel_size_v": 1},
}
DROPOUTS = {
    **{"text_dropout": 0.1, "embed_dropout": 0.2, "attn_dropout": 0.3, "attn_dropout_a": 0.15, "attn_dropout_v": 0.25},
    **{"relu_dropout": 0.05, "res_dropout": 0.35, "output_dropout": 0.4},
}
FEATURES = {"text": "Feature_t", "audio": "Feature_a", "vision": "Feature_v"}
LETTERS = {"l": "text", "a": "audio", "v": "vision"}
LAYER = {
    **{"norm_1": "layer_norms.0", "norm_2": "layer_norms.1", "layer_1": "fc1", "layer_2": "fc2"},
    **{"attention.inputs.weight": "self_attn.in_proj_weight", "attention.inputs.bias": "self_attn.in_proj_bias"},
    "attention.output": "self_attn.out_proj",
}


def names() -> dict[str, str]:
    """Return our names and upstream's."""
    stacks = {f"memory.{name}": f"trans_{letter}_mem" for letter, name in LETTERS.items()}
    for target in LETTERS:
        for source in LETTERS.keys() - {target}:
            stacks[f"crossmodal.{LETTERS[target]}_from_{LETTERS[source]}"] = f"trans_{target}_with_{source}"
    found = {"layer_1": "proj1", "layer_2": "proj2", "layer_3": "out_layer"}
    found |= {f"convolutions.{name}": f"proj_{letter}" for letter, name in LETTERS.items()}
    for ours, theirs in stacks.items():
        found[f"{ours}.norm"] = f"{theirs}.layer_norm"
        for n in range(3):
            found |= {f"{ours}.layers.{n}.{layer}": f"{theirs}.layers.{n}.{other}" for layer, other in LAYER.items()}
    return found


UNUSED = tuple(f"{name}.{buffer}" for name in
    [f"trans_{a}_{b}" for a in "lav" for b in ("mem", "with_l", "with_a", "with_v")]
    for buffer in ("version", "embed_positions"))  # fmt: skip


def pair(preset="mmsa", lengths=LENGTHS, **changes):
    """Return upstream's model and ours, with the same weights."""
    sizes = {**SIZES, **DROPOUTS, **changes}
    theirs = upstream("mult", lengths, **sizes)
    ours = SPEC.build(configured(SPEC, preset, **sizes), info(lengths)).eval()
    give_weights(ours, theirs.Model, names(), unused=UNUSED)
    return theirs, ours


def with_positions(model):
    """Switch on the positions that upstream has and does not use."""
    for stack in model.Model.children():
        if hasattr(stack, "embed_positions"):
            stack.embed_positions = SinusoidalPositionalEmbedding(stack.embed_dim)
    return model


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [LENGTHS, ALIGNED], ids=["unaligned", "aligned"])
@pytest.mark.parametrize("levels", [2, 3])
def test_equals_upstream(causal, lengths, levels):
    theirs, ours = pair(lengths=lengths, attn_mask=causal, nlevels=levels)
    data = batch(lengths)
    output, foreign = ours(data), theirs(data.text, data.audio, data.vision)
    assert_same(output, foreign, FEATURES)
    torch.testing.assert_close(output.features["fusion"], relu(theirs.Model.proj1(foreign["Feature_f"])))


@pytest.mark.parametrize("causal", [True, False])
def test_full_clips_equal_upstream_with_positions(causal):
    theirs, ours = pair("corrected", attn_mask=causal)
    data = batch(full=True)
    assert not torch.allclose(ours(data).prediction, theirs(data.text, data.audio, data.vision)["M"][:, 0], atol=1e-3)
    assert_same(ours(data), with_positions(theirs)(data.text, data.audio, data.vision), FEATURES)


@pytest.mark.parametrize("width", [2, 7, 10])
def test_positions_are_upstream_s(width):
    found = positions(torch.zeros(3, 5, width))
    if width > 3:  # upstream divides by zero
        torch.testing.assert_close(found, SinusoidalPositionalEmbedding.get_embedding(6, width)[1:])
    assert found.shape == (5, width)
    assert found.isfinite().all()


def test_dropouts_are_where_upstream_has_them():
    theirs, ours = pair()
    stacks = {ours_: theirs_.removesuffix(".layer_norm") for ours_, theirs_ in names().items() if ours_.count(".") == 2}
    for name, foreign in stacks.items():
        mine, other = ours.get_submodule(name.removesuffix(".norm")), theirs.Model.get_submodule(foreign)
        assert mine.dropout.p == other.dropout
        for layer, their_layer in zip(mine.layers, other.layers, strict=True):
            assert layer.attention.dropout == their_layer.self_attn.attn_dropout
            assert (layer.inner_dropout.p, layer.dropout.p) == (their_layer.relu_dropout, their_layer.res_dropout)
    assert len(stacks) == 9
    assert (ours.text_dropout.p, ours.dropout.p) == (theirs.Model.text_dropout, theirs.Model.output_dropout)


@pytest.mark.parametrize("change", [lambda spec: spec, fine_tuned, as_upstream], ids=["frozen", "tuned", "upstream"])
def test_keeps_the_contract(change):
    check_model(change(SPEC))


def test_padding_counts_upstream_and_not_here():
    data = batch()
    rubbish = replace(data, **{name: torch.where(getattr(data, name) == 0, 9.0, getattr(data, name)) for name in DIMS})
    _, ours = pair("corrected")
    torch.testing.assert_close(ours(data).prediction, ours(rubbish).prediction)
    _, as_theirs = pair("mmsa")
    assert not torch.allclose(as_theirs(data).prediction, as_theirs(rubbish).prediction, atol=1e-3)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_clip_shorter_than_the_kernel_is_one_step_in_any_company(steps):
    _, ours = pair("corrected")
    data = batch(clips=2)
    short = {f"{name}_lengths": torch.tensor([length, steps]) for name, length in LENGTHS.items()}
    arrays = {name: getattr(data, name).clone() for name in DIMS}
    for array in arrays.values():
        array[1, steps:] = 0.0
    together = ours(replace(data, **arrays, **short)).prediction[1:]
    alone = {name: array[1:, :steps] for name, array in arrays.items()}
    lengths = {name: length[1:] for name, length in short.items()}
    prediction = ours(Batch(index=torch.arange(1), **alone, **lengths)).prediction
    torch.testing.assert_close(prediction, together)
    assert ours._convolve("audio", alone["audio"], lengths["audio_lengths"])[0].shape == (1, 1, 6)


def test_order_counts_without_causality():
    small = {"attn_mask": False, "conv1d_kernel_size_l": 1, "conv1d_kernel_size_a": 1}
    data = batch(full=True)
    turned = replace(data, audio=data.audio[:, [*range(12, -1, -1), 13]])
    for preset, counts in (("mmsa", False), ("corrected", True)):
        _, ours = pair(preset, **small)
        same = torch.allclose(ours(data).prediction, ours(turned).prediction, atol=1e-4)
        assert same is not counts


def test_every_modality_is_convolved():
    wide = {"dst_feature_dim_nheads": (DIMS["vision"], 1), "conv1d_kernel_size_v": 3}
    for preset, found in (("mmsa", {"text", "audio"}), ("corrected", set(DIMS))):
        model = SPEC.build(configured(SPEC, preset, **{**SIZES, **wide}), info())
        assert set(model.convolutions) == found
    theirs = upstream("mult", **{**SIZES, **DROPOUTS, **wide})
    ours = SPEC.build(configured(SPEC, "mmsa", **{**SIZES, **wide}), info()).eval()
    give_weights(ours, theirs.Model, names(), unused=(*UNUSED, "proj_v"))
    data = batch()
    assert_same(ours(data), theirs(data.text, data.audio, data.vision), FEATURES)


def test_a_step_sees_real_steps_that_are_not_ahead():
    seen = visible(torch.tensor([2, 3]), torch.tensor([3, 1]), 3, 4, causal=True)
    assert seen.int().tolist() == [
        [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0]],  # the third step is padding
        [[1, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]],
    ]
    free = visible(torch.tensor([2]), torch.tensor([3]), 2, 4, causal=False)
    assert free.int().tolist() == [[[1, 1, 1, 0], [1, 1, 1, 0]]]


def test_published_weight_decay_counts():
    for preset, decay in (("mmsa", 0.0), ("corrected", 0.005)):
        config = configured(SPEC, preset)
        *_, others = SPEC.build(config, info()).parameter_groups(config)
        assert (others["lr"], others["weight_decay"]) == (2e-3, decay)


def test_is_trained_as_upstream():
    config = configured(SPEC, dataset="mosei")
    assert (config.update_epochs, config.clip_value, config.tail) == (8, 0.6, "drop")
    assert (config.scheduler, config.scheduler_factor, config.scheduler_patience) == ("plateau", 0.1, 20)


def test_a_step_moves_every_parameter():
    config = configured(SPEC, **SIZES, weight_decay=0.0)
    model = SPEC.build(config, info()).train()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = make_optimizer(model, [], config)
    model(batch()).prediction.sum().backward()
    optimizer.step()
    still = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    assert still == []


@pytest.mark.parametrize("value", [(50, 7), (0, 0), (4, -2)])
def test_heads_must_divide_the_width(value):
    with pytest.raises(InputError, match="a number of heads that divides it"):
        configured(SPEC, dst_feature_dim_nheads=value)
