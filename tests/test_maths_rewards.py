from __future__ import annotations

import json
import math
from dataclasses import FrozenInstanceError, asdict

import pytest
import torch

from stages.maths.advantages import gae
from stages.maths.rewards import RunningMoments, charge_missing_eos, combine_scores, length_penalty, shape_rewards
from stages.reward_knobs import COMBINATIONS
from tests.test_maths_tensors import in_shards


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


def test_length_is_charged_beyond_the_limit_only():
    lengths = torch.tensor([1, 100, 101, 120])
    assert length_penalty(lengths, limit=100, coef=0.25).tolist() == [0.0, 0.0, 0.25, 5.0]
    assert length_penalty(lengths, limit=100, coef=0.0).tolist() == [0.0, 0.0, 0.0, 0.0]
    assert length_penalty(lengths, limit=0.5, coef=1).tolist() == [0.5, 99.5, 100.5, 119.5]


def batches(*sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [3 * torch.randn(n, generator=generator, dtype=torch.float64) + 50 + n for n in sizes]


def seen(*scores):
    moments = RunningMoments()
    for score in scores:
        moments = moments.updated(score)
    return moments


def test_running_moments_by_hand():
    moments = seen(double(1.0, 3.0), double(8.0))
    # 1, 3, 8: mean 4, squared deviations 9 + 1 + 16
    assert (moments.count, moments.mean, moments.m2) == (3.0, 4.0, 26.0)
    assert moments.deviation == pytest.approx(math.sqrt(26 / 3))
    assert moments.normalise(double(4.0, 8.0)).tolist() == pytest.approx([0.0, 4 / math.sqrt(26 / 3)])


def test_running_moments_are_those_of_all_scores_at_once():
    parts = batches(5, 1, 17, 2)
    together = torch.cat(parts)
    for moments in (seen(*parts), seen(*reversed(parts)), seen(together)):
        assert moments.count == 25
        assert moments.mean == pytest.approx(together.mean().item(), rel=1e-12)
        assert moments.deviation == pytest.approx(together.std(correction=0).item(), rel=1e-12)
    normal = seen(*parts).normalise(together)
    assert abs(normal.mean().item()) < 1e-12
    assert normal.std(correction=0).item() == pytest.approx(1.0, rel=1e-12)


def test_running_moments_of_ranks_are_those_of_one():
    first, second = batches(6, 3)
    shards = [(first[:1], second[:2]), (first[1:], second[2:]), (first[:0], second[:0])]

    def work(shard, reduce):
        return RunningMoments().updated(shard[0], reduce).updated(shard[1], reduce)

    whole = seen(first, second)
    for moments in in_shards(work, shards):
        assert list(asdict(moments).values()) == pytest.approx(list(asdict(whole).values()), rel=1e-12)


def test_running_moments_survive_being_written_down():
    """Check 53: three floats through JSON go on as if nothing had happened, to the last bit."""
    first, second = (score.float() for score in batches(7, 4))
    moments = seen(first)
    back = RunningMoments(**json.loads(json.dumps(asdict(moments))))
    assert back == moments
    assert back.updated(second) == moments.updated(second)
    assert all(type(number) is float for number in asdict(moments).values())


def test_updated_moments_are_new_ones():
    moments = seen(double(1.0, 3.0))
    moments.updated(double(100.0))
    assert moments == RunningMoments(2.0, 2.0, 2.0)
    with pytest.raises(FrozenInstanceError):
        moments.mean = 0.0


def test_what_has_not_varied_is_shifted_but_not_scaled():
    assert RunningMoments().normalise(double(3.0, -1.0)).tolist() == [3.0, -1.0]
    assert seen(double(5.0)).normalise(double(5.0, 8.0)).tolist() == [0.0, 3.0]
    tenths = double(0.1, 0.1, 0.1)  # their mean is not 0.1, so their deviation is not 0
    assert seen(tenths).deviation > 0
    assert seen(tenths, tenths, tenths).normalise(tenths).abs().max() < 1e-6
    small = double(1e-4, 3e-4)
    assert seen(small).normalise(small).tolist() == pytest.approx([-1.0, 1.0])


def test_scores_that_are_not_numbers_are_left_out():
    moments = seen(double(1.0, math.nan, 3.0, math.inf), double(-math.inf, math.nan), torch.zeros(0))
    assert moments == RunningMoments(2.0, 2.0, 2.0)
    assert seen(torch.zeros(0), double(math.nan)) == RunningMoments()


def test_running_moments_are_counted_in_fp32_at_least():
    moments = seen(torch.ones(257).bfloat16(), torch.tensor([1, 1, 2]))  # bf16 has no 257
    assert moments.count == 260
    assert moments.mean == pytest.approx(261 / 260)


# --- several sources


def test_scores_of_several_sources_become_one():
    """Weighted scores 2, 4, 9 and 1, 1, 1: sum 15 and 3, mean 5 and 1, least 2 and 1, deviation sqrt(26 / 3) and 0."""
    scores, weights = torch.tensor([[1.0, 0.5], [4.0, 1.0], [3.0, 1 / 3]]), [2.0, 1.0, 3.0]
    found = {how: combine_scores(scores, weights, how, 0.5).tolist() for how in COMBINATIONS}
    deviation = math.sqrt(((2 - 5) ** 2 + (4 - 5) ** 2 + (9 - 5) ** 2) / 3)
    assert found["sum"] == pytest.approx([15, 3])
    assert found["mean"] == pytest.approx([5, 1])
    assert found["min"] == pytest.approx([2, 1])
    assert found["mean-std"] == pytest.approx([5 - 0.5 * deviation, 1])


def test_one_source_is_its_weighted_score_however_it_is_combined():
    score = torch.tensor([[1.5, -2.0]])
    assert all(combine_scores(score, [2.0], how, 1.0).tolist() == [3, -4] for how in COMBINATIONS)
