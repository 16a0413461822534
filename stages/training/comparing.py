"""Tokenised comparisons, their scores, and the report on how well scores predict the chosen responses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stages.data.comparisons import Comparison, Pair
from stages.data.prompts import whole_prompt
from stages.maths.statistics import (
    accuracy_by_length_difference,
    accuracy_interval,
    accuracy_of_pairs,
    calibration_bins,
    calibration_error,
    correlation,
    expected_accuracy_of_pairs,
    log_loss_of_pairs,
)
from stages.models.outputs import sequence_scores
from stages.models.roles import Roles
from stages.models.tokens import Text, TokenRow
from stages.native.prefixes import shared_beginnings

PLANNED_COMPARISONS = 64  # comparisons that the memory plan looks at
LENGTH_EDGES = (-1e9, -50, -10, 0, 10, 50, 1e9)
MIN_PROMPT_CLUSTERS = 3  # with fewer, the variance between prompts cannot be estimated


@dataclass(frozen=True)
class TokenComparison:
    """One prompt's responses, tokenised with the prompt, and pairs of a chosen and a rejected one."""

    responses: list[TokenRow]
    pairs: tuple[Pair, ...]
    prompt: str | None = None  # the same for every comparison of the prompt; None: its tokens identify it

    @property
    def size(self) -> int:
        """Tokens of all responses with their prompts."""
        return sum(len(row.ids) for row in self.responses)

    @property
    def cut(self) -> bool:
        return any(row.cut for row in self.responses)

    @property
    def whole(self) -> int:
        """Tokens of the longest response with its prompt, before it was cut."""
        return max(row.whole for row in self.responses)

    @property
    def best(self) -> TokenRow:
        """The response with the most expected wins minus losses; ties go to the smallest list of token ids."""
        lead = [0.0] * len(self.responses)
        for pair in self.pairs:
            lead[pair.better] += pair.probability - 0.5
            lead[pair.worse] -= pair.probability - 0.5
        return min(zip(lead, self.responses, strict=True), key=lambda item: (-item[0], item[1].ids.tolist()))[1]


@dataclass(frozen=True)
class Pairs:
    """Every pair of some comparisons, with responses numbered comparison by comparison."""

    better: list[int]
    worse: list[int]
    weight: list[float]  # 1 / (number of pairs of its comparison)
    probability: list[float]  # that the better one is better, at least 0.5; 0.5 is a tie
    margin: list[float]

    def both_ways(self) -> tuple[list[int], list[int]]:
        """Winners and losers with every pair twice: a tie once each way, every other pair the same way."""
        pairs = list(zip(self.better, self.worse, self.probability, strict=True))
        winners = [worse if probability == 0.5 else better for better, worse, probability in pairs]
        losers = [better if probability == 0.5 else worse for better, worse, probability in pairs]
        return self.better + winners, self.worse + losers


def pairs_of(comparisons: list[TokenComparison]) -> Pairs:
    """The pairs of comparisons, with all their responses in one list."""
    pairs, start = Pairs([], [], [], [], []), 0
    for comparison in comparisons:
        for pair in comparison.pairs:
            pairs.better.append(start + pair.better)
            pairs.worse.append(start + pair.worse)
            pairs.weight.append(1 / len(comparison.pairs))
            pairs.probability.append(pair.probability)
            pairs.margin.append(pair.margin)
        start += len(comparison.responses)
    return pairs


def encode_comparison(row: Comparison, text: Text, max_tokens: int) -> TokenComparison:
    """Tokenise a comparison."""
    return TokenComparison(text.comparison(row, max_tokens), row.pairs, whole_prompt(row))


def clusters_of(comparisons: list[TokenComparison]) -> list[int]:
    """A cluster number per pair, the same for pairs that may depend on each other: those of one prompt, in any row.

    With fewer than MIN_PROMPT_CLUSTERS prompts, a cluster is the pairs of rows that share a response, directly or
    through other rows.
    """
    prompts: list[object] = [c.prompt if c.prompt is not None else _prompt_tokens(c) for c in comparisons]
    keys = prompts if len(set(prompts)) >= MIN_PROMPT_CLUSTERS else _linked(comparisons)
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return [numbers[key] for comparison, key in zip(comparisons, keys, strict=True) for _ in comparison.pairs]


def _prompt_tokens(comparison: TokenComparison) -> tuple[int, ...]:
    row = comparison.responses[0]
    return tuple(row.ids[~row.targets].tolist())


def _linked(comparisons: list[TokenComparison]) -> list[object]:
    """A key per comparison, the same for those that shared responses link: the place of the first of them."""
    links = list(range(len(comparisons)))

    def first_of(place: int) -> int:
        while links[place] != place:
            place = links[place]
        return place

    seen: dict[tuple[int, ...], int] = {}
    for place, comparison in enumerate(comparisons):
        for row in comparison.responses:
            one, other = first_of(place), first_of(seen.setdefault(tuple(row.ids[row.targets].tolist()), place))
            links[max(one, other)] = min(one, other)
    return [first_of(place) for place in range(len(comparisons))]


def computed_share(rows: list[TokenComparison]) -> float:
    """Share of the tokens of the longest comparisons that is computed if their common prefixes are computed once."""
    longest = sorted(rows, key=lambda row: -row.size)[:PLANNED_COMPARISONS]
    saved = 0
    for row in longest:
        sequences = [r.ids for r in row.responses]
        saved += sum((len(group) - 1) * prefix for group, prefix in shared_beginnings(sequences))
    return 1 - saved / sum(row.size for row in longest)


def pair_sums(loss: Tensor, scores: Tensor, pairs: Pairs) -> dict[str, float]:
    """What `pair_means` needs of a forward pass: its loss, and sums over its pairs from scores (R,).

    Accuracy, margin and scores of chosen and rejected are defined as in `build_comparison_report`.
    """
    scores = scores.detach().double().cpu()
    chosen, rejected = (scores[index] for index in pairs.both_ways())
    right = (chosen > rejected).double() + 0.5 * (chosen == rejected).double()
    sums = {"accuracy": right, "margin": chosen - rejected, "score_chosen": chosen, "score_rejected": rejected}
    halves = {name: float(values.sum()) / 2 for name, values in sums.items()}  # `both_ways` has every pair twice
    return {"loss": float(loss.detach()), **halves, "pairs": len(pairs.better)}


NO_PAIRS = dict.fromkeys(("loss", "accuracy", "margin", "pairs", "score_chosen", "score_rejected"), 0.0)


def pair_means(sums: dict[str, float]) -> dict[str, float]:
    """Loss of an optimiser step on comparisons, and means over its pairs, from their sums on all ranks."""
    names = ("accuracy", "margin", "score_chosen", "score_rejected")
    return {"loss": sums["loss"], **{name: sums[name] / sums["pairs"] for name in names}}


def score_rows(roles: Roles, role: str, rows: list[TokenRow]) -> Tensor:
    """Scores (N,), fp32 on the CPU, of rows under a role with a head, without gradient."""

    def forward(rows: list[TokenRow]) -> list[Tensor]:
        return list(sequence_scores(roles, role, [row.ids for row in rows]).cpu())

    return torch.stack(roles.collect(role, rows, forward))


def held_out_measures(report: dict[str, object]) -> dict[str, float]:
    """The measures of a report that are logged at every evaluation; empty for an empty report."""
    names = ("accuracy", "log_loss", "margin_mean", "score_length_corr")
    return {f"eval_{name}": report[name] for name in names if name in report}


def numbers_of(report: dict[str, object]) -> dict[str, object]:
    """The numbers of a report as a stage's metrics; `eval_pairs` is its number of pairs."""
    numbers = {name: value for name, value in report.items() if isinstance(value, (int, float))}
    return numbers | {"eval_pairs": report.get("pairs")}


def build_comparison_report(scores: Tensor, comparisons: list[TokenComparison]) -> dict[str, object]:
    """The report on comparisons from scores (R,), one per response, comparison by comparison.

    Source of its measures: Stiennon et al. 2020 and Singhal et al. 2023 (accuracy, calibration, length bias).

    With soft labels the likelier response is the chosen one, and `accuracy` is how often it scores higher. A label of
    0.5 is a tie: it counts half in `accuracy`, half each way in margins and scores, and not in `by_length_difference`.
    `expected_accuracy`, calibration, log-loss and `label_length_corr` weight both ways by their probability;
    `agreement_ceiling` is the largest possible `expected_accuracy`.

    The interval treats pairs as independent if their `clusters` (prompts) differ; `effective_pairs` is the equivalent
    number of independent pairs.
    """
    rows = [row for c in comparisons for row in c.responses]
    lengths = torch.tensor([float(row.targets.sum()) for row in rows])
    pairs = pairs_of(comparisons)
    better, worse = pairs.better, pairs.worse
    delta = scores[better] - scores[worse]
    longer = lengths[better] - lengths[worse]
    chance = torch.tensor(pairs.probability, dtype=torch.float64)
    decided = chance != 0.5
    chosen, rejected = (scores[index] for index in pairs.both_ways())
    accuracy = accuracy_of_pairs(delta, chance)
    clusters = clusters_of(comparisons)
    low, high, effective = accuracy_interval(delta, chance, clusters)
    bins = calibration_bins(delta, probability=chance)
    return {
        "pairs": len(delta),
        "clusters": len(set(clusters)),
        "effective_pairs": effective,
        "accuracy": accuracy,
        "accuracy_low": low,
        "accuracy_high": high,
        "expected_accuracy": expected_accuracy_of_pairs(delta, chance),
        "log_loss": log_loss_of_pairs(delta, chance),
        **_mean_and_std("margin", chosen - rejected),
        **_mean_and_std("score_chosen", chosen),
        **_mean_and_std("score_rejected", rejected),
        "longer_wins_accuracy": accuracy_of_pairs(longer, chance),
        "score_length_corr": correlation(scores, lengths),
        "label_length_corr": correlation(torch.cat([chance, 1 - chance]), lengths[better + worse]),
        "agreement_ceiling": ceiling(pairs.probability),
        "calibration_error": calibration_error(bins),
        "confidence": float(delta.double().abs().sigmoid().mean()),
        "calibration": bins,
        "ties": int((~decided).sum()),
        "by_length_difference": accuracy_by_length_difference(delta[decided], longer[decided], LENGTH_EDGES),
    }


def _mean_and_std(name: str, numbers: Tensor) -> dict[str, float]:
    return {f"{name}_mean": float(numbers.mean()), f"{name}_std": float(numbers.std(unbiased=False))}


def ceiling(probability: list[float]) -> float:
    """Largest expected accuracy for labels with these probabilities; 1 if all labels are certain."""
    return sum(max(p, 1 - p) for p in probability) / len(probability)
