"""The win rate of one policy over another, adjusted for the difference in length of their responses."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from stages.maths.statistics import effective_clusters, student_quantile

NEWTON_STEPS = 50
LARGEST = 15.0  # coefficient of a fit that has a maximum; beyond it wins and lengths separate the responses


def length_adjusted_win_rate(
    wins: Tensor, length_difference: Tensor, clusters: Sequence[int], z: float = 1.96
) -> tuple[float, float, float] | None:
    """The win rate expected at equal lengths, and the ends of its interval; None if there is no estimate.

    `wins` (N,) is 1 for a win, a half for a tie, 0 for a loss; `length_difference` (N,) is the length of the policy's
    response minus the other's. Logistic regression by maximum likelihood, P(win) = sigmoid(a + b tanh(d / std(d))); the
    adjusted rate is sigmoid(a). z 1.96 covers 95 %, with the sandwich estimate of the variance of a over `clusters`
    (N,), numbers that are equal for responses to one prompt. It has none if lengths predict every win, and no
    interval if all comparisons end alike.

    Source: Dubois et al. 2024, "Length-Controlled AlpacaEval", eq. 2, without its term for the difficulty of a prompt,
    which takes many policies to estimate. Interval: Cameron and Miller 2015, section II.
    """
    wins, difference = (x.detach().cpu().double().flatten() for x in (wins, length_difference))
    std = difference.std().item() if len(difference) > 1 else 0.0
    inputs = torch.stack([torch.ones_like(wins), torch.tanh(difference / std)]) if std else torch.ones(1, len(wins))
    inputs = inputs.double()
    coefficients = torch.zeros(len(inputs), dtype=torch.float64)
    for _ in range(NEWTON_STEPS):
        chance = torch.sigmoid(coefficients @ inputs)
        gradient = inputs @ (wins - chance)
        hessian = (inputs * (chance * (1 - chance))) @ inputs.T
        step, info = torch.linalg.solve_ex(hessian, gradient)
        coefficients = coefficients + step.clamp(-2, 2)
        if info or not coefficients.isfinite().all() or coefficients.abs().max() > LARGEST:
            return None
        if step.abs().max() < 1e-10:
            break
    places = {cluster: place for place, cluster in enumerate(dict.fromkeys(clusters))}
    member = torch.tensor([places[cluster] for cluster in clusters])
    scores = torch.zeros(len(places), len(inputs), dtype=torch.float64).index_add_(
        0, member, (inputs * (wins - torch.sigmoid(coefficients @ inputs))).T
    )
    bread = torch.linalg.inv(hessian)
    groups = len(places)
    variance = (bread @ scores.T @ scores @ bread)[0, 0].item() * groups / max(1, groups - 1)
    if not variance > 0:
        return None
    margin = math.sqrt(variance) * student_quantile(z, effective_clusters(clusters) - 1)
    low, rate, high = (1 / (1 + math.exp(-(coefficients[0].item() + s * margin))) for s in (-1, 0, 1))
    return rate, low, high
