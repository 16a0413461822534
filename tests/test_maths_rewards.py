from __future__ import annotations

import pytest
import torch

from stages.maths.advantages import gae
from stages.maths.rewards import charge_missing_eos, shape_rewards


def double(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


@pytest.mark.parametrize(
    ("how", "penalty", "expected"),
    [
        ("floor", 1.0, [2.0, -4.0, -1.0, -3.0]),
        ("floor", 0.25, [2.0, -3.25, -0.25, -3.0]),
        ("subtract", 1.0, [2.0, -4.0, -0.5, -3.0]),
        ("replace", 1.0, [2.0, -1.0, -1.0, -3.0]),
        ("replace", 0.25, [2.0, -0.25, -0.25, -3.0]),
    ],
)
def test_a_response_that_never_ends_is_charged(how, penalty, expected):
    """Check 20: of four responses the first and last ended; their scores stay, whatever they are."""
    score, ended = double(2.0, -3.0, 0.5, -3.0), torch.tensor([True, False, False, True])
    charged = charge_missing_eos(score, ended, penalty, how)
    assert charged.tolist() == expected
    assert score.tolist() == [2.0, -3.0, 0.5, -3.0]


def test_the_floor_never_rewards_going_on_forever():
    """Check 20: plain replacement lifts a score below -1, the floor lowers every score by 1 at least."""
    score, nothing_ended = double(-5.0, -1.0, 0.0, 3.0), torch.zeros(4, dtype=torch.bool)
    assert (charge_missing_eos(score, nothing_ended, 1.0, "floor") <= score - 1).all()
    assert charge_missing_eos(score, nothing_ended, 1.0, "replace")[0] > score[0]


@pytest.mark.parametrize("how", ["floor", "subtract", "replace"])
def test_penalty_0_charges_nothing(how):
    score = double(2.0, -3.0)
    assert charge_missing_eos(score, torch.tensor([False, False]), 0.0, how).tolist() == [2.0, -3.0]


def test_another_way_to_charge_is_refused():
    with pytest.raises(ValueError, match="'halve'"):
        charge_missing_eos(double(1.0), torch.tensor([False]), 1.0, "halve")


def test_the_score_lands_on_the_last_token():
    """Check 19: score at e on top of that token's KL; each row sums to score - kl_coef * sequence KL."""
    poison = 1e6
    kl = torch.tensor([[0.5, -0.25, 1.0], [2.0, poison, poison], [1.0, 4.0, poison]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True], [True, False, False], [True, True, False]])
    rewards = shape_rewards(double(10.0, 20.0, -30.0), kl, mask, kl_coef=0.5)
    assert rewards.tolist() == [[-0.25, 0.125, 9.5], [19.0, 0.0, 0.0], [-0.5, -32.0, 0.0]]
    assert rewards.sum(dim=1).tolist() == [10 - 0.5 * 1.25, 20 - 0.5 * 2.0, -30 - 0.5 * 5.0]


def test_infinite_padding_does_not_reach_the_rewards():
    """Check 8: the padding's KL may be anything at all."""
    kl = torch.tensor([[1.0, float("inf"), float("nan")]])
    rewards = shape_rewards(torch.tensor([3.0]), kl, torch.tensor([[True, False, False]]), kl_coef=1.0)
    assert rewards.tolist() == [[2.0, 0.0, 0.0]]


@pytest.mark.parametrize("gae_lambda", [0.0, 0.5, 0.95, 1.0])
def test_score_at_the_last_token_or_in_a_slot_behind_it(gae_lambda):
    """Check 21: moving the score to slot e+1, valued V_{e+1}, changes A_e by (1 - lambda) (V_{e+1} - score)."""
    score, value_behind = 3.0, 5.0
    kl = torch.zeros(1, 3, dtype=torch.float64)
    values = torch.tensor([[0.5, 1.0, value_behind]], dtype=torch.float64)
    here = torch.tensor([[True, True, False]])
    behind = torch.tensor([[True, True, True]])
    ours, _ = gae(shape_rewards(double(score), kl, here, 0.1), values, here, 1.0, gae_lambda)
    theirs, _ = gae(shape_rewards(double(score), kl, behind, 0.1), values, behind, 1.0, gae_lambda)
    assert ours[0, 1].item() == score - 1.0  # V_{e+1} = 0, and the score is all that comes
    expected = (1 - gae_lambda) * (value_behind - score)
    assert abs((theirs - ours)[0, 1].item() - expected) < 1e-12
