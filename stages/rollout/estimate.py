"""From scores to advantages: what every token of a rollout is worth, by the estimator that was chosen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stages.config import PpoConfig
from stages.maths.advantages import broadcast, gae, group_relative, reinforce_pp, reinforce_pp_baseline, rloo
from stages.maths.kl import k1, k2, k3
from stages.maths.rewards import shape_rewards
from stages.maths.tensors import Reduce, scale_to_unit_variance, sequence_sum, whiten
from stages.rollout.experience import Experience

ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}
WHITENED = ("gae", "reinforce++", "reinforce++-baseline")


@dataclass(frozen=True)
class Estimate:
    """What the policy and the critic learn from a rollout."""

    advantages: Tensor  # (B, T)
    returns: Tensor  # (B, T) the critic's targets; zeros without a critic


def estimate(
    config: PpoConfig, experience: Experience, score: Tensor, kl_coef: float, groups: Tensor, reduce: Reduce
) -> Estimate:
    """Advantages and returns of a rollout; `score` (B,) as charged, `groups` (B,) the number of each one's prompt."""
    mask = experience.mask
    charged = kl_coef if config.kl_place == "reward" else 0.0
    kl = ESTIMATORS[config.kl_kind](experience.logprobs, experience.reference_logprobs)
    rewards = shape_rewards(score, kl, mask, charged)
    if config.whiten_rewards:
        rewards = scale_to_unit_variance(rewards, mask, reduce)
    advantages, returns = _advantages(config, rewards, experience, groups)
    if config.whiten_advantages and config.advantage in WHITENED:
        advantages = whiten(advantages, mask, reduce)
    return Estimate(advantages, returns)


def _advantages(config: PpoConfig, rewards: Tensor, experience: Experience, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Advantages and returns (B, T) from token rewards, before whitening."""
    mask, values = experience.mask, experience.values
    if config.advantage == "gae":
        advantages, returns = gae(rewards, values, mask, config.gamma, config.gae_lambda)
        if config.critic_lambda is not None:
            _, returns = gae(rewards, values, mask, config.gamma, config.critic_lambda)
        return advantages, returns
    nothing = torch.zeros_like(rewards)
    if config.advantage == "reinforce++":
        return reinforce_pp(rewards, mask, config.gamma), nothing
    of_group = {"rloo": rloo, "grpo": group_relative, "reinforce++-baseline": reinforce_pp_baseline}
    return broadcast(of_group[config.advantage](sequence_sum(rewards, mask), groups), mask), nothing
