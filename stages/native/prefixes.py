"""Finds the prefixes that sequences share, so that each is computed once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stages.native.attention import PrefixGroup

LEAST = 4  # shared tokens from which on sharing is worth the trouble


@dataclass(frozen=True)
class Packing:
    """Sequences as one packed row in which shared prefixes lie once."""

    ids: Tensor  # (N,) tokens of the row
    positions: Tensor  # (N,) of each within its own sequence
    groups: list[PrefixGroup]
    indices: Tensor | None  # (sum L_i,) index in the row of each token of the sequences laid end to end; None: the same


def pack(sequences: list[Tensor], *, share: bool) -> Packing:
    """Lay sequences (L_i,) out as a row; with `share` each common prefix of several lies in it once."""
    shared = shared_beginnings(sequences) if share else []
    if not shared:
        positions = torch.cat([torch.arange(len(s)) for s in sequences])
        return Packing(torch.cat(sequences), positions, [PrefixGroup(len(s)) for s in sequences], None)
    parts: list[tuple[int, int, int]] = []  # sequence, first and last position of each stretch of the row
    groups, start = [], 0
    indices: list[Tensor] = [torch.empty(0)] * len(sequences)
    for rows, prefix in shared:
        beginning = torch.arange(start, start + prefix)
        parts.append((rows[0], 0, prefix))
        start += prefix
        for i in rows:
            length = len(sequences[i])
            parts.append((i, prefix, length))
            indices[i] = torch.cat([beginning, torch.arange(start, start + length - prefix)])
            start += length - prefix
        groups.append(PrefixGroup(prefix, tuple(len(sequences[i]) - prefix for i in rows) if len(rows) > 1 else ()))
    ids = torch.cat([sequences[i][begin:end] for i, begin, end in parts])
    positions = torch.cat([torch.arange(begin, end) for _, begin, end in parts])
    return Packing(ids, positions, groups, torch.cat(indices))


def shared_beginnings(sequences: list[Tensor]) -> list[tuple[list[int], int]]:
    """Groups of sequences that share a prefix: their numbers, and the prefix's tokens. Empty if nothing is shared.

    The prefix of a sequence alone in its group is all of it; each of several keeps at least its last token to itself.
    Sorted by their tokens, sequences of one prefix are neighbours; one joins the group before it if that saves more
    tokens than the group's own prefix does without it.
    """
    keys = [s.numpy().tobytes() for s in sequences]
    order = sorted(range(len(sequences)), key=keys.__getitem__)
    groups: list[tuple[list[int], int]] = []
    for i in order:
        if groups:
            rows, prefix = groups[-1]
            common = min(_common(sequences[rows[-1]], sequences[i]), prefix if len(rows) > 1 else len(sequences[i]))
            common = min(common, len(sequences[i]) - 1, len(sequences[rows[0]]) - 1)
            saved = (len(rows) - 1) * prefix
            if common >= LEAST and len(rows) * common > saved:
                groups[-1] = ([*rows, i], common)
                continue
        groups.append(([i], len(sequences[i])))
    return groups if len(groups) < len(sequences) else []


def _common(a: Tensor, b: Tensor) -> int:
    shorter = min(len(a), len(b))
    differ = (a[:shorter] != b[:shorter]).nonzero()
    return int(differ[0]) if len(differ) else shorter
