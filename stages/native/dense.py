"""Attention over the short pieces of a packed row by plain matrix products, with a backward pass of its own.

On a CPU, pieces of a hundred tokens are too small for the tiles of fused kernels: products over a whole piece, its mask
added, are faster there.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from stages.native.limits import LONGEST_DENSE


def mask_of(before: int, length: int, window: int | None, group: int) -> Tensor:
    """What is added to the logits of `length` queries that follow `before` others, (group x length, before + length).

    0 or -inf: a token sees those before it, `window` of them with itself at most. Each query stands `group` times, once
    for every head that shares its keys. before + length is at most `LONGEST_DENSE`.
    """
    end = before + length
    return _whole_mask(window, group)[before * group : end * group, :end]


@lru_cache(maxsize=8)
def _whole_mask(window: int | None, group: int) -> Tensor:
    """The mask of `LONGEST_DENSE` tokens, as (heads x keys, keys); those of all shorter pieces are corners of it."""
    back = torch.arange(LONGEST_DENSE)[:, None] - torch.arange(LONGEST_DENSE)
    seen = back >= 0 if window is None else (back >= 0) & (back < window)
    return torch.where(seen, 0.0, float("-inf")).repeat_interleave(group, dim=0)


def attend_dense(q: Tensor, k: Tensor, v: Tensor, trees: tuple, scale: float, window: int | None) -> Tensor:
    """Attention within trees laid end to end: q (N, heads, D), k and v (N, kv heads, D), fp32 -> (N, heads, D)."""
    return _Dense.apply(q, k, v, trees, scale, window)


def _pieces(trees: tuple) -> Iterator[tuple[slice, slice]]:
    """Of each beginning and each continuation: where its tokens lie, and where those lie that come before them."""
    start = 0
    for tree in trees:
        beginning = slice(start, start + tree.prefix)
        yield beginning, slice(start, start)
        start += tree.prefix
        for length in tree.suffixes:
            yield slice(start, start + length), beginning
            start += length


def _by_head(x: Tensor, kv_heads: int) -> Tensor:
    """(L, heads, D) -> (kv heads, L x group, D); heads that share keys stand beneath each other."""
    if x.shape[1] == kv_heads:
        return x.transpose(0, 1)
    return x.unflatten(1, (kv_heads, -1)).transpose(0, 1).flatten(1, 2)


def _by_token(x: Tensor, length: int) -> Tensor:
    """The way back: (kv heads, L x group, D) -> (L, heads, D)."""
    return x.unflatten(1, (length, -1)).transpose(0, 1).flatten(1, 2)


def _with(x: Tensor, before: slice, own: slice) -> Tensor:
    """Keys or values (kv heads, L, D) that the queries of a piece see."""
    seen = x[own] if before.start == before.stop else torch.cat([x[before], x[own]])
    return seen.transpose(0, 1)


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, trees: tuple, scale: float, window: int | None) -> Tensor:
        out, weights, heads = torch.empty_like(q), [], k.shape[1]
        learns = any(ctx.needs_input_grad)
        for own, before in _pieces(trees):
            length = own.stop - own.start
            mask = mask_of(before.stop - before.start, length, window, q.shape[1] // heads).to(q.dtype)
            logits = torch.baddbmm(mask, _by_head(q[own], heads), _with(k, before, own).transpose(1, 2), alpha=scale)
            p = logits.softmax(-1)
            out[own] = _by_token(torch.bmm(p, _with(v, before, own)), length)
            if learns:
                weights.append(p)
        ctx.save_for_backward(q, k, v, *weights)
        ctx.trees, ctx.scale = trees, scale
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        q, k, v, *weights = ctx.saved_tensors
        dq, dk, dv, heads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), k.shape[1]
        for (own, before), p in zip(_pieces(ctx.trees), weights, strict=True):
            length, earlier = own.stop - own.start, before.stop - before.start
            mine, above = _by_head(q[own], heads), _by_head(grad[own], heads)
            by_values = torch.bmm(p.transpose(1, 2), above).transpose(0, 1)
            # Of the softmax: dS = P (dP - sum of P dP), scaled as the logits were.
            by_weights = torch.bmm(above, _with(v, before, own).transpose(1, 2))
            by_logits = torch._softmax_backward_data(by_weights, p, -1, p.dtype).mul_(ctx.scale)
            dq[own] = _by_token(torch.bmm(by_logits, _with(k, before, own)), length)
            by_keys = torch.bmm(by_logits.transpose(1, 2), mine).transpose(0, 1)
            dk[own], dv[own] = by_keys[earlier:], by_values[earlier:]
            if earlier:
                dk[before] += by_keys[:earlier]
                dv[before] += by_values[:earlier]
        return dq, dk, dv, None, None, None
