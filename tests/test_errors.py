"""How an error names what it is about."""

from __future__ import annotations

import pytest

from stages.errors import UserError, counted, verb_for


@pytest.mark.parametrize(
    ("where", "what", "text"),
    [
        ("--dataset", "--dataset is required", "--dataset is required"),
        ("--lora-rank", "lora_rank 2 is smaller than 4", "--lora-rank 2 is smaller than 4"),
        ("r.yaml:3: mask", "mask has no effect", "r.yaml:3: mask has no effect"),
        ("--mask", "masks are odd", "--mask: masks are odd"),
        ("rows.jsonl:1", "the row is empty", "rows.jsonl:1: the row is empty"),
        (None, "--mask is odd", "--mask is odd"),
        ("--mask", "odd", "--mask: odd"),
    ],
)
def test_a_knob_is_named_once(where, what, text):
    assert str(UserError(what, where=where, fix="change it")) == f"{text}\n  -> change it"


@pytest.mark.parametrize(("number", "text"), [(0, "0 rows have"), (1, "1 row has"), (2, "2 rows have")])
def test_one_of_something_is_singular(number, text):
    assert f"{counted(number, 'rows')} {verb_for(number, 'have')}" == text
