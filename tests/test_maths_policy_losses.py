"""Variants of the policy's loss: other clips, other weights of tokens, and the KL as a loss."""

from __future__ import annotations

import math

import pytest
import torch

from stages.maths.losses import aggregate, kl_loss, policy_loss, token_weights
from stages.maths.tensors import entropy_of
from tests.test_maths_losses import LENGTHS, POISON, double, ragged

ONE = torch.tensor([[True, False]])


def one_token(ratio, advantage, clip_range=0.2, **options):
    """Loss, slope and clipped count of one token, a poisoned pad beside it."""
    logprobs = double([math.log(ratio) - 2.0, 5.0]).requires_grad_()
    result = policy_loss(logprobs, double([-2.0, -5.0]), double([advantage, POISON]), ONE, clip_range, **options)
    (slope,) = torch.autograd.grad(result.loss, logprobs)
    assert slope[0, 1] == 0
    return result.loss.item(), slope[0, 0].item(), result.clipped_count.item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope", "clipped"),
    [
        (10.0, -1.0, 3.0, 0.0, 0),
        (10.0, -2.0, 6.0, 0.0, 0),
        (2.0, -1.0, 2.0, 2.0, 0),  # below the cap it is PPO
        (0.5, -1.0, 0.8, 0.0, 1),
        (10.0, 1.0, -1.2, 0.0, 1),  # a positive advantage is not capped
        (0.5, 1.0, -0.5, -0.5, 0),
        (10.0, 0.0, 0.0, 0.0, 0),
    ],
)
def test_dual_clip_caps_the_loss_of_a_negative_advantage(ratio, advantage, loss, slope, clipped):
    """Check 31: A = -1, ratio 10 and c = 3 cost 3, and teach nothing."""
    assert one_token(ratio, advantage, dual_clip=3.0) == pytest.approx((loss, slope, clipped), abs=1e-14)


def test_without_dual_clip_the_loss_grows_with_the_ratio():
    assert one_token(10.0, -1.0) == pytest.approx((10.0, 10.0, 0))


@pytest.mark.parametrize(
    ("clip_high", "ratio", "advantage", "loss", "slope", "clipped"),
    [
        (0.5, 1.4, 1.0, -1.4, -1.4, 0),  # 1.2 would have clipped it
        (0.5, 1.6, 1.0, -1.5, 0.0, 1),
        (0.5, 0.7, -1.0, 0.8, 0.0, 1),  # the lower end stays at .8
        (0.5, 0.85, -1.0, 0.85, 0.85, 0),
        (0.5, 1.6, -1.0, 1.6, 1.6, 0),
        (0.0, 1.1, 1.0, -1.0, 0.0, 1),  # 0 is a range, not the absence of one
        (None, 1.4, 1.0, -1.2, 0.0, 1),
    ],
)
def test_the_upper_clip_may_be_another_than_the_lower(clip_high, ratio, advantage, loss, slope, clipped):
    found = one_token(ratio, advantage, clip_high=clip_high)
    assert found == pytest.approx((loss, slope, clipped), abs=1e-14)


# --- how much each token counts


STEP = {"tokens": double(23.0)[0], "sequences": double(4.0)[0], "max_length": 16}  # lengths 7, 1, 12, 3 of at most 16


def test_token_weights_by_hand():
    mask = torch.tensor([[True, True, True, False], [True, False, False, False], [False] * 4])
    step = {"tokens": 4, "sequences": 2, "max_length": 5}
    quarter, sixth, half, tenth = (torch.tensor(x).item() for x in (1 / 4, 1 / 6, 1 / 2, 1 / 10))  # in fp32
    rows = {"token": (quarter, quarter), "sequence": (sixth, half), "constant": (tenth, tenth)}
    for how, (long, short) in rows.items():
        expected = [[long] * 3 + [0.0], [short] + [0.0] * 3, [0.0] * 4]
        assert token_weights(mask, how, **step).tolist() == expected


def test_weights_of_tokens_and_of_sequences_add_up_to_1_over_a_step():
    _, mask = ragged(count=1)
    assert token_weights(mask, "token", **STEP).sum().item() == pytest.approx(1.0, rel=1e-12)
    assert token_weights(mask, "sequence", **STEP).sum().item() == pytest.approx(1.0, rel=1e-12)
    assert token_weights(mask, "constant", **STEP).sum().item() == pytest.approx(23 / 64, rel=1e-12)


def weighted_losses(x, y, z, mask, how):
    weights = token_weights(mask, how, **STEP)
    yield policy_loss(x, y, z, mask, 0.2, clip_high=0.3, dual_clip=1.5, weights=weights).loss
    for estimator in ("k1", "k2", "k3"):
        yield kl_loss(x, y, mask, estimator, weights=weights)


@pytest.mark.parametrize("how", ["token", "sequence", "constant"])
def test_weighted_losses_by_explicit_means(how):
    """Tokens over all tokens; means of sequences' means; sums over a constant."""
    (x, y, z), mask = ragged(count=3)
    found = next(iter(weighted_losses(x, y, z, mask, how))).item()
    sums = [
        policy_loss(*(t[i : i + 1] for t in (x, y, z, mask)), 0.2, 1, clip_high=0.3, dual_clip=1.5).loss.item()
        for i in range(4)
    ]
    expected = {
        "token": sum(sums) / 23,
        "sequence": sum(s / n for s, n in zip(sums, LENGTHS, strict=True)) / 4,
        "constant": sum(sums) / (4 * 16),
    }
    assert found == pytest.approx(expected[how], rel=1e-12)


@pytest.mark.parametrize("how", ["token", "sequence", "constant"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_weighted_micro_batches_add_up_to_the_batch(how, size):
    """Checks 24 and 26: pieces as narrow as their longest response, whatever the weights; summed, not averaged."""
    (x, y, z), mask = ragged(count=3)
    x.requires_grad_()
    pieces = [[t[i : i + size, : max(LENGTHS[i : i + size])] for t in (x, y, z, mask)] for i in range(0, 4, size)]
    wholes = weighted_losses(x, y, z, mask, how)
    summed = (sum(parts) for parts in zip(*(weighted_losses(*p, how) for p in pieces), strict=True))
    for whole, parts in zip(wholes, summed, strict=True):
        assert parts.item() == pytest.approx(whole.item(), rel=1e-12)
        expected = torch.autograd.grad(whole, x, retain_graph=True)[0]
        found = torch.autograd.grad(parts, x, retain_graph=True)[0]
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("poison", [POISON, math.inf, math.nan])
def test_padding_reaches_no_weighted_loss(poison):
    """Check 8: neither through the tensors nor through the weights."""
    tensors, mask = ragged(count=4)
    clean = [t.masked_fill(~mask, 0) for t in tensors]
    bad = [t.masked_fill(~mask, poison) for t in tensors]
    losses = {
        "policy": lambda x, y, z, w: policy_loss(x, y, z, mask, 0.2, weights=w).loss,
        "k1": lambda x, y, z, w: kl_loss(x, y, mask, "k1", weights=w),
        "k2": lambda x, y, z, w: kl_loss(x, y, mask, "k2", weights=w),
        "k3": lambda x, y, z, w: kl_loss(x, y, mask, "k3", weights=w),
    }
    for loss in losses.values():
        found = []
        for x, y, z, w in (clean, bad):
            x = x.clone().requires_grad_()
            value = loss(x, y, z, w)
            found.append((value.item(), torch.autograd.grad(value, x)[0]))
        assert found[0][0] == found[1][0]
        assert torch.equal(found[0][1], found[1][1])
        assert (found[1][1][~mask] == 0).all()


def test_weights_are_constants_and_take_the_place_of_a_denominator():
    losses, mask = double([2.0, 6.0], [4.0, POISON]).requires_grad_(), torch.tensor([[True, True], [True, False]])
    weights = double([0.5, 1.0], [0.25, math.nan]).requires_grad_()
    value = aggregate(losses, mask, weights=weights)
    assert value.item() == 8.0
    assert torch.autograd.grad(value, losses)[0].tolist() == [[0.5, 1.0], [0.25, 0.0]]
    assert not aggregate(losses.detach(), mask, weights=weights).requires_grad
    assert (aggregate(losses, mask).item(), aggregate(losses, mask, 24).item()) == (4.0, 0.5)


def test_an_entropy_bonus_is_minus_the_aggregated_entropy():
    """Going down the loss evens the distribution out: dH/dz = -p (log p + H), averaged over the two tokens."""
    logits = torch.tensor([[[math.log(3), 0.0], [0.0, 0.0], [9.0, 0.0]]], dtype=torch.float64, requires_grad=True)
    loss = aggregate(-entropy_of(logits.log_softmax(-1)), torch.tensor([[True, True, False]]))
    (slope,) = torch.autograd.grad(loss, logits)
    spread = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert loss.item() == pytest.approx(-(spread + math.log(2)) / 2)
    expected = [p * (math.log(p) + spread) / 2 for p in (0.75, 0.25)]
    torch.testing.assert_close(slope[0], double(expected, [0, 0], [0, 0]))


# --- the KL as a loss


def test_kl_loss_by_hand():
    # log-ratios ln 2 and 0 and -ln 2 over three tokens
    logprobs, reference = double([-1.0, -2.0], [-3.0, POISON]), double([-1.0 - math.log(2), -2.0], [0.0, math.nan])
    reference[1, 0] = -3.0 + math.log(2)
    mask = torch.tensor([[True, True], [True, False]])
    assert kl_loss(logprobs, reference, mask, "k1").item() == pytest.approx(0.0, abs=1e-15)
    assert kl_loss(logprobs, reference, mask, "k2").item() == pytest.approx(math.log(2) ** 2 / 3)
    assert kl_loss(logprobs, reference, mask, "k3").item() == pytest.approx((0.5 - 1 + 2 - 1) / 3)
    assert kl_loss(logprobs, reference, mask, "k2", 12).item() == pytest.approx(math.log(2) ** 2 / 12)


def test_gradient_of_the_kl_as_a_loss():
    """Check 35: V = 6 by enumeration. k1 has no gradient on average, k2 KL(pi||ref)'s, k3 KL(ref||pi)'s."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, generator=generator, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(6, generator=generator, dtype=torch.float64).log_softmax(0)
    logprobs = logits.log_softmax(0)
    p, q = logprobs.exp(), reference.exp()
    forward, backward = (
        torch.autograd.grad(kl, logits, retain_graph=True)[0]
        for kl in ((p * (p / q).log()).sum(), (q * (q / p).log()).sum())
    )
    weights, mask = p.detach()[:, None], torch.ones(6, 1, dtype=torch.bool)
    for how, expected in (("k1", torch.zeros(6).double()), ("k2", forward), ("k3", backward)):
        loss = kl_loss(logprobs[:, None], reference[:, None], mask, how, weights=weights)
        found = torch.autograd.grad(loss, logits, retain_graph=True)[0]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert (forward - backward).abs().max() > 1e-2


def test_the_kl_as_a_loss_pulls_towards_the_reference_and_stays_finite():
    mask = torch.ones(1, 1, dtype=torch.bool)
    for how, far in (("k2", 100.0), ("k3", 19.0)):
        for side in (1, -1):
            logprobs = torch.tensor([[side * far - 30.0]], requires_grad=True)
            (slope,) = torch.autograd.grad(kl_loss(logprobs, torch.tensor([[-30.0]]), mask, how), logprobs)
            assert slope.item() * side > 0.9
    logprobs = torch.tensor([[-200.0]], requires_grad=True)
    loss = kl_loss(logprobs, torch.tensor([[-1.0]]), mask, "k3")
    loss.backward()
    assert loss.isfinite() and logprobs.grad.isfinite().all()
