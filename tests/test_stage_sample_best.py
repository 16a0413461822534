"""`rlhf sample --best-of`: each prompt's best response as a demonstration that `rlhf sft` takes."""

from __future__ import annotations

import pytest
import torch

from stages.rollout.best_responses import choose_best
from tests.commands import done, lines_of, refused, result
from tests.tiny import write_jsonl

VOWELS = """
def score(prompts, responses, answer=None):
    return [sum(letter in "aeiou" for letter in response) for response in responses]
"""


def test_the_best_response_is_the_first_of_the_highest_that_is_not_blank():
    scores = torch.tensor([[1.0, 3.0, 3.0], [9.0, 0.0, 2.0], [1.0, 1.0, 1.0]])
    texts = ["a", "b", "c", " \n", "d", "e", "", " ", "\t"]
    assert choose_best(scores, texts) == [1, 2, None]


@pytest.fixture(scope="module")
def sampled(chain, tmp_path_factory):
    """The best of 4 by a function, and all 4 responses."""
    place = tmp_path_factory.mktemp("best")
    (place / "vowels.py").write_text(VOWELS)
    line = ("sample", "--model", chain().sft, "--dataset", chain().prompts, "--limit-rows", 10)
    line += ("--max-response-tokens", 6)
    done(*line, "--output", place / "all.jsonl", "--responses-per-prompt", 4)
    best = ("--best-of", 4, "--reward", f"{place}/vowels.py", "--output", place / "best.jsonl")
    return place, result(*line, *best), (*line, *best)


@pytest.mark.full
def test_rows_are_the_best_of_the_same_responses(sampled, chain):
    place, report, _ = sampled
    everything, best = lines_of(place / "all.jsonl"), lines_of(place / "best.jsonl")
    vowels = [sum(letter in "aeiou" for letter in row["response"]) for row in everything]
    for i, row in enumerate(best):
        four, scores = everything[4 * i : 4 * i + 4], vowels[4 * i : 4 * i + 4]
        chosen = four[row["index"]]
        assert row["score"] == max(scores) and row["index"] == scores.index(max(scores))
        assert row["completion"] == chosen["response"] and row["prompt"] == chosen["prompt"]
        assert (row["answer"], row["tokens"], row["ended"]) == tuple(chosen[n] for n in ("answer", "tokens", "ended"))
    assert report["score"] == pytest.approx(sum(row["score"] for row in best) / len(best))
    assert report["score_of_all"] == pytest.approx(sum(vowels) / 40)
    assert report["kl_bound"] == pytest.approx(1.3862944 - 0.75)


@pytest.mark.full
def test_sft_takes_the_rows_and_the_command_may_be_repeated(sampled, tmp_path):
    place, _, line = sampled
    before = (place / "best.jsonl").read_bytes()
    ended = done(*line)
    assert (place / "best.jsonl").read_bytes() == before and "rlhf sft --model" in ended.stdout + ended.stderr
    flags = ("--max-steps", 1, "--batch-size", 4, "--eval-fraction", 0, "--samples", 0)
    done("sft", "--model", line[2], "--dataset", place / "best.jsonl", "--output", tmp_path / "sft", *flags)


@pytest.mark.full
def test_a_reward_model_chooses_conversations_too(chain, tmp_path):
    found = chain(chat=True)
    line = ("sample", "--model", found.sft, "--dataset", found.prompts, "--limit-rows", 4, "--max-response-tokens", 6)
    report = result(*line, "--best-of", 3, "--reward", found.reward, "--output", tmp_path / "best.jsonl")
    rows = lines_of(tmp_path / "best.jsonl")
    assert len(rows) == report["demonstrations"] and rows[0]["prompt"][0]["role"] == "user"
    assert report["score"] >= report["score_of_all"]
    flags = ("--max-steps", 1, "--batch-size", 2, "--eval-fraction", 0, "--samples", 0)
    done("sft", "--model", found.sft, "--dataset", tmp_path / "best.jsonl", "--output", tmp_path / "sft", *flags)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--best-of", 4), "give --reward"),
        (("--reward", "builtin:format"), "give --best-of"),
        (("--best-of", 4, "--reward", "builtin:format", "--responses-per-prompt", 2), "--responses-per-prompt"),
        (("--best-of", 4, "--reward", "builtin:format", "--temperature", 0), "--best-of"),
        (("--best-of", 4, "--reward", "builtin:maths"), "p.jsonl:1: answer"),
    ],
)
def test_what_the_best_of_several_needs(model_folder, tmp_path, flags, told):
    data = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "red"}])
    line = ("sample", "--model", model_folder(), "--dataset", data, "--output", tmp_path / "x.jsonl")
    assert told in refused(*line, *flags, "--max-response-tokens", 6)
