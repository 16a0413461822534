from __future__ import annotations

import torch

from stages.maths.advantages import gae
from stages.maths.tensors import whiten

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
