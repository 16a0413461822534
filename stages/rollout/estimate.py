"""From scores to the advantages and returns of every token, by the configured estimator."""

from __future__ import annotations

import torch
from torch import Tensor

from stages.config import PpoConfig
from stages.maths.advantages import broadcast, gae, group_centred, group_relative, reinforce_pp, rloo
from stages.maths.kl import ESTIMATORS
from stages.maths.rewards import shape_rewards
from stages.maths.tensors import Reduce, scale_to_unit_variance, sequence_sum, whiten
from stages.rollout.experience import Experience

WHITENED = ("gae", "reinforce++", "reinforce++-baseline")


def estimate_advantages(
    config: PpoConfig, experience: Experience, score: Tensor, kl_coef: float, groups: Tensor, reduce: Reduce
) -> tuple[Tensor, Tensor]:
    """Advantages and returns (B, T) of a rollout; returns are zero without a critic.

    `score` (B,) after `charge_scores`; `groups` (B,) is the number of each response's prompt; `reduce` sums over ranks.
    """
    mask = experience.mask
    kl = ESTIMATORS[config.kl_kind](experience.logprobs, experience.reference_logprobs)
    rewards = shape_rewards(score, kl, mask, kl_coef if config.kl_place == "reward" else 0.0)
    if config.whiten_rewards:
        rewards = scale_to_unit_variance(rewards, mask, reduce)
    advantages, returns = _advantages(config, rewards, experience, groups)
    if config.whiten_advantages and config.advantage in WHITENED:
        advantages = whiten(advantages, mask, reduce)
    return advantages, returns


def _advantages(config: PpoConfig, rewards: Tensor, experience: Experience, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Advantages and returns (B, T) from token rewards, before whitening."""
    mask, values = experience.mask, experience.values
    if config.advantage == "gae":
        advantages, returns = gae(rewards, values, mask, config.gamma, config.gae_lambda)
        if config.critic_lambda not in (None, config.gae_lambda):
            _, returns = gae(rewards, values, mask, config.gamma, config.critic_lambda)
        return advantages, returns
    no_returns = torch.zeros_like(rewards)
    if config.advantage == "reinforce++":
        return reinforce_pp(rewards, mask, config.gamma), no_returns
    estimators = {"rloo": rloo, "grpo": group_relative, "reinforce++-baseline": group_centred}
    return broadcast(estimators[config.advantage](sequence_sum(rewards, mask), groups), mask), no_returns
