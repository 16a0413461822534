"""`rlhf evaluate`: win rate, KL, perplexity and reports, each made again here by other means."""

from __future__ import annotations

import json
import math
import statistics

import pytest
import torch

from stages import evaluate
from stages.errors import NotFiniteError
from stages.evaluate import win_rate
from stages.maths.statistics import wilson_interval
from tests.commands import SHORT, contents, done, lines_of, refused, result, rlhf
from tests.parts import prompt_rows
from tests.tiny import write_jsonl


@pytest.fixture
def letters(tmp_path):
    """A reward function: how many letters a response has; it keeps what it was asked."""
    (tmp_path / "letters.py").write_text(
        "import json, pathlib\n"
        "def score(prompts, responses):\n"
        "    with open(pathlib.Path(__file__).with_name('seen'), 'a') as file:\n"
        "        file.write(json.dumps([prompts, responses]) + '\\n')\n"
        "    return [sum(letter.isalpha() for letter in response) for response in responses]\n"
        "def evens(prompts, responses):\n"
        "    return [len(response) % 2 for response in responses]\n"
    )
    return tmp_path / "letters.py"


def interval(wins: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval, from the roots of (p - rate)^2 = z^2 rate (1 - rate) / n."""
    z, p = 1.96, wins / n
    a, b, c = 1 + z * z / n, -2 * p - z * z / n, p * p
    root = math.sqrt(b * b - 4 * a * c)
    return (-b - root) / (2 * a), (-b + root) / (2 * a)


@pytest.fixture
def compared(chain, letters, tmp_path):
    """PPO against SFT under two sources."""
    found = chain()
    line = ("evaluate", "--model", found.ppo, "--against", found.base, "--dataset", found.prompts, *SHORT)
    sources = ("--reward", f"{letters}:score", "--gold", f"{letters}:evens", "--examples", 64)
    return result(*line, *sources, "--output", tmp_path / "x.json"), tmp_path


def test_scores_errors_and_win_rates_are_those_of_the_responses(compared):
    found, place = compared
    rows = found["examples"]
    assert found["prompts"] == len(rows) == 64
    mine, other = ([sum(c.isalpha() for c in row[key]) for row in rows] for key in ("response", "against"))
    assert [row["score"] for row in rows] == mine and [row["against_score"] for row in rows] == other
    for side, scores in (("policy", mine), ("against", other)):
        assert found[side]["score"] == pytest.approx(statistics.fmean(scores))
        assert found[side]["score_error"] == pytest.approx(statistics.stdev(scores) / 8, rel=1e-6)
    wins = sum((a > b) + 0.5 * (a == b) for a, b in zip(mine, other, strict=True))
    rate = found["win_rate"]["reward"]
    assert (rate["rate"], rate["n"]) == (pytest.approx(wins / 64), 64)
    assert (rate["low"], rate["high"]) == pytest.approx(interval(wins, 64), abs=1e-6)
    evens = [(len(row["response"]) % 2, len(row["against"]) % 2) for row in rows]
    assert found["policy"]["gold"] == pytest.approx(sum(a for a, _ in evens) / 64)
    assert found["win_rate"]["gold"]["rate"] == pytest.approx(sum((a > b) + 0.5 * (a == b) for a, b in evens) / 64)
    written = json.loads((place / "x.json").read_text())
    assert {k: v for k, v in found.items() if k in written} == written and found["output"] == str(place / "x.json")


def test_kl_is_what_transformers_says_of_the_responses(chain, tmp_path):
    """Sequence KL, estimator k1: log-probabilities of the same tokens under the exported policy and its parent."""
    from transformers import AutoModelForCausalLM

    found = chain()
    line = ("evaluate", "--model", found.ppo, "--dataset", found.prompts, *SHORT, "--temperature", 0.8)
    whole = result(*line, "--limit-rows", 10, "--seed", 3)["policy"]
    done("export", "--model", found.sft, "--output", tmp_path / "sft")
    models = [AutoModelForCausalLM.from_pretrained(p).eval() for p in (found.folder / "exported", tmp_path / "sft")]
    kls = [sequence_kl(models, prompt, response, 0.8) for prompt, response in tokens_of(found, 10)]
    assert whole["kl"] == pytest.approx(statistics.fmean(kls), abs=2e-5)
    assert whole["kl_error"] == pytest.approx(statistics.stdev(kls) / math.sqrt(10), abs=2e-5)


def tokens_of(found, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The tokens that `rlhf evaluate --seed 3 --temperature 0.8` samples for the first prompts."""
    from transformers import AutoTokenizer

    from stages.models.base import load_base
    from stages.models.model_ref import open_model
    from stages.models.roles import Roles, adapter_of
    from stages.rollout.generate import Sampling, generate

    source = open_model(str(found.ppo), stages=("ppo",), what="--model")
    base = load_base(source, device=torch.device("cpu"), dtype=torch.float32)
    roles = Roles(base)
    roles.add("policy", adapter_of(base, source, trainable=False))
    words = AutoTokenizer.from_pretrained(found.ppo)
    prompts = [torch.tensor(words(row["prompt"]).input_ids) for row in lines_of(found.prompts)[:count]]
    with roles.use("policy"):
        keys = [(3, "evaluate", i) for i in range(count)]
        return list(zip(prompts, generate(base, prompts, keys, (2,), Sampling(0.8, 6)), strict=True))


def sequence_kl(models: list, prompt: torch.Tensor, response: torch.Tensor, temperature: float) -> float:
    ids = torch.cat([prompt, response])[None]
    sums = []
    for model in models:
        with torch.no_grad():
            logprobs = (model(input_ids=ids).logits[0].double() / temperature).log_softmax(-1)
        places = range(len(prompt), len(prompt) + len(response))
        sums.append(sum(float(logprobs[place - 1, ids[0, place]]) for place in places))
    return sums[0] - sums[1]


@pytest.mark.full
def test_kl_is_measured_from_where_it_is_said(chain):
    found = chain()
    line = ("evaluate", "--dataset", found.prompts, "--limit-rows", 8, *SHORT)
    to_parent = result(*line, "--model", found.ppo)["policy"]["kl"]
    to_base = result(*line, "--model", found.ppo, "--reference", found.base)["policy"]["kl"]
    assert to_parent != 0 != to_base and to_parent != to_base
    assert result(*line, "--model", found.ppo, "--reference", found.ppo)["policy"]["kl"] == 0.0
    assert result(*line, "--model", found.base)["policy"]["kl"] == 0.0  # a base is its own reference
    assert result(*line, "--model", found.sft, "--reference", found.base)["policy"]["kl"] == pytest.approx(
        result(*line, "--model", found.sft)["policy"]["kl"]
    )


def test_without_the_parent_there_is_no_kl_and_a_warning(chain, tmp_path):
    """A policy whose parent was deleted is still measured."""
    found = chain()
    line = ("sft", "--model", found.sft, "--dataset", found.demonstrations, "--output", tmp_path / "x")
    done(*line, "--max-steps", 1, "--batch-size", 4)
    manifest = json.loads((tmp_path / "x" / "checkpoint.json").read_text())
    manifest["parents"][0] |= {"path": str(tmp_path / "gone"), "relative": "../gone"}
    (tmp_path / "x" / "checkpoint.json").write_text(json.dumps(manifest))
    ended = done("evaluate", "--model", tmp_path / "x", "--dataset", found.prompts, "--limit-rows", 4, *SHORT, "--json")
    assert "kl" not in ended.json["policy"] and ended.json["policy"]["length"] > 0
    assert (
        "warning: KL is not measured: its sft checkpoint is not at " in ended.stderr and "--reference" in ended.stderr
    )


def test_both_answer_with_the_same_noise(chain):
    """A checkpoint against itself: every response the same, every comparison a tie."""
    found = chain()
    line = ("evaluate", "--model", found.ppo, "--against", found.ppo, "--reward", found.reward, *SHORT)
    same = result(*line, "--dataset", found.prompts, "--limit-rows", 12)
    assert all(row["response"] == row["against"] for row in same["examples"])
    assert same["win_rate"]["reward"]["rate"] == 0.5 and same["policy"] == same["against"]


def test_the_policy_is_asked_as_it_was_trained(chain, letters, tmp_path):
    """Temperature and length come from the PPO checkpoint, a base takes 1.0; both can be given."""
    found = chain()
    line = ("evaluate", "--dataset", found.prompts, "--limit-rows", 4)
    trained = result(*line, "--model", found.ppo)
    assert trained["temperature"] == 0.7 and trained["policy"]["length"] <= 6
    assert result(*line, "--model", found.base, *SHORT)["temperature"] == 1.0
    given = result(*line, "--model", found.ppo, "--temperature", 0.2, "--max-response-tokens", 3)
    assert given["temperature"] == 0.2 and given["policy"]["length"] <= 3


def test_demonstrations_give_perplexity_and_with_a_reward_answers_too(chain, letters):
    found = chain()
    line = ("evaluate", "--model", found.sft, "--dataset", found.demonstrations, "--limit-rows", 9, *SHORT)
    alone = result(*line)
    assert "policy" not in alone and alone["perplexity"]["rows"] == 9
    assert alone["perplexity"]["perplexity"] == pytest.approx(math.exp(alone["perplexity"]["loss"]))
    both = result(*line, "--reward", f"{letters}:score")
    assert both["perplexity"] == alone["perplexity"] and both["prompts"] == 9 and both["policy"]["score"] >= 0
    completion, whole = alone["perplexity"]["loss"], result(*line, "--mask", "all")["perplexity"]["loss"]
    assert completion != whole


def test_texts_have_no_prompt_to_answer(chain, letters, tmp_path):
    data = write_jsonl(tmp_path / "texts.jsonl", [{"text": "red green"}])
    line = ("evaluate", "--model", chain().sft, "--dataset", data)
    assert result(*line)["perplexity"]["rows"] == 1
    assert "no row has a prompt to answer" in refused(*line, "--reward", f"{letters}:score")


def test_comparisons_serve_as_prompts_where_a_source_scores_answers(chain, letters):
    found = chain()
    line = ("evaluate", "--model", found.sft, "--dataset", found.comparisons, "--limit-rows", 5, *SHORT)
    assert result(*line, "--reward", found.reward)["prompts"] == 5


@pytest.mark.full
def test_several_sources_are_added_up(chain, letters):
    found = chain()
    line = ("evaluate", "--model", found.ppo, "--dataset", found.prompts, "--limit-rows", 6, *SHORT)
    model = result(*line, "--reward", found.reward)["policy"]["score"]
    function = result(*line, "--reward", f"{letters}:score")["policy"]["score"]
    both = result(*line, "--reward", f"{found.reward}=2", "--reward", f"{letters}:score=0.5")["policy"]["score"]
    assert both == pytest.approx(2 * model + 0.5 * function, abs=1e-5)


def test_ratings_and_ranked_lists_are_comparisons_too(chain, tmp_path):
    ranked = [{"prompt": "red", "responses": ["one", "two", "six"], "ranks": [1, 2, 3]}]
    rated = [{"prompt": "red", "response": word, "rating": k} for k, word in enumerate(("six", "two", "one"))]
    reports = [
        result("evaluate", "--model", chain().reward, "--dataset", write_jsonl(tmp_path / f"{i}.jsonl", rows))[
            "reward_model"
        ]
        for i, rows in enumerate((ranked, rated))
    ]
    assert reports[0]["pairs"] == reports[1]["pairs"] == 3
    assert reports[0]["accuracy"] == reports[1]["accuracy"]
    assert reports[0]["log_loss"] == pytest.approx(reports[1]["log_loss"], abs=1e-6)


def test_a_dry_run_checks_the_rows_and_measures_nothing(chain, tmp_path):
    found = chain()
    line = ("evaluate", "--model", found.ppo, "--dataset", found.prompts, "--output", tmp_path / "x.json", "--dry-run")
    assert result(*line)["plan"] == {"prompts": 64} and not (tmp_path / "x.json").exists()
    assert "2 fit beside the response" in refused(*line, "--max-prompt-tokens", 2)


@pytest.mark.full
def test_a_report_may_be_written_again_and_nothing_else_changes(chain, tmp_path):
    found = chain()
    before = contents(found.folder)
    line = ("evaluate", "--model", found.ppo, "--dataset", found.prompts, "--limit-rows", 4, "--output")
    done(*line, tmp_path / "new" / "x.json")
    first = (tmp_path / "new" / "x.json").read_text()
    done(*line, tmp_path / "new" / "x.json")
    assert (tmp_path / "new" / "x.json").read_text() == first and contents(found.folder) == before


@pytest.mark.full
def test_tables_have_short_headings_and_readable_prompts(chain):
    found = chain(chat=True)
    line = ("evaluate", "--model", found.ppo, "--against", found.sft, "--reward", found.reward, *SHORT)
    ended = rlhf(*line, "--dataset", found.prompts, "--limit-rows", 4)
    heading = next(line for line in ended.stdout.splitlines() if line.startswith("measure"))
    assert heading.split() == ["measure", "sft", "ppo"]
    assert "user: red six" in ended.stdout and "{'role'" not in ended.stdout
    assert ended.stdout.splitlines()[-1] == f"next: rlhf export --model {found.ppo} --output DIR"


def test_no_examples_are_no_table(chain):
    line = ("evaluate", "--model", chain().sft, "--dataset", chain().prompts, "--limit-rows", 2, *SHORT)
    assert "same prompts" not in done(*line, "--examples", 0).stdout


def test_rows_of_one_prompt_count_together_in_a_win_rate():
    """Four prompts asked five times each, all won or all lost: worth fewer than four; one prompt alone: its rows."""
    mine, other = torch.tensor([1.0] * 15 + [0.0] * 5), torch.full((20,), 0.5)
    apart = win_rate(mine, other, prompt_rows([torch.tensor([n]) for n in range(20)]))
    again = win_rate(mine, other, prompt_rows([torch.tensor([n // 5]) for n in range(20)]))
    alone = win_rate(mine, other, prompt_rows([torch.tensor([1])] * 20))
    assert (apart["low"], apart["high"]) == wilson_interval(15, 20) and apart == alone
    assert again["rate"] == apart["rate"] == 0.75 and again["n"] == 20
    worth = 3 * (1.96 / 3.182) ** 2  # (4 - 1) x (z / t of 3 degrees)^2
    assert (again["low"], again["high"]) == pytest.approx(wilson_interval(0.75 * worth, worth), abs=2e-3)


def test_a_checkpoint_that_computes_no_numbers_is_named(chain, tmp_path, monkeypatch):
    """Of several in one table it is the one that is named, not the first."""
    real = evaluate.measure
    calls = []

    def second_fails(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise NotFiniteError("sampling gives log-probabilities that are not finite", where="another")
        return real(*arguments)

    monkeypatch.setattr(evaluate, "measure", second_fails)
    found = chain()
    line = ("--model", found.base, "--reference", found.base, "--also", found.sft, "--reward", found.reward)
    said = refused("evaluate", *line, "--dataset", found.prompts, "--limit-rows", 2, "--max-response-tokens", 4)
    assert f"{found.sft}: sampling gives log-probabilities that are not finite" in said
