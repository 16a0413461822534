"""The best of n responses by a score: its expected measures, and its KL from the sampled policy.

All estimates use N >= n samples per prompt, averaged over every choice of n of the N. Source: Nakano et al. 2021,
"WebGPT", appendix; Gao et al. 2023, "Scaling Laws for Reward Model Overoptimization", section 2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def best_of_weights(scores: Tensor, n: int) -> Tensor:
    """The probability (P, N) that each sample is the best by `scores` (P, N) of a random n of its prompt's N; float64.

    The i-th smallest of N is the largest of a random n-subset in C(i - 1, n - 1) of C(N, n) cases; equal scores share
    their probability evenly. For any other measure x (P, N) of the samples, `(weights * x).sum(1)` is the unbiased
    estimate of x for the best of n by score.
    """
    size = scores.shape[1]
    assert 1 <= n <= size
    total = math.comb(size, n)
    # The probability that all n lie among the i smallest, for i from 0 to N.
    below = torch.tensor([math.comb(i, n) / total for i in range(size + 1)], dtype=torch.float64)
    scores = scores.detach().cpu().double().contiguous()
    ranked = scores.sort(dim=1).values
    smaller = torch.searchsorted(ranked, scores, right=False)  # (P, N) how many score less
    upto = torch.searchsorted(ranked, scores, right=True)  # (P, N) how many score no more
    return (below[upto] - below[smaller]) / (upto - smaller)


def best_of_kl(n: int) -> float:
    """KL, in nats, of the best of n from the sampled policy: ln n - (n - 1) / n, an upper bound.

    Exact if no two responses have equal scores and each is improbable. Source: Stiennon et al. 2020, "Learning to
    summarize from human feedback", appendix; that it is a bound: Beirami et al. 2024.
    """
    return math.log(n) - (n - 1) / n
