"""Holding rows out for evaluation, by prompt, so that no prompt is both learned and tested, in any stage."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from stages.data.prompts import first_question, whole_prompt
from stages.data.rows import Comparison, Demonstration, Prompt

Row = TypeVar("Row", Demonstration, Prompt, Comparison)

FEWEST_PROMPTS = 10
SALT = "0"


def split_held_out(rows: Sequence[Row], fraction: float, limit: int) -> tuple[list[Row], list[Row]]:
    """Rows to train on, and at most `limit` held-out ones to measure on, each in the order given.

    A prompt is held out if its hash, as a number in [0, 1), lies below `fraction`. That depends on nothing but the
    prompt's words, so it is the same for every dataset, form of row, stage and seed. Rows held out beyond `limit` (the
    lowest hashes are measured) are not trained on either. All rows of a prompt land on one side.

    Where no prompt lies below, the one with the lowest hash is held out. With fewer than 10 prompts, or where one has
    most of the rows, rows are held out by every turn of their prompts as well, and if these are as few, by the rows'
    whole contents. No such key takes more than half of what training is to have. At least one row is held out where
    `fraction` > 0 and there are two rows, and at least one is trained on. Other stages may train on rows chosen
    in these ways (`held_out_everywhere` is False).
    """
    if fraction <= 0 or limit < 1 or len(rows) < 2:
        return list(rows), []
    hashes, held = _choose(rows, fraction)
    measured = set(sorted(held, key=lambda place: (hashes[place], place))[:limit])
    train = [row for place, row in enumerate(rows) if place not in held]
    return train, [row for place, row in enumerate(rows) if place in measured]


def is_held_out(row: Row, fraction: float) -> bool:
    """Whether every stage with this `eval_fraction` holds a row's prompt out."""
    return _hash(prompt_key(row)) < fraction


def held_out_everywhere(held_out: Iterable[Row], fraction: float) -> bool:
    """Whether every stage holds these rows' prompts out; not where `split_held_out` had to choose them otherwise."""
    return all(is_held_out(row, fraction) for row in held_out)


def shared_prompts(rows: Sequence[Row], others: Iterable[Row]) -> list[Row]:
    """Those of `rows` that have a prompt of `others`: by `prompt_key` where that divides them, else by every turn."""
    others = list(others)
    divides = _divides([_hash(prompt_key(row)) for row in (*rows, *others)], FEWEST_PROMPTS)
    key = prompt_key if divides else whole_prompt
    known = {key(row) for row in others}
    return [row for row in rows if key(row) in known]


def warn_of_trained_prompts(eval_dataset: str, held_out: Sequence[Row], train: Iterable[Row]) -> tuple[str, ...]:
    """A warning if rows of --eval-dataset have prompts that are trained on."""
    shared = shared_prompts(held_out, train)
    if not shared:
        return ()
    return (
        f"{len(shared)} of {len(held_out)} rows of --eval-dataset {eval_dataset} have prompts that are trained on, so "
        f"what is measured on them is no test; the first is {shared[0].where}",
    )


def prompt_key(row: Row) -> str:
    """What makes two rows' prompts the same: the words of `first_question`."""
    return json.dumps(first_question(row))


def _choose(rows: Sequence[Row], fraction: float) -> tuple[list[float], set[int]]:
    """A hash per row, and the places of the rows to hold out by it, by the first kind of key that divides the rows."""
    kinds: list[tuple[Callable[[Row], str], int]] = [
        (prompt_key, FEWEST_PROMPTS),
        (lambda row: json.dumps(whole_prompt(row)), FEWEST_PROMPTS),
        (_content_key, 2),
    ]
    held: set[int] = set()
    for key, least in kinds:
        hashes = [_hash(key(row)) for row in rows]
        held |= _below(hashes, fraction, held)
        if _divides(hashes, least):
            lowest = min(hashes)
            return hashes, held or {place for place, number in enumerate(hashes) if number == lowest}
    hashes = [_hash(str(place)) for place in range(len(rows))]  # nothing better is left to choose by
    return hashes, held or _below(hashes, fraction, held) or {hashes.index(min(hashes))}


def _below(hashes: list[float], fraction: float, held: set[int]) -> set[int]:
    """Places beside `held` whose hash lies below `fraction`; none where half of what training is to have would go."""
    rest = [place for place in range(len(hashes)) if place not in held]
    found = {place for place in rest if hashes[place] < fraction}
    return found if 2 * (len(rest) - len(found)) > (1 - fraction) * len(rest) else set()


def _divides(hashes: list[float], least: int) -> bool:
    """Whether at least so many keys differ, and none has most of the rows."""
    counts = Counter(hashes)
    return len(counts) >= least and 2 * max(counts.values()) <= len(hashes)


def _content_key(row: Row) -> str:
    names = (field.name for field in dataclasses.fields(row) if field.name not in ("where", "guessed"))
    content = {name: getattr(row, name) for name in names}
    if isinstance(row, Comparison):
        content["pairs"] = [dataclasses.astuple(pair) for pair in row.pairs]
    return json.dumps(content, sort_keys=True, default=str)


def _hash(key: str) -> float:
    digest = hashlib.sha256(f"{SALT}\n{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
