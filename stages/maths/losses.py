"""Losses of PPO and its relatives, supervised fine-tuning and reward modelling.

A token loss (any but `pair_loss`) is a masked sum divided by `denominator`: the number of tokens of the whole optimiser
step, over all micro-batches and ranks, so that the cut of a batch cannot change its gradient. None means the number of
masked tokens. If tokens are to count unequally, `weights` (B, T) from `token_weights` replace it. Padding reaches no
loss and no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from stages.maths.kl import ESTIMATORS, k1
from stages.maths.tensors import at_least_fp32, masked_sum


@dataclass(frozen=True)
class PolicyLoss:
    """The policy's loss, with gradient, and its measures to report, without."""

    loss: Tensor  # scalar
    ratio: Tensor  # (B, T) new over old probability, 0 off-mask
    clipped_count: Tensor  # scalar, masked tokens whose loss the clip raised
    approx_kl_sum: Tensor  # scalar, masked sum of (logprobs - old_logprobs)^2 / 2


@dataclass(frozen=True)
class ValueLoss:
    """The critic's loss, with gradient, and the number of clipped tokens."""

    loss: Tensor  # scalar
    clipped_count: Tensor  # scalar, masked tokens whose loss the clip raised


def token_weights(
    mask: Tensor, how: str, *, tokens: float | Tensor, sequences: float | Tensor, max_length: float
) -> Tensor:
    """The weight of each token (B, T) in a loss that is a plain sum, 0 off-mask.

    `tokens`, `sequences` count the whole optimiser step, over all micro-batches and ranks, so that its parts add up;
    `max_length` is a constant of the run. `how` is "token", 1 / tokens: all tokens have equal weight (PPO, DAPO);
    "sequence", 1 / (sequences L) for a response of L tokens: all responses have equal weight (GRPO); or "constant",
    1 / (sequences max_length): all tokens have equal weight, whatever the lengths of other responses (Dr. GRPO).
    """
    if how == "token":
        weight = 1 / torch.as_tensor(tokens, device=mask.device)
    elif how == "sequence":
        weight = 1 / (sequences * mask.sum(dim=1, keepdim=True).clamp(min=1))
    else:
        weight = 1 / torch.as_tensor(sequences * max_length, device=mask.device)
    return torch.where(mask, weight, 0)


def aggregate(
    losses: Tensor, mask: Tensor, denominator: float | Tensor | None = None, weights: Tensor | None = None
) -> Tensor:
    """Masked sum of `losses` (B, T), divided by `denominator` or with `weights`; a scalar. Weights have no gradient.

    For any loss per token without a function here, such as minus the entropy.
    """
    if weights is None:
        count = mask.sum().clamp(min=1) if denominator is None else denominator
        return masked_sum(losses, mask) / count
    return masked_sum(losses * weights.detach().masked_fill(~mask, 0), mask)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_range: float,
    denominator: float | Tensor | None = None,
    *,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    weights: Tensor | None = None,
) -> PolicyLoss:
    """PPO's clipped surrogate max(-A ratio, -A clip(ratio, 1 - clip_range, 1 + clip_high)); all tensors (B, T).

    `clip_high` None is `clip_range`. With `dual_clip` c the loss of a negative advantage A is -cA at most, so that one
    extreme ratio cannot dominate the batch.
    The log-ratio is clamped to +-20, so that exp is finite in fp32.
    Sources: Schulman et al. 2017, "Proximal Policy Optimization Algorithms", eq. 7; separate upper range: Yu et al.
    2025, "DAPO"; dual clip: Ye et al. 2020, "Mastering Complex Control in MOBA Games".
    """
    # Under padding the change is 0, so neither clip acts there and nothing is counted.
    change = (logprobs - old_logprobs).masked_fill(~mask, 0)
    ratio = change.clamp(-20, 20).exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + (clip_range if clip_high is None else clip_high))
    losses = torch.maximum(unclipped, clipped)
    if dual_clip is not None:
        losses = torch.where(advantages < 0, torch.minimum(losses, -dual_clip * advantages), losses)
    return PolicyLoss(
        loss=aggregate(losses, mask, denominator, weights),
        ratio=ratio.detach().masked_fill(~mask, 0),
        clipped_count=(clipped > unclipped).sum(),
        approx_kl_sum=0.5 * masked_sum(change.detach().square(), mask),
    )


def kl_loss(
    logprobs: Tensor,
    reference_logprobs: Tensor,
    mask: Tensor,
    how: str,
    denominator: float | Tensor | None = None,
    *,
    weights: Tensor | None = None,
) -> Tensor:
    """The KL to the reference as a loss term: an estimator of it per token (B, T), aggregated; a scalar.

    Its mean gradient over tokens sampled from the policy depends on `how`: "k2" has that of KL(policy || reference),
    as intended; "k3" that of KL(reference || policy), as in GRPO; "k1" has a mean gradient of 0, only noise. A token's
    effect on the KL of later tokens has no gradient here; it has in the reward. For k3 the log-ratio is clamped to
    +-20, so that exp is finite in fp32.

    Source: Schulman 2020, "Approximating KL Divergence"; Tang and Munos 2025, "On a few pitfalls in KL divergence
    gradient estimation for RL".
    """
    log_ratio = k1(logprobs, reference_logprobs).masked_fill(~mask, 0)
    if how == "k3":
        log_ratio = log_ratio.clamp(-20, 20)
    return aggregate(ESTIMATORS[how](log_ratio, torch.zeros_like(log_ratio)), mask, denominator, weights)


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip_range: float,
    denominator: float | Tensor | None = None,
) -> ValueLoss:
    """Half the larger of two squared errors: of `values`, and of `values` clipped to within clip_range of `old_values`.

    All tensors (B, T). Source: the value loss of lm-human-preferences (Ziegler 2019).
    """
    values, old_values, returns = (x.masked_fill(~mask, 0) for x in (values, old_values, returns))
    unclipped = (values - returns).square()
    clipped = (torch.clamp(values, old_values - clip_range, old_values + clip_range) - returns).square()
    return ValueLoss(
        loss=0.5 * aggregate(torch.maximum(unclipped, clipped), mask, denominator),
        clipped_count=((clipped > unclipped) & mask).sum(),
    )


def token_nll(logprobs: Tensor, mask: Tensor, denominator: float | Tensor | None = None) -> Tensor:
    """Negative log-likelihood per token, the loss of supervised fine-tuning; `logprobs` (B, T)."""
    return aggregate(-logprobs, mask, denominator)


def pair_loss(
    better: Tensor,
    worse: Tensor,
    probability: float | Tensor = 1.0,
    margin: float | Tensor = 0.0,
    centre_coef: float = 0.0,
) -> Tensor:
    """Bradley-Terry losses (N,) of the scores (N,) of N comparisons, in fp32 at least.

    `probability` that `better` is the better one (1 for a hard label); `margin` for its lead to exceed; `centre_coef`
    weighs (better + worse)^2, which keeps scores near 0.
    Sources: Ouyang 2022, eq. 1; margin: Llama 2, eq. 2; centring: Eisenstein 2023, "Helping or Herding?".
    """
    better, worse = at_least_fp32(better), at_least_fp32(worse)
    lead = better - worse - margin
    # -logsigmoid(x) is softplus(-x), without the cut-off at 20 of torch's softplus.
    losses = -probability * logsigmoid(lead) - (1 - probability) * logsigmoid(-lead)
    return losses + centre_coef * (better + worse).square()
