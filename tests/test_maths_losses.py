from __future__ import annotations

import math
from functools import cache
from itertools import combinations

import pytest
import torch
from torch.nn.functional import pad

from stages.maths.losses import kl_loss, pair_loss, policy_loss, token_nll, value_loss
from stages.maths.statistics import accuracy_of_pairs, correlation
from stages.maths.tensors import token_logprobs

POISON = 1e6
LENGTHS = (7, 1, 12, 3)


def ragged(*, count, lengths=LENGTHS, width=12, seed=0, dtype=torch.float64):
    """`count` random (B, T) tensors that differ by about 0.3 from a common one, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(len(lengths), width, generator=generator, dtype=dtype)
    tensors = [common + 0.3 * torch.randn(common.shape, generator=generator, dtype=dtype) for _ in range(count)]
    return tensors, torch.arange(width) < torch.tensor(lengths)[:, None]


def double(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


# Every token loss as a function of (trained tensor, two constants, mask, denominator).
TOKEN_LOSSES = {
    "policy": lambda x, y, z, mask, n=None: policy_loss(x, y, z, mask, 0.2, n).loss,
    "value": lambda x, y, z, mask, n=None: value_loss(x, y, z, mask, 0.2, n).loss,
    "nll": lambda x, y, z, mask, n=None: token_nll(x, mask, n),
    "dual clip": lambda x, y, z, mask, n=None: policy_loss(x, y, z, mask, 0.2, n, clip_high=0.3, dual_clip=1.5).loss,
    "k1": lambda x, y, z, mask, n=None: kl_loss(x, y, mask, "k1", n),
    "k2": lambda x, y, z, mask, n=None: kl_loss(x, y, mask, "k2", n),
    "k3": lambda x, y, z, mask, n=None: kl_loss(x, y, mask, "k3", n),
}


def test_policy_gradient_at_ratio_1():
    """Check 4: minus the mean of A times the gradient of log pi, which for logits is A (one-hot - softmax)."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(5, (3, 4), generator=generator)
    advantages = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    mask = torch.arange(4) < torch.tensor([[4], [1], [2]])
    logprobs = token_logprobs(logits, tokens)
    result = policy_loss(logprobs, logprobs.detach(), advantages, mask, 0.2)
    result.loss.backward()
    one_hot = torch.eye(5, dtype=torch.float64)[tokens]
    expected = -advantages[..., None] * (one_hot - logits.detach().softmax(-1)) / 7
    expected[~mask] = 0
    torch.testing.assert_close(logits.grad, expected, rtol=1e-12, atol=1e-14)
    assert result.loss.item() == pytest.approx(-advantages[mask].mean().item(), rel=1e-12)
    assert result.ratio.tolist() == mask.double().tolist()
    assert (result.clipped_count.item(), result.approx_kl_sum.item()) == (0, 0)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope", "clipped"),
    [
        (0.5, 1.0, -0.5, -0.5, 0),
        (1.0, 1.0, -1.0, -1.0, 0),
        (1.5, 1.0, -1.2, 0.0, 1),
        (0.5, -1.0, 0.8, 0.0, 1),
        (1.0, -1.0, 1.0, 1.0, 0),
        (1.5, -1.0, 1.5, 1.5, 0),
    ],
)
def test_ratio_clip_truth_table(ratio, advantage, loss, slope, clipped):
    """Check 30: loss and gradient for ratio .5, 1, 1.5 and advantage +-1 at clip range .2; a pad beside it."""
    logprobs = double([math.log(ratio) - 2.0, 5.0]).requires_grad_()
    mask = torch.tensor([[True, False]])
    result = policy_loss(logprobs, double([-2.0, -5.0]), double([advantage, POISON]), mask, 0.2)
    result.loss.backward()
    assert result.loss.item() == pytest.approx(loss, abs=1e-15)
    assert logprobs.grad[0].tolist() == pytest.approx([slope, 0.0], abs=1e-15)
    assert result.clipped_count.item() == clipped
    assert result.ratio[0].tolist() == pytest.approx([ratio, 0.0], abs=1e-15)
    assert result.approx_kl_sum.item() == pytest.approx(math.log(ratio) ** 2 / 2, abs=1e-15)
    assert not result.ratio.requires_grad
    assert not result.approx_kl_sum.requires_grad


def test_a_ratio_out_of_all_bounds_stays_finite():
    mask = torch.ones(1, 2, dtype=torch.bool)
    result = policy_loss(torch.tensor([[500.0, -500.0]]), torch.zeros(1, 2), -torch.ones(1, 2), mask, 0.2)
    assert result.ratio[0].tolist() == pytest.approx([math.exp(20), math.exp(-20)])
    assert result.loss.item() == pytest.approx((math.exp(20) + 0.8) / 2)


@pytest.mark.parametrize(
    ("value", "target", "loss", "slope", "clipped"),
    [
        (1.5, 2.0, 0.32, 0.0, 1),  # up, towards the return: held at 1.2, error .8 beats .5
        (1.5, 0.0, 1.125, 1.5, 0),  # up, away from it: 1.5 beats 1.2
        (0.5, 2.0, 1.125, -1.5, 0),
        (0.5, 0.0, 0.32, 0.0, 1),
        (1.125, 2.0, 0.3828125, -0.875, 0),  # within the clip range nothing is held
    ],
)
def test_value_clip_takes_the_larger_error(value, target, loss, slope, clipped):
    """Check 32: the old value is 1 and the clip range .2; the value went up or down, towards the return or away."""
    values = double([value, 7.0]).requires_grad_()
    mask = torch.tensor([[True, False]])
    result = value_loss(values, double([1.0, -POISON]), double([target, POISON]), mask, 0.2)
    result.loss.backward()
    assert result.loss.item() == pytest.approx(loss, abs=1e-15)
    assert values.grad[0].tolist() == pytest.approx([slope, 0.0], abs=1e-15)
    assert result.clipped_count.item() == clipped


def test_rounding_is_not_counted_as_clipping():
    (x, old, other), mask = ragged(count=3, lengths=(50,) * 40, width=50, dtype=torch.float32)
    near = old + 0.1 * torch.tanh(x)
    assert policy_loss(near, old, other, mask, 0.2).clipped_count.item() == 0
    assert value_loss(near, old, other, mask, 0.2).clipped_count.item() == 0


def test_clipped_tokens_are_counted_under_the_mask_only():
    log_ratio = double([math.log(1.5), math.log(1.5), math.log(1.5)], [math.log(1.5), 0.0, math.log(1.5)])
    mask = torch.tensor([[True, True, False], [True, True, False]])
    zeros, ones = torch.zeros_like(log_ratio), torch.ones_like(log_ratio)
    assert policy_loss(log_ratio, zeros, ones, mask, 0.2).clipped_count.item() == 3
    assert value_loss(log_ratio, zeros, ones, mask, 0.2).clipped_count.item() == 3
    expected = 3 * math.log(1.5) ** 2 / 2
    assert policy_loss(log_ratio, zeros, ones, mask, 0.2).approx_kl_sum.item() == pytest.approx(expected)


def test_token_nll_by_hand():
    logprobs = double([-1.0, -2.0, POISON], [-6.0, POISON, POISON])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert token_nll(logprobs, mask).item() == 3.0
    assert token_nll(logprobs, mask, denominator=18).item() == 0.5
    assert token_nll(logprobs, mask, denominator=torch.tensor(18.0)).item() == 0.5


@pytest.mark.parametrize("name", TOKEN_LOSSES)
@pytest.mark.parametrize("poison", [POISON, math.inf, math.nan])
def test_padding_does_not_reach_losses_or_gradients(name, poison):
    """Check 8: poison in place of zeros changes no bit; five more poisoned columns change nothing but rounding."""
    loss = TOKEN_LOSSES[name]
    tensors, mask = ragged(count=3)

    def loss_and_slope(fills, more):
        filled = [tensor.masked_fill(~mask, fill) for tensor, fill in zip(tensors, fills, strict=True)]
        x, y, z = (pad(tensor, (0, more), value=fill) for tensor, fill in zip(filled, fills, strict=True))
        x.requires_grad_()
        value = loss(x, y, z, pad(mask, (0, more), value=False))
        return value.item(), torch.autograd.grad(value, x)[0]

    value, slope = loss_and_slope((0, 0, 0), 0)
    for fills in ((poison, poison, poison), (poison, 0, 0), (0, poison, 0), (0, 0, poison)):
        poisoned, poisoned_slope = loss_and_slope(fills, 0)
        assert poisoned == value
        assert torch.equal(poisoned_slope, slope)
    wider, wider_slope = loss_and_slope((poison, poison, poison), 5)
    assert wider == pytest.approx(value, rel=1e-14)
    torch.testing.assert_close(wider_slope, pad(slope, (0, 5)), rtol=1e-14, atol=0)
    assert (slope[~mask] == 0).all()


@pytest.mark.parametrize("name", TOKEN_LOSSES)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_micro_batches_add_up_to_the_batch(name, size):
    """Checks 24 and 26: over one denominator, summed pieces give the loss and gradient of the whole."""
    loss = TOKEN_LOSSES[name]
    (x, y, z), mask = ragged(count=3)
    x.requires_grad_()
    whole = loss(x, y, z, mask)
    pieces = zip(*(tensor.split(size) for tensor in (x, y, z, mask)), strict=True)
    summed = sum(loss(*piece, 23) for piece in pieces)  # 7 + 1 + 12 + 3 tokens
    assert summed.item() == pytest.approx(whole.item(), rel=1e-12)
    expected = torch.autograd.grad(whole, x)[0]
    torch.testing.assert_close(torch.autograd.grad(summed, x)[0], expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_a_mean_of_means_is_another_gradient(name):
    """Check 25: averaging each row's own mean is off by far more than 1 %."""
    loss = TOKEN_LOSSES[name]
    (x, y, z), mask = ragged(count=3)
    x.requires_grad_()
    expected = torch.autograd.grad(loss(x, y, z, mask), x)[0]
    rows = zip(*(tensor.split(1) for tensor in (x, y, z, mask)), strict=True)
    averaged = torch.autograd.grad(sum(loss(*row) for row in rows) / 4, x)[0]
    assert (averaged - expected).norm() > 0.01 * expected.norm()


def test_an_empty_mask_gives_zero_and_not_nan():
    x, nothing = torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.bool)
    assert [loss(x, x, x, nothing).item() for loss in TOKEN_LOSSES.values()] == [0] * len(TOKEN_LOSSES)


def test_pair_loss_by_hand():
    def found(*scores, **options):
        return pair_loss(*(double(score) for score in scores), **options).item()

    def softplus(x):
        return math.log1p(math.exp(x))

    assert found(1.0, 0.0) == pytest.approx(softplus(-1), rel=1e-12)
    assert found(0.0, 1.0) == pytest.approx(softplus(1), rel=1e-12)
    assert found(1.0, 0.0, probability=0.8) == pytest.approx(0.8 * softplus(-1) + 0.2 * softplus(1), rel=1e-12)
    assert found(3.0, 1.0, margin=0.5) == pytest.approx(softplus(-1.5), rel=1e-12)
    assert found(3.0, 1.0, probability=0.8, margin=0.5) == pytest.approx(0.8 * softplus(-1.5) + 0.2 * softplus(1.5))
    assert found(3.0, 1.0, centre_coef=0.01) == pytest.approx(softplus(-2) + 0.16, rel=1e-12)
    assert found(3.0, -3.0, centre_coef=0.01) == pytest.approx(softplus(-6), rel=1e-12)


def test_pair_loss_keeps_a_loss_per_pair():
    losses = pair_loss(
        double(0.0, 1.0), double(0.0, 1.0), probability=double(1.0, 0.3), margin=double(0.0, 0.0), centre_coef=1.0
    )
    assert losses.tolist() == pytest.approx([math.log(2), math.log(2) + 4])


def test_pair_loss_is_ln_2_at_zero_and_blind_to_a_common_shift():
    """Check 43: a zero head knows nothing, whatever the label; only the difference of scores counts."""
    zero = torch.zeros(3)
    assert pair_loss(zero, zero).tolist() == pytest.approx([math.log(2)] * 3, abs=1e-6)
    assert pair_loss(zero, zero, probability=0.3).tolist() == pytest.approx([math.log(2)] * 3, abs=1e-6)
    better, worse = double(0.5, -1.0, 2.0), double(1.5, -2.0, 2.0)
    expected = pair_loss(better, worse, 0.9, 0.25)
    torch.testing.assert_close(pair_loss(better + 100, worse + 100, 0.9, 0.25), expected, rtol=1e-12, atol=0)
    assert (pair_loss(better + 1, worse, 0.9, 0.25) - expected).abs().min() > 0.01


def test_pair_loss_computes_in_fp32_and_holds_out_at_the_extremes():
    half = torch.tensor([2.0]).bfloat16()
    assert pair_loss(half, half).dtype == torch.float32
    lead = double(40.0, -1000.0).requires_grad_()
    losses = pair_loss(lead, torch.zeros_like(lead))
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([math.exp(-40), 1000.0], rel=1e-12)
    assert lead.grad.tolist() == pytest.approx([-math.exp(-40), -1.0], rel=1e-12)


def test_a_soft_label_is_met_at_its_own_log_odds():
    lead = double(math.log(4) + 0.5).requires_grad_()  # sigma(lead - margin) = 0.8
    (slope,) = torch.autograd.grad(pair_loss(lead, torch.zeros_like(lead), 0.8, 0.5).sum(), lead)
    assert abs(slope.item()) < 1e-15


def test_all_pairs_of_four_responses():
    """Check 44: six pairs, by explicit sums; the gradients of the four scores sum to 0."""
    scores = double(0.3, -0.7, 1.9, 0.1).requires_grad_()  # ranked best first, whatever the scores say
    pairs = torch.tensor(list(combinations(range(4), 2)))
    loss = pair_loss(scores[pairs[:, 0]], scores[pairs[:, 1]]).mean()
    loss.backward()
    s = scores.tolist()
    doubt = {(i, j): 1 / (1 + math.exp(s[i] - s[j])) for i, j in combinations(range(4), 2)}  # chance of the wrong order
    assert loss.item() == pytest.approx(-sum(math.log(1 - d) for d in doubt.values()) / 6, rel=1e-12)
    for k in range(4):
        expected = sum(d * ((j == k) - (i == k)) for (i, j), d in doubt.items()) / 6
        assert scores.grad[k].item() == pytest.approx(expected, rel=1e-12)
    assert abs(scores.grad.sum().item()) < 1e-12


@cache
def fitted_bradley_terry():
    """60 items with planted scores, 20 000 judged pairs; returns planted scores, fitted scores, winners, losers."""
    generator = torch.Generator().manual_seed(0)
    planted = torch.randn(60, generator=generator, dtype=torch.float64)
    first = torch.randint(60, (20_000,), generator=generator)
    second = (first + torch.randint(1, 60, (20_000,), generator=generator)) % 60
    chance = (planted[first] - planted[second]).sigmoid()
    first_wins = torch.rand(20_000, generator=generator, dtype=torch.float64) < chance
    winners, losers = torch.where(first_wins, first, second), torch.where(first_wins, second, first)
    fitted = torch.zeros(60, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([fitted], max_iter=50, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = pair_loss(fitted[winners], fitted[losers]).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    return planted, fitted.detach(), winners, losers


def test_bradley_terry_recovers_planted_scores():
    """Check 41: correlation above .98 and a slope of about 1."""
    planted, fitted, _, _ = fitted_bradley_terry()
    slope = ((planted - planted.mean()) * fitted).sum() / (planted - planted.mean()).square().sum()
    assert correlation(planted, fitted) > 0.98
    assert 0.9 < slope.item() < 1.1


def test_accuracy_meets_the_noise_ceiling():
    """Check 42: no model of noisy comparisons can be right more often than E[max(p, 1 - p)]."""
    planted, fitted, winners, losers = fitted_bradley_terry()
    chance = (planted[winners] - planted[losers]).sigmoid()
    ceiling = torch.maximum(chance, 1 - chance).mean().item()
    assert 0.6 < ceiling < 0.9
    assert abs(accuracy_of_pairs(fitted[winners] - fitted[losers]) - ceiling) < 0.02
