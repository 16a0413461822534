"""Numbers for reports: intervals, correlations, and what the scores of a reward model say about its comparisons.

Everything is computed in float64 and comes back as Python floats. `delta` (N,) is always the score of the response
that won a comparison minus the score of the one that lost. What has no answer, such as a mean of nothing, is nan.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

from torch import Tensor
from torch.nn.functional import logsigmoid


def wilson_interval(successes: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """The interval for a proportion of `successes` in `n` trials; (0, 1) for no trials. z 1.96 covers 95 %.

    Source: Wilson 1927. Unlike p +- z sqrt(p (1 - p) / n) it stays within 0 and 1 and has a width at p = 1.
    """
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    centre = p + z * z / (2 * n)
    spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def mean_with_error(x: Tensor) -> tuple[float, float]:
    """Mean of `x` and its standard error (sample deviation / sqrt(n)); error 0 for one number, nan for none."""
    x = _numbers(x)
    if x.numel() == 0:
        return math.nan, math.nan
    error = x.std().item() / math.sqrt(x.numel()) if x.numel() > 1 else 0.0
    return x.mean().item(), error


def correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's correlation of `x` and `y`; 0 where one of them does not vary."""
    x, y = _numbers(x), _numbers(y)
    if _is_constant(x) or _is_constant(y):
        return 0.0
    x, y = x - x.mean(), y - y.mean()
    return (x @ y / (x.norm() * y.norm())).item()


def distinct_ngrams(sequences: Iterable[Sequence[int]], n: int) -> float:
    """Share of all runs of n tokens that differ from each other, over all sequences; nan where there is none.

    It falls as sequences are added, so compare like numbers of them. Source: Li et al. 2016, "A Diversity-Promoting
    Objective Function for Neural Conversation Models" (distinct-1, distinct-2).
    """
    runs = [tuple(s[i : i + n]) for s in sequences for i in range(len(s) - n + 1)]
    return len(set(runs)) / len(runs) if runs else math.nan


def repeated_ngrams(sequence: Sequence[int], n: int, window: int) -> tuple[int, int]:
    """How many runs of n tokens end at most `window` tokens after an equal run of the same sequence, and of how many.

    The window keeps their share independent of the sequence's length. Source: rep-n of Welleck et al. 2020, "Neural
    Text Generation with Unlikelihood Training", here of runs rather than single tokens.
    """
    runs = [tuple(sequence[i : i + n]) for i in range(len(sequence) - n + 1)]
    last: dict[tuple[int, ...], int] = {}
    repeated = 0
    for place, run in enumerate(runs):
        repeated += place - last.get(run, -window - 1) <= window
        last[run] = place
    return repeated, len(runs)


def shared_response_rate(responses: Sequence[str], prompts: Sequence[object]) -> float:
    """Share of responses that equal a response to a different prompt; `prompts[i]` is what response i answers."""
    answered: dict[str, set[object]] = {}
    for response, prompt in zip(responses, prompts, strict=True):
        answered.setdefault(response, set()).add(prompt)
    return sum(len(answered[response]) > 1 for response in responses) / len(responses)


def log_loss_of_pairs(delta: Tensor) -> float:
    """Mean of -log sigmoid(delta), in nats; ln 2 is what knowing nothing costs."""
    return -logsigmoid(_numbers(delta)).mean().item()


def accuracy_of_pairs(delta: Tensor) -> float:
    """Share of comparisons ranked as they were judged; a tie counts half."""
    return _wins(delta).mean().item()


def lead_of_pairs(delta: Tensor, other: Tensor, z: float = 1.96) -> tuple[float, float, float]:
    """How much more accurate `delta` (N,) is than `other` (N,) on the same pairs, and the ends of its interval.

    Of the differences pair by pair, mean and mean +- z standard errors; z 1.96 covers 95 %.
    """
    mean, error = mean_with_error(_wins(delta) - _wins(other))
    return mean, mean - z * error, mean + z * error


def calibration_bins(
    delta: Tensor, edges: Sequence[float] = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
) -> list[dict[str, float | int]]:
    """How often the predicted winner won, per bin of how sure the prediction was.

    The prediction is folded to its winner: its confidence is sigmoid(|delta|). Bins are [low, high), the last one
    closed. A dict each: `low`, `high`, `count`, `predicted` (mean confidence), `observed` (share of wins, a tie
    counts half); the last two nan in an empty bin.
    """
    confidence = _numbers(delta).abs().sigmoid()
    wins = _wins(delta)
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
    """Expected calibration error of `calibration_bins`: mean distance of predicted from observed, bins by their count.

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", eq. 5.
    """
    filled = [b for b in bins if b["count"]]
    total = sum(b["count"] for b in filled)
    return sum(b["count"] * abs(b["predicted"] - b["observed"]) for b in filled) / total if total else math.nan


def accuracy_by_length_difference(
    delta: Tensor, length_difference: Tensor, edges: Sequence[float]
) -> list[dict[str, float | int]]:
    """`accuracy_of_pairs` per bin of `length_difference` (N,), winner's length minus loser's.

    Bins are [low, high), the last one closed; what lies outside `edges` is left out, so they may be infinite.
    A dict each: `low`, `high`, `count`, `accuracy` (nan in an empty bin).
    """
    delta = _numbers(delta)
    return [
        {"low": low, "high": high, "count": int(inside.sum()), "accuracy": accuracy_of_pairs(delta[inside])}
        for low, high, inside in _bins(_numbers(length_difference), edges)
    ]


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over the masked tokens of (B, T); nan where the returns do not vary."""
    values, returns = _numbers(values[mask]), _numbers(returns[mask])
    if _is_constant(returns):
        return math.nan
    return 1 - ((returns - values).var() / returns.var()).item()


def _numbers(x: Tensor) -> Tensor:
    # On the CPU: not every accelerator has float64.
    return x.detach().cpu().double().flatten()


def _wins(delta: Tensor) -> Tensor:
    delta = _numbers(delta)
    return (delta > 0).double() + 0.5 * (delta == 0)


def _is_constant(x: Tensor) -> bool:
    # A variance of equal numbers need not be exactly 0 once their mean is rounded.
    return x.numel() == 0 or bool(x.min() == x.max())


def _bins(x: Tensor, edges: Sequence[float]) -> Iterator[tuple[float, float, Tensor]]:
    for low, high in pairwise(edges):
        below = x <= high if high == edges[-1] else x < high
        yield low, high, (x >= low) & below
