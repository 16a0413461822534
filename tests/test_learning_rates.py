"""Learning rates that follow the width."""

from __future__ import annotations

import pytest

from stages.training.learning_rates import LAWS, auto_learning_rate


@pytest.mark.parametrize(("width", "rate"), [(64, 5.6e-3), (576, 1.3e-3), (2000, 6e-4), (4096, 3.8e-4)])
def test_demonstrations_by_hand(width, rate):
    """6e-4 x (2000 / width)^0.65, to two digits: (2000 / 64)^0.65 = e^(0.65 x 3.442) = 9.37."""
    assert auto_learning_rate("sft", width) == rate


@pytest.mark.parametrize("stage", LAWS)
def test_a_wider_base_has_a_lower_rate(stage):
    rates = [auto_learning_rate(stage, width) for width in (32, 64, 256, 576, 4096, 16384)]
    assert rates == sorted(rates, reverse=True) and len(set(rates)) == len(rates)
