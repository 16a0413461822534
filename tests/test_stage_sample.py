"""`rlhf sample`: responses by the law that was asked for, the same whoever is sampled beside them."""

from __future__ import annotations

import collections
import json

import pytest
import torch

from tests.commands import done, lines_of, result
from tests.tiny import write_jsonl


def sample(chain, place, *more: object, model: object = None, dataset: object = None) -> list[dict]:
    line = ("sample", "--model", model or chain.sft, "--dataset", dataset or chain.prompts, "--max-response-tokens", 6)
    result(*line, "--output", place, *more)
    return lines_of(place)


def test_a_line_per_response_with_the_rows_own_columns(chain, tmp_path):
    ended = result(
        "sample", "--model", chain().ppo, "--dataset", chain().prompts, "--output", tmp_path / "x.jsonl",
        "--responses-per-prompt", 3, "--max-response-tokens", 4, "--limit-rows", 5,
    )  # fmt: skip
    rows, asked = lines_of(tmp_path / "x.jsonl"), lines_of(chain().prompts)[:5]
    assert [(row["prompt"], row["index"]) for row in rows] == [(a["prompt"], k) for a in asked for k in range(3)]
    assert [row["answer"] for row in rows[::3]] == [a["answer"] for a in asked]
    assert (ended["prompts"], ended["responses"], ended["output"]) == (5, 15, str(tmp_path / "x.jsonl"))
    assert ended["mean_tokens"] == pytest.approx(sum(row["tokens"] for row in rows) / 15)
    assert ended["ended"] == pytest.approx(sum(row["ended"] for row in rows) / 15)
    assert len({row["response"] for row in rows[:3]}) > 1


@pytest.mark.full
def test_a_response_does_not_depend_on_the_others(chain, tmp_path):
    """Design section 7: noise belongs to (prompt, position), so batches and seeds of others change nothing."""
    found = chain()
    whole = sample(found, tmp_path / "whole.jsonl")
    assert sample(found, tmp_path / "ones.jsonl", "--rollout-batch-size", 1) == whole
    assert sample(found, tmp_path / "few.jsonl", "--limit-rows", 7) == whole[:7]
    assert sample(found, tmp_path / "other.jsonl", "--seed", 1) != whole


def test_a_second_response_does_not_change_the_first(chain, tmp_path):
    one = sample(chain(), tmp_path / "one.jsonl", "--limit-rows", 6)
    two = sample(chain(), tmp_path / "two.jsonl", "--limit-rows", 6, "--responses-per-prompt", 2)
    assert two[::2] == one


def test_temperature_zero_takes_the_likeliest_token(chain, tmp_path):
    """The same as transformers' own greedy decoding of the exported model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = chain()
    rows = sample(found, tmp_path / "x.jsonl", "--temperature", 0, "--limit-rows", 5, model=found.ppo)
    model = AutoModelForCausalLM.from_pretrained(found.folder / "exported").eval()
    words = AutoTokenizer.from_pretrained(found.folder / "exported")
    for row in rows:
        ids = torch.tensor([words(row["prompt"]).input_ids])
        said = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)[0]
        before = words.decode(ids[0], skip_special_tokens=True)
        assert words.decode(said, skip_special_tokens=True) == before + row["response"]


def test_top_p_keeps_the_likeliest_tokens(chain, tmp_path):
    """At top_p 0.05 hardly a choice is left; at 1.0 first tokens of one prompt spread widely."""
    data = write_jsonl(tmp_path / "one.jsonl", [{"prompt": "red one"}])
    seen = {}
    for p in (0.05, 1.0):
        rows = sample(chain(), tmp_path / f"{p}.jsonl", "--top-p", p, "--responses-per-prompt", 40, dataset=data)
        seen[p] = collections.Counter(row["response"][:1] for row in rows)
    assert len(seen[0.05]) <= 5 < 10 <= len(seen[1.0])


def test_a_base_can_be_sampled_from(chain, tmp_path):
    rows = sample(chain(), tmp_path / "x.jsonl", "--limit-rows", 3, model=chain().base)
    assert len(rows) == 3 and all(row["tokens"] <= 6 for row in rows)


@pytest.mark.full
def test_conversations_are_answered_without_their_markers(chain, tmp_path):
    found = chain(chat=True)
    talk = [
        {"role": "user", "content": "red"},
        {"role": "assistant", "content": "blue"},
        {"role": "user", "content": "one"},
    ]
    data = write_jsonl(tmp_path / "talk.jsonl", [{"messages": talk, "id": 7}])
    rows = sample(found, tmp_path / "x.jsonl", dataset=data)
    assert rows[0]["prompt"] == talk and rows[0]["id"] == 7
    assert "<|" not in rows[0]["response"]


def test_samples_may_be_written_again(chain, tmp_path):
    first = sample(chain(), tmp_path / "x.jsonl", "--limit-rows", 2)
    assert sample(chain(), tmp_path / "x.jsonl", "--limit-rows", 2) == first


@pytest.mark.full
def test_samples_are_demonstrations_for_another_round(chain, tmp_path):
    """What sample writes is what sft reads, with --map."""
    sample(chain(), tmp_path / "x.jsonl", "--limit-rows", 30)
    rows = [row for row in lines_of(tmp_path / "x.jsonl") if row["response"].strip()]
    data = write_jsonl(tmp_path / "good.jsonl", rows)
    line = ("sft", "--model", chain().base, "--dataset", data, "--map", "completion=response")
    done(*line, "--output", tmp_path / "sft", "--max-steps", 1, "--batch-size", 4, "--eval-fraction", 0)


def test_lines_are_utf8_json_whatever_was_said(chain, tmp_path):
    sample(chain(), tmp_path / "x.jsonl", "--temperature", 3, "--responses-per-prompt", 4)
    text = (tmp_path / "x.jsonl").read_bytes().decode("utf-8")
    assert len(text.split("\n")) == 64 * 4 + 1 and all(json.loads(line) for line in text.split("\n")[:-1])
