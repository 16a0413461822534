from __future__ import annotations

import math

import pytest
import torch

from stages.maths.importance import engine_mismatch, importance_weights
from stages.maths.losses import policy_loss
from tests.test_maths_tensors import in_shards

MASK = torch.tensor([[True, True, True, False], [True, False, False, False]])


def logprobs_for(*ratios, dtype=torch.float64):
    """Log-probabilities of trainer and sampler (2, 4) with these trainer / sampler ratios, and poison elsewhere."""
    sampler = torch.full((2, 4), -2.0, dtype=dtype)
    trainer = torch.full((2, 4), math.nan, dtype=dtype)
    trainer[MASK] = sampler[MASK] + torch.tensor(ratios, dtype=dtype).log()
    sampler[~MASK] = math.inf
    return trainer, sampler


def test_the_same_engine_weighs_everything_alike():
    """Check 49: a weight of 1 for every token, 1e-4 where only fp32 noise lies between the two."""
    trainer, _ = logprobs_for(1, 1, 1, 1)
    assert importance_weights(trainer, trainer, MASK).tolist() == MASK.double().tolist()
    noise = 1e-5 * torch.randn(trainer.shape, generator=torch.Generator().manual_seed(0))
    found = importance_weights((trainer + noise).float(), trainer.float(), MASK)
    torch.testing.assert_close(found, MASK.float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_are_truncated_above_and_only_there(dtype):
    """Check 49: at most the cap, 2 unless told otherwise; what the trainer finds unlikely keeps its small weight."""
    ratios = (0.01, 1.5, 2.5, 40.0)
    trainer, sampler = logprobs_for(*ratios, dtype=dtype)
    for options, cap in (({}, 2.0), ({"cap": 3.0}, 3.0)):
        found = importance_weights(trainer, sampler, MASK, **options)
        assert found[MASK].tolist() == pytest.approx([min(r, cap) for r in ratios], rel=1e-5)
        assert found[~MASK].tolist() == [0.0] * 4
        assert found.max() <= cap


def test_weights_hold_out_at_the_extremes_and_have_no_gradient():
    trainer, sampler = logprobs_for(1, 1, 1, 1, dtype=torch.float32)
    trainer[0, :3] = torch.tensor([500.0, -500.0, -math.inf])
    trainer.requires_grad_()
    found = importance_weights(trainer, sampler, MASK)
    assert found[0].tolist() == pytest.approx([2.0, math.exp(-20), math.exp(-20), 0.0])
    assert not found.requires_grad


def test_a_weighted_policy_loss_corrects_for_the_sampler():
    """Check 49: averaged over what the sampler draws, the weighted gradient is the one under the trainer's law."""
    logits = torch.tensor([0.3, -0.4, 0.1], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([[1.0], [-2.0], [0.5]], dtype=torch.float64)
    logprobs = logits.log_softmax(0)[:, None]  # three responses of one token: every token there is
    drawn = torch.tensor([[0.25], [0.35], [0.4]], dtype=torch.float64)  # how often the sampler draws each
    mask = torch.ones(3, 1, dtype=torch.bool)
    weights = drawn * importance_weights(logprobs, drawn.log(), mask)
    loss = policy_loss(logprobs, logprobs.detach(), advantages, mask, 0.2, weights=weights).loss
    meant = -(logprobs.exp() * advantages).sum()
    found, expected = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (loss, meant))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    uncorrected = policy_loss(logprobs, logprobs.detach(), advantages, mask, 0.2, weights=drawn).loss
    assert (torch.autograd.grad(uncorrected, logits)[0] - expected).abs().max() > 1e-2


def test_engine_mismatch_by_hand():
    # weights 4, 1, 1, 2, not capped: mean 2, mean square 5.5, variance 1.5
    found = engine_mismatch(*logprobs_for(4, 1, 1, 2), MASK)
    expected = {
        "weight_mean": 2.0,
        "weight_std": math.sqrt(1.5),
        "effective_share": 4 / 5.5,
        "mismatch_kl": -3 * math.log(2) / 4,
    }
    assert found == pytest.approx(expected, rel=1e-12)
    assert all(type(number) is float for number in found.values())


def test_the_same_engine_has_no_mismatch():
    """Check 49: mean 1, deviation 0, every token effective, no KL; and the same where there is no token."""
    trainer, _ = logprobs_for(1, 1, 1, 1)
    expected = {"weight_mean": 1.0, "weight_std": 0.0, "effective_share": 1.0, "mismatch_kl": 0.0}
    assert engine_mismatch(trainer, trainer, MASK) == expected
    empty = engine_mismatch(trainer, trainer, torch.zeros_like(MASK))
    assert not any(math.isnan(number) for number in empty.values())


def test_mismatch_over_the_samplers_law():
    """Check 49: a sampler of 1/2, 1/4, 1/4 against a trainer of 1/4, 1/4, 1/2: mean weight 1, KL(sampler||trainer)."""
    sampler = torch.tensor([[0.5, 0.5, 0.25, 0.25]], dtype=torch.float64).log()
    trainer = torch.tensor([[0.25, 0.25, 0.25, 0.5]], dtype=torch.float64).log()
    found = engine_mismatch(trainer, sampler, torch.ones(1, 4, dtype=torch.bool))
    assert found["weight_mean"] == pytest.approx(1.0, rel=1e-12)
    assert found["mismatch_kl"] == pytest.approx(0.25 * math.log(2), rel=1e-12)


def test_mismatch_is_measured_over_all_ranks():
    trainer, sampler = logprobs_for(4, 1, 0.5, 3)
    whole = engine_mismatch(trainer, sampler, MASK)
    shards = [(trainer[:1], sampler[:1], MASK[:1]), (trainer[1:], sampler[1:], MASK[1:])]
    for found in in_shards(lambda shard, reduce: engine_mismatch(*shard, reduce), shards):
        assert found == pytest.approx(whole, rel=1e-12)
