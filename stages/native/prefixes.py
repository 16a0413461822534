"""Finds what sequences have in common at their beginnings, so that it is computed once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stages.native.attention import PrefixGroup

LEAST = 4  # tokens that have to be shared before it is worth the trouble


@dataclass(frozen=True)
class Packing:
    """Sequences as one packed row in which shared beginnings lie once."""

    ids: Tensor  # (N,) tokens of the row
    positions: Tensor  # (N,) of each within its own sequence
    trees: list[PrefixGroup]
    places: Tensor | None  # (sum L_i,) where each token of the sequences, laid end to end, is in the row; None: there


def pack(sequences: list[Tensor], *, share: bool) -> Packing:
    """Lay sequences (L_i,) out as a row; with `share` each common beginning of several lies in it once."""
    groups = shared_beginnings(sequences) if share else []
    if not groups:
        positions = torch.cat([torch.arange(len(s)) for s in sequences])
        return Packing(torch.cat(sequences), positions, [PrefixGroup(len(s)) for s in sequences], None)
    ids, positions, trees, start = [], [], [], 0
    places: list[Tensor] = [torch.empty(0)] * len(sequences)
    for rows, prefix in groups:
        suffixes = tuple(len(sequences[i]) - prefix for i in rows) if len(rows) > 1 else ()
        beginning = torch.arange(start, start + prefix)
        ids.append(sequences[rows[0]][:prefix])
        positions.append(torch.arange(prefix))
        start += prefix
        for i in rows:
            rest = len(sequences[i]) - prefix
            ids.append(sequences[i][prefix:])
            positions.append(torch.arange(prefix, prefix + rest))
            places[i] = torch.cat([beginning, torch.arange(start, start + rest)])
            start += rest
        trees.append(PrefixGroup(prefix, suffixes))
    return Packing(torch.cat(ids), torch.cat(positions), trees, torch.cat(places))


def shared_beginnings(sequences: list[Tensor]) -> list[tuple[list[int], int]]:
    """Every sequence's number in a group with those it shares a beginning with, and its length in tokens.

    A sequence alone in its group begins with all of itself. Empty where nothing is shared. Each sequence keeps at least
    its last token to itself. Sorted by their tokens, sequences of one beginning are neighbours; one joins the group
    before it where that saves more tokens than the group's own beginning does without it.
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
    """Tokens that two sequences begin with alike."""
    shorter = min(len(a), len(b))
    differ = (a[:shorter] != b[:shorter]).nonzero()
    return int(differ[0]) if len(differ) else shorter
