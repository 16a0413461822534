"""Advantage estimation: with a critic, and without one from several responses to the same prompt.

`group` (B,) int64 is an id of each response's prompt, any number, unique on its rank. All responses to a prompt are on
one rank; groups may differ in size. In a group of one, or of equal scores, the advantages are exactly 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stages.maths.tensors import Reduce, at_least_fp32, identity


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and the returns they imply.

    All (B, T); `values[:, t]` is the value of the state before token t. After the last masked token the value is 0: a
    truncated response ends there like any other. Returns advantages, not whitened, and returns = advantages + values;
    both are 0 off-mask.

    Source: Schulman et al. 2016, "High-Dimensional Continuous Control Using Generalized Advantage Estimation", eq. 16.
    """
    values = values.masked_fill(~mask, 0)  # no value after the last token
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

    Source: Ahmadian et al. 2024, "Back to Basics"; there a return is score - kl_coef * sequence KL.
    """
    deviation, size, _ = _deviations(returns, group)
    # S_i - mean of the others = n / (n - 1) (S_i - mean of all).
    return deviation * size / (size - 1).clamp(min=1)


def group_relative(score: Tensor, group: Tensor, eps: float = 1e-4) -> Tensor:
    """(score - mean) / (deviation + eps) within each group, with the sample deviation (over n - 1): (B,).

    Source: Shao et al. 2024, "DeepSeekMath" (GRPO); `eps` is TRL's.
    """
    deviation, size, groups = _deviations(score, group)
    squares = torch.zeros_like(deviation).index_add(0, groups, deviation.square())[groups]
    variance = squares / (size - 1).clamp(min=1)
    return deviation / (variance.sqrt() + eps)


def group_centred(score: Tensor, group: Tensor) -> Tensor:
    """`score` (B,) minus its group's mean: (B,).

    The mean counts the response itself, which leaves (n - 1) / n of the score's expected gradient: a KL that is a loss
    term weighs n / (n - 1) times its coefficient. `rloo` has no such factor. Unlike `group_relative` it does not scale
    by the group, so whiten it over the batch for REINFORCE++ with a baseline.
    Sources: Liu et al. 2025, "Understanding R1-Zero-Like Training" (Dr. GRPO); Hu 2025, "REINFORCE++".
    """
    return _deviations(score, group)[0]


def reinforce_pp(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Discounted sum of the rewards (B, T) from each token on, 0 off-mask; to be whitened over the batch.

    Source: Hu 2025, "REINFORCE++". It is `gae` at lambda 1 with values of 0.
    """
    advantages, _ = gae(rewards, torch.zeros_like(rewards), mask, gamma, gae_lambda=1.0)
    return advantages


def broadcast(advantage: Tensor, mask: Tensor) -> Tensor:
    """One advantage per response (B,), at each of its masked tokens: (B, T), 0 off-mask."""
    return torch.where(mask, advantage[:, None], 0)


def dead_groups(score: Tensor, group: Tensor, reduce: Reduce = identity) -> float:
    """Share of groups whose scores (B,) are all equal, over all ranks; nan if no group has two responses.

    Groups of one are not counted.
    """
    _, low, high, size = _group_statistics(at_least_fp32(score), group.unique(return_inverse=True)[1])
    counted = size > 1
    counts = torch.stack([(counted & (low == high)).sum(), counted.sum()]).to(low.dtype)
    dead, groups = reduce(counts).tolist()
    return dead / groups if groups else math.nan


def _deviations(x: Tensor, group: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each response (B,): `x` minus its group's mean, its group's size, and its group's number from 0."""
    x = at_least_fp32(x)
    groups = group.unique(return_inverse=True)[1]
    total, low, high, size = (per_group[groups] for per_group in _group_statistics(x, groups))
    # The rounded mean of equal numbers need not be exactly that number.
    return (x - total / size).masked_fill(low == high, 0), size, groups


def _group_statistics(x: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For each group (G,): the sum, smallest, largest and number of its `x`; `groups` (B,) counts from 0."""
    count = int(groups.max()) + 1 if len(groups) else 0
    zeros = x.new_zeros(count)
    total = zeros.index_add(0, groups, x)
    low = zeros.scatter_reduce(0, groups, x, "amin", include_self=False)
    high = zeros.scatter_reduce(0, groups, x, "amax", include_self=False)
    return total, low, high, groups.bincount(minlength=count)
