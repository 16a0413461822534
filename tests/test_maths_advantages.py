from __future__ import annotations

import math

import pytest
import torch

from stages.maths.advantages import (
    broadcast,
    dead_groups,
    gae,
    group_centred,
    group_relative,
    reinforce_pp,
    rloo,
)
from stages.maths.losses import policy_loss
from stages.maths.tensors import whiten
from tests.test_maths_tensors import in_shards

POISON = 1e6


def ragged_experience(lengths=(6, 1, 4, 2), width=6):
    """Random rewards and values with ragged lengths, and the poison that must change nothing under the padding."""
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, len(lengths), width, generator=generator, dtype=torch.float64)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    return rewards.masked_fill(~mask, POISON), values.masked_fill(~mask, POISON), mask


def one_by_one(rewards, values, mask):
    """The masked rewards and values of each response, as lists of floats."""
    for r, v, m in zip(rewards, values, mask, strict=True):
        yield r[m].tolist(), v[m].tolist()


def test_gae_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 2.0, POISON]], dtype=torch.float64)
    values = torch.tensor([[0.5, 1.0, 4.0, POISON]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True, False]])
    # gamma .5, lambda .5: deltas 1 + .5*1 - .5 = 1;  0 + .5*4 - 1 = 1;  2 + 0 - 4 = -2
    # A2 = -2;  A1 = 1 + .25 * -2 = .5;  A0 = 1 + .25 * .5 = 1.125
    advantages, returns = gae(rewards, values, mask, gamma=0.5, gae_lambda=0.5)
    assert advantages.tolist() == [[1.125, 0.5, -2.0, 0.0]]
    assert returns.tolist() == [[1.625, 1.5, 2.0, 0.0]]


def test_lambda_1_is_what_follows_minus_the_value():
    """Check 5: lambda = gamma = 1 gives the sum of the rewards from t on, less V."""
    rewards, values, mask = ragged_experience()
    advantages, returns = gae(rewards, values, mask, gamma=1.0, gae_lambda=1.0)
    for row, (r, v) in enumerate(one_by_one(rewards, values, mask)):
        for t in range(len(r)):
            assert abs(advantages[row, t].item() - (sum(r[t:]) - v[t])) < 1e-12
            assert abs(returns[row, t].item() - sum(r[t:])) < 1e-12


def test_lambda_0_is_the_temporal_difference():
    """Check 6: lambda = 0 gives r + gamma V' - V, with V' = 0 after the last token."""
    rewards, values, mask = ragged_experience()
    advantages, _ = gae(rewards, values, mask, gamma=0.9, gae_lambda=0.0)
    for row, (r, v) in enumerate(one_by_one(rewards, values, mask)):
        following = v[1:] + [0.0]
        for t in range(len(r)):
            assert abs(advantages[row, t].item() - (r[t] + 0.9 * following[t] - v[t])) < 1e-12


def test_gae_is_the_explicit_double_sum():
    """Check 7: A_t = sum over s >= t of (gamma lambda)^(s-t) delta_s, at gamma .9 and lambda .7."""
    rewards, values, mask = ragged_experience()
    advantages, returns = gae(rewards, values, mask, gamma=0.9, gae_lambda=0.7)
    for row, (r, v) in enumerate(one_by_one(rewards, values, mask)):
        following = v[1:] + [0.0]
        deltas = [r[s] + 0.9 * following[s] - v[s] for s in range(len(r))]
        for t in range(len(r)):
            expected = sum((0.9 * 0.7) ** (s - t) * deltas[s] for s in range(t, len(r)))
            assert abs(advantages[row, t].item() - expected) < 1e-12
            assert abs(returns[row, t].item() - (expected + v[t])) < 1e-12


def test_more_padding_changes_nothing():
    """Check 8: five more columns of padding, all of it poisoned, leave advantages and returns as they are, exactly."""
    rewards, values, mask = ragged_experience()
    wider = [torch.nn.functional.pad(x, (0, 5), value=POISON) for x in (rewards, values)]
    wider_mask = torch.nn.functional.pad(mask, (0, 5), value=False)
    clean = gae(rewards.masked_fill(~mask, 0), values.masked_fill(~mask, 0), mask, 0.9, 0.7)
    poisoned = gae(*wider, wider_mask, 0.9, 0.7)
    for before, after in zip(clean, poisoned, strict=True):
        assert torch.equal(after[:, :6], before)
        assert (after[~wider_mask] == 0).all()


def test_returns_come_from_advantages_before_whitening():
    """Check 9: the critic's target is the same number whether or not advantages are whitened afterwards."""
    rewards, values, mask = ragged_experience()
    advantages, returns = gae(rewards, values, mask, gamma=1.0, gae_lambda=0.95)
    kept_advantages, kept_returns = advantages.clone(), returns.clone()
    white = whiten(advantages, mask)
    assert torch.equal(advantages, kept_advantages)
    assert torch.equal(returns, kept_returns)
    assert torch.equal(returns[mask], (advantages + values)[mask])
    assert (returns - white - values)[mask].abs().max() > 0.1


def test_gae_leaves_its_inputs_alone():
    rewards, values, mask = ragged_experience()
    before = rewards.clone(), values.clone()
    gae(rewards, values, mask, gamma=1.0, gae_lambda=0.95)
    assert torch.equal(rewards, before[0])
    assert torch.equal(values, before[1])


# --- without a critic

# Three groups, not side by side, their ids anything: 1, 2, 6 and 3, 5 and a 5 alone.
GROUP = torch.tensor([900, -7, 900, 3, -7, 900])
SCORE = torch.tensor([1.0, 3.0, 2.0, 5.0, 5.0, 6.0], dtype=torch.float64)
WITHOUT_CRITIC = {"rloo": rloo, "relative": group_relative, "centred": group_centred}


def random_groups(sizes, seed=0, dtype=torch.float64):
    """Scores about 5 and shuffled group ids, `sizes` responses to each prompt."""
    generator = torch.Generator().manual_seed(seed)
    group = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    group = group[torch.randperm(len(group), generator=generator)]
    return 5 + torch.randn(len(group), generator=generator, dtype=dtype), group


def test_rloo_by_hand():
    # 1 - (2 + 6) / 2;  3 - 5;  2 - (1 + 6) / 2;  nobody else;  5 - 3;  6 - (1 + 2) / 2
    torch.testing.assert_close(rloo(SCORE, GROUP).tolist(), [-3.0, -2.0, -1.5, 0.0, 2.0, 4.5])


def test_rloo_has_two_forms_and_sums_to_0_in_every_group():
    """Check 39: return minus the mean of the others is K / (K - 1) times return minus the mean of all."""
    for sizes in ([4] * 6, [2, 5, 1, 3]):
        returns, group = random_groups(sizes)
        found = rloo(returns, group)
        for i, g in enumerate(group.tolist()):
            others = [s for j, s in enumerate(returns.tolist()) if group[j] == g and j != i]
            expected = returns[i].item() - sum(others) / len(others) if others else 0.0
            assert abs(found[i].item() - expected) < 1e-12
        for g, k in enumerate(sizes):
            mine = returns[group == g]
            other_form = k / max(k - 1, 1) * (mine - mine.mean())
            torch.testing.assert_close(found[group == g], other_form, rtol=0, atol=1e-12)
            assert abs(found[group == g].sum().item()) < 1e-12


def test_group_relative_by_hand():
    # 1, 2, 6: mean 3, squared deviations 4 + 1 + 9 over 2;  3, 5: mean 4, squared deviations 1 + 1 over 1
    for options, eps in (({}, 1e-4), ({"eps": 0.5}, 0.5)):
        wide, narrow = math.sqrt(7) + eps, math.sqrt(2) + eps
        expected = [-2 / wide, -1 / narrow, -1 / wide, 0.0, 1 / narrow, 3 / wide]
        torch.testing.assert_close(group_relative(SCORE, GROUP, **options).tolist(), expected, rtol=1e-12, atol=0)


def test_group_centred_by_hand():
    torch.testing.assert_close(group_centred(SCORE, GROUP).tolist(), [-2.0, -1.0, -1.0, 0.0, 1.0, 3.0])


@pytest.mark.parametrize("name", WITHOUT_CRITIC)
def test_what_all_responses_to_a_prompt_have_in_common_cancels(name):
    score, group = random_groups([4, 2, 3])
    shifted = score + torch.tensor([100.0, -30.0, 0.5], dtype=torch.float64)[group]
    found = WITHOUT_CRITIC[name](score, group)
    torch.testing.assert_close(WITHOUT_CRITIC[name](shifted, group), found, rtol=0, atol=1e-12)
    assert found.abs().min() > 1e-3


@pytest.mark.parametrize("name", WITHOUT_CRITIC)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_group_of_equal_scores_gives_no_gradient(name, dtype):
    """Check 40: exactly 0 and no nan, though the mean of equal numbers is not that number once it is rounded."""
    score = torch.full((9,), 0.1, dtype=dtype)
    means = [float(score[:n].sum() / n - score[0]) for n in range(2, 10)]
    n = 2 + next(i for i, off in enumerate(means) if off)
    advantage = WITHOUT_CRITIC[name](score[:n], torch.zeros(n, dtype=torch.int64))
    assert advantage.tolist() == [0.0] * n
    mask = torch.ones(n, 2, dtype=torch.bool)
    logprobs = torch.full((n, 2), -1.0, dtype=dtype, requires_grad=True)
    policy_loss(logprobs, logprobs.detach(), broadcast(advantage, mask), mask, 0.2).loss.backward()
    assert logprobs.grad.tolist() == [[0.0, 0.0]] * n


@pytest.mark.parametrize("name", WITHOUT_CRITIC)
def test_a_group_does_not_hear_of_the_others(name):
    """Check 40: beside a dead group, a single response and a spoilt score, the living group is as if alone."""
    score = torch.tensor([1.0, 7.0, 2.0, 7.0, 5.0, math.nan, 3.0])
    group = torch.tensor([0, 1, 0, 1, 2, 3, 3])
    alone = WITHOUT_CRITIC[name](score[[0, 2]], group[[0, 2]]).tolist()
    found = WITHOUT_CRITIC[name](score, group).tolist()
    assert [found[i] for i in (0, 2)] == alone and alone[0] < -0.4
    assert [found[i] for i in (1, 3, 4)] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("name", WITHOUT_CRITIC)
def test_scores_are_compared_in_fp32_at_least(name):
    group = torch.zeros(3, dtype=torch.int64)
    half = torch.tensor([100.0, 101.0, 103.0]).bfloat16()  # a mean of 101.33 would be 101.5 in bf16
    found = WITHOUT_CRITIC[name](half, group)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, WITHOUT_CRITIC[name](half.float(), group), rtol=0, atol=0)
    whole = WITHOUT_CRITIC[name](torch.tensor([100, 101, 103]), group)
    torch.testing.assert_close(whole, found, rtol=0, atol=0)
    assert WITHOUT_CRITIC[name](half.double(), group).dtype == torch.float64


@pytest.mark.parametrize("name", WITHOUT_CRITIC)
def test_a_rank_may_have_no_responses(name):
    assert WITHOUT_CRITIC[name](torch.zeros(0), torch.zeros(0, dtype=torch.int64)).shape == (0,)


def test_reinforce_pp_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 2.0, POISON], [-3.0, math.nan, math.inf, POISON]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    # gamma .5: 1 + 0 + .25 * 2;  0 + .5 * 2;  2
    assert reinforce_pp(rewards, mask, gamma=0.5).tolist() == [[1.5, 1.0, 2.0, 0.0], [-3.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_reinforce_pp_is_the_discounted_sum_from_each_token_on(gamma):
    rewards, _, mask = ragged_experience()
    found = reinforce_pp(rewards, mask, gamma)
    for row, (r, _) in enumerate(one_by_one(rewards, rewards, mask)):
        for t in range(len(r)):
            expected = sum(gamma ** (s - t) * r[s] for s in range(t, len(r)))
            assert abs(found[row, t].item() - expected) < 1e-12
    assert (found[~mask] == 0).all()


def test_broadcast_gives_every_token_the_advantage_of_its_response():
    mask = torch.tensor([[True, True, False], [True, False, False], [False] * 3])
    found = broadcast(torch.tensor([2.0, -3.0, math.nan]), mask)
    assert found.tolist() == [[2.0, 2.0, 0.0], [-3.0, 0.0, 0.0], [0.0, 0.0, 0.0]]


def test_dead_groups_are_those_without_spread():
    group = torch.tensor([5, 5, 2, 2, 2, 9, 4, 4, 4])
    score = torch.tensor([0.1, 0.1, 1.0, 1.0, 2.0, 3.0, 0.1, 0.1, 0.1])
    assert dead_groups(score, group) == pytest.approx(2 / 3)  # a group of one is not counted
    assert dead_groups(score[2:6], group[2:6]) == 0.0
    assert dead_groups(score[:2], group[:2]) == 1.0
    assert dead_groups(-score, group) == pytest.approx(2 / 3)
    assert dead_groups(-score[2:6], group[2:6]) == 0.0
    assert math.isnan(dead_groups(score[5:6], group[5:6]))
    assert math.isnan(dead_groups(score[:0], group[:0]))


def test_dead_groups_are_counted_in_fp32_at_least():
    score, group = torch.zeros(514).bfloat16(), torch.arange(257).repeat(2)  # bf16 has no 257
    score[:2] = 1
    assert dead_groups(score, group) == pytest.approx(255 / 257)


def test_dead_groups_are_counted_over_all_ranks():
    """Ranks number their groups alike and may have nothing: two of three groups are dead, not a mean of shares."""
    shards = [
        (torch.tensor([1.0, 1.0, 2.0, 2.0]), torch.tensor([0, 0, 1, 1])),
        (torch.tensor([1.0, 3.0]), torch.tensor([0, 0])),
        (torch.zeros(0), torch.zeros(0, dtype=torch.int64)),
    ]
    assert in_shards(lambda shard, reduce: dead_groups(*shard, reduce), shards) == [pytest.approx(2 / 3)] * 3
