"""Attention over a packed row: sequences laid end to end, each attending to itself alone, with no padding at all.

Registered with transformers under one name. Where a forward pass runs inside `packed(lengths)`, the mask that
transformers hands to every layer is a `Segments` object and attention runs segment by segment; elsewhere it is
transformers' own scaled-dot-product attention.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional

NAME = "rlhf_packed"


@dataclass(frozen=True)
class Segments:
    """Where each sequence of a packed row lies."""

    lengths: tuple[int, ...]
    offsets: Tensor  # (sequences + 1,) int32 on the row's device: cumulative lengths


class _Current:
    segments: Segments | None = None


@contextmanager
def packed(lengths: list[int], device: torch.device) -> Iterator[None]:
    """Forward passes in this block see one row made of sequences of these lengths."""
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    _Current.segments = Segments(tuple(lengths), ends.to(device))
    try:
        yield
    finally:
        _Current.segments = None


def make_mask(*args: object, **kwargs: object) -> object:
    """The mask of a forward pass: the segments of the packed row, or transformers' own."""
    from transformers.masking_utils import sdpa_mask

    return _Current.segments if _Current.segments is not None else sdpa_mask(*args, **kwargs)


def attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: object, **kwargs: object
):
    """Attention of one layer; query (B, heads, N, D), key and value (B, kv heads, N, D) -> (B, N, heads, D), None."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    scale = kwargs.get("scaling")
    window, softcap = kwargs.get("sliding_window"), kwargs.get("softcap")
    if not isinstance(attention_mask, Segments):
        if softcap is None:
            return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        if attention_mask is None:  # plain causal attention, perhaps of one new token
            shape = (query.shape[2], key.shape[2])
            attention_mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril(shape[1] - shape[0])
        return _attend_capped(query, key, value, attention_mask, scale, softcap).transpose(1, 2).contiguous(), None
    if query.is_cuda and softcap is None and query.dtype != torch.float32:
        return _attend_varlen(query, key, value, attention_mask, scale, window), None
    runs = [(length, len(list(same))) for length, same in groupby(attention_mask.lengths)]
    pieces = (x.split([length * count for length, count in runs], dim=2) for x in (query, key, value))
    outs = [
        _attend_run(*parts, length, scale, window, softcap) for (length, _), *parts in zip(runs, *pieces, strict=True)
    ]
    return torch.cat(outs, dim=1), None


def _attend_run(
    q: Tensor, k: Tensor, v: Tensor, length: int, scale: float | None, window: int | None, softcap: float | None
) -> Tensor:
    """Causal attention within neighbouring sequences of one length, (1, heads, n L, D) each -> (1, n L, heads, D)."""
    q, k, v = (x.unflatten(2, (-1, length))[0].transpose(0, 1) for x in (q, k, v))  # (n, heads, L, D)
    return _attend_one(q, k, v, scale, window, softcap).transpose(1, 2).flatten(0, 1)[None]


def _attend_one(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int | None, softcap: float | None
) -> Tensor:
    """Causal attention within sequences of one length, (n, heads, L, D) each."""
    gqa = q.shape[1] != k.shape[1]
    length = q.shape[2]
    if softcap is None and (window is None or length <= window):
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa)
    ones = torch.ones(length, length, dtype=torch.bool, device=q.device)
    mask = ones.tril() if window is None else ones.tril() & ~ones.tril(-window)
    if softcap is None:
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=gqa)
    return _attend_capped(q, k, v, mask, scale, softcap)


def _attend_capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None, softcap: float) -> Tensor:
    """Attention with logits squeezed into +-softcap (Gemma 2), which no fused kernel of torch does."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    logits = (q @ k.transpose(-1, -2)) * (scale if scale is not None else q.shape[-1] ** -0.5)
    logits = softcap * torch.tanh(logits / softcap)
    weights = logits.masked_fill(~mask, torch.finfo(logits.dtype).min).softmax(-1, dtype=torch.float32).to(q.dtype)
    return weights @ v


def _attend_varlen(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float | None, window: int | None
) -> Tensor:
    """The same on CUDA through torch's variable-length kernel; its signature changed between torch 2.11 and 2.13."""
    from torch.nn.attention.varlen import varlen_attn

    accepts = inspect.signature(varlen_attn).parameters
    options: dict[str, object] = {"scale": scale} if "scale" in accepts else {}
    if "window_size" in accepts:
        options["window_size"] = (-1 if window is None else window - 1, 0)
    else:
        options["is_causal"] = True
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in accepts:
            options["enable_gqa"] = True
        else:
            groups = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    longest = max(segments.lengths)
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (q, k, v))
    return varlen_attn(q, k, v, segments.offsets, segments.offsets, longest, longest, **options).unsqueeze(0)


def register() -> None:
    """Make the attention known to transformers under `NAME`."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, make_mask)
