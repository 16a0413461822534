"""From a score per response to a reward per token."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.maths.tensors import Reduce, at_least_fp32, identity, last_index, masked_moments


def charge_missing_eos(score: Tensor, ended: Tensor, penalty: float, how: str) -> Tensor:
    """Scores (B,) with `penalty` charged to responses that did not end (`ended` (B,) is False); 0 charges nothing.

    `how` is "subtract" (score - penalty), "replace" (-penalty, whatever the score) or "floor" (the lower of the two,
    because plain replacement would reward never ending if the score is below -penalty).

    Source: "replace" with penalty 1 is Ziegler 2019 and Huang 2024; "subtract" is TRL's `missing_eos_penalty`.
    """
    if penalty == 0:
        return score
    if how == "floor":
        charged = (score - penalty).clamp(max=-penalty)
    elif how == "subtract":
        charged = score - penalty
    else:
        charged = torch.full_like(score, -penalty)
    return torch.where(ended, score, charged)


def combine_scores(scores: Tensor, weights: list[float], how: str, std_coef: float) -> Tensor:
    """One score (B,) per response from those of several sources, `scores` (K, B), each times its weight first.

    `how` is "sum", "mean", "min" (worst-case optimisation) or "mean-std" (uncertainty-weighted optimisation): the mean
    minus `std_coef` times the standard deviation of the K weighted scores (of the population, 1 / K).

    Source: Coste et al. 2023, "Reward Model Ensembles Help Mitigate Overoptimization", section 3; there the variance is
    subtracted. The standard deviation has the unit of the scores, so its coefficient does not depend on their scale.
    """
    weighted = torch.stack([weight * score for weight, score in zip(weights, scores, strict=True)])
    if how == "mean":
        return weighted.mean(dim=0)
    if how == "min":
        return weighted.amin(dim=0)
    if how == "mean-std":
        return weighted.mean(dim=0) - std_coef * weighted.std(dim=0, unbiased=False)
    total = torch.zeros_like(scores[0])
    for score in weighted:  # one after the other: the sum does not depend on how a library adds
        total += score
    return total


def shape_rewards(score: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Rewards (B, T): -kl_coef * kl (B, T) on `mask`, plus score (B,) at the last masked token; 0 off-mask.

    Source: Ziegler 2019, "Fine-Tuning Language Models from Human Preferences", eq. 2.
    """
    positions = torch.arange(mask.shape[1], device=mask.device)
    at_last = positions == last_index(mask)[:, None]
    penalty = (-kl_coef * kl).masked_fill(~mask, 0)
    return penalty + torch.where(at_last, score[:, None], 0)


def length_penalty(lengths: Tensor, limit: float, coef: float) -> Tensor:
    """Penalty to subtract from the scores: `coef` per token of `lengths` (B,) beyond `limit`; (B,) in fp32.

    Source: the soft overlong punishment of Yu et al. 2025, "DAPO", eq. 13, with coef = 1 / (longest - limit).
    """
    return coef * (at_least_fp32(lengths) - limit).clamp(min=0)


@dataclass(frozen=True)
class RunningMoments:
    """Moments of every score so far, in three floats.

    Source of `updated`: Chan, Golub, LeVeque 1979, "Updating Formulae and a Pairwise Algorithm".
    """

    count: float = 0.0
    mean: float = 0.0
    m2: float = 0.0  # sum of squared deviations from the mean

    @property
    def deviation(self) -> float:
        """Standard deviation of the population; 0 before the first score."""
        return math.sqrt(self.m2 / self.count) if self.count else 0.0

    def updated(self, score: Tensor, reduce: Reduce = identity) -> RunningMoments:
        """The moments after one more batch of scores (B,), over all ranks. Infinite scores and nan are left out."""
        score = at_least_fp32(score)
        mean, variance, count = (moment.item() for moment in masked_moments(score, score.isfinite(), reduce))
        if count == 0:
            return self
        total, step = self.count + count, mean - self.mean
        m2 = self.m2 + variance * count + step * step * self.count * count / total
        return RunningMoments(total, self.mean + step * count / total, m2)

    def normalise(self, score: Tensor) -> Tensor:
        """`score` (B,) shifted to mean 0 and scaled to variance 1; only shifted while all scores were equal.

        Source: the reward normalisation of Zheng et al. 2023, "Secrets of RLHF I" (PPO-max).
        """
        # Equal scores have a tiny deviation from rounding their mean, which must not be scaled up to 1.
        varied = self.deviation > 1e-6 * abs(self.mean)
        return (score - self.mean) / (self.deviation if varied else 1.0)
