"""Losses that learn from preferences without a reward model: DPO and its relatives.

Their inputs are log-ratios (N,): log policy - log reference of whole responses, summed over their tokens, stop token
included (`kl.sequence_kl`, or `tensors.sequence_sum` minus a stored sum of the reference's). They return one loss per
comparison or response, in fp32 at least; divide their sum by the number in the optimiser step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stages.maths.losses import pair_loss
from stages.maths.tensors import Reduce, at_least_fp32, identity, masked_moments


def implicit_reward(log_ratio: Tensor, beta: float) -> Tensor:
    """The reward (N,) for which the policy is optimal at KL weight `beta`, up to a constant per prompt.

    Source: Rafailov et al. 2023, "Direct Preference Optimization", eq. 5.
    """
    return beta * log_ratio


def dpo_loss(
    better: Tensor,
    worse: Tensor,
    beta: float,
    probability: float | Tensor = 1.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """-log sigmoid of the lead of `better` over `worse` in implicit reward; log-ratios and losses (N,).

    `probability` that `better` is the better one; `label_smoothing` the probability that any label is flipped.
    Sources: Rafailov et al. 2023, eq. 7; smoothing: Mitchell 2023, "A note on DPO with noisy preferences" (cDPO).
    """
    smoothed = probability * (1 - label_smoothing) + (1 - probability) * label_smoothing
    return pair_loss(implicit_reward(better, beta), implicit_reward(worse, beta), smoothed)


def ipo_loss(better: Tensor, worse: Tensor, beta: float, probability: float | Tensor = 1.0) -> Tensor:
    """(lead - 1 / (2 beta))^2 with lead the log-ratio of `better` minus that of `worse`; all (N,).

    Summed over tokens, not averaged. The loss of the other order has the weight 1 - `probability`.
    Source: Azar et al. 2023, "A General Theoretical Paradigm to Understand Learning from Human Preferences", eq. 17.
    """
    lead, target = at_least_fp32(better) - at_least_fp32(worse), 1 / (2 * beta)
    return probability * (lead - target).square() + (1 - probability) * (lead + target).square()


def kto_baseline(mismatched: Tensor, reduce: Reduce = identity) -> Tensor:
    """z0 of `kto_loss`: the mean of log-ratios (N,) over all ranks, at least 0, without gradient; a scalar.

    `mismatched` are log-ratios of responses to the prompts of other rows, so a batch has at least two rows.
    Source: Ethayarajh et al. 2024, "KTO: Model Alignment as Prospect Theoretic Optimization".
    """
    mismatched = at_least_fp32(mismatched.detach())
    mean, _, _ = masked_moments(mismatched, torch.ones_like(mismatched, dtype=torch.bool), reduce)
    return mean.clamp(min=0)


def kto_loss(
    log_ratio: Tensor,
    desirable: Tensor,
    z0: Tensor,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Losses (N,) of responses labelled one by one: `desirable` (N,) bool, log-ratios (N,), `z0` from `kto_baseline`.

    weight * (1 - sigmoid(+-beta (log_ratio - z0))), with + and `desirable_weight` for the desirable, with - and
    `undesirable_weight` for the others.
    Source: Ethayarajh et al. 2024, "KTO: Model Alignment as Prospect Theoretic Optimization".
    """
    gain = beta * (at_least_fp32(log_ratio) - z0)
    # 1 - sigmoid(x) is sigmoid(-x), which keeps its digits if sigmoid(x) is almost 1.
    return torch.where(desirable, desirable_weight * (-gain).sigmoid(), undesirable_weight * gain.sigmoid())
