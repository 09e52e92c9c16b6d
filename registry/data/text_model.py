"""The text encoder as a module: it computes real tokens only, and in bf16 where that is asked for.

Clips of a batch are padded to the longest of them, some three times their tokens. Everything in an encoder but its
attention looks at one token at a time, so it gets the real tokens of all clips in one row; only attention has to know
which tokens are of one clip.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import linear, scaled_dot_product_attention

SPARE = 128
"""Packed tokens are the real ones and at least one and at most so many others."""


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
        packed_ids, packed_segments = (tokens.flatten()[rows][None] for tokens in (ids, segments))
        places = (rows % ids.shape[1])[None]
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


class _Packing:
    """Where the tokens of a packed row stand in (B, L).

    Args:
        mask: (B, L), 1 at real tokens.
        rows: (T) places in the flattened (B·L), the real ones in their order, then 1 to `SPARE` others.
    """

    def __init__(self, mask: Tensor, rows: Tensor) -> None:
        self.mask = mask.bool()
        self.rows = rows
        self._wide: _Wide | None = None

    def spread(self, packed: Tensor) -> Tensor:
        """Return (B, L, …) of (T, …); what no row names is 0."""
        places = packed.new_zeros(self.mask.numel(), *packed.shape[1:])
        return places.index_copy(0, self.rows, packed).unflatten(0, self.mask.shape)

    def attend(self, heads: Tensor, dropout: float) -> Tensor:
        """Return the attention (T, H, d) within each clip, of query, key and value in one (T, 3, H, d)."""
        if _is_fused(heads):
            if self._wide is None:  # the first of the layers, which have one precision
                self._wide = self._places(heads.dtype)
            return _FusedAttention.apply(heads, self._wide, dropout)
        query, key, value = (self.spread(tensor).transpose(1, 2) for tensor in heads.unbind(1))
        each_sees = self.mask[:, None, None]
        found = scaled_dot_product_attention(query, key, value, attn_mask=each_sees, dropout_p=dropout)
        return found.transpose(1, 2).flatten(0, 1).index_select(0, self.rows)

    def _places(self, dtype: torch.dtype) -> _Wide:
        """Return the places in clips that are as long as a GPU's attention wants them."""
        (clips, longest), tokens = self.mask.shape, len(self.rows)
        length = -(-longest // 8) * 8
        at = self.rows // longest * length + self.rows % longest
        token = at.new_zeros(clips * length).index_copy_(0, at, torch.arange(tokens, device=at.device))
        sees = nn.functional.pad(self.mask, (0, length - longest))
        return _Wide(at, token, torch.zeros_like(sees, dtype=dtype).masked_fill_(~sees, -torch.inf))


class _Wide(NamedTuple):
    """Clips as long as all of (B, W), for T packed tokens."""

    at: Tensor
    """(T) each token's place in the flattened (B·W)"""
    token: Tensor
    """(B·W) the token at each place, anyone's where there is none"""
    bias: Tensor
    """(B, W) added to what a query thinks of each key: 0, and −∞ where the key is padding"""


class _FusedAttention(torch.autograd.Function):
    """Attention (T, H, d) of packed query, key and value, (T, 3, H, d) in one, by a GPU's kernel for padded clips.

    It has one for packed ones, whose dropout is wrong: forward it drops the same in all clips and heads, and backward
    something else (seen with torch 2.11).
    """

    @staticmethod
    def forward(ctx: Any, heads: Tensor, wide: _Wide, dropout: float) -> Tensor:
        clips, length = wide.bias.shape
        parts = heads.index_select(0, wide.token).unflatten(0, (clips, length)).unbind(2)
        bias = wide.bias[:, None, None].expand(-1, heads.shape[2], length, -1)
        found, sums, *drawn, _, _ = torch.ops.aten._efficient_attention_forward(
            *parts, bias, *[None] * 4, dropout, 0, ctx.needs_input_grad[0]
        )
        ctx.save_for_backward(wide.at, *parts, bias, found, sums, *drawn)
        ctx.dropout = dropout
        return found.flatten(0, 1).index_select(0, wide.at)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        at, *given, found, sums, seed, offset = ctx.saved_tensors
        clips, length, count, width = found.shape
        spread = gradient.new_zeros(clips * length, count, width).index_copy_(0, at, gradient)
        query, *_ = torch.ops.aten._efficient_attention_backward(
            spread.view_as(found),
            *given,
            *(found, None, None, length, length, sums, ctx.dropout, seed, offset, 0, False),
            shared_storage_dqdkdv=True,
        )
        # That of the query is the first third of a tensor (B, W, 3, H, d).
        size, strides = (clips * length, 3, count, width), (3 * count * width, count * width, width, 1)
        return query.as_strided(size, strides).index_select(0, at), None, None


def _is_fused(heads: Tensor) -> bool:
    """Whether a GPU has a kernel for the attention of packed tokens (…, d): it reads 16 bytes at a time."""
    wide = heads.shape[-1] * heads.element_size() % 16 == 0
    has_bf16 = heads.is_cuda and torch.cuda.get_device_capability(heads.device) >= (8, 0)
    return heads.is_cuda and wide and (has_bf16 or heads.dtype == torch.float32)


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
    if any(type(part) is not nn.Linear or part._forward_hooks or part._forward_pre_hooks for part in parts):
        return torch.cat([part(tokens) for part in parts], 1)  # adapters do more, and hooks want to be called
    weight, bias = (torch.cat([getattr(part, name) for part in parts]) for name in ("weight", "bias"))
    return linear(tokens, weight, bias)


def _prepare(model: Any) -> bool:
    """Make a model's attention one that can read packed tokens, where that is known to be right; return whether."""
    # Of encoders of other kinds it is not known that positions can be given and that only attention mixes tokens.
    config = model.config
    known = getattr(config, "model_type", None) == "bert" and getattr(model, "_supports_attention_backend", False)
    if not known or getattr(config, "position_embedding_type", "absolute") != "absolute":
        return False
    for layer in model.encoder.layer:
        attention: Any = layer.attention.self
        kind: Any = type(attention)
        attention.__class__ = _that_packs(kind)
    return True
