"""Advantage estimation: with a critic, and without one from several responses to the same prompt.

`group` (B,) int64 says which responses answer the same prompt: they share an id, any number, unique on their rank. All
responses to a prompt are on one rank; groups may differ in size. In a group of one, or whose scores are all equal,
there is nothing to learn: the advantages are exactly 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stages.maths.tensors import Reduce, at_least_fp32, identity


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and the returns they imply.

    All (B, T); `values[:, t]` judges the state before token t. Beyond the last masked token the value is 0: a
    truncated response ends there like any other. Returns advantages, not whitened, and returns = advantages + values;
    both are 0 off-mask.

    Source: Schulman et al. 2016, "High-Dimensional Continuous Control Using Generalized Advantage Estimation", eq. 16.
    """
    values = values.masked_fill(~mask, 0)  # so that nothing follows the last token
    columns = []
    next_value = next_advantage = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = (delta + gamma * gae_lambda * next_advantage).masked_fill(~mask[:, t], 0)
        next_value = values[:, t]
        columns.append(next_advantage)
    advantages = torch.stack(columns[::-1], dim=1)
    return advantages, advantages + values


def rloo(returns: Tensor, group: Tensor) -> Tensor:
    """Each of `returns` (B,) minus the mean of the others of its group: (B,).

    Source: Ahmadian et al. 2024, "Back to Basics", where a return is score - kl_coef * sequence KL.
    """
    deviation, size, _ = _deviations(returns, group)
    # S_i - mean of the others = n / (n - 1) (S_i - mean of all).
    return deviation * size / (size - 1).clamp(min=1)


def group_relative(score: Tensor, group: Tensor, eps: float = 1e-4) -> Tensor:
    """(score - mean) / (deviation + eps) within each group, with the sample deviation (over n - 1): (B,).

    Source: Shao et al. 2024, "DeepSeekMath" (GRPO); `eps` is TRL's.
    """
    deviation, size, groups = _deviations(score, group)
    variance = _sums(deviation.square(), groups) / (size - 1).clamp(min=1)
    return deviation / (variance.sqrt() + eps)


def group_centred(score: Tensor, group: Tensor) -> Tensor:
    """`score` (B,) minus its group's mean: (B,).

    The mean counts the response itself, which leaves (n - 1) / n of the score's expected gradient: beside a KL that is
    a loss term, the KL weighs that much more than its coefficient says. `rloo` has no such factor.
    Source: Liu et al. 2025, "Understanding R1-Zero-Like Training" (Dr. GRPO).
    """
    return _deviations(score, group)[0]


def reinforce_pp(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Discounted sum of the rewards (B, T) from each token on, 0 off-mask; to be whitened over the batch.

    Source: Hu 2025, "REINFORCE++". It is `gae` at lambda 1 with a critic that says 0.
    """
    advantages, _ = gae(rewards, torch.zeros_like(rewards), mask, gamma, gae_lambda=1.0)
    return advantages


def reinforce_pp_baseline(score: Tensor, group: Tensor) -> Tensor:
    """`score` (B,) minus its group's mean: (B,), to be spread over the tokens and whitened over the batch.

    Source: Hu 2025, "REINFORCE++", the variant with a baseline. Unlike `group_relative` the scale is the batch's.
    """
    return group_centred(score, group)


def broadcast(advantage: Tensor, mask: Tensor) -> Tensor:
    """One advantage per response (B,), at each of its masked tokens: (B, T), 0 off-mask."""
    return torch.where(mask, advantage[:, None], 0)


def dead_groups(score: Tensor, group: Tensor, reduce: Reduce = identity) -> float:
    """Share of groups whose scores (B,) are all equal, over all ranks; nan where no group has two responses.

    Groups of one are not counted: they could not differ.
    """
    _, low, high, size = _spread(at_least_fp32(score), group.unique(return_inverse=True)[1])
    counted = size > 1
    counts = torch.stack([(counted & (low == high)).sum(), counted.sum()]).to(low.dtype)
    dead, groups = reduce(counts).tolist()
    return dead / groups if groups else math.nan


def _deviations(x: Tensor, group: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each response (B,): `x` minus its group's mean, its group's size, and its group counted from 0."""
    x = at_least_fp32(x)
    groups = group.unique(return_inverse=True)[1]
    total, low, high, size = (per_group[groups] for per_group in _spread(x, groups))
    # The mean of equal numbers need not be exactly that number once it is rounded.
    return (x - total / size).masked_fill(low == high, 0), size, groups


def _spread(x: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each group (G,): the sum, smallest, largest and number of its `x`; `groups` (B,) counts from 0."""
    count = int(groups.max()) + 1 if len(groups) else 0
    zeros = x.new_zeros(count)
    total = zeros.index_add(0, groups, x)
    low = zeros.scatter_reduce(0, groups, x, "amin", include_self=False)
    high = zeros.scatter_reduce(0, groups, x, "amax", include_self=False)
    return total, low, high, groups.bincount(minlength=count)


def _sums(x: Tensor, groups: Tensor) -> Tensor:
    """Of each response (B,): the sum of `x` over its group."""
    return torch.zeros_like(x).index_add(0, groups, x)[groups]
