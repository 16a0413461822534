"""Statistics for reports: intervals, correlations, and measures of a reward model's scores on comparisons.

Everything is computed in float64 and returned as Python floats. `delta` (N,) is the score of the response that won a
comparison minus the score of the one that lost; `probability` (N,), at least a half, is the probability that it is the
better one (None: 1), and at exactly a half the comparison is a tie. Undefined results, such as a mean of nothing, are
nan.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

from torch import Tensor
from torch.nn.functional import logsigmoid


def wilson_interval(successes: float, n: float, z: float = 1.96) -> tuple[float, float]:
    """The interval for a proportion of `successes` in `n` trials; (0, 1) for no trials. z 1.96 covers 95 %.

    Source: Wilson 1927. Unlike p +- z sqrt(p (1 - p) / n) it stays within 0 and 1 and has a width at p = 1.
    """
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    centre = p + z * z / (2 * n)
    half_width = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - half_width) / scale), min(1.0, (centre + half_width) / scale)


def clustered_interval(x: Tensor, clusters: Sequence[int], z: float = 1.96) -> tuple[float, float, float]:
    """Wilson's interval for the mean of `x` (N,), each from 0 to 1, and the effective number of independent ones.

    Numbers of one cluster (pairs of one prompt) may depend on each other in any way; clusters (N,) may not. If every
    number is a cluster of its own, this is `wilson_interval`. Else its n is N / deff x (z / t)^2: deff is the variance
    of the mean by `cluster_error` over p (1 - p) / N, at least one, and t is the quantile of Student's distribution for
    z. If all are 0 or all are 1, so that deff is undefined, n is `effective_clusters`.
    Sources: Korn and Graubard 1998, "Confidence intervals for proportions with small expected number of positive
    counts estimated from survey data", for n and t; with Wilson's interval: Dean and Pagano 2015, "Evaluating
    confidence interval methods for binomial proportions in clustered surveys".
    """
    x = _numbers(x)
    n, mean = x.numel(), x.mean().item()
    if len(set(clusters)) == n:
        return *wilson_interval(x.sum().item(), n, z), float(n)
    effective = effective_clusters(clusters)
    if len(set(clusters)) > 1 and 0 < mean < 1:
        binomial, variance = mean * (1 - mean), cluster_error(x, clusters) ** 2
        t = student_quantile(z, effective - 1)
        effective = (binomial / variance if binomial < n * variance else n) * (z / t) ** 2
    return *wilson_interval(mean * effective, effective, z), effective


def cluster_error(x: Tensor, clusters: Sequence[int]) -> float:
    """Standard error of the mean of `x` (N,) from the means without each cluster in turn; inf for a single cluster.

    The jackknife over clusters, CV3: less optimistic than the usual sandwich if clusters are few or uneven, and that of
    `mean_with_error` if each has one number. Source: Cameron and Miller 2015, "A Practitioner's Guide
    to Cluster-Robust Inference", section VI.
    """
    x = _numbers(x)
    sums: dict[int, float] = {}
    for number, cluster in zip(x.tolist(), clusters, strict=True):
        sums[cluster] = sums.get(cluster, 0.0) + number
    sizes, g = Counter(clusters), len(sums)
    if g == 1:
        return math.inf
    total, n = math.fsum(sums.values()), x.numel()
    squares = ((total - sums[c]) / (n - sizes[c]) - total / n for c in sums)
    return math.sqrt((g - 1) / g * math.fsum(s * s for s in squares))


def effective_clusters(clusters: Sequence[int]) -> float:
    """The effective number of clusters: N^2 / sum of squared sizes, which is their number if all sizes are equal.

    Source: Carter, Schnepel and Steigerwald 2017, "Asymptotic Behavior of a t-Test Robust to Cluster Heterogeneity",
    for clusters with fully correlated members.
    """
    return len(clusters) ** 2 / sum(size * size for size in Counter(clusters).values())


def student_quantile(z: float, freedom: float) -> float:
    """The quantile of Student's distribution at the probability of the normal quantile `z`.

    Within 1 % from 2 degrees of freedom on; fewer than one degree count as one.
    Source: Abramowitz and Stegun 1964, 26.7.5.
    """
    v = max(freedom, 1.0)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / v**power for power, term in enumerate(terms, 1))


def mean_with_error(x: Tensor) -> tuple[float, float]:
    """Mean of `x` and its standard error (sample deviation / sqrt(n)); error 0 for one number, nan for none."""
    x = _numbers(x)
    if x.numel() == 0:
        return math.nan, math.nan
    error = x.std().item() / math.sqrt(x.numel()) if x.numel() > 1 else 0.0
    return x.mean().item(), error


def correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's correlation of `x` and `y`; 0 if one of them does not vary."""
    x, y = _numbers(x), _numbers(y)
    if _is_constant(x) or _is_constant(y):
        return 0.0
    x, y = x - x.mean(), y - y.mean()
    return (x @ y / (x.norm() * y.norm())).item()


def distinct_ngrams(sequences: Iterable[Sequence[int]], n: int) -> float:
    """Share of distinct n-grams among all n-grams of tokens in all sequences; nan if there is none.

    It falls as sequences are added, so compare equal numbers of them. Source: Li et al. 2016, "A Diversity-Promoting
    Objective Function for Neural Conversation Models" (distinct-1, distinct-2).
    """
    ngrams = [ngram for sequence in sequences for ngram in _ngrams(sequence, n)]
    return len(set(ngrams)) / len(ngrams) if ngrams else math.nan


def repeated_ngrams(sequence: Sequence[int], n: int, window: int) -> tuple[int, int]:
    """The number of n-grams that end at most `window` tokens after an equal n-gram of the sequence, and of all n-grams.

    The window keeps their share independent of the sequence's length. Source: rep-n of Welleck et al. 2020, "Neural
    Text Generation with Unlikelihood Training", here of n-grams rather than single tokens.
    """
    ngrams = _ngrams(sequence, n)
    last: dict[tuple[int, ...], int] = {}
    repeated = 0
    for position, ngram in enumerate(ngrams):
        repeated += position - last.get(ngram, -window - 1) <= window
        last[ngram] = position
    return repeated, len(ngrams)


def shared_response_rate(responses: Sequence[str], prompts: Sequence[object]) -> float:
    """Share of responses that equal a response to a different prompt; `prompts[i]` is the prompt of response i."""
    prompts_of: dict[str, set[object]] = {}
    for response, prompt in zip(responses, prompts, strict=True):
        prompts_of.setdefault(response, set()).add(prompt)
    return sum(len(prompts_of[response]) > 1 for response in responses) / len(responses)


def log_loss_of_pairs(delta: Tensor, probability: Tensor | None = None) -> float:
    """Mean of -p log sigmoid(delta) - (1 - p) log sigmoid(-delta), in nats; ln 2 if all scores are equal."""
    delta = _numbers(delta)
    p = 1.0 if probability is None else _numbers(probability)
    return -(p * logsigmoid(delta) + (1 - p) * logsigmoid(-delta)).mean().item()


def accuracy_of_pairs(delta: Tensor, probability: Tensor | None = None) -> float:
    """Share of comparisons whose likelier winner scores higher; a tie, of scores or in the label, counts half."""
    return _wins(delta, probability).mean().item()


def accuracy_interval(delta: Tensor, probability: Tensor | None, clusters: Sequence[int]) -> tuple[float, float, float]:
    """The 95 % interval of `accuracy_of_pairs` and its effective number of pairs, by `clustered_interval`."""
    return clustered_interval(_wins(delta, probability), clusters)


def expected_accuracy_of_pairs(delta: Tensor, probability: Tensor | None = None) -> float:
    """Expected share of labels drawn with `probability` that agree with the scores; ties count half.

    Its upper limit, for any scores, is the mean of `probability`.
    """
    return _expected_wins(delta, probability).mean().item()


def lead_of_pairs(
    delta: Tensor,
    other: Tensor,
    probability: Tensor | None = None,
    clusters: Sequence[int] | None = None,
    *,
    z: float = 1.96,
) -> tuple[float, float, float]:
    """The accuracy of `delta` (N,) minus that of `other` (N,) on the same pairs, and the ends of its interval.

    Mean and mean +- z standard errors of the differences pair by pair; z 1.96 covers 95 %. If several pairs share
    one of the `clusters` (N,), the error is `cluster_error` and z becomes the quantile of Student's distribution.
    """
    difference = _wins(delta, probability) - _wins(other, probability)
    mean, error = mean_with_error(difference)
    if clusters is not None and len(set(clusters)) < len(clusters):
        error = cluster_error(difference, clusters)
        z = student_quantile(z, effective_clusters(clusters) - 1)
    if error == math.inf:
        return mean, -1.0, 1.0
    return mean, mean - z * error, mean + z * error


def calibration_bins(
    delta: Tensor,
    edges: Sequence[float] = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
    *,
    probability: Tensor | None = None,
) -> list[dict[str, float | int]]:
    """Share of predicted winners that won, per bin of the prediction's confidence sigmoid(|delta|).

    Bins are [low, high), the last one closed. A dict each: `low`, `high`, `count`, `predicted` (mean confidence),
    `observed` (expected share of wins, a tie counts half); the last two nan in an empty bin.
    """
    confidence = _numbers(delta).abs().sigmoid()
    wins = _expected_wins(delta, probability)
    return [
        {
            "low": low,
            "high": high,
            "count": int(inside.sum()),
            "predicted": confidence[inside].mean().item(),
            "observed": wins[inside].mean().item(),
        }
        for low, high, inside in _bins(confidence, edges)
    ]


def calibration_error(bins: Sequence[dict[str, float | int]]) -> float:
    """Expected calibration error of `calibration_bins`: mean |predicted - observed|, weighted by the bins' counts.

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", eq. 5.
    """
    filled = [b for b in bins if b["count"]]
    total = sum(b["count"] for b in filled)
    return sum(b["count"] * abs(b["predicted"] - b["observed"]) for b in filled) / total if total else math.nan


def accuracy_by_length_difference(
    delta: Tensor, length_difference: Tensor, edges: Sequence[float]
) -> list[dict[str, float | int]]:
    """`accuracy_of_pairs` per bin of `length_difference` (N,), winner's length minus loser's; no pair is a tie.

    Bins are [low, high), the last one closed; pairs outside `edges`, which may be infinite, are left out.
    A dict each: `low`, `high`, `count`, `accuracy` (nan in an empty bin).
    """
    delta = _numbers(delta)
    return [
        {"low": low, "high": high, "count": int(inside.sum()), "accuracy": accuracy_of_pairs(delta[inside])}
        for low, high, inside in _bins(_numbers(length_difference), edges)
    ]


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over tokens (N,); nan if the returns do not vary."""
    values, returns = _numbers(values), _numbers(returns)
    if _is_constant(returns):
        return math.nan
    return 1 - ((returns - values).var() / returns.var()).item()


def _ngrams(sequence: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(sequence[i : i + n]) for i in range(len(sequence) - n + 1)]


def _numbers(x: Tensor) -> Tensor:
    # On the CPU: not every accelerator has float64.
    return x.detach().cpu().double().flatten()


def _wins(delta: Tensor, probability: Tensor | None = None) -> Tensor:
    delta = _numbers(delta)
    wins = (delta > 0).double() + 0.5 * (delta == 0)
    return wins if probability is None else wins.masked_fill(_numbers(probability) == 0.5, 0.5)


def _expected_wins(delta: Tensor, probability: Tensor | None) -> Tensor:
    wins = _wins(delta)
    p = 1.0 if probability is None else _numbers(probability)
    return p * wins + (1 - p) * (1 - wins)


def _is_constant(x: Tensor) -> bool:
    # The variance of equal numbers need not be exactly 0, since their mean is rounded.
    return x.numel() == 0 or bool(x.min() == x.max())


def _bins(x: Tensor, edges: Sequence[float]) -> Iterator[tuple[float, float, Tensor]]:
    for low, high in pairwise(edges):
        below = x <= high if high == edges[-1] else x < high
        yield low, high, (x >= low) & below
