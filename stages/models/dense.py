"""Attention over the short pieces of a packed row by plain matrix products, with a backward pass of its own.

On a CPU, pieces of a hundred tokens are too small for the tiles of fused kernels: products over a whole piece, its mask
added, are faster there, and continuations of a shared beginning cost no copies of it.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

LONGEST = 384  # tokens of a piece up to which this is used


@lru_cache(maxsize=512)
def mask_of(prefix: int, suffixes: tuple[int, ...], window: int | None, group: int) -> Tensor:
    """What is added to the logits of a beginning and its continuations, (group x size, size): 0 or -inf.

    A token sees those before it in its own sequence, `window` of them with itself at most. Each query stands `group`
    times, once for every head that shares its keys.
    """
    branch = torch.tensor([0] * prefix + [i for i, n in enumerate(suffixes, start=1) for _ in range(n)])
    place = torch.tensor([*range(prefix), *(prefix + i for n in suffixes for i in range(n))])
    back = place[:, None] - place
    seen = (back >= 0) & ((branch == branch[:, None]) | (branch == 0))
    if window is not None:
        seen &= back < window
    return torch.where(seen, 0.0, float("-inf")).repeat_interleave(group, dim=0)


def attend(q: Tensor, k: Tensor, v: Tensor, trees: tuple, scale: float, window: int | None) -> Tensor:
    """Attention within trees laid end to end: q (N, heads, D), k and v (N, kv heads, D), fp32 -> (N, heads, D)."""
    return _Dense.apply(q, k, v, trees, scale, window)


def _by_head(x: Tensor, kv_heads: int) -> Tensor:
    """(L, heads, D) -> (kv heads, L x group, D); heads that share keys stand beneath each other."""
    if x.shape[1] == kv_heads:
        return x.transpose(0, 1)
    return x.unflatten(1, (kv_heads, -1)).transpose(0, 1).flatten(1, 2)


def _by_token(x: Tensor, length: int) -> Tensor:
    """The way back: (kv heads, L x group, D) -> (L, heads, D)."""
    return x.unflatten(1, (length, -1)).transpose(0, 1).flatten(1, 2)


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, trees: tuple, scale: float, window: int | None) -> Tensor:
        out, weights, start = torch.empty_like(q), [], 0
        heads = k.shape[1]
        for tree in trees:
            piece = slice(start, start + tree.size)
            start += tree.size
            mask = mask_of(tree.prefix, tree.suffixes, window, q.shape[1] // heads).to(q.dtype)
            mine, keys, values = _by_head(q[piece], heads), k[piece].transpose(0, 1), v[piece].transpose(0, 1)
            p = torch.baddbmm(mask, mine, keys.transpose(1, 2), alpha=scale).softmax(-1)
            out[piece] = _by_token(torch.bmm(p, values), tree.size)
            weights.append(p)
        ctx.save_for_backward(q, k, v, *(weights if any(ctx.needs_input_grad) else ()))
        ctx.trees, ctx.scale = trees, scale
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        q, k, v, *weights = ctx.saved_tensors
        dq, dk, dv, start = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), 0
        heads = k.shape[1]
        for tree, p in zip(ctx.trees, weights, strict=True):
            piece = slice(start, start + tree.size)
            start += tree.size
            mine, keys, values = _by_head(q[piece], heads), k[piece].transpose(0, 1), v[piece].transpose(0, 1)
            above = _by_head(grad[piece], heads)
            dv[piece] = torch.bmm(p.transpose(1, 2), above).transpose(0, 1)
            # Of the softmax: dS = P (dP - sum of P dP), scaled as the logits were.
            by_logits = torch._softmax_backward_data(torch.bmm(above, values.transpose(1, 2)), p, -1, p.dtype)
            by_logits.mul_(ctx.scale)
            dq[piece] = _by_token(torch.bmm(by_logits, keys), tree.size)
            dk[piece] = torch.bmm(by_logits.transpose(1, 2), mine).transpose(0, 1)
        return dq, dk, dv, None, None, None
