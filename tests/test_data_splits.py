"""Held-out rows: chosen by prompt, by hash, within bounds, and the same whatever stands around them."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.data.comparisons import Comparison, Pair
from stages.data.prompts import whole_prompt
from stages.data.rows import (
    Demonstration,
    Prompt,
    read_comparisons,
    read_demonstrations,
    read_prompts,
)
from stages.data.splits import held_out_everywhere, is_held_out, prompt_key, shared_prompts, split_held_out
from tests.tiny import write_jsonl


def asks(*texts):
    return [Prompt(f"f:{number}", text) for number, text in enumerate(texts, 1)]


def number_of(prompt):
    """The documented rule, worked out by itself: the hash's first 64 bits as a number in [0, 1)."""
    return int(hashlib.sha256(f"0\n{json.dumps(prompt)}".encode()).hexdigest()[:16], 16) / 2**64


def test_a_prompt_is_held_out_when_its_hash_lies_below_the_fraction():
    rows = asks(*[f"question {n}" for n in range(200)])
    expected = [row for row in rows if number_of(row.prompt) < 0.2]
    train, held = split_held_out(rows, 0.2, 500)
    assert held == expected
    assert train == [row for row in rows if row not in expected]
    assert 20 < len(held) < 60  # 40 expected, deviation 5.7
    assert [row for row in rows if is_held_out(row, 0.2)] == held


def test_added_rows_move_no_other_row():
    rows = asks(*[f"question {n}" for n in range(100)])
    more = asks(*[f"another {n}" for n in range(100)])
    _, held = split_held_out(rows, 0.1, 500)
    _, held_of_more = split_held_out(more + rows, 0.1, 500)
    assert [row for row in held_of_more if row in rows] == held


def test_the_same_prompts_are_held_out_of_every_kind_of_row():
    texts = [f"question {n}" for n in range(60)]
    held = [row.prompt for row in split_held_out(asks(*texts), 0.2, 500)[1]]
    demonstrations = [Demonstration("f", text, "a") for text in texts]
    comparisons = [Comparison("f", text, ("a", "b"), (Pair(0, 1),)) for text in texts]
    assert [row.prompt for row in split_held_out(demonstrations, 0.2, 500)[1]] == held
    assert [row.prompt for row in split_held_out(comparisons, 0.2, 500)[1]] == held
    assert held


def test_all_rows_of_a_prompt_land_on_one_side():
    rows = [Demonstration("f", f"question {n % 40}", f"answer {n}") for n in range(200)]
    train, held = split_held_out(rows, 0.2, 500)
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
    assert split_held_out(rows, 0.0, 500) == (rows, [])


@pytest.mark.parametrize("rows", [[], asks("a")])
def test_fewer_than_two_rows_are_all_trained_on(rows):
    assert split_held_out(rows, 0.5, 500) == (rows, [])


def test_at_least_one_row_is_held_out_and_it_is_the_one_with_the_lowest_hash():
    rows = asks(*[f"question {n}" for n in range(30)])
    train, held = split_held_out(rows, 1e-9, 500)
    assert held == [min(rows, key=lambda row: number_of(row.prompt))]
    assert len(train) == 29


def test_the_surplus_over_the_limit_is_not_trained_on():
    """The limit bounds what is measured, the lowest hashes; who is trained on depends on the fraction alone."""
    rows = asks(*[f"question {n}" for n in range(100)])
    train, held = split_held_out(rows, 0.5, 3)
    lowest = sorted(rows, key=lambda row: number_of(row.prompt))[:3]
    assert held == [row for row in rows if row in lowest]
    assert train == [row for row in rows if number_of(row.prompt) >= 0.5] == split_held_out(rows, 0.5, 500)[0]


def test_no_stage_is_tested_on_what_another_was_trained_on():
    """Datasets of other sizes, forms and limits: 7 of the 64 prompts measured last were trained on before."""
    texts = [f"question {n}" for n in range(4000)]
    messages = [({"role": "user", "content": text},) for text in texts]
    sft = split_held_out([Demonstration("f", "", "", (*m, ANSWER)) for m in messages[:3000]], 0.05, 20)
    pairs = [Comparison("f", text, ("a", "b"), (Pair(0, 1),)) for text in texts[500:]]
    reward = split_held_out(pairs, 0.05, 50)
    ppo = split_held_out(asks(*messages[:1000], *texts[1000:2000]), 0.05, 64)
    tested = {prompt_key(row) for row in ppo[1]}
    assert len(tested) == 64
    for train, _ in (sft, reward, ppo):
        assert not tested & {prompt_key(row) for row in train}


def test_it_is_known_whether_every_stage_holds_the_measured_rows_out():
    rows = asks(*[f"question {n}" for n in range(30)])
    assert held_out_everywhere(split_held_out(rows, 0.2, 500)[1], 0.2)
    assert not held_out_everywhere(split_held_out(rows, 1e-9, 500)[1], 1e-9)
    one = [Demonstration("f", "Write.", f"a{n}") for n in range(100)]
    assert not held_out_everywhere(split_held_out(one, 0.2, 500)[1], 0.2)
    assert held_out_everywhere([], 0.2)


def test_two_rows_give_one_to_each_side():
    for n in range(20):
        train, held = split_held_out(asks(f"a {n}", f"b {n}"), 0.5, 500)
        assert (len(train), len(held)) == (1, 1)


def test_a_single_prompt_is_split_by_content():
    rows = [Comparison("f", "Write.", (f"a{n}", f"b{n}"), (Pair(0, 1),)) for n in range(100)]
    train, held = split_held_out(rows, 0.2, 500)
    assert 5 < len(held) < 40
    assert len(train) + len(held) == 100


@pytest.mark.parametrize(("prompts", "divided"), [(9, True), (10, False)])
def test_fewer_than_ten_prompts_of_which_none_is_held_out_are_split_by_content(prompts, divided):
    names = [f"question {n}" for n in range(100) if number_of(f"question {n}") >= 0.1][:prompts]
    rows = [Demonstration("f", names[n % prompts], f"answer {n}") for n in range(90)]
    train, held = split_held_out(rows, 0.1, 500)
    assert bool({row.prompt for row in train} & {row.prompt for row in held}) is divided and held


def test_of_fewer_than_ten_prompts_too_those_that_other_stages_hold_out_are_not_trained_on():
    names = sorted((f"question {n}" for n in range(100)), key=number_of)
    rows = [Demonstration("f", name, f"answer {n}") for name in [names[0], *names[50:57]] for n in range(10)]
    train, held = split_held_out(rows, 0.1, 500)
    assert sum(row.prompt == names[0] for row in held) == 10 and len(held) < 40  # and some of the others by content
    assert names[0] not in {row.prompt for row in train} and len(train) + len(held) == 80


def test_a_prompt_that_has_most_rows_is_split_by_content():
    rows = [Demonstration("f", "Write.", f"a{n}") for n in range(60)]
    rows += [Demonstration("f", f"question {n}", "a") for n in range(40)]
    held = split_held_out(rows, 0.2, 500)[1]
    assert 0 < sum(row.prompt == "Write." for row in held) < 60


def test_texts_are_split_by_content_and_copies_stay_together():
    rows = [Demonstration(f"f:{n}", "", f"text {n % 50}") for n in range(100)]
    train, held = split_held_out(rows, 0.2, 500)
    assert {row.completion for row in train}.isdisjoint(row.completion for row in held)
    assert held


def test_rows_that_are_all_the_same_still_give_one():
    train, held = split_held_out(asks(*["same"] * 4), 0.1, 500)
    assert (len(train), len(held)) == (3, 1)


def test_a_limit_smaller_than_every_prompt_is_kept():
    rows = [Demonstration("f", f"question {n % 20}", f"answer {n}") for n in range(60)]
    train, held = split_held_out(rows, 0.3, 2)
    assert len(held) == 2 and len({row.prompt for row in held}) == 1
    assert len(train) == 3 * sum(number_of(f"question {n}") >= 0.3 for n in range(20))


# --- the same prompt in other forms

QUESTION = "What is 2 + 2?\n\nBe brief."
ASK, ANSWER = {"role": "user", "content": QUESTION}, {"role": "assistant", "content": "4"}
SYSTEM, MORE = {"role": "system", "content": "You are kind."}, {"role": "user", "content": "And 3 + 3?"}
RENDERED = {
    "hh": f"\n\nHuman: {QUESTION}\n\nAssistant:",
    "plain": f"System: Be kind.\n\nHuman: {QUESTION}\n\nAssistant: 4</s>\n\nHuman: And 3 + 3?\n\nAssistant:",
    "chatml": f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n",
    "qwen": "<|im_start|>system\nYou are Qwen.<|im_end|>\n"
    f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday<|eot_id|>"
    f"<|start_header_id|>user<|end_header_id|>\n\n{QUESTION}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "llama2": f"<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\n{QUESTION} [/INST] 4 </s>",
    "mistral": f"<s>[INST] {QUESTION} [/INST]",
    "gemma": f"<bos><start_of_turn>user\n{QUESTION}<end_of_turn>\n<start_of_turn>model\n",
    "zephyr": f"<|user|>\n{QUESTION}</s>\n<|assistant|>\n",
    "deepseek": f"<｜begin▁of▁sentence｜><｜User｜>{QUESTION}<｜Assistant｜>",
    "command": f"<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{QUESTION}<|END_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
    "vicuna": f"A chat with an assistant. USER: {QUESTION} ASSISTANT:",
    "alpaca": f"Below is an instruction.\n\n### Instruction:\n{QUESTION}\n\n### Response:\n",
}


@pytest.mark.parametrize("name", RENDERED)
def test_a_rendered_prompt_is_the_same_prompt(name):
    assert prompt_key(Prompt("f", RENDERED[name])) == prompt_key(Prompt("f", QUESTION))
    text = Demonstration("f", "", RENDERED[name] + " four")
    assert prompt_key(text) == prompt_key(Demonstration("f", QUESTION, " four"))


@pytest.mark.parametrize(
    "prompt",
    [QUESTION, f" {QUESTION}\n", (ASK,), (SYSTEM, ASK), (ASK, ANSWER, MORE), (ANSWER, ASK), ({**ASK, "name": "x"},)],
)
def test_a_prompt_has_one_key_as_text_and_as_messages(prompt):
    expected = prompt_key(Demonstration("f", "", "", (ASK, ANSWER)))
    assert prompt_key(Prompt("f", prompt)) == prompt_key(Comparison("f", prompt, (), ())) == expected


CHAT = "Summarize this chat, number 7.\nUser: where is item 7?\nBot: in shop 0"
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
DIALOGUES = {
    CHAT: "Summarize this chat, number 7. where is item 7?",
    "Who is right?\n\nHuman: It rains.\n\nAssistant: No.\n\nHuman: Yes.": "Who is right? It rains.",
    "Bot: hello\nuser: hi\nBot: yes\nWho spoke first?": "hi",
    "### Input:\nabc\nUser: hi": "abc hi",
    "Explain this log.\nSystem: rebooted\nUser: hi": "Explain this log. hi",
}


@pytest.mark.parametrize("question", DIALOGUES)
def test_a_dialogue_within_a_prompt_is_the_same_in_every_form(tmp_path, question):
    """Its words count up to where a speaker that could be the assistant has its turn, whatever stands around them."""
    ask = {"role": "user", "content": question}
    known = f"{ALPACA}\n\n### Instruction:\n{question}\n\n### Response:\n"
    prompts = {
        "text": question,
        "messages": (ask,),
        "whole": (SYSTEM, ask, ANSWER, MORE),
        "hh": f"\n\nHuman: {question}\n\nAssistant:",
        "chatml": f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n",
        "mistral": f"<s>[INST] {question} [/INST]",
        "zephyr": f"<|user|>{question}</s>\n<|assistant|>\n",
        "vicuna": f"{VICUNA} USER: {question} ASSISTANT:",
        "alpaca": known,
        "alpaca message": ({"role": "user", "content": known},),
    }
    rows = {
        "sharegpt": (
            read_demonstrations,
            {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": "4"}]},
        ),
        "alpaca row": (read_demonstrations, {"instruction": question, "output": "4"}),
        "alpaca prompt": (read_prompts, {"instruction": question}),
        "hh pair": (read_comparisons, {key: f"{prompts['hh']} {key}" for key in ("chosen", "rejected")}),
    }
    keys = {name: prompt_key(Prompt("f", prompt)) for name, prompt in prompts.items()}
    for name, (read, row) in rows.items():
        keys[name] = prompt_key(read(str(write_jsonl(tmp_path / "x.jsonl", [row]))).rows[0])
    assert keys == dict.fromkeys(keys, json.dumps(DIALOGUES[question]))


def test_every_format_of_a_file_has_the_same_key(tmp_path):
    rows = {
        "completion": (read_demonstrations, {"prompt": QUESTION, "completion": " 4"}),
        "messages": (read_demonstrations, {"messages": [SYSTEM, ASK, ANSWER]}),
        "sharegpt": (
            read_demonstrations,
            {"conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": "4"}]},
        ),
        "alpaca": (read_demonstrations, {"instruction": "What is 2 + 2?", "input": "Be brief.", "output": "4"}),
        "alpaca prompt": (read_prompts, {"instruction": QUESTION}),
        "pair": (read_comparisons, {"prompt": [ASK], "chosen": "4", "rejected": "5"}),
        "hh": (read_comparisons, {key: RENDERED["hh"] + f" {key}" for key in ("chosen", "rejected")}),
        "whole": (read_comparisons, {"chosen": [ASK, ANSWER], "rejected": [ASK, ANSWER | {"content": "5"}]}),
        "ranked": (read_comparisons, {"prompt": QUESTION, "responses": ["4", "5"], "ranks": [1, 2]}),
    }
    keys = {
        name: prompt_key(read(str(write_jsonl(tmp_path / "x.jsonl", [row]))).rows[0])
        for name, (read, row) in rows.items()
    }
    ratings = [{"prompt": [ASK], "response": str(n), "rating": n} for n in (4, 5)]
    keys["rating"] = prompt_key(read_comparisons(str(write_jsonl(tmp_path / "x.jsonl", ratings))).rows[0])
    assert set(keys.values()) == {prompt_key(Prompt("f", QUESTION))}, keys


@pytest.mark.parametrize("question", ["Is it 7?", "Count.\nFrom 1 to 7", "Count.\n\nFrom 1 to 7\n"])
def test_words_that_two_responses_share_are_not_of_the_prompt_guessed_from_them(tmp_path, question):
    """The guess still stands for training; the key, and the clusters' too, take whole lines of it."""
    answers = [("Yes", "No"), ("It is so", "It was not"), ("The cat sat", "The cat ran"), ("I do", "I do not know")]
    lines = [{"chosen": f"{question}\n{one} now", "rejected": f"{question}\n{other}"} for one, other in answers]
    rows = read_comparisons(str(write_jsonl(tmp_path / "x.jsonl", lines))).rows
    assert rows[1].prompt == f"{question}\nIt" and rows[1].responses == (" is so now", " was not")
    assert {prompt_key(row) for row in rows} == {prompt_key(Prompt("f", question))}
    assert {whole_prompt(row) for row in rows} == {whole_prompt(Prompt("f", question))}


@pytest.mark.parametrize("name", ["hh", "mistral", "llama2", "gemma", "command"])
def test_a_guessed_prompt_that_ends_with_an_assistants_turn_is_known_by_its_questions(tmp_path, name):
    lines = [{"chosen": f"{RENDERED[name]} {a}\nyes", "rejected": f"{RENDERED[name]} {a}\nno"} for a in ("I say", "It")]
    rows = read_comparisons(str(write_jsonl(tmp_path / "x.jsonl", lines))).rows
    assert {prompt_key(row) for row in rows} == {prompt_key(Prompt("f", QUESTION))}
    assert {whole_prompt(row) for row in rows} == {whole_prompt(Prompt("f", RENDERED[name]))}


def test_a_guessed_prompt_of_one_line_is_taken_whole_and_a_given_one_always_is():
    guessed = Comparison("f", "Is it 7? It", (" is", " was"), (Pair(0, 1),), guessed=True)
    assert prompt_key(guessed) == prompt_key(Prompt("f", "Is it 7? It"))
    given = Comparison("f", "Is it\n7? It", (" is", " was"), (Pair(0, 1),))
    assert prompt_key(given) == prompt_key(Prompt("f", "Is it 7? It"))
    assert prompt_key(dataclasses.replace(given, guessed=True)) == prompt_key(Prompt("f", "Is it"))


def test_other_words_are_another_prompt():
    keys = [prompt_key(Prompt("f", text)) for text in ("a b", "a  c", "A b", "user", "ab", "Hi: a b", "note: a b")]
    assert len(set(keys)) == len(keys)
    assert prompt_key(Prompt("f", (SYSTEM, {"role": "user", "content": " "}))) != keys[0]


def test_what_all_conversations_begin_with_is_no_prompt():
    """Worked examples before every question: whole prompts are told apart, and rows of one stay together."""
    shots = "Human: 1 + 1\n\nAssistant: 2\n\n"
    rows = [Demonstration("f", f"{shots}Human: {n % 40} + 1\n\nAssistant:", f" {n}") for n in range(120)]
    train, held = split_held_out(rows, 0.2, 500)
    assert {row.prompt for row in train}.isdisjoint(row.prompt for row in held)
    assert 3 <= len(held) <= 60 and len(held) % 3 == 0


def test_prompts_that_two_datasets_share():
    train = [Demonstration(f"t:{n}", "", "", ({**ASK, "content": f"question {n}"}, ANSWER)) for n in range(30)]
    assert [row.prompt for row in shared_prompts(asks("question 3", "question 40", " question 7"), train)] == [
        "question 3", " question 7",
    ]  # fmt: skip


def test_columns_that_json_does_not_know_are_no_obstacle():
    rows = [Prompt("f", "same", {"when": {n}, "n": n}) for n in range(5)]
    train, held = split_held_out(rows, 0.2, 500)
    assert len(train) + len(held) == 5
    assert held


@settings(max_examples=60, deadline=None)
@given(
    names=st.lists(st.integers(0, 30), min_size=2, max_size=80),
    fraction=st.floats(0.001, 0.5),
    limit=st.integers(1, 40),
)
def test_every_split_keeps_all_rows_in_order_and_both_sides_filled(names, fraction, limit):
    rows = [Demonstration(f"f:{place}", f"q{name}", f"a{name}") for place, name in enumerate(names)]
    train, held = split_held_out(rows, fraction, limit)
    assert not {row.where for row in train} & {row.where for row in held}
    assert len(split_held_out(rows, fraction, 500)[1]) + len(train) == len(rows)
    assert train == [row for row in rows if row in train]
    assert held == [row for row in rows if row in held]
    assert 1 <= len(held) <= limit
    assert train
