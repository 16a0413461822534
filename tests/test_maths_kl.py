from __future__ import annotations

import math

import pytest
import torch

from stages.maths.kl import k1, k2, k3, next_kl_coef, sequence_kl


def six_token_policies():
    """The logits of a policy, to be differentiated, and the log-probabilities of a reference, V = 6."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, generator=generator, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(6, generator=generator, dtype=torch.float64).log_softmax(0)
    return logits, reference


def gradient(loss, parameter):
    return torch.autograd.grad(loss, parameter, retain_graph=True)[0]


def test_estimators_by_hand():
    logprobs, reference = torch.tensor([-1.0 + math.log(2)]).double(), torch.tensor([-1.0]).double()
    torch.testing.assert_close(k1(logprobs, reference).item(), math.log(2))
    torch.testing.assert_close(k2(logprobs, reference).item(), math.log(2) ** 2 / 2)
    torch.testing.assert_close(k3(logprobs, reference).item(), math.log(2) - 0.5)


def test_k3_is_never_negative_however_close_the_policies():
    logprobs = torch.linspace(-1e-4, 1e-4, 1001) - 2.0
    assert (k3(logprobs, torch.full_like(logprobs, -2.0)) >= 0).all()


def test_k1_and_k3_have_the_kl_as_their_mean_and_k2_has_not():
    """Check 34: V = 6 by enumeration."""
    logits, reference = six_token_policies()
    logprobs = logits.detach().log_softmax(0)
    p, q = logprobs.exp().tolist(), reference.exp().tolist()
    kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    weights = logprobs.exp()
    assert abs((weights * k1(logprobs, reference)).sum().item() - kl) < 1e-12
    assert abs((weights * k3(logprobs, reference)).sum().item() - kl) < 1e-12
    assert abs((weights * k2(logprobs, reference)).sum().item() - kl) > 1e-2
    assert (k3(logprobs, reference) >= 0).all()


def test_gradients_of_the_estimators():
    """Check 35: what each estimator's expected gradient is, in the reward (times the score function) and as a loss."""
    logits, reference = six_token_policies()
    logprobs = logits.log_softmax(0)
    weights = logprobs.detach().exp()  # the sampler is not differentiated
    # d KL(pi||ref) / d logits_i = pi_i (q_i - KL);  d KL(ref||pi) / d logits_i = pi_i - ref_i
    log_ratio = logprobs.detach() - reference
    forward = weights * (log_ratio - (weights * log_ratio).sum())
    backward = weights - reference.exp()

    def in_reward(estimate):
        return gradient((weights * estimate(logprobs, reference).detach() * logprobs).sum(), logits)

    def as_loss(estimate):
        return gradient((weights * estimate(logprobs, reference)).sum(), logits)

    for found, expected in [
        (in_reward(k1), forward),
        (as_loss(k1), torch.zeros(6, dtype=torch.float64)),
        (as_loss(k2), forward),
        (as_loss(k3), backward),
        (in_reward(k3), forward - backward),
    ]:
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert (forward - backward).abs().max() > 1e-2  # the rows can be told apart


def test_sequence_kl_sums_the_masked_tokens():
    logprobs = torch.tensor([[-1.0, -2.0, 1e6], [-1.0, math.inf, math.nan]], dtype=torch.float64)
    reference = torch.tensor([[-1.5, -1.0, 0.0], [-4.0, 0.0, 0.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert sequence_kl(logprobs, reference, mask).tolist() == [-0.5, 3.0]


@pytest.mark.parametrize(
    ("observed", "factor"),
    [(12.0, 1.00128), (0.0, 0.99872), (6.0, 1.0), (6.6, 1.00064), (5.4, 0.99936), (-3.0, 0.99872)],
)
def test_kl_controller(observed, factor):
    """Check 33: target 6, 64 responses, horizon 10 000; twice the target is clipped to +0.2: x 1.00128."""
    assert abs(next_kl_coef(0.15, observed, 6.0, 64, 10_000) - 0.15 * factor) < 1e-9
