"""The text encoder's module: packed tokens give what padded ones give, and bf16 what float32 gives, nearly."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertModel, DistilBertConfig, DistilBertModel

from registry.data import text_model
from registry.data.text_model import (
    CLIPS_AT_ONCE,
    LONGEST_BY_PRODUCTS,
    TextModel,
    _Affine,
    _Clips,
    _Packing,
    set_precision,
)
from tests.helpers import TINY_BERT

LENGTHS = (5, 9, 2, 7)


def tokens(lengths=LENGTHS, longest: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(1, 50, mask.shape, generator=torch.Generator().manual_seed(0)) * mask
    return ids, mask, torch.zeros_like(ids)


def rows_of(mask: Tensor, spare: int = 1) -> Tensor:
    return (mask == 0).flatten().sort(stable=True).indices[: int(mask.sum()) + spare]


def encoder(**settings) -> TextModel:
    torch.manual_seed(0)
    config = {key: value for key, value in TINY_BERT.items() if key != "model_type"}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return TextModel(BertModel(BertConfig(**config, **still, **settings)))


def gradients(model: TextModel, given, rows: Tensor | None, autocast: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    with torch.autocast(given[0].device.type, torch.bfloat16, enabled=autocast):
        states = model(*given, rows)
    weights = torch.linspace(-1, 1, states.numel(), device=states.device).view_as(states) * given[1][:, :, None]
    (states * weights).sum().backward()
    return states.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_clips_of_like_length_are_attended_to_together():
    """A CPU computes attention of a few clips at a time; those without tokens, here all of the last few, come last."""
    model = encoder()
    lengths = torch.randint(1, 9, (2 * CLIPS_AT_ONCE,), generator=torch.Generator().manual_seed(1)).tolist()
    given = tokens([*lengths, 0])
    expected, expected_gradients = gradients(model, given, None)
    shapes = []
    attend = _Clips.attend
    with patch.object(
        _Clips, "attend", lambda self, *heads: shapes.append(tuple(self.mask.shape)) or attend(self, *heads)
    ):
        found, found_gradients = gradients(model, given, rows_of(given[1], 2))
    assert shapes[:3] == [(CLIPS_AT_ONCE, 8), (CLIPS_AT_ONCE, 5), (1, 1)]
    real = given[1].bool()
    torch.testing.assert_close(found[real], expected[real], atol=1e-6, rtol=0)
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(found_gradients[name], gradient, atol=2e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("spare", [1, 4])
def test_packed_tokens_give_what_padded_ones_give(spare):
    model, given = encoder(), tokens()
    assert model.can_pack
    expected, expected_gradients = gradients(model, given, None)
    found, found_gradients = gradients(model, given, rows_of(given[1], spare))
    real = given[1].bool()
    torch.testing.assert_close(found[real], expected[real], atol=1e-6, rtol=0)
    assert not found[~real].any()
    assert found_gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(found_gradients[name], gradient, atol=2e-5, rtol=1e-4, msg=name)


def test_a_clip_without_any_token_spoils_no_other():
    model, (ids, mask, segments) = encoder(), tokens()
    mask[1] = 0
    rows = rows_of(mask, int((mask == 0).sum()))
    found, gradient_of = gradients(model, (ids, mask, segments), rows)
    assert found.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradient_of.values())
    others = [0, *range(2, len(mask))]
    alone = model(ids[others], mask[others], segments[others], rows_of(mask[others]))
    torch.testing.assert_close(found[others], alone, atol=1e-6, rtol=0)


class Adapted(torch.nn.Module):
    """A linear layer with something beside it."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base, self.weight, self.bias = base, base.weight, base.bias

    def forward(self, values: Tensor) -> Tensor:
        return self.base(values) + values.flip(-1)


def test_adapters_and_hooks_of_query_key_and_value_count_for_packed_tokens_too():
    model, given = encoder().eval(), tokens()
    plain, attention = model(*given), model.model.encoder.layer[0].attention.self
    attention.value = Adapted(attention.value)
    attention.query.register_forward_hook(lambda module, inputs, output: 3 * output)
    expected, real = model(*given), given[1].bool()
    assert (expected - plain)[real].abs().max() > 1e-2
    torch.testing.assert_close(model(*given, rows_of(given[1]))[real], expected[real], atol=1e-6, rtol=0)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_reads_packed_tokens_with_its_own_weights(copied):
    model, given = encoder().eval(), tokens()
    rows = rows_of(given[1])
    expected, other = model(*given, rows), copied(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert other.can_pack
    assert torch.equal(other(*given, rows), expected)
    assert other.state_dict().keys() == model.state_dict().keys()


def test_a_model_goes_when_nobody_has_it():
    """On a GPU the memory of its weights waits for nothing."""
    model = encoder()
    weights = [weakref.ref(parameter) for parameter in model.parameters()]
    gc.disable()
    try:
        del model
        assert not any(ref() is not None for ref in weights)
    finally:
        gc.enable()


def slopes_with_dropout(heads: Tensor, packing: _Packing, way: str = "attend") -> tuple[float, float]:
    """Return the slope of a sum of what is attended to along a direction, by its gradient and by two values.

    The same elements are dropped each time.

    Args:
        heads: (T, 3, H, d).
        packing: of the same tokens.
        way: the method of `packing` that attends.
    """
    direction, weights = torch.randn_like(heads), torch.randn_like(heads[:, 0])
    weights *= (packing.mask.flatten()[packing.rows])[:, None, None]

    def total(at: Tensor) -> Tensor:
        torch.manual_seed(7)
        return (getattr(packing, way)(at, 0.5) * weights).sum()

    (gradient,) = torch.autograd.grad(total(heads.requires_grad_()), heads)
    with torch.no_grad():
        step = 0.01 * direction
        return float((gradient * direction).sum()), float((total(heads + step) - total(heads - step)) / 0.02)


@pytest.mark.parametrize("way", ["attend", "by_products"])
def test_the_gradient_is_that_of_the_dropout_which_was_drawn(way):
    _, mask, _ = tokens((5, 9, 2, 7, 8, 3))
    rows = rows_of(mask, 4)
    by_gradient, by_values = slopes_with_dropout(torch.randn(len(rows), 3, 2, 16).double(), _Packing(mask, rows), way)
    assert by_gradient == pytest.approx(by_values, rel=1e-3, abs=1e-3)
    assert abs(by_values) > 0.1


def test_attention_is_the_same_by_products():
    """This is how a GPU does it; the first clip has no token, and what comes of it spoils no other."""
    _, mask, _ = tokens((0, 9, 2, 7, 8, 3))
    packing = _Packing(mask, rows_of(mask, 4))
    heads = torch.randn(len(packing.rows), 3, 2, 16).double().requires_grad_()
    weights = torch.randn(len(heads), 2, 16) * mask.flatten()[packing.rows][:, None, None]
    found, expected = packing.by_products(heads, 0.0), packing.attend(heads, 0.0)
    torch.testing.assert_close(found * weights, expected * weights)
    slopes = [torch.autograd.grad((values * weights).sum(), heads)[0] for values in (found, expected)]
    assert slopes[1].abs().mean() > 0.1
    torch.testing.assert_close(*slopes)


@pytest.mark.parametrize("longest", [LONGEST_BY_PRODUCTS, LONGEST_BY_PRODUCTS + 1])
def test_a_gpu_attends_to_long_clips_without_all_their_weights(longest, monkeypatch):
    monkeypatch.setattr(text_model, "_is_on_gpu", lambda heads: True)
    _, mask, _ = tokens((5, longest), longest)
    packing = _Packing(mask, rows_of(mask, 4))
    heads = torch.randn(len(packing.rows), 3, 2, 16)
    with patch.object(packing, "by_products", side_effect=packing.by_products) as by_products:
        found = packing.attend(heads, 0.0)
    assert by_products.called == (longest == LONGEST_BY_PRODUCTS)
    monkeypatch.undo()
    torch.testing.assert_close(found, packing.attend(heads, 0.0))


@pytest.mark.parametrize("frozen", [(), (0,), (1, 2)])
def test_a_linear_layer_s_gradients_are_the_same_as_products(frozen):
    given = [torch.randn(2, 7, 5), torch.randn(3, 5), torch.randn(3)]
    given = [tensor.double().requires_grad_(number not in frozen) for number, tensor in enumerate(given)]
    weights = torch.randn(2, 7, 3)
    found, expected = _Affine.apply(*given), torch.nn.functional.linear(*given)
    assert torch.equal(found, expected)
    trained = [tensor for tensor in given if tensor.requires_grad]
    slopes = [torch.autograd.grad((values * weights).sum(), trained) for values in (found, expected)]
    torch.testing.assert_close(*slopes)


def under_autocast_near_without(device: str) -> None:
    """Compare states and gradients of packed tokens; under autocast products are in bf16."""
    model = encoder().to(device)
    given = [tensor.to(device) for tensor in tokens()]
    expected, expected_gradients = gradients(model, given, rows_of(given[1]))
    found, found_gradients = gradients(model, given, rows_of(given[1]), autocast=True)
    assert 0 < (found - expected).abs().max() < 0.05
    name = "model.encoder.layer.0.attention.self.value.weight"
    assert (
        0 < (found_gradients[name] - expected_gradients[name]).abs().max() < 0.05 * expected_gradients[name].abs().max()
    )
    assert all(gradient.dtype == torch.float32 for gradient in found_gradients.values())


def test_packed_tokens_under_autocast_are_near_those_without():
    under_autocast_near_without("cpu")


def test_packed_tokens_keep_the_places_that_padding_on_the_left_gives_them():
    model = encoder().eval()
    ids, mask, segments = (tensor.flip(1) for tensor in tokens())
    expected, found = model(ids, mask, segments), model(ids, mask, segments, rows_of(mask))
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=1e-6, rtol=0)


def test_padding_is_computed_only_where_it_must_be():
    model, given = encoder(), tokens()
    widths: list[int] = []
    layer = model.model.encoder.layer[0].intermediate
    layer.register_forward_hook(lambda module, inputs, output: widths.append(output.shape[:-1].numel()))
    model(*given)
    model(*given, rows_of(given[1]))
    assert widths == [given[1].numel(), sum(LENGTHS) + 1]


def test_an_encoder_of_another_kind_computes_padding_and_gives_the_same():
    torch.manual_seed(0)
    other = TextModel(DistilBertModel(DistilBertConfig(vocab_size=50, dim=8, n_layers=1, n_heads=2, hidden_dim=8)))
    given = tokens()
    other.eval()
    assert not other.can_pack
    assert torch.equal(other(*given), other(*given, rows_of(given[1])))


def test_the_states_are_those_of_transformers_itself():
    model, (ids, mask, segments) = encoder().eval(), tokens()
    plain = BertModel(copy.deepcopy(model.model.config), add_pooling_layer=False).eval()
    plain.load_state_dict(model.model.state_dict())
    plain.set_attn_implementation("eager")
    expected = plain(input_ids=ids, attention_mask=mask, token_type_ids=segments).last_hidden_state
    for rows in (None, rows_of(mask)):
        found = model(ids, mask, segments, rows)
        torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=0)


def test_attention_that_is_set_otherwise_is_never_given_packed_tokens():
    model, given = encoder().eval(), tokens()
    expected = model(*given)
    model.model.set_attn_implementation("eager")
    torch.testing.assert_close(model(*given, rows_of(given[1])), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("packs", [True, False])
def test_bf16_is_near_float32_and_its_gradients_are_float32(packs):
    model, given = encoder(), tokens()
    rows = rows_of(given[1]) if packs else None
    expected, expected_gradients = gradients(model, given, rows)
    set_precision(model, "bf16")
    found, found_gradients = gradients(model, given, rows)
    assert found.dtype == torch.float32
    assert {gradient.dtype for gradient in found_gradients.values()} == {torch.float32}
    assert found_gradients.keys() == expected_gradients.keys()
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0.05)
    assert not torch.equal(found, expected)
    one, other = (torch.cat([g.flatten() for g in of.values()]) for of in (found_gradients, expected_gradients))
    assert torch.cosine_similarity(one, other, dim=0) > 0.999
    set_precision(model, "fp32")
    assert torch.equal(gradients(model, given, rows)[0], expected)


def test_weights_below_bf16_s_steps_still_move():
    """Weights are float32: an update that bf16 would round away is kept."""
    model, given = encoder(), tokens()
    set_precision(model, "bf16")
    before = model.model.encoder.layer[0].output.dense.weight.clone()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-6)
    gradients(model, given, rows_of(given[1]))
    optimizer.step()
    moved = (model.model.encoder.layer[0].output.dense.weight.detach() - before.detach()).abs()
    assert 0 < float(moved.max()) < 2e-6
