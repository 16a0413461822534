"""Several reward sources: how their scores are combined, logged and warned of, in training, evaluation and resuming."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from stages.config import PpoConfig
from stages.errors import ConfigError
from stages.measuring_config import EvaluateConfig, SampleConfig
from stages.recipe import differing, resolve
from stages.results import next_commands
from stages.rollout.charges import warn_of_spreads
from stages.rollout.reward_sources import RewardSources
from stages.rollout.reward_specs import RewardSpec, open_rewards
from tests.commands import SHORT, done, lines_of, result, rlhf
from tests.parts import PLACES, ppo_config, prompt_rows, sequences_of

TEXTS, ENDED = ["aaaa", "b"], torch.tensor([True, False])
SMALL = ("--max-steps", 2, "--batch-size", 8, *SHORT, "--eval-limit", 6, "--lora-rank", 4, "--samples", 6)
LETTERS = """
def many(prompts, responses):
    return [100.0 * sum(letter.isalpha() for letter in response) for response in responses]
def evens(prompts, responses):
    return [float(len(response) % 2) for response in responses]
"""


def function_spec(name: str, values: list[float], weight: float = 1.0) -> RewardSpec:
    return RewardSpec(name, weight, None, lambda prompts, responses: values, "digest")


def scored(how: str, coef: float = 1.0):
    """Scores 4 and 1 times 0.5, 1 and 3, and of `length:4` 3 / 4 (a token ends the response) and 1 / 4."""
    specs = [function_spec("f.py:a", [4.0, 1.0], 0.5), function_spec("f.py:b", [1.0, 3.0])]
    specs += open_rewards(["builtin:length:4"], None)
    sources = RewardSources(specs, SimpleNamespace(), combine=(how, coef))
    responses = [torch.tensor([5, 6, 7, 2]), torch.tensor([5])]
    return sources.score_by_source(prompt_rows(sequences_of([3, 3])), responses, TEXTS, ENDED)


def test_each_source_is_scored_and_all_are_combined():
    found = scored("sum")
    assert found.total.tolist() == pytest.approx([2 + 1 + 0.75, 0.5 + 3 + 0.25])
    assert found.parts == [{"a": 4.0, "b": 1.0, "length": 0.75}, {"a": 1.0, "b": 3.0, "length": 0.25}]
    assert scored("min").total.tolist() == pytest.approx([0.75, 0.25])
    assert scored("mean").total.tolist() == pytest.approx([1.25, 1.25])
    spread = (((2 - 1.25) ** 2 + (1 - 1.25) ** 2 + (0.75 - 1.25) ** 2) / 3) ** 0.5
    assert scored("mean-std", 2.0).total[0].item() == pytest.approx(1.25 - 2 * spread)


def test_one_source_has_no_parts():
    sources = RewardSources([function_spec("f.py:a", [1.0, 2.0])], SimpleNamespace())
    found = sources.score_by_source(prompt_rows(sequences_of([3, 3])), [torch.tensor([2])] * 2, TEXTS, ENDED)
    assert found.by_source == {} and found.parts == [{}, {}]


# --- knobs


@pytest.mark.parametrize("cls", [PpoConfig, EvaluateConfig, SampleConfig])
def test_a_combination_needs_several_sources(cls):
    flags = PLACES | {"reward": ["a.py", "b.py"]} | ({"best_of": "2"} if cls is SampleConfig else {})
    assert resolve(cls, {}, flags | {"reward_combine": "mean-std", "reward_std_coef": "0.5"}).combination == (
        "mean-std",
        0.5,
    )
    with pytest.raises(ConfigError, match="not several reward sources"):
        resolve(cls, {}, flags | {"reward": ["a.py"], "reward_combine": "min"})
    with pytest.raises(ConfigError, match="reward_combine is sum"):
        resolve(cls, {}, flags | {"reward_std_coef": "0.5"})


def test_a_run_from_before_these_knobs_still_resumes():
    config = ppo_config(reward=["a.py", "b.py"])
    old = {name: value for name, value in vars(config).items() if not name.startswith(("reward_c", "reward_s"))}
    assert differing(config, old) == []
    assert differing(replace(config, reward_combine="min"), old) == ["reward_combine"]


def test_the_next_command_has_every_source_its_weight_and_the_combination():
    config = ppo_config(reward=["a b.py=0.5", "runs/rm"], reward_combine="mean-std", reward_std_coef=0.5)
    flags = "--reward 'a b.py=0.5' --reward runs/rm --reward-combine mean-std --reward-std-coef 0.5"
    assert f"{flags} --dataset PROMPTS" in next_commands("ppo", config, {})[0]
    assert "combine" not in next_commands("ppo", ppo_config(reward=["a.py", "b.py"]), {})[0]


# --- scores far from 1


def spread_warnings(specs: list[RewardSpec], metrics: dict[str, float], **knobs: object) -> list[str]:
    told: list[str] = []
    session = SimpleNamespace(config=ppo_config(**knobs), reporter=SimpleNamespace(warn=told.append))
    warn_of_spreads(session, RewardSources(specs, SimpleNamespace()), metrics, 0)
    return told


def test_scores_far_from_1_are_warned_of_with_the_weight_that_helps():
    one = [function_spec("f.py:a", [])]
    (told,) = spread_warnings(one, {"reward_score_std": 99.0})
    assert "--reward f.py:a=0.01" in told and "standard deviation of 99" in told and "--normalise-scores" in told
    assert "--reward f.py:a=100" in spread_warnings(one, {"reward_score_std": 0.01})[0]
    for std in (0.0, 0.05, 1.0, 9.0):
        assert spread_warnings(one, {"reward_score_std": std}) == []
    assert spread_warnings(one, {"reward_score_std": 99.0}, normalise_scores=True) == []
    several = [function_spec("f.py:a", [], 0.1), function_spec("f.py:b", [], 2.0)]
    (told,) = spread_warnings(several, {"reward_score_std": 9.0, "source_a_std": 3.0, "source_b_std": 100.0})
    assert "--reward f.py:b=0.02" in told  # 2 x 100 is 200, nearest power of ten 100


# --- whole commands


@pytest.fixture(scope="module")
def trained(chain, tmp_path_factory):
    """PPO with two functions and their least, and the lines that it printed."""
    place = tmp_path_factory.mktemp("several")
    (place / "letters.py").write_text(LETTERS)
    sources = ("--reward", f"{place}/letters.py:many=0.5", "--reward", f"{place}/letters.py:evens")
    flags = (*sources, "--reward", "builtin:exact=2", "--reward-combine", "mean")
    line = ("ppo", "--model", chain().sft, "--dataset", chain().prompts, "--output", place / "ppo", *SMALL, *flags)
    return place, flags, line, done(*line)


@pytest.mark.full
def test_training_logs_every_source_and_warns_of_a_wide_one(trained):
    place, _, _, ended = trained
    assert "many=0.005" in ended.stderr and "letters.py:many have a standard deviation" in ended.stderr
    first, *updates = lines_of(place / "ppo" / "metrics.jsonl")
    names = ("many", "evens", "exact")
    for line in updates:
        many, evens, exact = (line[f"source_{name}"] for name in names)
        assert line["reward_score"] == pytest.approx((0.5 * many + evens + 2 * exact) / 3, rel=1e-5)
        assert line["source_many_std"] > 10
    many, evens, exact = (first[f"eval_source_{name}"] for name in names)
    assert first["eval_score"] == pytest.approx((0.5 * many + evens + 2 * exact) / 3, rel=1e-5)
    for row in lines_of(place / "ppo" / "samples.jsonl"):
        parts = row["scores"]
        assert row["score"] == pytest.approx((0.5 * parts["many"] + parts["evens"] + 2 * parts["exact"]) / 3, rel=1e-5)


@pytest.mark.full
def test_the_same_flags_mean_the_same_in_evaluate_and_a_finished_run_is_found(trained, chain):
    place, flags, line, _ = trained
    assert "already" in done(*line).stderr + done(*line, "--json").stdout
    report = result(
        "evaluate", "--model", place / "ppo", "--dataset", chain().prompts, *SHORT, *flags, "--limit-rows", 8
    )
    policy = report["policy"]
    parts = [policy[f"source_{name}"] for name in ("many", "evens", "exact")]
    assert policy["score"] == pytest.approx((0.5 * parts[0] + parts[1] + 2 * parts[2]) / 3, rel=1e-5)
    other = rlhf(*line[:-1], "min")
    assert other.code == 2 and "reward_combine" in other.stderr
    assert json.loads((place / "ppo" / "checkpoint.json").read_text())["config"]["reward_combine"] == "mean"
