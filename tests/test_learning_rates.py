"""Learning rates that follow the width."""

from __future__ import annotations

import pytest

from stages.training.learning_rates import AT_REFERENCE_WIDTH, auto_learning_rate


@pytest.mark.parametrize(("width", "rate"), [(64, 7.3e-3), (576, 1.3e-3), (2000, 5e-4), (4096, 2.9e-4)])
def test_demonstrations_by_hand(width, rate):
    """5e-4 x (2000 / width)^0.78, to two digits: (2000 / 64)^0.78 = e^(0.78 x 3.442) = 14.65."""
    assert auto_learning_rate("sft", width) == rate


@pytest.mark.parametrize("stage", AT_REFERENCE_WIDTH)
def test_a_wider_base_has_a_lower_rate(stage):
    rates = [auto_learning_rate(stage, width) for width in (32, 64, 256, 576, 4096, 16384)]
    assert rates == sorted(rates, reverse=True) and len(set(rates)) == len(rates)
