"""PPO's clipped steps: several passes over one batch of experience, cut into minibatches (Schulman et al. 2017)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from stages.config import PpoConfig
from stages.maths.losses import aggregate, kl_loss, policy_loss, token_weights, value_loss
from stages.models.outputs import TargetOutputs, pad, predictors, read_targets
from stages.models.roles import Roles
from stages.rollout.experience import Experience, read_values
from stages.training.devices import Ranks
from stages.training.seeds import permutation
from stages.training.session import Session

Terms = tuple[Tensor, dict[str, float]]  # a loss, and named values that add up over the passes of a minibatch
COUNTED = ("loss", "policy_loss", "kl_loss", "value_loss", "clipped", "values_clipped", "moved", "ratios", "squares",
           "largest_ratio", "largest_error")  # fmt: skip
NOT_AVERAGED = ("ratio_max", "ratio_error", "ratio_std", "skipped_steps", "nonfinite_steps", "grad_norm")


@dataclass(frozen=True)
class ExperienceWithAdvantages:
    """Experience with what is learned from it."""

    experience: Experience
    advantages: Tensor  # (B, T)
    returns: Tensor  # (B, T) the critic's targets
    kl_coef: float = 0.0  # weight of the KL if it is a loss
    train_policy: bool = True  # False while only the critic warms up


@dataclass(frozen=True)
class Minibatch:
    """The rows of one optimiser step on this rank."""

    judged: ExperienceWithAdvantages
    rows: tuple[int, ...]
    tokens: float  # response tokens of the step over all ranks: what losses are divided by
    sequences: float  # responses of the step over all ranks


def clipped_steps(
    session: Session,
    judged: ExperienceWithAdvantages,
    rate: float,
    step: int,
    add_extra_gradient: Callable[[int], dict[str, float]] | None = None,
) -> dict[str, float]:
    """`ppo_epochs` passes of `minibatches` steps each; ends early once the policy has moved too far.

    A minibatch is not learned from if its mean probability ratio exceeds `ratio_limit`, or if the policy has moved more
    than 1.5 x `target_approx_kl` from the one that sampled. `add_extra_gradient(number)` adds that of another loss, of
    this rank's rows, to optimiser step `number` of the update. Returns the update's mean statistics.
    """
    config, ranks = session.config, session.ranks
    history: list[dict[str, float]] = []
    for epoch in range(config.ppo_epochs):
        for rows in minibatches_of(config, ranks, judged, step, epoch):
            own = {"tokens": float(judged.experience.mask[list(rows)].sum()), "sequences": float(len(rows))}
            counts = ranks.sum_floats(own, session.base.device)
            if counts["tokens"] == 0:  # more minibatches than there are responses
                continue
            minibatch = Minibatch(judged, rows, counts["tokens"], counts["sequences"])
            found = backward_minibatch(session, minibatch)
            moved_too_far = config.target_approx_kl and found["approx_kl"] > 1.5 * config.target_approx_kl
            if moved_too_far or found["ratio_mean"] > config.ratio_limit:
                session.progress.zero_gradients()
                found |= {"skipped_steps": 1.0}
            else:
                if judged.train_policy and add_extra_gradient is not None:
                    again = partial(add_minibatch, config, session.roles, minibatch)
                    found |= session.add_gradients(partial(add_extra_gradient, len(history)), again=again)
                rates = learning_rates(session, rate, train_policy=judged.train_policy)
                found |= session.apply_gradients(rates, step, patience=math.inf)
            history.append(found)
            if moved_too_far:
                return {"lr": rate, "early_stop": 1.0, **over_steps(history)}
    return {"lr": rate, "early_stop": 0.0, **over_steps(history)}


def learning_rates(session: Session, rate: float, *, train_policy: bool) -> dict[str, float]:
    """Learning rates of what is trained, for a policy's of `rate`; the critic's follows the same schedule."""
    config = session.config
    of_critic = rate * (config.critic_learning_rate or config.learning_rate) / config.learning_rate
    rates = {"policy": rate, "critic": of_critic}
    return {name: rates[name] for name in session.progress.optimizers if name == "critic" or train_policy}


def minibatches_of(
    config: PpoConfig, ranks: Ranks, judged: ExperienceWithAdvantages, step: int, epoch: int
) -> list[tuple[int, ...]]:
    """This rank's rows of every minibatch of one pass.

    All ranks' responses are shuffled as one list, so that a minibatch holds the same ones however many ranks there are.
    """
    mine, several = len(judged.experience.rollout.responses), config.responses_per_prompt
    whole = int(ranks.sum_floats({"responses": float(mine)}, judged.experience.mask.device)["responses"])
    places = [(ranks.rank + ranks.size * (i // several)) * several + i % several for i in range(mine)]
    row_at = dict(zip(places, range(mine), strict=True))
    order = permutation(whole, config.seed, "ppo", step, epoch, 0)
    ends = [part * whole // config.minibatches for part in range(config.minibatches + 1)]
    return [tuple(row_at[i] for i in order[a:b] if i in row_at) for a, b in pairwise(ends)]


def backward_minibatch(session: Session, minibatch: Minibatch) -> dict[str, float]:
    """Add the gradient of policy loss + value_coef x value loss over a minibatch; returns all ranks' statistics."""
    config, tokens = session.config, minibatch.tokens
    values = session.add_gradients(partial(add_minibatch, config, session.roles, minibatch))
    return {
        "policy_loss": values["policy_loss"],
        "value_loss": values["value_loss"],
        "loss": values["loss"] + config.value_coef * values["value_loss"],
        "kl_loss": values["kl_loss"],
        "approx_kl": values["moved"] / tokens,
        "clip_fraction": values["clipped"] / tokens,
        "value_clip_fraction": values["values_clipped"] / tokens,
        "ratio_mean": values["ratios"] / tokens,
        "ratio_max": values["largest_ratio"],
        "ratio_error": values["largest_error"],
        "ratio_std": math.sqrt(values["squares"] / tokens),
    }


def add_minibatch(config: PpoConfig, roles: Roles, minibatch: Minibatch) -> dict[str, float]:
    """Add the gradient of this rank's rows of a minibatch; returns their named values.

    A critic with an adapter of its own is a second pass under its own role; a shared one reads the policy's states,
    and while only the critic warms up its head alone learns from them.
    """
    sizes = [minibatch.judged.experience.rollout.sizes[i] for i in minibatch.rows]

    def accumulate(role: str, forward: Callable[..., Terms]) -> dict[str, float]:
        return roles.accumulate(role, minibatch.rows, partial(forward, config, roles, minibatch), sizes)

    values = dict.fromkeys(COUNTED, 0.0)
    learns, critic = minibatch.judged.train_policy, config.critic if config.advantage == "gae" else None
    if critic == "shared":
        return values | accumulate("policy", both_losses if learns else value_loss_of_frozen_states)
    if learns:
        values |= accumulate("policy", policy_loss_alone)
    if critic == "adapter":
        values |= accumulate("critic", value_loss_alone)
    return values


# --- forward passes over some rows of a minibatch, under the active role


def policy_loss_alone(config: PpoConfig, roles: Roles, minibatch: Minibatch, rows: list[int]) -> Terms:
    """The policy's loss."""
    return policy_terms(config, minibatch, rows, read_policy(config, roles, minibatch, rows))


def value_loss_alone(config: PpoConfig, roles: Roles, minibatch: Minibatch, rows: list[int]) -> Terms:
    """The loss of a critic with an adapter of its own."""
    return value_terms(config, minibatch, rows, read_values(roles, "critic", *_sequences(minibatch, rows)))


def both_losses(config: PpoConfig, roles: Roles, minibatch: Minibatch, rows: list[int]) -> Terms:
    """Policy and value loss from one forward pass: the shared critic's head reads the policy's states."""
    outputs = read_policy(config, roles, minibatch, rows)
    policy, counted = policy_terms(config, minibatch, rows, outputs)
    value, more = value_terms(config, minibatch, rows, roles.heads["critic"](outputs.hidden))
    return policy + value, counted | more


def value_loss_of_frozen_states(config: PpoConfig, roles: Roles, minibatch: Minibatch, rows: list[int]) -> Terms:
    """Value loss of a shared critic's head alone: the policy's states are taken as they are."""
    sequences, targets = _sequences(minibatch, rows)
    with torch.no_grad():
        hidden = roles.base.hidden(sequences, predictors(targets))
    return value_terms(config, minibatch, rows, roles.heads["critic"](hidden))


def read_policy(config: PpoConfig, roles: Roles, minibatch: Minibatch, rows: list[int]) -> TargetOutputs:
    """Log-probabilities of the responses under the policy as it is now, with entropies if they are paid for."""
    sequences, targets = _sequences(minibatch, rows)
    paid = config.entropy_coef > 0
    return read_targets(roles.base, sequences, targets, temperature=config.temperature, want_entropy=paid)


def _sequences(minibatch: Minibatch, rows: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    rollout = minibatch.judged.experience.rollout
    return [rollout.sequences[i] for i in rows], [rollout.targets[i] for i in rows]


# --- losses


def policy_terms(config: PpoConfig, minibatch: Minibatch, rows: list[int], outputs: TargetOutputs) -> Terms:
    """The clipped surrogate of some rows, with the KL and entropy terms that are asked for; and what is counted."""
    judged, experience = minibatch.judged, minibatch.judged.experience
    lengths = [experience.rollout.lengths[i] for i in rows]
    index = torch.tensor(rows, device=experience.mask.device)
    old, reference, advantages, mask = (
        x[index, : max(lengths)]
        for x in (experience.logprobs, experience.reference_logprobs, judged.advantages, experience.mask)
    )
    logprobs = pad(outputs.logprobs, lengths)
    counts = {"tokens": minibatch.tokens, "sequences": minibatch.sequences, "max_length": config.max_response_tokens}
    weights = token_weights(mask, config.loss_aggregation, **counts)
    clips = {"clip_high": config.clip_range_high, "dual_clip": config.dual_clip}
    found = policy_loss(logprobs, old, advantages, mask, config.clip_range, weights=weights, **clips)
    off = (found.ratio - 1)[mask]
    counted = {
        "policy_loss": found.loss.item(),
        "clipped": float(found.clipped_count),
        "moved": float(found.approx_kl_sum),
        "ratios": float(found.ratio.sum()),
        "squares": float(off.square().sum()),
        "largest_ratio": float(found.ratio.max()),
        "largest_error": float(off.abs().max()),
    }
    total = found.loss
    if config.kl_place == "loss":
        distance = kl_loss(logprobs, reference, mask, config.kl_kind, weights=weights)
        total = total + judged.kl_coef * distance
        counted["kl_loss"] = distance.item()
    if config.entropy_coef > 0:
        total = total - config.entropy_coef * aggregate(pad(outputs.entropy, lengths), mask, weights=weights)
    return total, counted | {"loss": total.item()}


def value_terms(config: PpoConfig, minibatch: Minibatch, rows: list[int], values: Tensor) -> Terms:
    """value_coef x the clipped value loss of some rows, whose values (M,) lie end to end; and what is counted."""
    judged, experience = minibatch.judged, minibatch.judged.experience
    lengths = [experience.rollout.lengths[i] for i in rows]
    index = torch.tensor(rows, device=experience.mask.device)
    old, returns, mask = (x[index, : max(lengths)] for x in (experience.values, judged.returns, experience.mask))
    found = value_loss(pad(values, lengths), old, returns, mask, config.value_clip_range, minibatch.tokens)
    return config.value_coef * found.loss, {
        "value_loss": found.loss.item(),
        "values_clipped": float(found.clipped_count),
    }


def over_steps(history: list[dict[str, float]]) -> dict[str, float]:
    """An update's statistics: means over its steps, the largest and the first ratio, and how many were skipped."""
    names = {name: None for found in history for name in found if name not in NOT_AVERAGED}
    out = {}
    for name in names:  # a step that was skipped lacks some
        values = [found[name] for found in history if name in found]
        out[name] = sum(values) / len(values)
    norms = [found["grad_norm"] for found in history if "grad_norm" in found]
    return out | {
        "ratio_max": max(found["ratio_max"] for found in history),
        "ratio_first": history[0]["ratio_max"],
        "ratio_first_error": history[0]["ratio_error"],
        "ratio_first_std": history[0]["ratio_std"],
        "grad_norm": sum(norms) / len(norms) if norms else 0.0,
        **{n: sum(found.get(n, 0.0) for found in history) for n in ("skipped_steps", "nonfinite_steps")},
    }
