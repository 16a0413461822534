"""Attention over a packed row: sequences laid end to end, each attending to itself alone, with no padding at all.

A beginning that several sequences share lies in the row once; their continuations follow and attend to it.

Registered with transformers under one name. Where a forward pass runs inside `packed(trees)`, the mask that
transformers hands to every layer is a `Segments` object and attention runs piece by piece; elsewhere it is
transformers' own scaled-dot-product attention.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional

NAME = "rlhf_packed"


@dataclass(frozen=True)
class PrefixGroup:
    """A stretch of a packed row: a beginning, and continuations that attend to it and to themselves alone."""

    prefix: int  # tokens of the beginning; of a sequence that shares nothing, all of it
    suffixes: tuple[int, ...] = ()  # tokens of each continuation

    @property
    def size(self) -> int:
        return self.prefix + sum(self.suffixes)


@dataclass(frozen=True)
class Segments:
    """Where everything lies in a packed row, and what the variable-length kernel has to know of it."""

    trees: tuple[PrefixGroup, ...]
    offsets: Tensor  # (parts + 1,) int32 on the row's device: where each part's queries begin, the end last
    key_offsets: Tensor  # the same of its keys, which for a continuation are the beginning's too
    keys: Tensor | None  # places of the keys in the row, part by part; None where they lie as the queries do
    longest: tuple[int, int]  # queries and keys of the largest part


_packed_row: ContextVar[Segments | None] = ContextVar("packed_row", default=None)


@contextmanager
def packed(trees: list[PrefixGroup], device: torch.device) -> Iterator[None]:
    """Forward passes in this block see one row made of these trees."""
    token = _packed_row.set(segments(tuple(trees), device))
    try:
        yield
    finally:
        _packed_row.reset(token)


def segments(trees: tuple[PrefixGroup, ...], device: torch.device) -> Segments:
    """Where the trees of a packed row lie, on a device."""
    queries, keys, places, start = [], [], [], 0
    shared = any(tree.suffixes for tree in trees)
    for tree in trees:
        queries += [tree.prefix, *tree.suffixes]
        keys += [tree.prefix, *(tree.prefix + n for n in tree.suffixes)]
        if shared:
            own = torch.arange(start, start + tree.size).split([tree.prefix, *tree.suffixes])
            places += [own[0], *(part for suffix in own[1:] for part in (own[0], suffix))]
        start += tree.size

    def ends(sizes: list[int]) -> Tensor:
        return torch.tensor([0, *sizes], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)

    where = torch.cat(places).to(device) if shared else None
    return Segments(trees, ends(queries), ends(keys), where, (max(queries), max(keys)))


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

    scale = kwargs.get("scaling")
    window, softcap = kwargs.get("sliding_window"), kwargs.get("softcap")
    if not isinstance(attention_mask, Segments):
        if softcap is None:
            return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        if attention_mask is None:  # plain causal attention, perhaps of one new token
            shape = (query.shape[2], key.shape[2])
            attention_mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril(shape[1] - shape[0])
        return _attend_capped(query, key, value, attention_mask, scale, softcap).transpose(1, 2).contiguous(), None
    return attend_packed(query, key, value, attention_mask, scale, window, softcap), None


def attend_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scale: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attention within the pieces of one packed row, (1, heads, N, D) each -> (1, N, heads, D)."""
    if query.is_cuda and softcap is None and query.dtype != torch.float32:
        return _attend_varlen(query, key, value, segments, scale, window)
    runs = [(tree, len(list(same))) for tree, same in groupby(segments.trees)]
    pieces = (x.split([tree.size * count for tree, count in runs], dim=2) for x in (query, key, value))
    outs = [_attend_run(*parts, tree, scale, window, softcap) for (tree, _), *parts in zip(runs, *pieces, strict=True)]
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)


def _attend_run(
    q: Tensor, k: Tensor, v: Tensor, tree: PrefixGroup, scale: float | None, window: int | None, softcap: float | None
) -> Tensor:
    """Attention within neighbouring trees of one shape, (1, heads, n size, D) each -> (1, n size, heads, D)."""
    q, k, v = (x.unflatten(2, (-1, tree.size))[0].transpose(0, 1) for x in (q, k, v))  # (n, heads, size, D)
    if not tree.suffixes:
        return _attend_one(q, k, v, scale, window, softcap).transpose(1, 2).flatten(0, 1)[None]
    cut = [tree.prefix, tree.size - tree.prefix]
    (q, more_q), (k, more_k), (v, more_v) = (x.split(cut, dim=2) for x in (q, k, v))
    first = _attend_one(q, k, v, scale, window, softcap).transpose(1, 2)  # (n, prefix, heads, D)
    rest = _attend_suffixes(more_q, (k, more_k), (v, more_v), tree, scale, window, softcap)
    return torch.cat([first, rest], dim=1).flatten(0, 1)[None]


def _attend_suffixes(
    q: Tensor,
    k: tuple[Tensor, Tensor],
    v: tuple[Tensor, Tensor],
    tree: PrefixGroup,
    scale: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Continuations of n beginnings, q (n, heads, sum suffixes, D), keys of both -> (n, sum suffixes, heads, D).

    Side by side, padded to the longest: what pads lies behind all that a real token may attend to.
    """
    n, count, longest = len(q), len(tree.suffixes), max(tree.suffixes)
    q, own_k, own_v = (_side_by_side(x, tree.suffixes) for x in (q, k[1], v[1]))  # (n K, heads, longest, D)
    shared_k, shared_v = (x.repeat_interleave(count, dim=0) for x in (k[0], v[0]))
    keys, values = torch.cat([shared_k, own_k], dim=2), torch.cat([shared_v, own_v], dim=2)
    ones = torch.ones(longest, tree.prefix + longest, dtype=torch.bool, device=q.device)
    mask = ones.tril(tree.prefix)
    if window is not None:
        mask = mask & ~ones.tril(tree.prefix - window)
    if softcap is None:
        gqa = q.shape[1] != keys.shape[1]
        out = functional.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale, enable_gqa=gqa)
    else:
        out = _attend_capped(q, keys, values, mask, scale, softcap)
    rows = out.transpose(1, 2).unflatten(0, (n, count))  # (n, K, longest, heads, D)
    return torch.cat([rows[:, i, :length] for i, length in enumerate(tree.suffixes)], dim=1)


def _side_by_side(x: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """(n, heads, sum lengths, D) -> (n K, heads, longest, D), zeros behind the shorter ones."""
    longest = max(lengths)
    parts = [functional.pad(part, (0, 0, 0, longest - part.shape[2])) for part in x.split(lengths, dim=2)]
    return torch.stack(parts, dim=1).flatten(0, 1)


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
    """The same on CUDA through a variable-length kernel: flash-attn's where that is installed, else torch's own."""
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (q, k, v))
    if segments.keys is not None:  # the last key stands under the last query, as causal kernels align them
        k, v = k[segments.keys], v[segments.keys]
    bounds = segments.offsets, segments.key_offsets, *segments.longest
    flash = _flash_attn()
    if flash is not None:
        back = (-1, -1) if window is None else (window - 1, 0)
        return flash(q, k, v, *bounds, softmax_scale=scale, causal=True, window_size=back)[None]
    return _torch_varlen(q, k, v, bounds, scale, window)[None]


@lru_cache(maxsize=1)
def _flash_attn() -> Callable[..., Tensor] | None:
    """flash-attn's kernel; None where it is not installed, or does not load beside this torch."""
    try:
        from flash_attn import flash_attn_varlen_func
    except Exception:  # an extension that was built for another torch fails in ways of its own
        return None
    return flash_attn_varlen_func


def _torch_varlen(q: Tensor, k: Tensor, v: Tensor, bounds: tuple, scale: float | None, window: int | None) -> Tensor:
    """torch's kernel on (N, heads, D); its signature changed between torch 2.11 and 2.13."""
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
    return varlen_attn(q, k, v, *bounds, **options)


def register() -> None:
    """Make the attention known to transformers under `NAME`."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, make_mask)
