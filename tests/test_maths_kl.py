from __future__ import annotations

import math
from itertools import product

import pytest
import torch

from stages.maths.advantages import gae
from stages.maths.kl import k1, k2, k3, next_kl_coef, sequence_kl
from stages.maths.losses import policy_loss
from stages.maths.rewards import shape_rewards
from stages.maths.tensors import token_logprobs


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


# A tabular language model: V = 3, token 0 ends a response, at most 3 tokens. Its 15 responses can be enumerated.

PREFIXES = [(), (1,), (2,), (1, 1), (1, 2), (2, 1), (2, 2)]
RESPONSES = [
    response
    for length in (1, 2, 3)
    for response in product(range(3), repeat=length)
    if 0 not in response[:-1] and (response[-1] == 0 or length == 3)
]
LENGTHS = torch.tensor([len(response) for response in RESPONSES])
MASK = torch.arange(3) < LENGTHS[:, None]
TOKENS = torch.tensor([list(response) + [2] * (3 - len(response)) for response in RESPONSES])
STATES = torch.tensor(  # (15, 3) index of the prefix before each token
    [[PREFIXES.index(r[:t]) if t < len(r) else 0 for t in range(3)] for r in RESPONSES]
)


def tabular(seed):
    return torch.randn(7, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def response_logprobs(table):
    return token_logprobs(table[STATES], TOKENS)


def probability_of_responses(table):
    """(15,) as products of softmax entries, without any of the functions under test."""
    rows = table.softmax(dim=1)
    chances = [torch.stack([rows[PREFIXES.index(r[:t]), r[t]] for t in range(len(r))]).prod() for r in RESPONSES]
    return torch.stack(chances)


def state_values(rewards, probability):
    """(15, 3) the exact value of every state: the expected sum of what is still to come."""
    to_come = rewards.flip(1).cumsum(1).flip(1)
    values = torch.zeros(15, 3, dtype=torch.float64)
    for state in range(7):
        here = STATES.eq(state) & MASK
        weight = probability[:, None].expand(15, 3)[here]
        values[here] = (weight * to_come[here]).sum() / weight.sum()
    return values


def expected_policy_gradient(table, reference_table, score, kl_coef, gae_lambda, estimate=k1):
    """Gradient of the PPO loss at ratio 1, in expectation over all responses, from score to loss."""
    logprobs = response_logprobs(table)
    old = logprobs.detach()
    probability = probability_of_responses(table.detach())
    rewards = shape_rewards(score, estimate(old, response_logprobs(reference_table)), MASK, kl_coef)
    values = state_values(rewards, probability)
    advantages, _ = gae(rewards, values, MASK, 1.0, gae_lambda)
    loss = policy_loss(logprobs, old, probability[:, None] * advantages, MASK, 0.2, denominator=1).loss
    return gradient(loss, table)


def test_the_tabular_model_is_whole():
    probability = probability_of_responses(tabular(1))
    assert len(RESPONSES) == 15
    assert abs(probability.sum().item() - 1) < 1e-12
    found = response_logprobs(tabular(1)).masked_fill(~MASK, 0).sum(1).exp()
    torch.testing.assert_close(found, probability)


def test_mean_sequence_kl_is_the_kl_of_whole_responses():
    """Check 34: on responses of unequal length."""
    p, q = probability_of_responses(tabular(1)), probability_of_responses(tabular(2))
    found = sequence_kl(response_logprobs(tabular(1)), response_logprobs(tabular(2)), MASK)
    assert abs((p * found).sum().item() - (p * (p / q).log()).sum().item()) < 1e-12


@pytest.mark.parametrize("gae_lambda", [0.0, 0.95, 1.0])
def test_expected_ppo_gradient_is_that_of_score_minus_kl(gae_lambda):
    """Checks 4 and 35: with exact values every lambda gives the gradient of E[score] - kl_coef KL, exactly."""
    table, reference = tabular(1).requires_grad_(), tabular(2)
    score = torch.randn(15, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    p, q = probability_of_responses(table), probability_of_responses(reference)
    objective = (p * score).sum() - 0.7 * (p * (p / q).log()).sum()
    wanted = -gradient(objective, table)
    found = expected_policy_gradient(table, reference, score, 0.7, gae_lambda)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    assert wanted.abs().max() > 1e-2


def test_the_optimum_of_ppo_is_the_reference_tilted_by_the_score():
    """Checks 36 and 37, without the walk there: k1 in the reward rests at pi* ~ ref exp(score / kl_coef), k3 does not.

    The table of pi* comes from summing the tilted weights of the responses behind each state and token.
    """
    reference, kl_coef = tabular(2), 0.5
    score = torch.randn(15, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    tilted = probability_of_responses(reference) * (score / kl_coef).exp()
    weights = torch.zeros(7, 3, dtype=torch.float64)
    for row, response in enumerate(RESPONSES):
        for t, token in enumerate(response):
            weights[PREFIXES.index(response[:t]), token] += tilted[row]
    optimum = weights.log().requires_grad_()
    torch.testing.assert_close(probability_of_responses(optimum.detach()), tilted / tilted.sum())
    rests = expected_policy_gradient(optimum, reference, score, kl_coef, 0.95)
    moves = expected_policy_gradient(optimum, reference, score, kl_coef, 0.95, estimate=k3)
    assert rests.abs().max() < 1e-12
    assert moves.abs().max() > 1e-2
