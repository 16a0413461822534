"""Attention over the short parts of a packed row by plain matrix products, with its own backward pass.

On a CPU, parts of a hundred tokens are too small for the tiles of fused kernels: products over a whole part, its mask
added, are faster there.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from stages.native.limits import LONGEST_DENSE


def mask_of(before: int, length: int, window: int | None, group: int) -> Tensor:
    """The mask to add to the logits of `length` queries that follow `before` others, (group x length, before + length).

    0 or -inf: a token attends to itself and earlier ones, `window` in all at most. Each query is repeated `group`
    times, once for every head that shares its keys. before + length is at most `LONGEST_DENSE`.
    """
    end = before + length
    return _whole_mask(window, group)[before * group : end * group, :end]


@lru_cache(maxsize=8)
def _whole_mask(window: int | None, group: int) -> Tensor:
    """The mask of `LONGEST_DENSE` tokens, as (heads x keys, keys); those of all shorter parts are corners of it."""
    back = torch.arange(LONGEST_DENSE)[:, None] - torch.arange(LONGEST_DENSE)
    visible = back >= 0 if window is None else (back >= 0) & (back < window)
    return torch.where(visible, 0.0, float("-inf")).repeat_interleave(group, dim=0)


def _parts(groups: tuple) -> Iterator[tuple[slice, slice]]:
    """The tokens of each prefix and each suffix, and the prefix before them (empty before a prefix)."""
    start = 0
    for group in groups:
        prefix = slice(start, start + group.prefix)
        yield prefix, slice(start, start)
        start += group.prefix
        for length in group.suffixes:
            yield slice(start, start + length), prefix
            start += length


def _by_head(x: Tensor, kv_heads: int) -> Tensor:
    """(L, heads, D) -> (kv heads, L x group, D), the heads that share keys as rows of one matrix."""
    if x.shape[1] == kv_heads:
        return x.transpose(0, 1)
    return x.unflatten(1, (kv_heads, -1)).transpose(0, 1).flatten(1, 2)


def _by_token(x: Tensor, length: int) -> Tensor:
    """The inverse of `_by_head`: (kv heads, L x group, D) -> (L, heads, D)."""
    return x.unflatten(1, (length, -1)).transpose(0, 1).flatten(1, 2)


def _with_prefix(x: Tensor, before: slice, part: slice) -> Tensor:
    """Keys or values (kv heads, L, D) of a part and of the prefix before it."""
    whole = x[part] if before.start == before.stop else torch.cat([x[before], x[part]])
    return whole.transpose(0, 1)


class DenseAttention(torch.autograd.Function):
    """Attention within prefix groups laid end to end: q (N, heads, D), k, v (N, kv heads, D), fp32 -> (N, heads, D)."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, groups: tuple, scale: float, window: int | None) -> Tensor:
        out, weights, heads = torch.empty_like(q), [], k.shape[1]
        with_grad = any(ctx.needs_input_grad)
        for part, before in _parts(groups):
            length = part.stop - part.start
            mask = mask_of(before.stop - before.start, length, window, q.shape[1] // heads).to(q.dtype)
            logits = torch.baddbmm(
                mask, _by_head(q[part], heads), _with_prefix(k, before, part).transpose(1, 2), alpha=scale
            )
            p = logits.softmax(-1)
            out[part] = _by_token(torch.bmm(p, _with_prefix(v, before, part)), length)
            if with_grad:
                weights.append(p)
        ctx.save_for_backward(q, k, v, *weights)
        ctx.groups, ctx.scale = groups, scale
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        q, k, v, *weights = ctx.saved_tensors
        dq, dk, dv, heads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), k.shape[1]
        for (part, before), p in zip(_parts(ctx.groups), weights, strict=True):
            length, earlier = part.stop - part.start, before.stop - before.start
            queries, grads = _by_head(q[part], heads), _by_head(grad[part], heads)
            by_values = torch.bmm(p.transpose(1, 2), grads).transpose(0, 1)
            # Of the softmax: dS = P (dP - sum of P dP), scaled as the logits were.
            by_weights = torch.bmm(grads, _with_prefix(v, before, part).transpose(1, 2))
            by_logits = torch._softmax_backward_data(by_weights, p, -1, p.dtype).mul_(ctx.scale)
            dq[part] = _by_token(torch.bmm(by_logits, _with_prefix(k, before, part)), length)
            by_keys = torch.bmm(by_logits.transpose(1, 2), queries).transpose(0, 1)
            dk[part], dv[part] = by_keys[earlier:], by_values[earlier:]
            if earlier:
                dk[before] += by_keys[:earlier]
                dv[before] += by_values[:earlier]
        return dq, dk, dv, None, None, None
