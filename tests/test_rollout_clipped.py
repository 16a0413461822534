"""PPO's clipped steps, through the model: gradients, denominators, and when a step is not taken."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from stages.models.roles import Roles
from stages.rollout import clipped
from stages.rollout.clipped import Minibatch, backward_minibatch, clipped_steps, over_steps
from stages.rollout.experience import role_logprobs
from stages.training.devices import Ranks
from stages.training.progress import open_progress
from tests.marks import full
from tests.parts import (
    all_rows,
    base_parameters,
    experience_of,
    gradient,
    judged_at_random,
    open_tiny_text,
    ppo_config,
    prompt_rows,
    random_adapter,
    random_head,
    relative,
    roles_on,
    sequences_of,
    session_of,
    whole_model,
)

PROMPTS = prompt_rows(sequences_of([9, 3, 14, 6]))
RANKS = Ranks(torch.device("cpu"))
MICRO = [1, 2, 4, "auto"]


@pytest.fixture(scope="module")
def text(model_folder):
    """Token 2 and some others stop, so that responses differ in length."""
    return open_tiny_text(model_folder("llama"), stop_ids=(2, *range(7, 47)))


@pytest.fixture
def roles(open_tiny):
    return roles_on(open_tiny("llama"))


@pytest.fixture
def judged(roles, text):
    judged = judged_at_random(experience_of(roles, text, PROMPTS))
    assert len(set(judged.experience.rollout.lengths)) > 1
    return judged


def progress_of(roles, config):
    critic = roles.parameters("critic") if config.critic == "adapter" else list(roles.heads["critic"].parameters())
    return open_progress(config, {"policy": roles.parameters("policy"), "critic": critic})


def backward(config, roles, minibatch):
    return backward_minibatch(session_of(config, roles, ranks=RANKS), minibatch)


def steps(config, roles, progress, *rest):
    return clipped_steps(session_of(config, roles, ranks=RANKS, progress=progress), *rest)


def both_gradients(roles):
    return gradient(roles.parameters("policy")), gradient(roles.parameters("critic"))


def weights(roles):
    """Every weight there is, by the role or part that it belongs to."""
    found = {role: [p.detach().clone() for p in roles.parameters(role)] for role in roles.adapters}
    return found | {"base": [p.detach().clone() for p in base_parameters(roles.base)]}


def changed(before, after):
    return {
        role for role in before if not all(torch.equal(a, b) for a, b in zip(before[role], after[role], strict=True))
    }


# --- the first minibatch


@pytest.mark.parametrize("recompute", [False, *full(True)])
def test_the_ratio_is_1_in_the_first_minibatch_of_every_update(open_tiny, text, recompute):
    """Check 1: ratio 1, approximate KL and clip fraction 0, on a base whose config asks for dropout 0.1."""
    base = open_tiny("gpt2")
    assert base.model.config.resid_pdrop == 0.1
    if recompute:
        base.checkpoint_activations()
    roles = roles_on(base)
    config = ppo_config(ppo_epochs=2, minibatches=2, micro_batch_size=1)
    progress = progress_of(roles, config)
    for step in range(3):
        judged = judged_at_random(experience_of(roles, text, PROMPTS, seed=step), seed=step)
        same = backward(ppo_config(), roles, all_rows(judged))
        assert same["ratio_max"] == 1 and same["approx_kl"] == 0  # the very same forward pass
        rows = Minibatch(judged, (1, 3), float(judged.experience.mask[[1, 3]].sum()), 2.0)
        found = backward(config, roles, rows)
        assert abs(found["ratio_max"] - 1) <= 1e-5 and abs(found["ratio_mean"] - 1) <= 1e-6
        assert abs(found["approx_kl"]) <= 1e-6 and found["clip_fraction"] == 0 and found["value_clip_fraction"] == 0
        for optimizer in progress.optimizers.values():
            optimizer.zero()
        learned = steps(config, roles, progress, judged, 1e-3, step)
        assert abs(learned["ratio_first"] - 1) <= 1e-5
        assert learned["ratio_max"] > 1 + 1e-4 and learned["approx_kl"] > 1e-6  # it moves after that


def test_at_ratio_1_the_gradient_is_the_policy_gradient(model_folder, roles, judged):
    """Check 4: -E[A grad log pi] over the batch's tokens, from a loop with one forward pass per token."""
    config = ppo_config(value_coef=0.0)
    backward(config, roles, all_rows(judged))
    found = gradient(roles.parameters("policy"))
    rollout, mask = judged.experience.rollout, judged.experience.mask
    with roles.use("policy"):
        for row, (prompt, response) in enumerate(zip(rollout.prompts, rollout.responses, strict=True)):
            for t in range(len(response)):
                ids = torch.cat([prompt.ids, response[:t]])[None]
                logits = roles.base.model(ids, use_cache=False).logits[0, -1] / 0.7
                term = -judged.advantages[row, t] * logits.log_softmax(-1)[response[t]] / mask.sum()
                term.backward()
    expected = gradient(roles.parameters("policy"))
    assert expected.norm() > 1e-2
    assert relative(found, expected) <= 1e-5


def test_the_value_gradient_is_that_of_half_the_squared_error(roles, judged):
    """At the first minibatch nothing is clipped: the gradient is (V - R) grad V, averaged over tokens."""
    config = ppo_config(value_coef=0.3)
    found = backward(config, roles, all_rows(judged))
    got = gradient(roles.parameters("critic"))
    rollout, loss = judged.experience.rollout, 0.0
    tokens = float(judged.experience.mask.sum())
    with roles.use("critic"):
        for row, (prompt, response) in enumerate(zip(rollout.prompts, rollout.responses, strict=True)):
            states = roles.base.hidden([torch.cat([prompt.ids, response])])
            for t in range(len(response)):
                value = roles.heads["critic"](states[len(prompt.ids) + t - 1])
                loss = loss + 0.5 * (value - judged.returns[row, t]) ** 2 / tokens
        (0.3 * loss).backward()
    assert relative(got, gradient(roles.parameters("critic"))) <= 1e-5
    assert found["value_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert found["loss"] == pytest.approx(found["policy_loss"] + 0.3 * loss.item(), rel=1e-5)


# --- cutting a minibatch into forward passes


@pytest.mark.parametrize("critic", ["adapter", "shared"])
def test_the_micro_batch_size_changes_neither_gradient_nor_statistics(roles, judged, critic):
    """Check 24, PPO: the policy's and the critic's gradient are the same however a minibatch is cut."""
    if critic == "shared":
        roles.heads["critic"] = random_head(roles.base.width, 3)
    old, found = judged.experience, {}
    old = dataclasses.replace(
        old, logprobs=old.logprobs - 0.3 * judged.advantages, values=old.values + 0.4 * judged.advantages
    )
    for size in MICRO:
        config = ppo_config(micro_batch_size=size, critic=critic)
        metrics = backward(config, roles, all_rows(dataclasses.replace(judged, experience=old)))
        found[size] = (*both_gradients(roles), metrics)
    for size in MICRO[1:]:
        assert relative(found[size][0], found[1][0]) <= 1e-5
        assert relative(found[size][1], found[1][1]) <= 1e-5
        assert found[size][2] == pytest.approx(found[1][2], rel=1e-5, abs=1e-7)
    assert 0 < found[1][2]["clip_fraction"] < 1  # so both sides of the clip take part
    assert critic == "shared" or 0 < found[1][2]["value_clip_fraction"] < 1


def test_a_mean_of_means_would_give_another_gradient(roles, judged):
    """Check 25, negative: averaging the means of unequally long rows is off by more than 1 %."""
    config = ppo_config(value_coef=0.0)
    rows = [0, 1, 2, 3]
    backward(config, roles, all_rows(judged))
    right = gradient(roles.parameters("policy"))
    for row in rows:
        tokens = float(judged.experience.mask[row].sum())
        backward(config, roles, Minibatch(judged, (row,), tokens * len(rows), 1.0))
    assert relative(gradient(roles.parameters("policy")), right) > 0.01


def test_minibatches_have_their_own_tokens_as_denominator(roles, judged):
    config = ppo_config(value_coef=0.0)
    mask = judged.experience.mask
    parts = []
    for rows in ([0, 2], [3, 1]):
        tokens = float(mask[rows].sum())
        backward(config, roles, Minibatch(judged, tuple(rows), tokens, float(len(rows))))
        parts.append(gradient(roles.parameters("policy")) * tokens)
    backward(config, roles, all_rows(judged))
    assert relative(sum(parts) / mask.sum(), gradient(roles.parameters("policy"))) <= 1e-5


def test_a_shared_critics_gradient_is_the_sum_of_both(roles, judged):
    roles.heads["critic"] = random_head(roles.base.width, 3)
    config = ppo_config(critic="shared", value_coef=0.3)
    backward(config, roles, all_rows(judged))
    trunk = gradient(list(roles.adapters["policy"].parameters()))
    head = gradient(list(roles.heads["critic"].parameters()))
    minibatch = all_rows(judged)
    with roles.use("policy"):
        loss, _ = clipped.policy_loss_alone(config, roles, minibatch, [0, 1, 2, 3])
        loss.backward()
    with roles.use("policy"):  # its trunk under the critic's head, in a pass of its own
        loss, _ = clipped.value_loss_alone(config, roles, minibatch, [0, 1, 2, 3])
        loss.backward()
    assert relative(trunk, gradient(list(roles.adapters["policy"].parameters()))) <= 1e-5
    assert relative(head, gradient(list(roles.heads["critic"].parameters()))) <= 1e-5


# --- who learns


def test_both_trained_roles_get_gradients_and_nobody_else(roles, judged):
    """Check 52: policy and critic in one update; reference, reward and base in none."""
    backward(ppo_config(), roles, all_rows(judged))
    frozen = [*roles.parameters("reference"), *roles.parameters("reward"), *base_parameters(roles.base)]
    assert all(p.grad is None for p in frozen)
    for role in ("policy", "critic"):
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in roles.parameters(role)), role


def test_a_policy_step_changes_the_policy_alone(roles, judged):
    """Check 52: with the value loss off, every weight but the policy's is the same to the bit."""
    config = ppo_config(value_coef=0.0)
    progress, before = progress_of(roles, config), weights(roles)
    steps(config, roles, progress, judged, 1e-3, 0)
    assert changed(before, weights(roles)) == {"policy"}


def test_an_update_changes_policy_and_critic_and_nothing_else(roles, judged):
    """Check 52: reward model, reference and base are the same to the bit after a whole update."""
    config = ppo_config()
    progress, before = progress_of(roles, config), weights(roles)
    steps(config, roles, progress, judged, 1e-3, 0)
    assert changed(before, weights(roles)) == {"policy", "critic"}


def test_the_critic_may_have_a_learning_rate_of_its_own(roles, judged):
    config = ppo_config(learning_rate=1e-3, critic_learning_rate=1e-30, ppo_epochs=1)
    progress, before = progress_of(roles, config), weights(roles)
    steps(config, roles, progress, judged, 1e-3, 0)
    assert changed(before, weights(roles)) == {"policy"}
    config = ppo_config(learning_rate=1e-3, critic_learning_rate=4e-3)
    rates = []
    monkey = progress.optimizers["critic"].step
    progress.optimizers["critic"].step = lambda rate: rates.append(rate) or monkey(rate)
    steps(config, roles, progress, judged, 5e-4, 1)
    assert rates == [2e-3] * 4  # half-way through its decay, like the policy's


# --- which steps are taken


def spy_minibatches(monkeypatch, found=None):
    """Records the rows of every minibatch; `found(n)` are the statistics of the n-th instead of a backward pass."""
    seen, real = [], clipped.backward_minibatch

    def recorded(session, minibatch):
        seen.append((minibatch.rows, minibatch.tokens))
        return real(session, minibatch) if found is None else found(len(seen) - 1)

    monkeypatch.setattr(clipped, "backward_minibatch", recorded)
    return seen


def test_every_pass_sees_every_response_once_in_its_own_order(roles, judged, monkeypatch):
    config = ppo_config(ppo_epochs=3, minibatches=2, target_approx_kl=None)
    progress = progress_of(roles, config)
    seen = spy_minibatches(monkeypatch)
    steps(config, roles, progress, judged, 1e-5, 0)
    assert len(seen) == 6 and progress.optimizers["policy"].updates == 6
    for first, second in zip(seen[::2], seen[1::2], strict=True):
        assert sorted(first[0] + second[0]) == [0, 1, 2, 3] and len(first[0]) == 2
        for rows, tokens in (first, second):
            assert tokens == sum(judged.experience.rollout.lengths[i] for i in rows)
    orders = [tuple(rows) for rows, _ in seen]
    assert len(set(orders[::2])) > 1  # not one order for all passes
    again = spy_minibatches(monkeypatch)
    steps(config, roles, progress, judged, 1e-5, 0)
    assert [tuple(rows) for rows, _ in again] == orders
    other = spy_minibatches(monkeypatch)
    steps(config, roles, progress, judged, 1e-5, 1)
    assert [tuple(rows) for rows, _ in other] != orders


def test_more_minibatches_than_responses_leave_some_out(roles, judged, monkeypatch):
    """A rank may hold fewer responses than there are minibatches; one that no rank has tokens for is no step."""
    config = ppo_config(batch_size=8, minibatches=8, ppo_epochs=1)
    progress = progress_of(roles, config)
    seen = spy_minibatches(monkeypatch)
    steps(config, roles, progress, judged, 1e-5, 0)
    assert sorted(row for rows, _ in seen for row in rows) == [0, 1, 2, 3]
    assert progress.optimizers["policy"].updates == 4


STILL = {"policy_loss": 1.0, "approx_kl": 0.0, "ratio_mean": 1.0, "ratio_max": 1.0, "ratio_error": 0.0}
STILL |= {"ratio_std": 0.0}


def test_passes_end_once_the_policy_has_moved_too_far(roles, judged, monkeypatch):
    config = ppo_config(ppo_epochs=2, minibatches=4, target_approx_kl=0.1)
    progress, before = progress_of(roles, config), weights(roles)
    seen = spy_minibatches(monkeypatch, lambda n: STILL | {"approx_kl": (0.0, 0.14, 0.16)[n]})
    found = steps(config, roles, progress, judged, 1e-3, 0)
    assert len(seen) == 3 and found["early_stop"] == 1.0 and found["skipped_steps"] == 1.0
    assert progress.optimizers["policy"].updates == 2  # not the step whose gradient came from too far off
    assert found["approx_kl"] == pytest.approx(0.1) and found["policy_loss"] == 1.0
    assert changed(before, weights(roles)) == set()  # no gradient was ever made here


def test_another_loss_is_averaged_over_the_steps_that_have_it(roles, judged, monkeypatch):
    """Of three minibatches the middle one is skipped: the other loss is asked for at steps 0 and 2 of the update."""
    config = ppo_config(ppo_epochs=1, minibatches=3, target_approx_kl=None, ratio_limit=2.0)
    spy_minibatches(monkeypatch, lambda n: STILL | {"ratio_mean": (1.0, 3.0, 1.0)[n]})
    also = {0: {"ptx_loss": 5.0}, 2: {"ptx_loss": 2.0}}.__getitem__
    found = steps(config, roles, progress_of(roles, config), judged, 1e-3, 0, also)
    assert found["ptx_loss"] == 3.5 and found["skipped_steps"] == 1.0 and found["policy_loss"] == 1.0
    spy_minibatches(monkeypatch, lambda n: STILL | {"ratio_mean": 3.0})
    found = steps(config, roles, progress_of(roles, config), judged, 1e-3, 0, also)
    assert "ptx_loss" not in found and found["skipped_steps"] == 3.0


def test_no_target_never_ends_the_passes(roles, judged, monkeypatch):
    config = ppo_config(ppo_epochs=2, minibatches=2, target_approx_kl=None)
    progress = progress_of(roles, config)
    seen = spy_minibatches(monkeypatch, lambda n: STILL | {"approx_kl": 100.0})
    assert steps(config, roles, progress, judged, 1e-3, 0)["early_stop"] == 0.0
    assert len(seen) == 4


def test_a_minibatch_with_a_wild_ratio_is_not_learned_from(roles, judged):
    """Old log-probabilities 3 nats too low make every ratio e^3; the step is skipped and its gradient forgotten."""
    wild = dataclasses.replace(judged.experience, logprobs=judged.experience.logprobs - 3.0)
    config = ppo_config(ppo_epochs=2, minibatches=1, target_approx_kl=None, ratio_limit=20.0)
    progress, before = progress_of(roles, config), weights(roles)
    wild = dataclasses.replace(judged, experience=wild)
    found = steps(config, roles, progress, wild, 1e-3, 0)
    assert found["ratio_mean"] == pytest.approx(20.0855, rel=1e-4) and found["skipped_steps"] == 2.0
    assert found["approx_kl"] == pytest.approx(4.5, rel=1e-4) and found["grad_norm"] == 0.0
    assert changed(before, weights(roles)) == set()
    assert all(o.gradient.abs().max() == 0 and o.updates == 0 for o in progress.optimizers.values())
    config = ppo_config(ppo_epochs=2, minibatches=1, target_approx_kl=None, ratio_limit=21.0)
    learned = steps(config, roles, progress, wild, 1e-6, 0)
    assert learned["skipped_steps"] == 0.0 and progress.optimizers["policy"].updates == 2


def test_an_updates_numbers_are_means_but_for_the_largest_and_first_ratio():
    steps = [
        {
            "policy_loss": 1.0,
            "ratio_max": 1.0,
            "ratio_error": 0.2,
            "ratio_mean": 1.0,
            "grad_norm": 3.0,
            "skipped_steps": 0.0,
        },
        {
            "policy_loss": 2.0,
            "ratio_max": 1.5,
            "ratio_error": 0.5,
            "ratio_mean": 1.1,
            "grad_norm": 5.0,
            "nonfinite_steps": 1.0,
        },
        {"policy_loss": 6.0, "ratio_max": 1.2, "ratio_error": 0.3, "ratio_mean": 1.2, "skipped_steps": 1.0},
    ]
    for step, deviation in zip(steps, (0.1, 0.3, 0.2), strict=True):
        step["ratio_std"] = deviation
    assert over_steps(steps) == pytest.approx(
        {
            "policy_loss": 3.0,
            "ratio_mean": 1.1,
            "ratio_max": 1.5,
            "ratio_first": 1.0,
            "ratio_first_error": 0.2,
            "ratio_first_std": 0.1,
            "grad_norm": 4.0,
            "skipped_steps": 1.0,
            "nonfinite_steps": 1.0,
        }
    )


# --- one update moves the policy where the advantages point


def test_steps_raise_the_probability_of_what_was_better(open_tiny, text):
    base = open_tiny("llama")
    roles = Roles(base)
    roles.add("policy", random_adapter(base, 1))
    roles.add("reference", None)
    roles.add("critic", random_adapter(base, 2), random_head(base.width, 3))
    experience = experience_of(roles, text, PROMPTS)
    judged = judged_at_random(experience)
    sign = torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None] * experience.mask
    judged = dataclasses.replace(judged, advantages=sign)
    config = ppo_config(ppo_epochs=4, target_approx_kl=None)
    steps(config, roles, progress_of(roles, config), judged, 1e-3, 0)
    after, _ = role_logprobs(roles, "policy", experience.rollout, 0.7)
    moved = ((after - experience.logprobs) * experience.mask).sum(1)
    assert (moved * sign[:, 0] > 0).all()


def test_the_loop_of_check_4_uses_the_model_itself(model_folder, roles):
    """Its oracle runs the base's own forward pass; without an adapter that is transformers' model."""
    ids = sequences_of([9])[0][None]
    with torch.no_grad():
        mine, plain = roles.base.model(ids, use_cache=False).logits, whole_model(model_folder("llama"))(ids).logits
    assert (mine - plain).abs().max() <= 1e-5 * plain.abs().max()
