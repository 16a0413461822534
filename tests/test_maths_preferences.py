from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch

from stages.maths.kl import sequence_kl
from stages.maths.preferences import dpo_loss, implicit_reward, ipo_loss, kto_baseline, kto_loss
from stages.maths.tensors import sequence_sum
from tests.test_maths_tensors import in_shards


def double(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def minimise(parameter, loss_of):
    """LBFGS until nothing moves."""
    optimizer = torch.optim.LBFGS(
        [parameter], max_iter=500, tolerance_grad=1e-13, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        return loss

    optimizer.step(closure)


def slopes(losses, *inputs):
    return [slope.tolist() for slope in torch.autograd.grad(losses.sum(), inputs)]


def test_the_two_ways_to_a_log_ratio_agree():
    """Whole responses, tokens summed and never averaged; the reference's sum may have been stored."""
    policy, reference = double([-1.0, -2.0, 1e6], [-3.0, math.nan, 1e6]), double([-1.5, -4.0, 7.0], [-1.0, 7.0, 7.0])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert sequence_kl(policy, reference, mask).tolist() == [2.5, -2.0]
    assert (sequence_sum(policy, mask) - double(-5.5, -1.0)).tolist() == [2.5, -2.0]


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_a_policy_that_is_its_reference_prefers_nothing(label_smoothing):
    """Check 46: loss ln 2 and margin 0; the first step raises one side as it lowers the other."""
    better, worse = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    losses = dpo_loss(better, worse, beta=0.1, label_smoothing=label_smoothing)
    assert losses.tolist() == pytest.approx([math.log(2)] * 3, abs=1e-6)
    assert (implicit_reward(better, 0.1) - implicit_reward(worse, 0.1)).tolist() == [0.0] * 3
    up, down = slopes(losses, better, worse)
    assert up == pytest.approx([-0.1 * (0.5 - label_smoothing)] * 3)
    assert down == pytest.approx([0.1 * (0.5 - label_smoothing)] * 3)


def test_implicit_reward_by_hand():
    assert implicit_reward(double(2.0, -3.0), 0.5).tolist() == [1.0, -1.5]


def test_dpo_loss_by_hand():
    better, worse = double(3.0).requires_grad_(), double(-1.0).requires_grad_()  # a lead of 4, of 2 at beta .5
    yes, no = -math.log(sigmoid(2)), -math.log(sigmoid(-2))

    def found(**options):
        return dpo_loss(better, worse, 0.5, **options).item()

    assert found() == pytest.approx(yes, rel=1e-12)
    assert found(label_smoothing=0.1) == pytest.approx(0.9 * yes + 0.1 * no, rel=1e-12)
    assert found(probability=0.8) == pytest.approx(0.8 * yes + 0.2 * no, rel=1e-12)
    # a label that is right in 80 % of cases and flipped in 10 %: .8 * .9 + .2 * .1
    assert found(probability=0.8, label_smoothing=0.1) == pytest.approx(0.74 * yes + 0.26 * no, rel=1e-12)
    assert dpo_loss(worse, better, 0.5).item() == pytest.approx(no, rel=1e-12)
    up, down = slopes(dpo_loss(better, worse, 0.5), better, worse)
    assert (up, down) == (pytest.approx([-0.5 * sigmoid(-2)]), pytest.approx([0.5 * sigmoid(-2)]))


def test_smoothed_labels_are_met_at_their_own_log_odds():
    """cDPO stops where the implicit reward's lead says what the labels are worth: sigma = 1 - smoothing."""
    better = double(math.log(9) / 0.3).requires_grad_()
    (slope,) = slopes(dpo_loss(better, double(0.0), 0.3, label_smoothing=0.1), better)
    assert abs(slope[0]) < 1e-15


def test_preference_losses_keep_a_loss_per_row_in_fp32_at_least():
    half = torch.tensor([2.0, 0.0]).bfloat16()
    desirable = torch.tensor([True, False])
    for losses in (dpo_loss(half, half, 0.1), ipo_loss(half, half, 0.1), kto_loss(half, desirable, torch.zeros(()), 1)):
        assert (losses.dtype, losses.shape) == (torch.float32, (2,))
    probability = double(1.0, 0.25)
    losses = dpo_loss(double(4.0, 4.0), double(0.0, 0.0), 0.5, probability).tolist()
    assert losses[1] - losses[0] == pytest.approx(0.75 * 2)  # each flipped label costs the lead once more


def test_dpo_on_all_pairs_recovers_the_planted_reward():
    """Check 47: 8 responses, beta .3, soft Bradley-Terry labels: beta log(policy / reference) is the reward again."""
    generator = torch.Generator().manual_seed(0)
    reward = torch.randn(8, generator=generator, dtype=torch.float64)
    reference = torch.randn(8, generator=generator, dtype=torch.float64).log_softmax(0)
    first, second = torch.tensor(list(combinations(range(8), 2))).T
    chance = (reward[first] - reward[second]).sigmoid()
    logits = reference.clone().requires_grad_()

    def loss_of():
        log_ratio = logits.log_softmax(0) - reference
        return dpo_loss(log_ratio[first], log_ratio[second], 0.3, chance).mean()

    minimise(logits, loss_of)
    found = implicit_reward(logits.detach().log_softmax(0) - reference, 0.3)
    torch.testing.assert_close(found - found[0], reward - reward[0], rtol=0, atol=1e-5)
    tilted = reference.exp() * (reward / 0.3).exp()  # which makes it the optimum of PPO at kl_coef .3
    torch.testing.assert_close(logits.detach().softmax(0), tilted / tilted.sum(), rtol=0, atol=1e-5)


def test_ipo_loss_by_hand():
    better, worse = double(3.0).requires_grad_(), double(1.0).requires_grad_()  # lead 2; wanted 1 / (2 * .1) = 5
    assert ipo_loss(better, worse, 0.1).item() == pytest.approx(9.0)
    assert ipo_loss(worse, better, 0.1).item() == pytest.approx(49.0)
    assert ipo_loss(better, worse, 0.1, probability=0.75).item() == pytest.approx(0.75 * 9 + 0.25 * 49)
    up, down = slopes(ipo_loss(better, worse, 0.1), better, worse)
    assert (up, down) == (pytest.approx([-6.0]), pytest.approx([6.0]))


@pytest.mark.parametrize(("probability", "gap"), [(1.0, 5.0), (0.75, 2.5), (0.5, 0.0)])
def test_ipo_rests_at_a_finite_gap(probability, gap):
    """Check 48: one deterministic pair ends 1 / (2 beta) apart, where DPO would never end; a doubtful one closer."""
    logits, reference = torch.zeros(2, dtype=torch.float64, requires_grad=True), double(0.2, 0.8).log()

    def loss_of():
        log_ratio = logits.log_softmax(0) - reference
        return ipo_loss(log_ratio[:1], log_ratio[1:], 0.1, probability).sum()

    minimise(logits, loss_of)
    log_ratio = logits.detach().log_softmax(0) - reference
    assert (log_ratio[0] - log_ratio[1]).item() == pytest.approx(gap, abs=1e-4)


def test_kto_loss_by_hand():
    log_ratio = double(3.0, 3.0, -1.0, -1.0).requires_grad_()
    desirable = torch.tensor([True, False, True, False])
    # beta .5 and z0 1: gains 1 and -1
    losses = kto_loss(log_ratio, desirable, double(1.0)[0], 0.5)
    assert losses.tolist() == pytest.approx([1 - sigmoid(1), 1 - sigmoid(-1), 1 - sigmoid(-1), 1 - sigmoid(1)])
    weighed = kto_loss(log_ratio, desirable, double(1.0)[0], 0.5, desirable_weight=2.0, undesirable_weight=3.0)
    assert (weighed / losses).tolist() == pytest.approx([2.0, 3.0, 2.0, 3.0])
    (slope,) = slopes(losses, log_ratio)
    steep = 0.5 * sigmoid(1) * sigmoid(-1)
    assert slope == pytest.approx([-steep, steep, -steep, steep])


def test_kto_loss_keeps_its_digits_at_the_extremes():
    log_ratio = torch.tensor([40.0, -40.0, -500.0, 500.0], requires_grad=True)
    losses = kto_loss(log_ratio, torch.tensor([True, False, True, False]), torch.zeros(()), 1.0)
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([math.exp(-40), math.exp(-40), 1.0, 1.0], rel=1e-5, abs=0)
    assert log_ratio.grad.isfinite().all()


def test_kto_baseline_is_the_mean_never_below_0_and_a_constant():
    mismatched = double(1.0, -2.0, 4.0).requires_grad_()
    z0 = kto_baseline(mismatched)
    assert z0.item() == 1.0
    assert not z0.requires_grad
    assert kto_baseline(double(1.0, -2.0)).item() == 0.0
    assert kto_baseline(torch.tensor([1.0, 1.0078125]).bfloat16()).item() == 1.00390625  # in fp32


def test_kto_baseline_is_one_number_on_all_ranks():
    """The mean comes before the clamp, and of all rows: not a mean of each rank's own."""
    shards = [double(-5.0), double(4.0, 7.0), torch.zeros(0, dtype=torch.float64)]
    found = in_shards(lambda shard, reduce: kto_baseline(shard, reduce).item(), shards)
    assert found == [2.0] * 3
