"""Rules that ignore the prompt, as baselines of a reward model on the same held-out pairs."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from stages.maths.statistics import accuracy_of_pairs, lead_of_pairs
from stages.models.tokens import TokenRow
from stages.training.comparing import TokenComparison, clusters_of, pairs_of

LONGER, SHORTER, MAJORITY = "longer wins", "shorter wins", "majority"


def baselines(scores: Tensor, held: list[TokenComparison], train: list[TokenComparison]) -> dict[str, dict[str, float]]:
    """Accuracy of each rule on held-out pairs, and the lead of `scores` (R,) over it with its 95 % interval.

    "longer wins" and "shorter wins" compare numbers of tokens. "majority" prefers the response that won more often
    among the training pairs, whatever the prompt; one that is not in them counts as winning half of its pairs. Ties
    count half, in the rule and in the labels.
    """
    pairs, clusters = pairs_of(held), clusters_of(held)
    rows = [row for comparison in held for row in comparison.responses]
    share = win_shares(train)
    length = torch.tensor([float(row.targets.sum()) for row in rows])
    majority = torch.tensor([share.get(response_key(row), 0.5) for row in rows], dtype=torch.float64)
    delta = scores[pairs.better] - scores[pairs.worse]
    chance = torch.tensor(pairs.probability, dtype=torch.float64)
    out = {}
    for name, rule in ((LONGER, length), (SHORTER, -length), (MAJORITY, majority)):
        other = rule[pairs.better] - rule[pairs.worse]
        lead, low, high = lead_of_pairs(delta, other, chance, clusters)
        accuracy = accuracy_of_pairs(other, chance)
        out[name] = {"accuracy": accuracy, "lead": lead, "lead_low": low, "lead_high": high}
    return out


def win_shares(comparisons: list[TokenComparison]) -> dict[tuple[int, ...], float]:
    """Smoothed share of wins of each response, by its tokens: (wins + 1) / (pairs + 2)."""
    wins: dict[tuple[int, ...], float] = defaultdict(float)
    count: dict[tuple[int, ...], int] = defaultdict(int)
    for comparison in comparisons:
        for pair in comparison.pairs:
            better, worse = (response_key(comparison.responses[i]) for i in (pair.better, pair.worse))
            wins[better] += pair.probability
            wins[worse] += 1 - pair.probability
            count[better] += 1
            count[worse] += 1
    return {key: (wins[key] + 1) / (count[key] + 2) for key in count}


def response_key(row: TokenRow) -> tuple[int, ...]:
    """The tokens of a response, without its prompt."""
    return tuple(row.ids[row.targets].tolist())
