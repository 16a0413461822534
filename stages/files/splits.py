"""Holding rows out for evaluation, by prompt, so that no prompt is both learned and tested."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Sequence
from typing import TypeVar

from stages.files.rows import Comparison, Demonstration, Prompt

Row = TypeVar("Row", Demonstration, Prompt, Comparison)

FEWEST_PROMPTS = 10


def split_held_out(rows: Sequence[Row], fraction: float, limit: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Split rows into (train, held out), each in the order given; all rows of a prompt land on one side.

    A prompt is held out if its hash with the seed, as a number in [0, 1), lies below `fraction`: the choice depends on
    nothing else, so it outlives added rows and is the same for every dataset with that prompt. At most `limit` rows are
    held out, those with the lowest hashes, and at least one where `fraction` > 0 and there are two rows. With fewer
    than 10 prompts, or one that has most of the rows, rows are held out by their whole content instead.
    """
    if fraction <= 0 or limit < 1 or len(rows) < 2:
        return list(rows), []
    prompts = [prompt_key(row) for row in rows]
    held: set[int] = set()
    if len(set(prompts)) >= FEWEST_PROMPTS and Counter(prompts).most_common(1)[0][1] * 2 <= len(rows):
        held = _hold_out(prompts, fraction, limit, seed)
    if not held:
        held = _hold_out([_content_key(row) for row in rows], fraction, limit, seed)
    if not held:  # every row is the same: nothing better than its place is left to choose by
        held = _hold_out([str(place) for place in range(len(rows))], fraction, limit, seed)
    train = [row for place, row in enumerate(rows) if place not in held]
    return train, [row for place, row in enumerate(rows) if place in held]


def prompt_key(row: Row) -> str:
    """What makes two rows' prompts the same: the text, or a conversation's turns before the assistant first speaks."""
    if isinstance(row.prompt, str) and (row.prompt or not isinstance(row, Demonstration)):
        return json.dumps(row.prompt)
    messages = row.messages if isinstance(row, Demonstration) else row.prompt
    return json.dumps(list(itertools.takewhile(lambda message: message["role"] != "assistant", messages)))


def _content_key(row: Row) -> str:
    content = {field.name: getattr(row, field.name) for field in dataclasses.fields(row) if field.name != "where"}
    if isinstance(row, Comparison):
        content["pairs"] = [dataclasses.astuple(pair) for pair in row.pairs]
    return json.dumps(content, sort_keys=True, default=str)


def _hold_out(keys: Sequence[str], fraction: float, limit: int, seed: int) -> set[int]:
    """Places of the rows to hold out: whole groups of equal keys, lowest hash first, never all rows."""
    groups: dict[str, list[int]] = {}
    for place, key in enumerate(keys):
        groups.setdefault(key, []).append(place)
    room = min(limit, len(keys) - 1)
    fitting = sorted((_hash(key, seed), places) for key, places in groups.items() if len(places) <= room)
    held: set[int] = set()
    for number, places in fitting:
        if number < fraction and len(held) + len(places) <= room:
            held.update(places)
    return held or set(itertools.chain.from_iterable(places for _, places in fitting[:1]))


def _hash(key: str, seed: int) -> float:
    digest = hashlib.sha256(f"{seed}\n{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
