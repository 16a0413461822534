"""Estimators of the KL from the policy to the reference, and the controller of its weight.

With q = log(policy / reference) of a token sampled from the policy: the means of k1 = q and k3 = exp(-q) - 1 + q are
the KL, the mean gradient of k2 = q^2 / 2 is the KL's gradient. None is masked: off-mask entries mean nothing.
Source: Schulman 2020, "Approximating KL Divergence".
"""

from __future__ import annotations

import torch
from torch import Tensor

from stages.maths.tensors import sequence_sum


def k1(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """q per token (B, T): unbiased, may be negative; for the KL in the reward."""
    return logprobs - reference_logprobs


def k2(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """q^2 / 2 per token (B, T): biased; has the right gradient if the KL is a loss term."""
    return 0.5 * (logprobs - reference_logprobs).square()


def k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """exp(-q) - 1 + q per token (B, T): unbiased and never negative; for reports."""
    log_ratio = logprobs - reference_logprobs
    return torch.expm1(-log_ratio) + log_ratio


ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}


def sequence_kl(logprobs: Tensor, reference_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Sum of k1 over each response's masked tokens, (B,) nats."""
    return sequence_sum(k1(logprobs, reference_logprobs), mask)


def next_kl_coef(kl_coef: float, observed_kl: float, target: float, episodes: int, horizon: int) -> float:
    """The KL weight after `episodes` responses with a mean sequence KL of `observed_kl` nats instead of `target`.

    Source: `AdaptiveKLController` of lm-human-preferences (Ziegler 2019): the error is held within +-0.2.
    """
    error = min(max(observed_kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * episodes / horizon)
