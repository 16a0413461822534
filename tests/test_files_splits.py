"""Held-out rows: chosen by prompt, by hash, within bounds, and the same whatever stands around them."""

from __future__ import annotations

import hashlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.files.rows import Comparison, Demonstration, Pair, Prompt
from stages.files.splits import prompt_key, split_held_out


def asks(*texts):
    return [Prompt(f"f:{number}", text) for number, text in enumerate(texts, 1)]


def number_of(prompt, seed):
    """The documented rule, worked out by itself: the hash's first 64 bits as a number in [0, 1)."""
    return int(hashlib.sha256(f"{seed}\n{json.dumps(prompt)}".encode()).hexdigest()[:16], 16) / 2**64


def test_a_prompt_is_held_out_when_its_hash_lies_below_the_fraction():
    rows = asks(*[f"question {n}" for n in range(200)])
    expected = [row for row in rows if number_of(row.prompt, 3) < 0.2]
    train, held = split_held_out(rows, 0.2, 500, 3)
    assert held == expected
    assert train == [row for row in rows if row not in expected]
    assert 20 < len(held) < 60  # 40 expected, deviation 5.7


def test_added_rows_move_no_other_row():
    rows = asks(*[f"question {n}" for n in range(100)])
    more = asks(*[f"another {n}" for n in range(100)])
    _, held = split_held_out(rows, 0.1, 500, 0)
    _, held_of_more = split_held_out(more + rows, 0.1, 500, 0)
    assert [row for row in held_of_more if row in rows] == held


def test_another_seed_is_another_choice():
    rows = asks(*[f"question {n}" for n in range(100)])
    assert split_held_out(rows, 0.2, 500, 0)[1] != split_held_out(rows, 0.2, 500, 1)[1]


def test_the_same_prompts_are_held_out_of_every_kind_of_row():
    texts = [f"question {n}" for n in range(60)]
    held = [row.prompt for row in split_held_out(asks(*texts), 0.2, 500, 0)[1]]
    demonstrations = [Demonstration("f", text, "a") for text in texts]
    comparisons = [Comparison("f", text, ("a", "b"), (Pair(0, 1),)) for text in texts]
    assert [row.prompt for row in split_held_out(demonstrations, 0.2, 500, 0)[1]] == held
    assert [row.prompt for row in split_held_out(comparisons, 0.2, 500, 0)[1]] == held
    assert held


def test_all_rows_of_a_prompt_land_on_one_side():
    rows = [Demonstration("f", f"question {n % 40}", f"answer {n}") for n in range(200)]
    train, held = split_held_out(rows, 0.2, 500, 0)
    assert {row.prompt for row in train}.isdisjoint(row.prompt for row in held)
    assert len(held) % 5 == 0


def test_turns_of_one_conversation_land_on_one_side():
    user, assistant = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
    more = {"role": "user", "content": "R"}
    key = prompt_key(Prompt("f", (user,)))
    assert prompt_key(Prompt("f", (user, assistant, more))) == key
    assert prompt_key(Comparison("f", (user, assistant, more), (), ())) == key
    assert prompt_key(Demonstration("f", "", "", (user, assistant, more, assistant))) == key
    assert prompt_key(Prompt("f", (more,))) != key


def test_an_alpaca_row_has_one_key_as_demonstration_and_as_prompt():
    turn = {"role": "user", "content": "Sing."}
    assert prompt_key(Demonstration("f", "### Sing", "la", (turn,))) == prompt_key(Prompt("g", "### Sing", {}, (turn,)))


def test_fraction_zero_holds_nothing_out():
    rows = asks("a", "b", "c")
    assert split_held_out(rows, 0.0, 500, 0) == (rows, [])


@pytest.mark.parametrize("rows", [[], asks("a")])
def test_fewer_than_two_rows_are_all_trained_on(rows):
    assert split_held_out(rows, 0.5, 500, 0) == (rows, [])


def test_at_least_one_row_is_held_out_and_it_is_the_one_with_the_lowest_hash():
    rows = asks(*[f"question {n}" for n in range(30)])
    train, held = split_held_out(rows, 1e-9, 500, 0)
    assert held == [min(rows, key=lambda row: number_of(row.prompt, 0))]
    assert len(train) == 29


def test_the_surplus_over_the_limit_goes_back_to_training():
    rows = asks(*[f"question {n}" for n in range(100)])
    train, held = split_held_out(rows, 0.5, 3, 0)
    lowest = sorted(rows, key=lambda row: number_of(row.prompt, 0))[:3]
    assert held == [row for row in rows if row in lowest]
    assert len(train) == 97


def test_two_rows_give_one_to_each_side():
    for seed in range(20):
        train, held = split_held_out(asks("a", "b"), 0.5, 500, seed)
        assert (len(train), len(held)) == (1, 1)


def test_a_single_prompt_is_split_by_content():
    rows = [Comparison("f", "Write.", (f"a{n}", f"b{n}"), (Pair(0, 1),)) for n in range(100)]
    train, held = split_held_out(rows, 0.2, 500, 0)
    assert 5 < len(held) < 40
    assert len(train) + len(held) == 100


@pytest.mark.parametrize(("prompts", "divided"), [(9, True), (10, False)])
def test_fewer_than_ten_prompts_are_split_by_content(prompts, divided):
    rows = [Demonstration("f", f"question {n % prompts}", f"answer {n}") for n in range(90)]
    train, held = split_held_out(rows, 0.3, 500, 0)
    assert bool({row.prompt for row in train} & {row.prompt for row in held}) is divided


def test_a_prompt_that_has_most_rows_is_split_by_content():
    rows = [Demonstration("f", "Write.", f"a{n}") for n in range(60)]
    rows += [Demonstration("f", f"question {n}", "a") for n in range(40)]
    held = split_held_out(rows, 0.2, 500, 0)[1]
    assert 0 < sum(row.prompt == "Write." for row in held) < 60


def test_texts_are_split_by_content_and_copies_stay_together():
    rows = [Demonstration(f"f:{n}", "", f"text {n % 50}") for n in range(100)]
    train, held = split_held_out(rows, 0.2, 500, 0)
    assert {row.completion for row in train}.isdisjoint(row.completion for row in held)
    assert held


def test_rows_that_are_all_the_same_still_give_one():
    train, held = split_held_out(asks(*["same"] * 4), 0.1, 500, 0)
    assert (len(train), len(held)) == (3, 1)


def test_a_limit_smaller_than_every_prompt_is_kept():
    rows = [Demonstration("f", f"question {n % 20}", f"answer {n}") for n in range(60)]
    train, held = split_held_out(rows, 0.3, 2, 0)
    assert (len(train), len(held)) == (58, 2)


def test_columns_that_json_does_not_know_are_no_obstacle():
    rows = [Prompt("f", "same", {"when": {n}, "n": n}) for n in range(5)]
    train, held = split_held_out(rows, 0.2, 500, 0)
    assert len(train) + len(held) == 5
    assert held


@settings(max_examples=60, deadline=None)
@given(
    names=st.lists(st.integers(0, 30), min_size=2, max_size=80),
    fraction=st.floats(0.001, 0.5),
    limit=st.integers(1, 40),
    seed=st.integers(0, 9),
)
def test_every_split_keeps_all_rows_in_order_and_both_sides_filled(names, fraction, limit, seed):
    rows = [Demonstration(f"f:{place}", f"q{name}", f"a{name}") for place, name in enumerate(names)]
    train, held = split_held_out(rows, fraction, limit, seed)
    assert sorted(train + held, key=rows.index) == rows
    assert train == [row for row in rows if row in train]
    assert held == [row for row in rows if row in held]
    assert 1 <= len(held) <= limit
    assert train
