"""The text encoder as a module: it computes real tokens only, and in bf16 where that is asked for.

Clips of a batch are padded to the longest of them, some three times their tokens. Everything in an encoder but its
attention looks at one token at a time, so it gets the real tokens of all clips in one row; only attention has to know
which tokens are of one clip.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn.functional import linear, scaled_dot_product_attention

SPARE = 128
"""Packed tokens are the real ones and at least one and at most so many others."""
CLIPS_AT_ONCE = 16
"""whose attention a CPU computes together"""
LONGEST_BY_PRODUCTS = 128
"""Of clips with more tokens a GPU does not keep the weights that each token gives to each other."""


class TextModel(nn.Module):
    """A Hugging Face encoder, `.model`, without the pooler unless it is wanted."""

    def __init__(self, model: nn.Module, *, pooler: bool = False) -> None:
        super().__init__()
        if not pooler and getattr(model, "pooler", None) is not None:
            model.pooler = None  # type: ignore[assignment]
        self.model = model
        accepted = inspect.signature(model.forward).parameters
        self.takes_segments = "token_type_ids" in accepted and getattr(model.config, "type_vocab_size", 0) > 1
        self.dtype = torch.float32
        self._prepared = _prepare(model)

    @property
    def can_pack(self) -> bool:
        """Whether the encoder reads packed tokens."""
        config: Any = self.model.config
        return self._prepared and config._attn_implementation == "sdpa"

    def forward(self, ids: Tensor, mask: Tensor, segments: Tensor, rows: Tensor | None = None) -> Tensor:
        """Return the last hidden state (B, L, width), float32, of tokens (B, L).

        Args:
            ids, mask, segments: of every token; the mask is 1 at real ones.
            rows: (T) places in the flattened (B·L) of the real tokens, in their order, then of 1 to `SPARE`
                others: the rest is 0. Without it, and where the encoder is none that can, padding is computed as well.
        """
        if not self.can_pack:
            return self._states(ids, segments, attention_mask=mask)
        # A mask that is (B, 1, 1, L) already is handed on as it is; transformers would ask a GPU what is in another.
        each_sees = mask.bool()[:, None, None]
        if rows is None:
            return self._states(ids, segments, attention_mask=each_sees)
        packing = _Packing(mask, rows)
        packed_ids, packed_segments = (tokens.flatten()[packing.rows][None] for tokens in (ids, segments))
        places = (packing.rows % ids.shape[1])[None]
        states = self._states(
            packed_ids, packed_segments, position_ids=places, attention_mask=each_sees, packing=packing
        )
        return torch.where(packing.mask[:, :, None], packing.spread(states[0]), 0.0)

    def _states(self, ids: Tensor, segments: Tensor, **options: Any) -> Tensor:
        """Return the states in the weights' precision, whatever they are computed in."""
        if self.takes_segments:
            options["token_type_ids"] = segments
        if self.dtype == torch.float32:
            return self.model(input_ids=ids, **options).last_hidden_state
        weights = dict(self.model.named_parameters())
        options["input_ids"] = ids
        if self.can_pack:
            # The vocabulary is a fifth of BERT's weights and needs no arithmetic: what is looked up is rounded.
            vocabulary = self.model.get_input_embeddings()  # type: ignore[operator]
            weights = {name: weight for name, weight in weights.items() if weight is not vocabulary.weight}
            options["inputs_embeds"] = vocabulary(options.pop("input_ids")).to(self.dtype)
        lowered = dict(zip(weights, _Lowered.apply(self.dtype, *weights.values()), strict=True))
        return functional_call(self.model, lowered, (), options).last_hidden_state.float()


def set_precision(model: nn.Module, precision: str) -> None:
    """Make a model's text encoders compute in the precision `"fp32"`, `"tf32"` or `"bf16"`; weights stay float32."""
    for module in model.modules():
        if isinstance(module, TextModel):
            module.dtype = torch.bfloat16 if precision == "bf16" else torch.float32


class _Lowered(torch.autograd.Function):
    """Weights in a lower precision, and their gradients in the weights' own: all tensors in one pass over memory."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        lowered = [torch.empty_like(weight, dtype=dtype) for weight in weights]
        torch._foreach_copy_(lowered, list(weights))
        ctx.dtypes = [weight.dtype for weight in weights]
        ctx.set_materialize_grads(False)
        return tuple(lowered)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        raised = [
            None if gradient is None else torch.empty_like(gradient, dtype=dtype, memory_format=torch.contiguous_format)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        given = [gradient for gradient in gradients if gradient is not None]
        torch._foreach_copy_([tensor for tensor in raised if tensor is not None], given)
        return None, *raised


class _Clips:
    """Where packed tokens stand in clips of length L.

    Args:
        mask: (B, L), 1 at real tokens.
        rows: (T) places in the flattened (B·L), in the order of the packed row.
    """

    def __init__(self, mask: Tensor, rows: Tensor) -> None:
        self.mask = mask.bool()
        self.rows = rows

    def spread(self, packed: Tensor) -> Tensor:
        """Return (B, L, …) of (T, …); what no row names is 0."""
        places = packed.new_zeros(self.mask.numel(), *packed.shape[1:])
        return places.index_copy(0, self.rows, packed).unflatten(0, self.mask.shape)

    def attend(self, heads: Tensor, dropout: float) -> Tensor:
        """Return the attention (T, H, d) within each clip, of query, key and value in one (T, 3, H, d)."""
        query, key, value = (self.spread(tensor).transpose(1, 2) for tensor in heads.unbind(1))
        each_sees = self.mask[:, None, None]
        found = scaled_dot_product_attention(query, key, value, attn_mask=each_sees, dropout_p=dropout)
        return found.transpose(1, 2).flatten(0, 1).index_select(0, self.rows)


class _Packing(_Clips):
    """Where the tokens of a packed row stand, in all clips; on a CPU those of longer clips come first.

    Args:
        mask: as above.
        rows: of the real tokens, then 1 to `SPARE` others, in any order.
    """

    def __init__(self, mask: Tensor, rows: Tensor) -> None:
        super().__init__(mask, rows)
        self._some_clips = [_Clips(self.mask, rows)]
        if mask.device.type == "cpu":
            self.rows, self._some_clips = _by_length(self.mask, rows)
        self._places: _Places | None = None

    def attend(self, heads: Tensor, dropout: float) -> Tensor:
        """Return the attention as above."""
        if _is_on_gpu(heads) and self.mask.shape[1] <= LONGEST_BY_PRODUCTS:
            return self.by_products(heads, dropout)
        of_some = zip(self._some_clips, heads.split([len(clips.rows) for clips in self._some_clips]), strict=True)
        return torch.cat([clips.attend(of_them, dropout) for clips, of_them in of_some])

    def by_products(self, heads: Tensor, dropout: float) -> Tensor:
        """Return the same, as a GPU is fast at it."""
        if self._places is None:  # the first of the layers, which are alike
            self._places = self._of_places(heads)
        return _Attention.apply(heads, self._places, dropout)

    def _of_places(self, heads: Tensor) -> _Places:
        (clips, longest), tokens = self.mask.shape, len(self.rows)
        length = -(-longest // 8) * 8  # a GPU's products read 16 bytes at a time
        at = self.rows % longest * clips + self.rows // longest
        token = at.new_zeros(length * clips).index_copy_(0, at, torch.arange(tokens, device=at.device))
        sees = nn.functional.pad(self.mask, (0, length - longest)).repeat_interleave(heads.shape[2], 0)
        # Not -∞, of which a clip without any token would get no number at all.
        bias = torch.zeros_like(sees, dtype=heads.dtype).masked_fill_(~sees, torch.finfo(heads.dtype).min)
        return _Places(at, token, bias[:, None])


def _by_length(mask: Tensor, rows: Tensor) -> tuple[Tensor, list[_Clips]]:
    """Return the places (T) of packed tokens, longer clips first, and where they stand in a few clips at a time.

    Attention of a few clips of like length computes little padding.
    """
    packed = torch.zeros(mask.numel(), dtype=torch.bool).index_fill_(0, rows, True).view_as(mask)
    ends = (packed * torch.arange(1, mask.shape[1] + 1)).amax(1)
    places = torch.arange(mask.numel()).view_as(mask)
    ordered, parts = [], []
    for clips in ends.argsort(descending=True, stable=True).split(CLIPS_AT_ONCE):
        longest = max(1, int(ends[clips[0]]))
        here = packed[clips, :longest]
        ordered.append(places[clips, :longest][here])
        parts.append(_Clips(mask[clips, :longest], here.flatten().nonzero().squeeze(1)))
    return torch.cat(ordered), parts


class _Places:
    """Places of T packed tokens in B clips of the same length W.

    First come the clips' first places, then their second ones: so the rows of each clip and head have one distance
    from each other, and those of the next clip and head one from them, which is what a batch of matrix products takes.

    Args:
        at: (T) each token's place in the flattened (W·B).
        token: (W·B) the token at each place, anyone's where there is none.
        bias: (B·H, 1, W) added to what a query thinks of each key: 0, and the least number where the key is padding.
    """

    def __init__(self, at: Tensor, token: Tensor, bias: Tensor) -> None:
        self.at, self.token, self.bias = at, token, bias
        third = torch.arange(3, device=at.device)
        self._all_at = (at[:, None] + len(token) * third).flatten()
        self._all_tokens = (3 * token + third[:, None]).flatten()

    def of_clips(self, tensor: Tensor) -> Tensor:
        """Return (B·H, W, d) of a tensor (W·B, H, d) of all places, the same memory."""
        return tensor.view(self.bias.shape[2], -1, tensor.shape[2]).transpose(0, 1)

    def spread(self, heads: Tensor) -> Tensor:
        """Return (3, W·B, H, d) of packed query, key and value (T, 3, H, d)."""
        return heads.flatten(0, 1).index_select(0, self._all_tokens).unflatten(0, (3, -1))

    def gather(self, heads: Tensor) -> Tensor:
        """Return (T, 3, H, d) of (3, W·B, H, d)."""
        return heads.flatten(0, 1).index_select(0, self._all_at).unflatten(0, (-1, 3))


class _Attention(torch.autograd.Function):
    """Attention (T, H, d) within clips, of packed query, key and value in one (T, 3, H, d).

    As matrix products, which for clips of some fifty tokens are faster than a GPU's fused kernels: those compute
    blocks of 64 × 64. Theirs for sequences of different lengths, which needs no places, drops the same in all clips
    and heads forward, and something else backward (seen with torch 2.11).
    """

    @staticmethod
    def forward(ctx: Any, heads: Tensor, places: _Places, dropout: float) -> Tensor:
        query, key, value = map(places.of_clips, places.spread(heads))
        weights = torch.baddbmm(places.bias, query, key.mT, alpha=heads.shape[3] ** -0.5).softmax(-1)
        kept, drawn = torch.native_dropout(weights, dropout, True) if dropout else (weights, None)
        found = heads.new_empty(len(places.token), *heads.shape[2:])
        torch.bmm(kept, value, out=places.of_clips(found))
        ctx.save_for_backward(query, key, value, weights, drawn)
        ctx.places, ctx.dropout = places, dropout
        return found.index_select(0, places.at)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        query, key, value, weights, drawn = ctx.saved_tensors
        places: _Places = ctx.places
        spread = gradient.new_zeros(len(places.token), *gradient.shape[1:]).index_copy_(0, places.at, gradient)
        given = places.of_clips(spread)

        def dropped(tensor: Tensor) -> Tensor:
            if drawn is None:
                return tensor
            return torch.ops.aten.native_dropout_backward(tensor, drawn, 1 / (1 - ctx.dropout))

        of_weights = dropped(torch.bmm(given, value.mT))
        of_scores = torch.ops.aten._softmax_backward_data(of_weights, weights, -1, weights.dtype)
        found = gradient.new_empty(3, *spread.shape)
        of_query, of_key, of_value = map(places.of_clips, found)
        scaled: dict[str, Any] = {"beta": 0, "alpha": gradient.shape[2] ** -0.5}
        torch.baddbmm(of_query, of_scores, key, out=of_query, **scaled)
        torch.baddbmm(of_key, of_scores.mT, query, out=of_key, **scaled)
        torch.bmm(dropped(weights).mT, given, out=of_value)
        return places.gather(found), None, None


@cache
def _that_packs(kind: Any) -> Any:
    """Return a kind of transformers' `BertSelfAttention` that also reads packed tokens (1, T, width)."""

    class ThatPacks(kind):
        def forward(
            self, hidden_states: Tensor, *positional: Any, packing: _Packing | None = None, **options: Any
        ) -> tuple[Tensor, Tensor | None]:
            if packing is None:
                return super().forward(hidden_states, *positional, **options)
            heads = _heads(hidden_states.squeeze(0), (self.query, self.key, self.value))
            heads = heads.unflatten(1, (3, self.num_attention_heads, -1))
            found = packing.attend(heads, self.dropout.p if self.training else 0.0)
            return found.flatten(1)[None], None

        def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
            return _blank, (kind,), self.__dict__

    return ThatPacks


def _blank(kind: Any) -> nn.Module:
    """Return what copying and unpickling fill."""
    made = _that_packs(kind)
    return made.__new__(made)


def _heads(tokens: Tensor, parts: Sequence[nn.Module]) -> Tensor:
    """Return query, key and value of tokens (T, width) in one (T, 3·width).

    One product makes them: three of a third of the width each would leave a GPU idle in between.
    """
    if any(type(part) is not _Linear or part._forward_hooks or part._forward_pre_hooks for part in parts):
        return torch.cat([part(tokens) for part in parts], 1)  # adapters do more, and hooks want to be called
    weight, bias = (torch.cat([getattr(part, name) for part in parts]) for name in ("weight", "bias"))
    return _affine(tokens, weight, bias)


class _Linear(nn.Linear):
    """A linear layer with `_Affine`."""

    def forward(self, values: Tensor) -> Tensor:
        return _affine(values, self.weight, self.bias)


def _affine(values: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None or not _is_on_gpu(values):
        return linear(values, weight, bias)
    return _Affine.apply(values, weight, bias)


class _Affine(torch.autograd.Function):
    """What `linear` gives for values (…, K). The gradient of the bias is a product too, faster on a GPU than a sum."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        of_values, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(values if of_weight else None, weight if of_values else None)
        return linear(values, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        values, weight = ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        return (
            None if weight is None else gradient @ weight,
            None if values is None else rows.mT @ values.flatten(0, -2),
            (rows.new_ones(1, len(rows)) @ rows).squeeze(0) if ctx.needs_input_grad[2] else None,
        )


def _is_on_gpu(tensor: Tensor) -> bool:
    """Whether a GPU computes with a tensor, and in its own precision."""
    return tensor.is_cuda and not torch.is_autocast_enabled("cuda")


def _prepare(model: Any) -> bool:
    """Make a model's attention one that can read packed tokens, where that is known to be right; return whether."""
    # Of encoders of other kinds it is not known that positions can be given and that only attention mixes tokens.
    config = model.config
    known = getattr(config, "model_type", None) == "bert" and getattr(model, "_supports_attention_backend", False)
    if not known or getattr(config, "position_embedding_type", "absolute") != "absolute":
        return False
    for layer in model.encoder.layer:
        for module in layer.modules():
            if type(module) is nn.Linear:
                module.__class__ = _Linear
        attention: Any = layer.attention.self
        kind: Any = type(attention)
        attention.__class__ = _that_packs(kind)
    return True
