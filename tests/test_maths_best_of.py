"""stages/maths/best_of.py: against every subset there is, and closed forms."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.maths.best_of import best_of_kl, best_of_weights


def by_enumeration(scores: list[int], n: int) -> list[Fraction]:
    """The chance of each to be the best of n: every subset counts alike, and so do those that tie in it."""
    chances = [Fraction(0)] * len(scores)
    subsets = list(itertools.combinations(range(len(scores)), n))
    for subset in subsets:
        top = max(scores[i] for i in subset)
        best = [i for i in subset if scores[i] == top]
        for i in best:
            chances[i] += Fraction(1, len(best) * len(subsets))
    return chances


@given(st.lists(st.integers(-2, 3), min_size=1, max_size=7), st.data())
def test_the_chances_are_those_of_every_subset(scores, data):
    """Ties are common among six values."""
    n = data.draw(st.integers(1, len(scores)))
    expected = [float(chance) for chance in by_enumeration(scores, n)]
    found = best_of_weights(torch.tensor([scores], dtype=torch.float32), n)
    assert found[0].tolist() == pytest.approx(expected, abs=1e-12)


def test_three_of_four_by_hand():
    """Of 4 subsets of three, the largest is in 3; the one that lacks it has the second largest."""
    found = best_of_weights(torch.tensor([[0.5, -1.0, 2.0, 0.7], [4.0, 3.0, 2.0, 1.0]]), 3)
    assert found.tolist() == [[0.0, 0.0, 0.75, 0.25], [0.75, 0.25, 0.0, 0.0]]


def test_two_that_tie_at_the_top_share():
    """Best of 2 from (1, 1, 0): one subset ties, in the two others a 1 beats the 0. Gold 5 and 7: 6 on average."""
    weights = best_of_weights(torch.tensor([[1.0, 1.0, 0.0]]), 2)
    assert weights.tolist() == [[0.5, 0.5, 0.0]]
    assert float((weights * torch.tensor([[5.0, 7.0, 100.0]])).sum()) == 6.0


def test_one_of_all_is_the_mean_and_all_of_all_the_maximum():
    scores = torch.tensor([[3.0, 1.0, 2.0, 2.0]])
    assert best_of_weights(scores, 1).tolist() == [[0.25] * 4]
    assert best_of_weights(scores, 4).tolist() == [[1.0, 0.0, 0.0, 0.0]]


def test_many_samples_stay_exact():
    """N 600: the expected maximum of n of the numbers 1..N is n (N + 1) / (n + 1)."""
    scores = torch.randperm(600, generator=torch.Generator().manual_seed(0)).double()[None] + 1
    for n in (1, 2, 64, 599, 600):
        found = float((best_of_weights(scores, n) * scores).sum())
        assert found == pytest.approx(n * 601 / (n + 1), rel=1e-12)


def test_the_bound_on_kl():
    assert best_of_kl(1) == 0.0
    assert best_of_kl(2) == pytest.approx(math.log(2) - 0.5)
    assert best_of_kl(16) == pytest.approx(1.8350887, abs=1e-6)


def test_the_bound_is_the_kl_of_a_density_that_grows_with_its_rank():
    """The best of n of a uniform rank u has density n u^(n-1): its KL, by the midpoint rule."""
    n, cells = 5, 200_000
    u = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells
    density = n * u ** (n - 1)
    assert best_of_kl(n) == pytest.approx(float((density * density.log()).mean()), abs=1e-8)
