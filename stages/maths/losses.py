"""Losses of PPO, supervised fine-tuning and reward modelling.

A token loss (any but `pair_loss`) is a masked sum over `denominator`: the number of tokens of the whole optimiser
step, over all its micro-batches and ranks, so that how a batch is cut up cannot change its gradient. None means the
mask's own count.
Nothing under the padding reaches a loss or a gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from stages.maths.tensors import at_least_fp32, masked_sum


@dataclass(frozen=True)
class PolicyLoss:
    """The policy's loss, with gradient, and what to report about it, without."""

    loss: Tensor  # scalar
    ratio: Tensor  # (B, T) new over old probability; 0 off-mask
    clipped_count: Tensor  # scalar, masked tokens whose loss the clip raised
    approx_kl_sum: Tensor  # scalar, masked sum of (logprobs - old_logprobs)^2 / 2


@dataclass(frozen=True)
class ValueLoss:
    """The critic's loss, with gradient, and how often the clip decided it."""

    loss: Tensor  # scalar
    clipped_count: Tensor  # scalar, masked tokens whose loss the clip raised


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_range: float,
    denominator: float | Tensor | None = None,
) -> PolicyLoss:
    """PPO's clipped surrogate max(-A ratio, -A clip(ratio, 1 +- clip_range)); all tensors (B, T).

    The log-ratio is held within +-20, where exp is still finite in fp32.
    Source: Schulman et al. 2017, "Proximal Policy Optimization Algorithms", eq. 7.
    """
    change = (logprobs - old_logprobs).masked_fill(~mask, 0)
    ratio = change.clamp(-20, 20).exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    return PolicyLoss(
        loss=_per_token(torch.maximum(unclipped, clipped), mask, denominator),
        ratio=ratio.detach().masked_fill(~mask, 0),
        clipped_count=((clipped > unclipped) & mask).sum(),
        approx_kl_sum=0.5 * masked_sum(change.detach().square(), mask),
    )


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip_range: float,
    denominator: float | Tensor | None = None,
) -> ValueLoss:
    """Half the larger of two squared errors: of `values`, and of `values` held within clip_range of `old_values`.

    All tensors (B, T). Source: the value loss of lm-human-preferences (Ziegler 2019).
    """
    values, old_values, returns = (x.masked_fill(~mask, 0) for x in (values, old_values, returns))
    held = torch.clamp(values, old_values - clip_range, old_values + clip_range)
    unclipped = (values - returns).square()
    clipped = (held - returns).square()
    return ValueLoss(
        loss=0.5 * _per_token(torch.maximum(unclipped, clipped), mask, denominator),
        clipped_count=((clipped > unclipped) & mask).sum(),
    )


def token_nll(logprobs: Tensor, mask: Tensor, denominator: float | Tensor | None = None) -> Tensor:
    """Negative log-likelihood per token, the loss of supervised fine-tuning; `logprobs` (B, T)."""
    return _per_token(-logprobs, mask, denominator)


def pair_loss(
    better: Tensor,
    worse: Tensor,
    probability: float | Tensor = 1.0,
    margin: float | Tensor = 0.0,
    centre_coef: float = 0.0,
) -> Tensor:
    """Bradley-Terry losses (N,) of the scores (N,) of N comparisons, in fp32 at least.

    `probability` that `better` really is the better one (1 for a hard label); `margin` that its lead is to exceed;
    `centre_coef` weighs (better + worse)^2, which keeps scores near 0.
    Sources: Ouyang 2022, eq. 1; margin: Llama 2, eq. 2; centring: Eisenstein 2023, "Helping or Herding?".
    """
    better, worse = at_least_fp32(better), at_least_fp32(worse)
    lead = better - worse - margin
    # -logsigmoid(x) is softplus(-x), without the cut-off at 20 of torch's softplus.
    losses = -probability * logsigmoid(lead) - (1 - probability) * logsigmoid(-lead)
    return losses + centre_coef * (better + worse).square()


def _per_token(losses: Tensor, mask: Tensor, denominator: float | Tensor | None) -> Tensor:
    count = mask.sum().clamp(min=1) if denominator is None else denominator
    return masked_sum(losses, mask) / count
