"""The whole algorithm on a model whose responses can be enumerated: where it rests, and that it gets there."""

from __future__ import annotations

from functools import partial
from itertools import product

import pytest
import torch

from stages.maths.advantages import broadcast, gae, group_centred, reinforce_pp, rloo
from stages.maths.kl import k1, k3, sequence_kl
from stages.maths.losses import kl_loss, policy_loss, token_weights, value_loss
from stages.maths.rewards import shape_rewards
from stages.maths.tensors import sequence_sum, token_logprobs, whiten
from tests.marks import full


def gradient(loss, parameter):
    return torch.autograd.grad(loss, parameter, retain_graph=True)[0]


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


# The task of all that follows: a score for each response, and the KL's weight.

REFERENCE, KL_COEF = tabular(2), 0.5
SCORE = torch.randn(15, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
TILTED = probability_of_responses(REFERENCE) * (SCORE / KL_COEF).exp()
OPTIMUM = TILTED / TILTED.sum()


def optimal_table():
    """The table of pi*, by summing the tilted weights of the responses behind each state and token."""
    weights = torch.zeros(7, 3, dtype=torch.float64)
    for row, response in enumerate(RESPONSES):
        for t, token in enumerate(response):
            weights[PREFIXES.index(response[:t]), token] += TILTED[row]
    return weights.log().requires_grad_()


def test_the_optimum_of_ppo_is_the_reference_tilted_by_the_score():
    """Checks 36, 37, without the walk there: k1 in the reward rests at pi* ~ ref exp(score / kl_coef), k3 does not."""
    optimum = optimal_table()
    torch.testing.assert_close(probability_of_responses(optimum.detach()), OPTIMUM)
    rests = expected_policy_gradient(optimum, REFERENCE, SCORE, KL_COEF, 0.95)
    moves = expected_policy_gradient(optimum, REFERENCE, SCORE, KL_COEF, 0.95, estimate=k3)
    assert rests.abs().max() < 1e-12
    assert moves.abs().max() > 1e-2


def expected_kl_gradient(table, how, *, whole):
    """Gradient of the KL as a loss, in expectation over all responses; of `whole` responses or of their tokens."""
    logprobs, reference, mask = response_logprobs(table), response_logprobs(REFERENCE), MASK
    probability = probability_of_responses(table.detach())
    if whole:
        logprobs, reference = (sequence_sum(x, MASK)[:, None] for x in (logprobs, reference))
        mask = MASK[:, :1]
    return gradient(kl_loss(logprobs, reference, mask, how, weights=probability[:, None].expand(mask.shape)), table)


def test_the_kl_as_a_loss_is_right_for_whole_responses_and_short_sighted_for_tokens():
    """Check 35: on sequences k2 has KL(pi||ref)'s gradient, k3 KL(ref||pi)'s; token by token, later KL is left out."""
    table = tabular(1).requires_grad_()
    p, q = probability_of_responses(table), probability_of_responses(REFERENCE)
    forward, backward = gradient((p * (p / q).log()).sum(), table), gradient((q * (q / p).log()).sum(), table)
    for how, expected in (("k1", torch.zeros_like(table)), ("k2", forward), ("k3", backward)):
        torch.testing.assert_close(expected_kl_gradient(table, how, whole=True), expected, rtol=0, atol=1e-10)
    by_token = expected_kl_gradient(table, "k2", whole=False)
    # The last token has no later KL: in the states that only a last token can have, nothing is missing.
    torch.testing.assert_close(by_token[3:], forward[3:], rtol=0, atol=1e-10)
    assert (by_token - forward)[:3].abs().max() > 1e-2
    assert expected_kl_gradient(table, "k1", whole=False).abs().max() < 1e-12


# --- the walk there: 150 updates of 512 sampled responses, one epoch each, Adam, learning rate .1 -> 0

RESPONSES_PER_PROMPT = 4
GROUP = torch.arange(512) // RESPONSES_PER_PROMPT


def ppo_advantages(score, kl, mask, values, estimator_lambda=0.95):
    return gae(shape_rewards(score, kl, mask, KL_COEF), values, mask, 1.0, estimator_lambda)


def rloo_advantages(score, kl, mask, values):
    returns = score - KL_COEF * kl.masked_fill(~mask, 0).sum(1)
    return broadcast(rloo(returns, GROUP), mask), None


def reinforce_pp_advantages(score, kl, mask, values):
    return whiten(reinforce_pp(shape_rewards(score, kl, mask, KL_COEF), mask, 1.0), mask), None


def policy_term(logprobs, old, advantages, mask, how):
    tokens = mask.sum().double()
    # On the first step, where every ratio is 1, the gradient of whole responses is that of their tokens' sum.
    how, max_length = ("constant", 1) if how == "whole responses" else (how, 3)
    weights = token_weights(mask, how, tokens=tokens, sequences=torch.tensor(512.0).double(), max_length=max_length)
    return policy_loss(logprobs, old, advantages, mask, 0.2, weights=weights).loss


def walk(advantages_of, estimate=k1, how="token", kl_term=None, seed=0):
    """Total variation between pi* and where 150 updates from the reference end."""
    generator = torch.Generator().manual_seed(seed)
    table = REFERENCE.clone().requires_grad_()
    critic = torch.zeros(7, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([table, critic], lr=0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=150)
    for _ in range(150):
        probability = probability_of_responses(table.detach())
        rows = torch.multinomial(probability, 512, replacement=True, generator=generator)
        mask, reference = MASK[rows], response_logprobs(REFERENCE)[rows]
        logprobs, values = response_logprobs(table)[rows], critic[STATES[rows]]
        old, old_values = logprobs.detach(), values.detach()
        advantages, returns = advantages_of(SCORE[rows], estimate(old, reference), mask, old_values)
        loss = policy_term(logprobs, old, advantages, mask, how)
        if returns is not None:
            loss = loss + value_loss(values, old_values, returns, mask, 10.0).loss
        if kl_term:
            loss = loss + KL_COEF * kl_term(logprobs, reference, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return (probability_of_responses(table.detach()) - OPTIMUM).abs().sum().item() / 2


def test_the_reference_is_far_from_the_optimum():
    assert (probability_of_responses(REFERENCE) - OPTIMUM).abs().sum() / 2 > 0.3


@pytest.mark.parametrize(("whitened", "gae_lambda"), [(False, 1.0), (True, 0.95), *full((False, 0.95), (True, 1.0))])
def test_ppo_reaches_the_optimum(gae_lambda, whitened):
    """Check 36: total variation of .01 at most; a critic learns along, advantages whitened or as they are."""

    def advantages_of(score, kl, mask, values):
        advantages, returns = ppo_advantages(score, kl, mask, values, gae_lambda)
        return whiten(advantages, mask) if whitened else advantages, returns

    assert walk(advantages_of) < 0.01


def test_ppo_with_k3_in_the_reward_misses_the_optimum():
    """Check 37: the negative control, by more than .03."""
    assert walk(ppo_advantages, estimate=k3) > 0.03


@pytest.mark.parametrize("how", ["token", *full("sequence", "constant")])
def test_rloo_reaches_the_optimum(how):
    """Check 38: four responses per prompt, within .02; however the tokens are weighted."""
    assert walk(rloo_advantages, how=how) < 0.02


def test_reinforce_pp_reaches_the_optimum():
    """Check 38: within .02, without a critic, its returns whitened over the batch."""
    assert walk(reinforce_pp_advantages) < 0.02


@pytest.mark.full
def test_the_kl_as_a_loss_reaches_the_optimum_for_whole_responses_and_misses_it_for_tokens():
    """Check 38: scores alone as returns and k2 of whole responses, within .02; k2 of tokens, or a baseline that
    counts the response itself and so leaves (K - 1) / K of the score's gradient, rests elsewhere."""

    def scores_alone(score, kl, mask, values):
        return broadcast(rloo(score, GROUP), mask), None

    def centred(score, kl, mask, values):
        return broadcast(group_centred(score, GROUP), mask), None

    def of_responses(logprobs, reference, mask):
        sums = (sequence_sum(x, mask)[:, None] for x in (logprobs, reference))
        return kl_loss(*sums, mask[:, :1], "k2")

    of_tokens = partial(kl_loss, how="k2", denominator=512)
    assert walk(scores_alone, how="whole responses", kl_term=of_responses) < 0.02
    assert walk(scores_alone, how="whole responses", kl_term=of_tokens) > 0.03
    assert walk(centred, how="whole responses", kl_term=of_responses) > 0.03
