"""Masked sums, whitening and log-probabilities.

A mask is True where a token counts. Numbers where it is False, infinities included, change nothing: they are replaced
before the arithmetic, not multiplied by zero after it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]  # sums a tensor over ranks; every rank calls it equally often


def identity(x: Tensor) -> Tensor:
    """The `Reduce` of a single rank."""
    return x


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of `x` where `mask`; a scalar."""
    return x.masked_fill(~mask, 0).sum()


def sequence_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of each row of `x` (B, T) where `mask`: (B,); of log-probabilities, that of the whole response."""
    return x.masked_fill(~mask, 0).sum(dim=1)


def masked_moments(x: Tensor, mask: Tensor, reduce: Reduce = identity) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, population variance and count of `x` where `mask`, over all ranks; three scalars.

    Two passes, so two calls of `reduce`: a sum of squares minus a squared mean would cancel in fp32. `x` is fp32 or
    wider, because the count is reduced in its dtype. An empty mask gives 0, 0, 0.
    """
    total, count = reduce(torch.stack([masked_sum(x, mask), mask.sum().to(x.dtype)])).unbind()
    divisor = count.clamp(min=1)
    mean = total / divisor
    variance = reduce(masked_sum((x - mean).square(), mask)) / divisor
    return mean, variance, count


def whiten(x: Tensor, mask: Tensor, reduce: Reduce = identity, eps: float = 1e-8) -> Tensor:
    """`x` shifted and scaled to mean 0 and variance 1 over the masked tokens of all ranks, 0 elsewhere.

    Source: `whiten` of lm-human-preferences (Ziegler 2019), here with the padding left out.
    """
    mean, variance, _ = masked_moments(x, mask, reduce)
    return ((x - mean) * torch.rsqrt(variance + eps)).masked_fill(~mask, 0)


def scale_to_unit_variance(x: Tensor, mask: Tensor, reduce: Reduce = identity, eps: float = 1e-8) -> Tensor:
    """`x` scaled about its mean to variance 1 over the masked tokens of all ranks, 0 elsewhere; the mean stays.

    With mean mu and deviation sigma that is x/sigma + mu (1 - 1/sigma).
    Source: `whiten(..., shift_mean=False)` of lm-human-preferences (Ziegler 2019), there applied to rewards.
    """
    mean, variance, _ = masked_moments(x, mask, reduce)
    return ((x - mean) * torch.rsqrt(variance + eps) + mean).masked_fill(~mask, 0)


def last_index(mask: Tensor) -> Tensor:
    """Index (B,) of the last True in each row of `mask` (B, T), padded on either side; -1 if there is none."""
    positions = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask, positions, -1).amax(dim=1)


def at_least_fp32(x: Tensor) -> Tensor:
    """`x` in fp32, or unchanged if it is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability of each of `tokens` (...) under `logits` (..., V), in fp32 at least.

    bf16 would be off by up to 0.02 per token, which the ratio of two policies turns into a spurious update. Tokens
    under padding must be valid ids too.
    """
    wide = at_least_fp32(logits)
    chosen = wide.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return chosen - wide.logsumexp(dim=-1)


def entropy_of(logprobs: Tensor) -> Tensor:
    """Entropy (...) in nats of distributions given as log-probabilities (..., V), which may be -inf."""
    probabilities = logprobs.exp()
    # An impossible token contributes lim p log p = 0, not 0 * -inf.
    return -(probabilities * logprobs.masked_fill(probabilities == 0, 0)).sum(dim=-1)
