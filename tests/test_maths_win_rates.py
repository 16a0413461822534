"""Length-adjusted win rates: the same fit by another method, and the cases that have none."""

from __future__ import annotations

import math

import pytest
import torch

from stages.maths.win_rates import length_adjusted_win_rate


def drawn(n: int, quality: float, by_length: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Wins of a known model, a tenth of them ties, and the differences in length that drive some of them."""
    generator = torch.Generator().manual_seed(seed)
    difference = (torch.randn(n, generator=generator, dtype=torch.float64) * 30 + 20).round()
    chance = torch.sigmoid(quality + by_length * torch.tanh(difference / difference.std()))
    wins = (torch.rand(n, generator=generator, dtype=torch.float64) < chance).double()
    wins[torch.rand(n, generator=generator) < 0.1] = 0.5
    return wins, difference


def fit(wins: torch.Tensor, difference: torch.Tensor) -> tuple[float, float]:
    """Both coefficients by plain gradient ascent on the mean log-likelihood, written out."""
    x, (a, b) = [math.tanh(d / difference.std().item()) for d in difference.tolist()], (0.0, 0.0)
    for _ in range(4000):
        errors = [w - 1 / (1 + math.exp(-a - b * v)) for w, v in zip(wins.tolist(), x, strict=True)]
        a += 2 * sum(errors) / len(x)
        b += 2 * sum(e * v for e, v in zip(errors, x, strict=True)) / len(x)
    return a, b


def test_the_rate_is_that_of_an_independent_fit_at_equal_length():
    wins, difference = drawn(120, 0.3, 1.5)
    a, _ = fit(wins, difference)
    rate, low, high = length_adjusted_win_rate(wins, difference, range(120))
    assert rate == pytest.approx(1 / (1 + math.exp(-a)), abs=1e-6)
    assert low < rate < high


def test_a_win_by_length_alone_is_taken_out():
    """True rate at equal length: sigmoid(0) = 0.5; the plain rate is far above it, since responses are longer."""
    wins, difference = drawn(4000, 0.0, 2.0, seed=1)
    rate, low, high = length_adjusted_win_rate(wins, difference, range(4000))
    assert wins.mean() > 0.6 and low < 0.5 < high and high - low < 0.08 and abs(rate - 0.5) < 0.04


def test_the_interval_is_that_of_repeated_draws():
    rates = [length_adjusted_win_rate(*drawn(300, 0.4, 1.0, seed), range(300)) for seed in range(200)]
    spread = torch.tensor([rate for rate, _, _ in rates], dtype=torch.float64).std().item()
    width = sum(high - low for _, low, high in rates) / len(rates)
    assert width == pytest.approx(2 * 1.96 * spread, rel=0.15)
    truth = 0.5 * 0.1 + 0.9 / (1 + math.exp(-0.4))  # ties are a tenth
    assert sum(low < truth < high for _, low, high in rates) > 0.9 * len(rates)


def test_repeated_rows_of_a_prompt_are_no_further_evidence():
    wins, difference = drawn(60, 0.3, 1.0)
    once = length_adjusted_win_rate(wins, difference, range(60))
    twice = length_adjusted_win_rate(wins.repeat(2), difference.repeat(2), [*range(60), *range(60)])
    assert twice[0] == pytest.approx(once[0], abs=2e-3)
    assert twice[2] - twice[1] == pytest.approx(once[2] - once[1], rel=0.03)


def test_without_a_difference_in_length_the_rate_is_the_plain_one():
    wins = torch.tensor([1.0, 0, 1, 1, 0.5, 0, 1, 1])
    assert length_adjusted_win_rate(wins, torch.full((8,), 3.0), range(8))[0] == pytest.approx(wins.mean().item())


@pytest.mark.parametrize(
    ("wins", "difference"),
    [
        ([1.0, 1, 1, 1], [1.0, 2, 3, 4]),  # no losses
        ([0.0, 0, 1, 1], [-2.0, -1, 1, 2]),  # the longer response always wins
        ([0.5, 0.5, 0.5], [1.0, 2, 3]),  # only ties
        ([1.0], [1.0]),
    ],
)
def test_there_is_no_estimate_without_a_maximum_or_a_variance(wins, difference):
    assert length_adjusted_win_rate(torch.tensor(wins), torch.tensor(difference), range(len(wins))) is None
