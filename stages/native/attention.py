"""Attention over a packed row: sequences laid end to end without padding, each attending to itself alone.

A prefix that several sequences share lies in the row once; their suffixes follow and attend to it.

Registered with transformers under one name. If a forward pass runs inside `packed(groups)`, the mask that transformers
hands to every layer is a `Segments` object and attention runs piece by piece; else it is transformers' own
scaled-dot-product attention.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

ATTENTION_NAME = "rlhf_packed"


@dataclass(frozen=True)
class PrefixGroup:
    """A stretch of a packed row: a prefix, and suffixes that attend to it and to themselves alone."""

    prefix: int  # tokens of the prefix; of a sequence that shares nothing, all of it
    suffixes: tuple[int, ...] = ()  # tokens of each suffix

    @property
    def size(self) -> int:
        return self.prefix + sum(self.suffixes)


@dataclass(frozen=True)
class Segments:
    """The layout of a packed row, for the variable-length kernel too; a part is a prefix or a suffix."""

    groups: tuple[PrefixGroup, ...]
    offsets: Tensor  # (parts + 1,) int32 on the row's device: where each part's queries begin, the end last
    key_offsets: Tensor  # the same of its keys, which for a suffix include the prefix
    keys: Tensor | None  # indices of the keys in the row, part by part; None if they are those of the queries
    longest: tuple[int, int]  # queries and keys of the largest part


class Rule(NamedTuple):
    """How attention logits are made: their scale (None: 1 / sqrt D), and the sliding window and soft cap, if any."""

    scale: float | None = None
    window: int | None = None
    softcap: float | None = None


_packed_row: ContextVar[Segments | None] = ContextVar("packed_row", default=None)


@contextmanager
def packed(groups: list[PrefixGroup], device: torch.device) -> Iterator[None]:
    """Forward passes in this block run over one row made of these groups."""
    token = _packed_row.set(segments(tuple(groups), device))
    try:
        yield
    finally:
        _packed_row.reset(token)


def segments(groups: tuple[PrefixGroup, ...], device: torch.device) -> Segments:
    """The layout of a packed row on a device."""
    queries, keys, indices, start = [], [], [], 0
    for group in groups:
        sizes = [group.prefix, *group.suffixes]
        queries += sizes
        keys += [group.prefix, *(group.prefix + n for n in group.suffixes)]
        prefix, *suffixes = torch.arange(start, start + group.size).split(sizes)
        indices += [prefix, *(part for suffix in suffixes for part in (prefix, suffix))]
        start += group.size

    def ends(sizes: list[int]) -> Tensor:
        return torch.tensor([0, *sizes], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)

    shared = any(group.suffixes for group in groups)
    where = torch.cat(indices).to(device) if shared else None
    return Segments(groups, ends(queries), ends(keys), where, (max(queries), max(keys)))


def make_mask(*args: object, **kwargs: object) -> object:
    """The mask of a forward pass: the segments of the packed row, or transformers' own."""
    from transformers.masking_utils import sdpa_mask

    row = _packed_row.get()
    return row if row is not None else sdpa_mask(*args, **kwargs)


def attention_forward(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: object, **kwargs: object
):
    """Attention of one layer; query (B, heads, N, D), key and value (B, kv heads, N, D) -> (B, N, heads, D), None."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    rule = Rule(kwargs.get("scaling"), kwargs.get("sliding_window"), kwargs.get("softcap"))
    if isinstance(attention_mask, Segments):
        return attend_packed(query, key, value, attention_mask, rule), None
    if rule.softcap is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if attention_mask is None:  # plain causal attention, perhaps of one new token
        attention_mask = _causal_mask(query, key, None)
    return _attend_capped(query, key, value, attention_mask, rule).transpose(1, 2).contiguous(), None


def attend_packed(query: Tensor, key: Tensor, value: Tensor, segments: Segments, rule: Rule) -> Tensor:
    """Attention within the parts of one packed row, (1, heads, N, D) each -> (1, N, heads, D)."""
    if query.is_cuda and rule.softcap is None and query.dtype != torch.float32:
        return _attend_varlen(query, key, value, segments, rule)
    runs = [(group, len(list(same))) for group, same in groupby(segments.groups)]
    pieces = (x.split([group.size * count for group, count in runs], dim=2) for x in (query, key, value))
    outs = [_attend_run(*qkv, group, rule) for (group, _), *qkv in zip(runs, *pieces, strict=True)]
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)


def _attend_run(q: Tensor, k: Tensor, v: Tensor, group: PrefixGroup, rule: Rule) -> Tensor:
    """Attention within neighbouring groups of one shape, (1, heads, n size, D) each -> (1, n size, heads, D)."""
    q, k, v = (x.unflatten(2, (-1, group.size))[0].transpose(0, 1) for x in (q, k, v))  # (n, heads, size, D)
    if not group.suffixes:
        return _attend(q, k, v, rule).transpose(1, 2).flatten(0, 1)[None]
    cut = [group.prefix, group.size - group.prefix]
    (q, more_q), (k, more_k), (v, more_v) = (x.split(cut, dim=2) for x in (q, k, v))
    first = _attend(q, k, v, rule).transpose(1, 2)  # (n, prefix, heads, D)
    rest = _attend_suffixes(more_q, (k, more_k), (v, more_v), group, rule)
    return torch.cat([first, rest], dim=1).flatten(0, 1)[None]


def _attend_suffixes(
    q: Tensor, k: tuple[Tensor, Tensor], v: tuple[Tensor, Tensor], group: PrefixGroup, rule: Rule
) -> Tensor:
    """Suffixes of n prefixes, q (n, heads, sum suffixes, D), keys of both -> (n, sum suffixes, heads, D).

    Side by side, padded to the longest: the padding lies behind all that a real token may attend to.
    """
    n, count = len(q), len(group.suffixes)
    q, own_k, own_v = (_side_by_side(x, group.suffixes) for x in (q, k[1], v[1]))  # (n K, heads, longest, D)
    shared_k, shared_v = (x.repeat_interleave(count, dim=0) for x in (k[0], v[0]))
    keys, values = torch.cat([shared_k, own_k], dim=2), torch.cat([shared_v, own_v], dim=2)
    rows = _attend(q, keys, values, rule).transpose(1, 2).unflatten(0, (n, count))
    return torch.cat([rows[:, i, :length] for i, length in enumerate(group.suffixes)], dim=1)


def _side_by_side(x: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """(n, heads, sum lengths, D) -> (n K, heads, longest, D), zeros behind the shorter ones."""
    longest = max(lengths)
    parts = [functional.pad(part, (0, 0, 0, longest - part.shape[2])) for part in x.split(lengths, dim=2)]
    return torch.stack(parts, dim=1).flatten(0, 1)


def _attend(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
    """Causal attention of queries (n, heads, L, D) over keys (n, kv heads, S, D), the last query at the last key."""
    if rule.softcap is not None:
        return _attend_capped(q, k, v, _causal_mask(q, k, rule.window), rule)
    length, keys = q.shape[2], k.shape[2]
    causal = length == keys and (rule.window is None or length <= rule.window)
    mask = None if causal else _causal_mask(q, k, rule.window)
    gqa = q.shape[1] != k.shape[1]
    return functional.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=rule.scale, enable_gqa=gqa)


def _causal_mask(q: Tensor, k: Tensor, window: int | None) -> Tensor:
    """(L, S) bool, True for the keys that each query attends to: those up to its own, `window` of them at most."""
    length, keys = q.shape[2], k.shape[2]
    ones = torch.ones(length, keys, dtype=torch.bool, device=q.device)
    mask = ones.tril(keys - length)
    return mask if window is None else mask & ~ones.tril(keys - length - window)


def _attend_capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, rule: Rule) -> Tensor:
    """Attention with logits squeezed into +-softcap (Gemma 2), which no fused kernel of torch does."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    logits = (q @ k.transpose(-1, -2)) * (rule.scale if rule.scale is not None else q.shape[-1] ** -0.5)
    logits = rule.softcap * torch.tanh(logits / rule.softcap)
    weights = logits.masked_fill(~mask, torch.finfo(logits.dtype).min).softmax(-1, dtype=torch.float32).to(q.dtype)
    return weights @ v


def _attend_varlen(q: Tensor, k: Tensor, v: Tensor, segments: Segments, rule: Rule) -> Tensor:
    """The same on CUDA through torch's variable-length kernel."""
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (q, k, v))
    if segments.keys is not None:  # causal kernels align the last key with the last query
        k, v = k[segments.keys], v[segments.keys]
    from torch.nn.attention.varlen import varlen_attn

    options = {"scale": rule.scale, "window_size": (-1 if rule.window is None else rule.window - 1, 0)}
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:  # from torch 2.13 on
            options["enable_gqa"] = True
        else:
            groups = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    return varlen_attn(q, k, v, segments.offsets, segments.key_offsets, *segments.longest, **options)[None]


def register() -> None:
    """Register the attention with transformers under `NAME`."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(ATTENTION_NAME, attention_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, make_mask)
