"""Implicit rewards and reward models on the same comparisons, through `rlhf evaluate`."""

from __future__ import annotations

import json
import math
import statistics

import pytest
import torch

from stages.diagnostics.comparison_evaluation import agreement
from tests.commands import SHORT, done, lines_of, refused, result
from tests.marks import full

LAST = ("--limit-rows", 20)


@pytest.fixture(scope="module")
def dpo(chain, tmp_path_factory):
    """A DPO checkpoint with its states, trained enough to prefer something."""
    place, found = tmp_path_factory.mktemp("dpo") / "dpo", chain()
    line = ("dpo", "--model", found.sft, "--dataset", found.comparisons, "--output", place, "--beta", 0.3)
    small = ("--batch-size", 8, "--lora-rank", 4, "--eval-fraction", "0.2", "--learning-rate", "2e-3")
    done(*line, *small, "--max-steps", 12, "--save-every", 6, "--keep-state")
    return place


def log_ratios(found, policy, temperature: float, tmp_path) -> list[tuple[float, float]]:
    """log policy / SFT of chosen and rejected responses, by transformers on merged weights, end of text included."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for name, place in (("policy", policy), ("reference", found.sft)):
        done("export", "--model", place, "--output", tmp_path / name)
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("policy", "reference")]
    words = AutoTokenizer.from_pretrained(found.sft)
    out = []
    for row in lines_of(found.comparisons)[:20]:
        pair = []
        for key in ("chosen", "rejected"):
            prompt, whole = words(row["prompt"]).input_ids, [*words(row["prompt"] + row[key]).input_ids, 2]
            sums = []
            for model in models:
                with torch.no_grad():
                    lines = (model(input_ids=torch.tensor([whole])).logits[0].double() / temperature).log_softmax(-1)
                sums.append(sum(float(lines[i - 1, whole[i]]) for i in range(len(prompt), len(whole))))
            pair.append(sums[0] - sums[1])
        out.append(tuple(pair))
    return out


@pytest.mark.parametrize("stage", ["ppo", *full("dpo")])
def test_the_implicit_reward_is_beta_times_the_log_ratio(chain, dpo, tmp_path, stage):
    """DPO at temperature 1 with its beta; PPO at its own temperature, 0.7, with its kl_coef, 0.05."""
    found = chain()
    policy, beta, temperature = {"dpo": (dpo, 0.3, 1.0), "ppo": (found.ppo, 0.05, 0.7)}[stage]
    report = result("evaluate", "--model", policy, "--dataset", found.comparisons, *LAST)["implicit_reward"]
    pairs = [(beta * a, beta * b) for a, b in log_ratios(found, policy, temperature, tmp_path)]
    margins = [a - b for a, b in pairs]
    assert report["pairs"] == 20
    assert report["margin_mean"] == pytest.approx(statistics.fmean(margins), abs=1e-5)
    assert report["score_chosen_mean"] == pytest.approx(statistics.fmean(a for a, _ in pairs), abs=1e-5)
    assert report["accuracy"] == sum(m > 0 for m in margins) / 20
    losses = [math.log1p(math.exp(-m)) for m in margins]
    assert report["log_loss"] == pytest.approx(statistics.fmean(losses), abs=1e-5)


@pytest.mark.full
def test_the_report_has_the_keys_of_a_reward_models(chain, dpo):
    line = ("--dataset", chain().comparisons, *LAST)
    implicit = result("evaluate", "--model", dpo, *line)["implicit_reward"]
    assert implicit.keys() == result("evaluate", "--model", chain().reward, *line)["reward_model"].keys()


@pytest.mark.full
def test_dpo_reports_of_itself_what_evaluate_does(chain, dpo):
    """The rows that were held out from it are judged in its own report, all of them here."""
    stored = json.loads((dpo / "report.json").read_text())
    assert stored["accuracy"] > 0.6
    again = result("evaluate", "--model", dpo, "--dataset", chain().comparisons)["implicit_reward"]
    assert again["pairs"] == 256 > stored["pairs"]


@pytest.mark.full
def test_side_by_side_each_is_what_it_is_alone(chain, dpo):
    found = chain()
    line = ("--dataset", found.comparisons, *LAST)
    whole = result("evaluate", "--model", found.reward, "--also", dpo, "--also", found.ppo, *line)
    rows = whole["compared"]
    assert [row["label"] for row in rows] == ["reward", "dpo", "ppo"]
    assert [row["kind"] for row in rows] == ["reward_model", "implicit_reward", "implicit_reward"]
    for row, place in zip(rows, (found.reward, dpo, found.ppo), strict=True):
        alone = result("evaluate", "--model", place, *line)[row["kind"]]
        assert alone.items() <= row.items() and row["model"] == str(place)
    assert rows[0]["agreement"] == 1.0 and whole["reward_model"].items() <= rows[0].items()
    table = done("evaluate", "--model", found.reward, "--also", dpo, *line).stdout
    assert "20 pairs, side by side" in table and "baseline: longer" in table


@pytest.mark.full
def test_a_dpo_runs_states_can_be_compared(chain, dpo):
    line = ("--dataset", chain().comparisons, *LAST)
    rows = result("evaluate", "--model", dpo, "--also", dpo / "state", *line)["compared"]
    assert [row["label"] for row in rows] == ["dpo", "dpo step 6", "dpo step 12"]
    assert rows[2]["margin_mean"] == rows[0]["margin_mean"] != rows[1]["margin_mean"] and rows[2]["agreement"] == 1.0


def test_another_reference_can_be_given(chain, dpo):
    line = ("evaluate", "--dataset", chain().comparisons, *LAST, "--model", dpo)
    itself = result(*line, "--reference", dpo)["implicit_reward"]
    assert itself["margin_mean"] == 0.0 and itself["accuracy"] == 0.5


def test_agreement_by_hand():
    """Agree, disagree, one undecided, both undecided: (1 + 0 + 1/2 + 1/2) / 4."""
    assert agreement(torch.tensor([1.0, 2.0, 0.0, 0.0]), torch.tensor([3.0, -0.1, 5.0, 0.0])) == 0.5


def test_comparisons_are_answered_where_a_score_is_given(chain, dpo):
    found = chain()
    line = ("evaluate", "--model", dpo, "--dataset", found.comparisons, "--limit-rows", 3, *SHORT)
    assert result(*line, "--reward", found.reward)["prompts"] == 3


@pytest.mark.parametrize(
    ("model", "more", "words"),
    [
        ("sft", (), ["holds comparisons", "is neither a reward model nor a DPO or PPO policy"]),
        ("base", (), ["holds comparisons", "is neither a reward model nor a DPO or PPO policy"]),
        ("reward", ("--also", "sft"), ["--also: ", "`sft` checkpoint", "no score of its own", "--reward"]),
        ("reward", ("--also", "base"), ["--also: ", "is a base model", "no score of its own"]),
        ("reward", ("--best-of", "2", "--reward", "reward"), ["--best-of: ", "nothing is sampled"]),
        ("reward", ("--against", "sft", "--reward", "reward"), ["--against: ", "nothing is sampled"]),
        ("dpo", ("--also", "reward", "--plot", "x.svg", "--gold", "reward"), ["is a `reward` checkpoint", "no policy"]),
    ],
)
def test_mixtures_that_make_no_sense(chain, dpo, model, more, words):
    found = chain()
    places = {"sft": found.sft, "base": found.base, "reward": found.reward, "dpo": dpo}
    line = ("evaluate", "--model", places[model], "--dataset", found.comparisons)
    said = refused(*line, *(places.get(m, m) for m in more))
    assert all(word in said for word in words), said


@pytest.mark.full
def test_a_policy_trained_without_kl_implies_no_reward(chain, tmp_path):
    (tmp_path / "f.py").write_text("def score(prompts, responses):\n    return [0.0 for _ in responses]\n")
    line = ("ppo", "--model", chain().sft, "--reward", tmp_path / "f.py", "--dataset", chain().prompts)
    small = ("--max-steps", 1, "--batch-size", 4, "--limit-rows", 8, "--kl-coef", 0, *SHORT)
    done(*line, "--output", tmp_path / "x", *small)
    said = refused("evaluate", "--model", tmp_path / "x", "--dataset", chain().comparisons)
    assert "kl_coef 0" in said and "no implicit reward" in said
