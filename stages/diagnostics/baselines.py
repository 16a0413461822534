"""What a reward model has to beat: rules that never read the prompt, on the same held-out pairs."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from stages.maths.statistics import accuracy_of_pairs, lead_of_pairs
from stages.models.tokens import TokenRow
from stages.training.comparing import TokenComparison, clusters_of, pairs_of

LONGER, SHORTER, MAJORITY = "longer wins", "shorter wins", "majority"


def baselines(scores: Tensor, held: list[TokenComparison], train: list[TokenComparison]) -> dict[str, dict[str, float]]:
    """Accuracy of each rule on held-out pairs, and by how much `scores` (R,) lead it, with the ends of that interval.

    "longer wins" and "shorter wins" go by tokens. "majority" prefers the response that won more often among the
    training pairs, whatever the prompt, and tells nothing of one that it never saw. Ties count half,
    of the rule as of the labels.
    """
    pairs, clusters = pairs_of(held), clusters_of(held)
    rows = [row for comparison in held for row in comparison.responses]
    share = win_shares(train)
    length = torch.tensor([float(row.targets.sum()) for row in rows])
    known = torch.tensor([share.get(response_key(row), 0.5) for row in rows], dtype=torch.float64)
    delta = scores[pairs.better] - scores[pairs.worse]
    chance = torch.tensor(pairs.probability, dtype=torch.float64)
    found = {}
    for name, rule in ((LONGER, length), (SHORTER, -length), (MAJORITY, known)):
        other = rule[pairs.better] - rule[pairs.worse]
        lead, low, high = lead_of_pairs(delta, other, chance, clusters)
        accuracy = accuracy_of_pairs(other, chance)
        found[name] = {"accuracy": accuracy, "lead": lead, "lead_low": low, "lead_high": high}
    return found


def win_shares(comparisons: list[TokenComparison]) -> dict[tuple[int, ...], float]:
    """How often each response won, by its tokens: (wins + 1) / (pairs + 2), so that one win is no certainty."""
    wins: dict[tuple[int, ...], float] = defaultdict(float)
    judged: dict[tuple[int, ...], int] = defaultdict(int)
    for comparison in comparisons:
        for pair in comparison.pairs:
            better, worse = (response_key(comparison.responses[i]) for i in (pair.better, pair.worse))
            wins[better] += pair.probability
            wins[worse] += 1 - pair.probability
            judged[better] += 1
            judged[worse] += 1
    return {key: (wins[key] + 1) / (judged[key] + 2) for key in judged}


def response_key(row: TokenRow) -> tuple[int, ...]:
    """A response without its prompt."""
    return tuple(row.ids[row.targets].tolist())
