"""From scores to advantages, by hand: two prompts with two responses each, of one or two tokens."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from stages.config import PpoConfig
from stages.maths.tensors import identity
from stages.rollout.estimate import estimate_advantages
from stages.rollout.experience import Experience

MASK = torch.tensor([[True, True], [True, False], [True, True], [True, False]])
SCORE = torch.tensor([1.0, 3.0, 2.0, 2.0])
GROUPS = torch.tensor([0, 0, 1, 1])
CONFIG = PpoConfig(model="m", dataset="d", output="o", reward=["r"], responses_per_prompt=2, gae_lambda=1.0)


def experience() -> Experience:
    logprobs = torch.tensor([[-1.0, -1.0], [-1.0, 9.0], [-2.0, -1.0], [-1.0, 9.0]])
    reference = torch.tensor([[-1.5, -1.0], [-1.0, 7.0], [-1.0, -1.0], [-2.0, 7.0]])
    values = torch.tensor([[0.5, 0.25], [1.0, 9.0], [0.0, 0.0], [0.0, 9.0]])
    return Experience(None, MASK, logprobs, reference, values, SCORE, torch.zeros(4, 2))


def advantages(advantage: str, **knobs: object) -> tuple[list, list]:
    config = dataclasses.replace(CONFIG, advantage=advantage, whiten_advantages=False, **knobs)
    found, returns = estimate_advantages(config, experience(), SCORE, 0.1, GROUPS, identity)
    return [[round(x, 5) for x in row] for row in found.tolist()], returns.tolist()


def test_gae_at_lambda_1_is_what_is_still_to_come_minus_the_value():
    # k1 is 0.5, 0 | 0 | -1, 0 | 1, charged at 0.1
    found, returns = advantages("gae")
    assert found == [[0.45, 0.75], [2.0, 0.0], [2.1, 2.0], [1.9, 0.0]]
    assert torch.allclose(torch.tensor(returns), torch.tensor([[0.95, 1.0], [3.0, 0.0], [2.1, 2.0], [1.9, 0.0]]))


def test_the_critic_may_have_a_lambda_of_its_own():
    found, returns = advantages("gae", gae_lambda=0.0, critic_lambda=1.0)
    assert found[0] == [round(-0.05 + 0.25 - 0.5, 5), 0.75]  # one step ahead
    assert torch.allclose(torch.tensor(returns[0]), torch.tensor([0.95, 1.0]))  # all the way


def test_rloo_compares_with_the_others_after_the_kl_is_paid():
    found, returns = advantages("rloo")  # paid: 0.95 and 3 | 2.1 and 1.9
    assert found == [[-2.05, -2.05], [2.05, 0.0], [0.2, 0.2], [-0.2, 0.0]]
    assert returns == [[0.0, 0.0]] * 4


def test_grpo_takes_scores_alone_and_scales_them_by_their_group():
    found, _ = advantages("grpo")  # 1 and 3: spread sqrt 2; 2 and 2: none
    unit = round(1 / (2**0.5 + 1e-4), 5)
    assert found == [[-unit, -unit], [unit, 0.0], [0.0, 0.0], [0.0, 0.0]]


def test_reinforce_pp_is_what_is_still_to_come():
    found, _ = advantages("reinforce++")
    assert found == [[0.95, 1.0], [3.0, 0.0], [2.1, 2.0], [1.9, 0.0]]


def test_reinforce_pp_baseline_takes_off_the_group_mean():
    found, _ = advantages("reinforce++-baseline")
    assert found == [[-1.0, -1.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize(
    ("advantage", "whitened"), [("gae", True), ("reinforce++", True), ("rloo", False), ("grpo", False)]
)
def test_only_estimators_that_ask_for_it_are_whitened(advantage, whitened):
    config = dataclasses.replace(CONFIG, advantage=advantage)
    found, _ = estimate_advantages(config, experience(), SCORE, 0.1, GROUPS, identity)
    inside = found[MASK]
    assert (abs(float(inside.mean())) < 1e-6 and abs(float(inside.var(unbiased=False)) - 1) < 1e-5) == whitened


def test_the_kl_is_charged_in_one_place_only():
    in_reward, _ = advantages("rloo")
    as_loss, _ = advantages("rloo", kl_placement="loss")
    assert as_loss == [[-2.0, -2.0], [2.0, 0.0], [0.0, 0.0], [0.0, 0.0]] and as_loss != in_reward


@pytest.mark.parametrize(
    ("advantage", "place", "kind"),
    [
        ("gae", "reward", "k1"),
        ("rloo", "reward", "k1"),
        ("reinforce++", "reward", "k1"),
        ("grpo", "loss", "k3"),
        ("reinforce++-baseline", "loss", "k2"),
    ],
)
def test_each_estimator_charges_the_kl_as_its_authors_do(advantage, place, kind):
    config = dataclasses.replace(CONFIG, advantage=advantage)
    assert (config.kl_place, config.kl_kind, config.kl_is_biased) == (place, kind, False)
