"""`rlhf reward`: it learns a planted preference from any kind of judgement, and its report says what is true."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch

from tests.commands import (
    WORDS,
    assert_same_weights,
    comparisons,
    contents,
    done,
    lines_of,
    manifest,
    refused,
    result,
    soft_comparisons,
    weights,
)
from tests.marks import full
from tests.tiny import write_jsonl

SHORT = ("--max-steps", 2, "--batch-size", 4, "--lora-rank", 2, "--eval-fraction", 0)
LEARN = ("--max-steps", 24, "--batch-size", 16, "--lora-rank", 8, "--learning-rate", "5e-3", "--eval-fraction", 0.3)


def reward(chain, dataset: Path, output: Path, *more: object, chat: bool = False) -> dict:
    return result("reward", "--model", chain(chat=chat).base, "--dataset", dataset, "--output", output, *more)


@pytest.fixture(scope="module")
def learned(chain, tmp_path_factory):
    """A reward model that has learned to prefer thanks, and what its command said."""
    folder = tmp_path_factory.mktemp("learned") / "reward"
    return folder, reward(chain, chain().comparisons, folder, *LEARN, "--eval-every", 12)


@pytest.fixture(scope="module")
def score(chain, learned, tmp_path_factory):
    """Scores of texts by the exported model: transformers alone, plus the bias that config.json carries."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = tmp_path_factory.mktemp("exported") / "x"
    done("export", "--model", learned[0], "--output", folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    words = AutoTokenizer.from_pretrained(folder)

    def get(text: str) -> float:
        ids = words(text).input_ids + [words.eos_token_id]
        with torch.no_grad():
            return float(model(input_ids=torch.tensor([ids])).logits[0, 0]) + model.config.score_bias

    return get


# --- learning


def test_it_learns_a_planted_preference(learned):
    metrics = learned[1]["metrics"]
    assert metrics["eval_pairs"] > 40
    assert metrics["accuracy"] > 0.95 and metrics["eval_accuracy"] == metrics["accuracy"]
    assert metrics["eval_accuracy_before"] < 0.8 and metrics["longer_wins_accuracy"] < 0.75
    assert metrics["log_loss"] < 0.2 < metrics["eval_log_loss_before"]
    assert metrics["score_chosen_mean"] > metrics["score_rejected_mean"] + 2
    lines = lines_of(learned[0] / "metrics.jsonl")
    assert sum(line["accuracy"] for line in lines[-5:]) / 5 > 0.95
    assert all(
        line["margin"] == pytest.approx(line["score_chosen"] - line["score_rejected"], abs=1e-4) for line in lines[1:]
    )


@pytest.mark.full
def test_soft_labels_below_a_half_are_learned_and_judged_as_what_they_say(chain, tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", soft_comparisons())
    found = reward(chain, data, tmp_path / "x", *LEARN)
    report = found["report"]
    assert report["accuracy"] > 0.95 and report["agreement_ceiling"] == pytest.approx(0.95)
    assert report["expected_accuracy"] <= report["agreement_ceiling"] + 1e-12
    assert report["verdict"]["decision"] != "no-go", report["verdict"]
    assert report["score_chosen_mean"] > report["score_rejected_mean"] + 1
    assert report["baselines"]["majority"]["accuracy"] > 0.9  # it counts wins the same way
    last = lines_of(tmp_path / "x" / "metrics.jsonl")[-3:]
    assert all(line["accuracy"] > 0.9 and line["margin"] > 0 for line in last)
    again = result("evaluate", "--model", tmp_path / "x", "--dataset", data)["reward_model"]
    assert again["accuracy"] > 0.95 and again["pairs"] == 256


def test_the_first_loss_of_a_random_head_is_that_of_its_margins(learned):
    """Check 43 in its bounds: with margins near 0 the loss is near ln 2."""
    first = lines_of(learned[0] / "metrics.jsonl")[1]
    assert abs(first["loss"] - math.log(2)) < 0.5


@pytest.mark.full
def test_demonstrations_score_zero_on_average(learned, score):
    """Check 45: the chosen responses that were trained on, as transformers scores them."""
    assert learned[1]["report"]["demonstrations_mean"] == pytest.approx(0, abs=1e-4)
    chosen = [score(row["prompt"] + row["chosen"]) for row in comparisons()]
    spread = learned[1]["report"]["demonstrations_std"]
    assert abs(sum(chosen) / len(chosen)) < 0.2 * max(spread, 1)


@pytest.mark.full
def test_the_mean_of_given_demonstrations_becomes_zero(chain, learned, tmp_path):
    rows = [{"prompt": "red one", "completion": f" {word}"} for word in ("two", "three", "cat sat")]
    data = write_jsonl(tmp_path / "demonstrations.jsonl", rows)
    found = reward(chain, chain().comparisons, tmp_path / "x", *LEARN, "--demonstrations", data)
    assert found["report"]["demonstrations_mean"] == pytest.approx(0, abs=1e-4)
    assert found["metrics"]["score_chosen_mean"] > 2  # the demonstrations are curt: thanks score above them
    assert found["report"]["accuracy"] == learned[1]["report"]["accuracy"]  # a shift changes no comparison


def test_report_json_is_what_scores_by_transformers_give(chain, learned, score, tmp_path):
    """`rlhf evaluate` on any comparisons: every number made again from scores and lengths."""
    rows = comparisons()[::5]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    found = result("evaluate", "--model", learned[0], "--dataset", data)["reward_model"]
    chosen, rejected = ([score(row["prompt"] + row[key]) for row in rows] for key in ("chosen", "rejected"))
    margins = [a - b for a, b in zip(chosen, rejected, strict=True)]
    n = len(rows)
    right = sum(m > 0 for m in margins) / n
    assert found["pairs"] == n == 52 and found["accuracy"] == pytest.approx(right)
    z = 1.959964  # 95 %
    centre, spread = (right + z * z / (2 * n)), z * math.sqrt(right * (1 - right) / n + z * z / (4 * n * n))
    assert found["accuracy_low"] == pytest.approx((centre - spread) / (1 + z * z / n), abs=1e-5)
    assert found["accuracy_high"] == pytest.approx(min(1, (centre + spread) / (1 + z * z / n)), abs=1e-5)
    assert found["log_loss"] == pytest.approx(sum(math.log1p(math.exp(-m)) for m in margins) / n, abs=1e-4)
    assert found["margin_mean"] == pytest.approx(sum(margins) / n, abs=1e-4)
    assert found["score_chosen_mean"] == pytest.approx(sum(chosen) / n, abs=1e-4)
    assert found["score_rejected_mean"] == pytest.approx(sum(rejected) / n, abs=1e-4)
    assert sum(part["count"] for part in found["calibration"]) == n
    assert sum(part["count"] for part in found["by_length_difference"]) == n
    sure = [abs(m) for m in margins if 1 / (1 + math.exp(-abs(m))) >= 0.9]
    assert found["calibration"][-1]["low"] == pytest.approx(0.9) and found["calibration"][-1]["count"] == len(sure)


@pytest.mark.full
def test_the_report_beside_the_checkpoint_is_evaluates_on_the_held_out_rows(chain, tmp_path):
    held = write_jsonl(tmp_path / "held.jsonl", comparisons()[:30])
    found = reward(chain, chain().comparisons, tmp_path / "x", *SHORT, "--eval-dataset", held)
    again = result("evaluate", "--model", tmp_path / "x", "--dataset", held)["reward_model"]
    report = json.loads((tmp_path / "x" / "report.json").read_text())
    more = {"demonstrations_mean", "demonstrations_std", "baselines", "samples", "verdict"}
    assert report == found["report"] and report.keys() - again.keys() == more
    for name, value in again.items():
        assert report[name] == (pytest.approx(value, abs=1e-6) if isinstance(value, float) else value)


@pytest.mark.full
def test_the_interval_counts_the_pairs_of_a_prompt_together(chain, learned, tmp_path):
    """Ranked lists, and their pairs as rows in another order: one interval, and not that of as many prompts."""
    texts = [" thank you", " two thank you", " cat sat", " on", " red"]
    ranked = [{"prompt": f"{a} two", "responses": texts, "ranks": [3, 1, 4, 2, 5]} for a in WORDS[:8]]
    pairs = [
        {"prompt": row["prompt"], "chosen": texts[i], "rejected": texts[j]}
        for i, j in itertools.permutations(range(5), 2)
        for row in ranked
        if row["ranks"][i] < row["ranks"][j]
    ]
    found = []
    for name, rows in (("ranked", ranked), ("pairs", pairs)):
        data = write_jsonl(tmp_path / f"{name}.jsonl", rows)
        found.append(result("evaluate", "--model", learned[0], "--dataset", data)["reward_model"])
    names = ("pairs", "clusters", "accuracy", "accuracy_low", "accuracy_high", "effective_pairs")
    assert [found[0][name] for name in names] == pytest.approx([found[1][name] for name in names])
    assert (found[0]["pairs"], found[0]["clusters"]) == (80, 8) and found[0]["effective_pairs"] < 80
    table = done("evaluate", "--model", learned[0], "--dataset", data).stdout
    assert "80 of 8 prompts" in table


def test_the_critic_of_ppo_begins_as_the_reward_model(chain, learned, tmp_path):
    """Check 45: with a learning rate of nothing the critic's files are the reward model's."""
    flags = ("--max-steps", 1, "--batch-size", 4, "--max-response-tokens", 3, "--learning-rate", "1e-30")
    line = ("ppo", "--model", chain().base, "--reward", learned[0], "--dataset", chain().prompts)
    done(*line, "--output", tmp_path / "x", *flags)
    mine, critic = weights(learned[0]), weights(tmp_path / "x" / "critic")
    assert mine.keys() == critic.keys() and "head.safetensors:bias" in mine
    assert all(torch.allclose(mine[name], critic[name], atol=1e-20) for name in mine)


# --- the same result


@pytest.mark.full
@pytest.mark.parametrize("size", ["auto", 4])
def test_the_micro_batch_size_does_not_matter(chain, tmp_path, size):
    """Check 24: comparisons of uneven length and number, cut in other ways."""
    ranked = [{"prompt": "red", "responses": ["one", "two two", "cat sat"], "ranks": [3, 1, 2]}] * 2
    pairs = [{"prompt": r["prompt"], "responses": [r["chosen"], r["rejected"]], "ranks": [1, 2]} for r in comparisons()]
    data = write_jsonl(tmp_path / "rows.jsonl", [*ranked, *pairs[:10]])
    for name, cut in (("one", 1), ("other", size)):
        reward(chain, data, tmp_path / name, *SHORT, "--batch-size", 8, "--micro-batch-size", cut)
    assert_same_weights(tmp_path / "one", tmp_path / "other", within=1e-5)


@pytest.mark.full
def test_the_same_seed_gives_the_same_weights_and_another_one_others(chain, tmp_path):
    """Check 54; head and adapter both depend on the seed."""
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        reward(chain, chain().comparisons, tmp_path / name, *SHORT, "--seed", seed)
    assert_same_weights(tmp_path / "a", tmp_path / "b")
    one, other = contents(tmp_path / "a"), contents(tmp_path / "c")
    assert one["adapter_model.safetensors"] != other["adapter_model.safetensors"]
    assert one["head.safetensors"] != other["head.safetensors"]


@pytest.mark.full
def test_training_goes_on_from_a_reward_model(chain, learned, tmp_path):
    flags = ("--max-steps", 1, "--batch-size", 4, "--eval-fraction", 0.3, "--learning-rate", "1e-6")
    line = ("reward", "--model", learned[0], "--dataset", chain().comparisons, "--output", tmp_path / "x", *flags)
    metrics = result(*line)["metrics"]
    assert metrics["eval_accuracy_before"] == learned[1]["metrics"]["accuracy"]
    assert manifest(tmp_path / "x")["parents"][0]["stage"] == "reward"


# --- what a judgement may look like

PAIR = {"prompt": "red one", "chosen": " thank you", "rejected": " two"}
LIKE = {  # each says that to "red one" the response " thank you" is better than " two"
    "ranked list": [{"prompt": "red one", "responses": [" two", " thank you"], "ranks": [2, 1]}],
    "ratings": [
        {"prompt": "red one", "response": " two", "rating": 2},
        {"prompt": "red one", "response": " thank you", "rating": 4, "annotator": "x"},
    ],
    "ratings as text": [
        {"prompt": "red one", "response": " thank you", "rating": "4"},
        {"prompt": "red one", "response": " two", "rating": "2"},
    ],
    "other columns": [PAIR | {"source": "x"}],
    "soft label of one": [PAIR | {"probability": 1.0}],
    "an unused margin": [PAIR | {"margin": 2.0}],
}


@pytest.mark.full
@pytest.mark.parametrize("kind", LIKE)
def test_every_kind_of_judgement_trains_the_same_model(chain, tmp_path, kind):
    found = []
    for name, rows in (("a", [PAIR]), ("b", LIKE[kind])):
        data = write_jsonl(tmp_path / f"{name}.jsonl", rows)
        found.append(reward(chain, data, tmp_path / name, *SHORT, "--learning-rate", "1e-2")["metrics"]["train_loss"])
    assert found[0] == pytest.approx(found[1], abs=1e-6)
    if "ratings" not in kind and kind != "ranked list":  # those list the responses in another order
        assert_same_weights(tmp_path / "a", tmp_path / "b")


@pytest.mark.full
def test_hh_rows_share_their_prompt(chain, tmp_path):
    start = "\n\nHuman: what is the time?\n\nAssistant:"
    hh = {"chosen": f"{start} it is noon", "rejected": f"{start} no"}
    plain = {"prompt": start, "chosen": " it is noon", "rejected": " no"}
    for name, row in (("a", plain), ("b", hh)):
        reward(chain, write_jsonl(tmp_path / f"{name}.jsonl", [row] * 4), tmp_path / name, *SHORT)
    assert_same_weights(tmp_path / "a", tmp_path / "b")


@pytest.mark.full
def test_conversations_may_repeat_the_prompt_or_not(chain, tmp_path):
    ask, good, bad = (
        [{"role": r, "content": t}] for r, t in (("user", "red"), ("assistant", "two"), ("assistant", "x"))
    )
    rows = {
        "apart": {"prompt": ask, "chosen": good, "rejected": bad},
        "whole": {"prompt": ask, "chosen": ask + good, "rejected": ask + bad},
        "alone": {"chosen": ask + good, "rejected": ask + bad},
        "texts": {"prompt": ask, "chosen": "two", "rejected": "x"},
    }
    for name, row in rows.items():
        reward(chain, write_jsonl(tmp_path / f"{name}.jsonl", [row] * 4), tmp_path / name, *SHORT, chat=True)
        assert_same_weights(tmp_path / "apart", tmp_path / name)


# --- the loss, from the scores of the first step


def first_step(chain, rows: list[dict], place: Path, *flags: object) -> dict:
    more = ("--max-steps", 1, "--batch-size", len(rows), "--lora-rank", 2, "--eval-fraction", 0, *flags)
    reward(chain, write_jsonl(place / "rows.jsonl", rows), place / "x", *more)
    return lines_of(place / "x" / "metrics.jsonl")[1]


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


@pytest.mark.parametrize(
    ("row", "flags", "loss"),
    [
        *full(({}, (), lambda c, r: softplus(r - c))),
        *full(({"margin": 1.5}, ("--loss-margin",), lambda c, r: softplus(r - c + 1.5))),
        *full(({"margin": 1.5}, (), lambda c, r: softplus(r - c))),
        *full(({"probability": 0.8}, (), lambda c, r: 0.8 * softplus(r - c) + 0.2 * softplus(c - r))),
        # Below a half the metrics call the row's `rejected` the chosen one; the loss is that of the row as it stands.
        *full(({"probability": 0.3}, (), lambda r, c: 0.3 * softplus(r - c) + 0.7 * softplus(c - r))),
        (
            {"probability": 0.3, "margin": 1.5},
            ("--loss-margin",),
            lambda r, c: 0.3 * softplus(r - c + 1.5) + 0.7 * softplus(c - r - 1.5),
        ),
        *full(({}, ("--label-smoothing", 0.1), lambda c, r: 0.9 * softplus(r - c) + 0.1 * softplus(c - r))),
        ({}, ("--centre-coef", 0.5), lambda c, r: softplus(r - c) + 0.5 * (c + r) ** 2),
    ],
    ids=["plain", "margin", "margin not asked", "soft label", "turned", "turned margin", "smoothing", "centring"],
)
def test_the_loss_of_one_comparison(chain, tmp_path, row, flags, loss):
    step = first_step(chain, [PAIR | row], tmp_path, *flags)
    assert step["loss"] == pytest.approx(loss(step["score_chosen"], step["score_rejected"]), abs=1e-5)


@pytest.mark.full
def test_ranked_lists_weigh_one_whatever_their_length(chain, tmp_path):
    """Check 44: all pairs of a prompt, ties left out, each with weight 1 / (number of pairs)."""
    texts = [" two", " thank you", " cat sat", " on"]
    ranked = {"prompt": "red one", "responses": texts, "ranks": [2, 1, 2, 3]}
    step = first_step(chain, [ranked], tmp_path)
    pairs, losses = [(1, 0), (1, 2), (1, 3), (0, 3), (2, 3)], []
    for number, (better, worse) in enumerate(pairs):
        row = {"prompt": "red one", "chosen": texts[better], "rejected": texts[worse]}
        place = tmp_path / str(number)
        place.mkdir()
        losses.append(first_step(chain, [row], place)["loss"])
    assert step["loss"] == pytest.approx(sum(losses) / 5, abs=1e-5)


def test_close_ratings_are_ties_and_raters_can_be_normalised(chain, tmp_path):
    rows = [
        {"prompt": "red", "response": response, "rating": rating, "annotator": who}
        for response, rating, who in [
            (" one", 9, "mild"),
            (" two", 10, "mild"),
            (" one", 5, "harsh"),
            (" two", 1, "harsh"),
        ]
    ]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    line = ("reward", "--model", chain().base, "--dataset", data, "--output", tmp_path / "x", *SHORT, "--dry-run")
    # By the mean " one" (7.0) beats " two" (5.5); as z-scores of each rater both are (-1 + 1) / 2 = 0: a tie.
    assert result(*line, "--rating-threshold", 1.4)["plan"]["rows"] == 1
    tied = "no two responses to the same prompt differ by more than"
    assert f"{tied} 1.5" in refused(*line, "--rating-threshold", 1.5)
    assert f"{tied} 0" in refused(*line, "--normalise-raters")
