"""Held-out rows for evaluation, split by prompt, so that no stage both trains and evaluates on one prompt."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from stages.data.comparisons import Comparison
from stages.data.prompts import first_question, whole_prompt
from stages.data.rows import Demonstration, Prompt
from stages.errors import counted, verb_for

Row = TypeVar("Row", Demonstration, Prompt, Comparison)

MIN_PROMPTS_TO_HOLD_OUT = 10
SALT = "0"


def split_held_out(rows: Sequence[Row], fraction: float, limit: int) -> tuple[list[Row], list[Row]]:
    """Rows to train on, and at most `limit` held-out rows for evaluation, both in the order given.

    A prompt is held out if its hash, a number in [0, 1), is below `fraction`. The hash depends only on the prompt's
    words, so it is the same for every dataset, row format, stage and seed. If more than `limit` rows are held out,
    those with the lowest hashes are used; the others are not trained on either. All rows of a prompt are on one side.

    If no hash is below `fraction`, the prompt with the lowest is held out. With fewer than 10 prompts, or if one prompt
    has most of the rows, rows are also held out by the words of every turn and, if these are as few, by their whole
    content. None of these keys removes more than half of the rows that are to be trained on. With `fraction` > 0 and
    two rows, at least one is held out and at least one is trained on. Rows chosen by the later keys may be trained on
    by other stages (`held_out_everywhere` is then False).
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
    """Whether every stage holds these rows' prompts out; False if `split_held_out` had to use its later keys."""
    return all(is_held_out(row, fraction) for row in held_out)


def shared_prompts(rows: Sequence[Row], others: Iterable[Row]) -> list[Row]:
    """The `rows` with a prompt that `others` have: by `prompt_key` if there are enough of these, else by every turn."""
    others = list(others)
    key = (
        prompt_key if _divides([prompt_key(row) for row in (*rows, *others)], MIN_PROMPTS_TO_HOLD_OUT) else whole_prompt
    )
    keys = {key(row) for row in others}
    return [row for row in rows if key(row) in keys]


def warn_of_trained_prompts(eval_dataset: str, held_out: Sequence[Row], train: Iterable[Row]) -> tuple[str, ...]:
    """A warning if rows of --eval-dataset have prompts that are trained on."""
    shared = shared_prompts(held_out, train)
    if not shared:
        return ()
    return (
        f"{len(shared)} of {counted(len(held_out), 'rows')} of --eval-dataset {eval_dataset} "
        f"{verb_for(len(shared), 'have')} prompts that are trained on, so their metrics are not held-out metrics; the "
        f"first is {shared[0].where}",
    )


def prompt_key(row: Row) -> str:
    """The key by which two rows have the same prompt: the words of `first_question`."""
    return json.dumps(first_question(row))


def _choose(rows: Sequence[Row], fraction: float) -> tuple[list[float], set[int]]:
    """A hash per row and the indices of the rows to hold out, by the first kind of key that divides the rows."""
    kinds: list[tuple[Callable[[Row], str], int]] = [
        (prompt_key, MIN_PROMPTS_TO_HOLD_OUT),
        (lambda row: json.dumps(whole_prompt(row)), MIN_PROMPTS_TO_HOLD_OUT),
        (_content_key, 2),
    ]
    held: set[int] = set()
    for key, least in kinds:
        hashes = [_hash(key(row)) for row in rows]
        held |= _below(hashes, fraction, held)
        if _divides(hashes, least):
            lowest = min(hashes)
            return hashes, held or {place for place, number in enumerate(hashes) if number == lowest}
    hashes = [_hash(str(place)) for place in range(len(rows))]  # no key divides the rows
    return hashes, held or _below(hashes, fraction, held) or {hashes.index(min(hashes))}


def _below(hashes: list[float], fraction: float, held: set[int]) -> set[int]:
    """Indices not in `held` with a hash below `fraction`; none if too few others would remain."""
    others = [place for place in range(len(hashes)) if place not in held]
    below = {place for place in others if hashes[place] < fraction}
    return below if 2 * (len(others) - len(below)) > (1 - fraction) * len(others) else set()


def _divides(keys: Sequence[str | float], least: int) -> bool:
    """Whether at least `least` keys are different, and none has most of the rows."""
    counts = Counter(keys)
    return len(counts) >= least and 2 * max(counts.values()) <= len(keys)


def _content_key(row: Row) -> str:
    names = (field.name for field in dataclasses.fields(row) if field.name not in ("where", "guessed"))
    content = {name: getattr(row, name) for name in names}
    if isinstance(row, Comparison):
        content["pairs"] = [dataclasses.astuple(pair) for pair in row.pairs]
    return json.dumps(content, sort_keys=True, default=str)


def _hash(key: str) -> float:
    digest = hashlib.sha256(f"{SALT}\n{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
