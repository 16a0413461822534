"""Where the engine that sampled and the trainer disagree on a token's probability, though their weights are the same.

`logprobs` (B, T) is the trainer's, recomputed before any step; `sampler_logprobs` (B, T) is what the sampler drew with.
"""

from __future__ import annotations

from torch import Tensor

from stages.maths.kl import k1
from stages.maths.tensors import Reduce, identity, masked_moments


def importance_weights(logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor, cap: float = 2.0) -> Tensor:
    """min(trainer's / sampler's probability, cap) of each token (B, T), 0 off-mask, without gradient.

    Multiply the weights of a policy loss by it. Source: Yao et al. 2025, "Your Efficient RL Framework Secretly Brings
    You Off-Policy RL Training" (truncated importance sampling).
    """
    return _ratios(logprobs, sampler_logprobs, mask).clamp(max=cap).masked_fill(~mask, 0)


def engine_mismatch(
    logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor, reduce: Reduce = identity
) -> dict[str, float]:
    """How far trainer and sampler are apart, over the masked tokens of all ranks; weights as they are, not capped.

    `weight_mean` and `weight_std` (population), 1 and 0 for equal engines; `effective_share` of the tokens,
    mean^2 / mean of squares, 1 for equal engines; `mismatch_kl` nats per token, KL(sampler || trainer) by k1.
    Source: the rollout-correction metrics of verl, which calls a mean of 0.5-2, a share above 0.3, a deviation below
    1 and a KL within +-0.1 healthy.
    """
    mean, variance, count = masked_moments(_ratios(logprobs, sampler_logprobs, mask), mask, reduce)
    kl, _, _ = masked_moments(k1(sampler_logprobs, logprobs).detach(), mask, reduce)
    square = mean.square() + variance
    return {
        "weight_mean": mean.item(),
        "weight_std": variance.sqrt().item(),
        "effective_share": (mean.square() / square).item() if count else 1.0,
        "mismatch_kl": kl.item(),
    }


def _ratios(logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor) -> Tensor:
    # Held within +-20, where exp is still finite in fp32.
    return k1(logprobs, sampler_logprobs).detach().masked_fill(~mask, 0).clamp(-20, 20).exp()
