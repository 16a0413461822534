"""PPO's clipped steps: several passes over one batch of experience in minibatches (Schulman et al. 2017)."""

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
SUMMED = ("loss", "policy_loss", "kl_loss", "value_loss", "clipped", "values_clipped", "moved", "ratios", "squares",
           "largest_ratio", "largest_error")  # fmt: skip
NOT_AVERAGED = ("ratio_max", "ratio_error", "ratio_std", "skipped_steps", "nonfinite_steps", "grad_norm")


@dataclass(frozen=True)
class ExperienceWithAdvantages:
    """Experience with its advantages and returns."""

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
    tokens: float  # response tokens of the step over all ranks, the divisor of losses
    sequences: float  # responses of the step over all ranks

    def sequences_of(self, rows: list[int]) -> tuple[list[Tensor], list[Tensor]]:
        """Sequences and targets of some rows."""
        rollout = self.judged.experience.rollout
        return [rollout.sequences[i] for i in rows], [rollout.targets[i] for i in rows]

    def select(self, rows: list[int], *tensors: Tensor) -> tuple[list[int], list[Tensor]]:
        """Response lengths of some rows, and the rows of tensors (B, T), as long as the longest of them."""
        experience = self.judged.experience
        lengths = [experience.rollout.lengths[i] for i in rows]
        index = torch.tensor(rows, device=experience.mask.device)
        return lengths, [x[index, : max(lengths)] for x in tensors]


def clipped_steps(
    session: Session,
    judged: ExperienceWithAdvantages,
    rate: float,
    step: int,
    add_extra_gradient: Callable[[int], dict[str, float]] | None = None,
) -> dict[str, float]:
    """`ppo_epochs` passes of `minibatches` steps each; ends early once the policy has moved too far.

    A minibatch is skipped if its mean probability ratio exceeds `ratio_limit`, or if approx_kl to the policy that
    sampled exceeds 1.5 x `target_approx_kl`. `add_extra_gradient(number)` adds this rank's gradient of another loss to
    optimiser step `number` of the update. Returns the update's mean statistics.
    """
    config, ranks = session.config, session.ranks
    history: list[dict[str, float]] = []
    for epoch in range(config.ppo_epochs):
        for rows in minibatches_of(config, ranks, judged, step, epoch):
            counts = {"tokens": float(judged.experience.mask[list(rows)].sum()), "sequences": float(len(rows))}
            counts = ranks.sum_floats(counts, session.base.device)
            if counts["tokens"] == 0:  # more minibatches than there are responses
                continue
            minibatch = Minibatch(judged, rows, **counts)
            metrics = backward_minibatch(session, minibatch)
            moved_too_far = config.target_approx_kl and metrics["approx_kl"] > 1.5 * config.target_approx_kl
            if moved_too_far or metrics["ratio_mean"] > config.ratio_limit:
                session.progress.zero_gradients()
                metrics |= {"skipped_steps": 1.0}
            else:
                if judged.train_policy and add_extra_gradient is not None:
                    again = partial(add_minibatch, config, session.roles, minibatch)
                    metrics |= session.add_gradients(partial(add_extra_gradient, len(history)), again=again)
                rates = learning_rates(session, rate, train_policy=judged.train_policy)
                metrics |= session.apply_gradients(rates, step, patience=math.inf)
            history.append(metrics)
            if moved_too_far:
                return {"lr": rate, "early_stop": 1.0, **over_steps(history)}
    return {"lr": rate, "early_stop": 0.0, **over_steps(history)}


def learning_rates(session: Session, rate: float, *, train_policy: bool) -> dict[str, float]:
    """Learning rates by optimiser if the policy's is `rate`; the critic's follows the same schedule."""
    rates = {"policy": rate, "critic": rate * session.peak_critic_rate / session.peak_learning_rate}
    return {name: rates[name] for name in session.progress.optimizers if name == "critic" or train_policy}


def minibatches_of(
    config: PpoConfig, ranks: Ranks, judged: ExperienceWithAdvantages, step: int, epoch: int
) -> list[tuple[int, ...]]:
    """This rank's rows of every minibatch of one pass.

    All ranks' responses are shuffled as one list, so that a minibatch holds the same ones however many ranks there are.
    """
    count, group = len(judged.experience.rollout.responses), config.responses_per_prompt
    total = int(ranks.sum_floats({"responses": float(count)}, judged.experience.mask.device)["responses"])
    row_at = {(ranks.rank + ranks.size * (i // group)) * group + i % group: i for i in range(count)}
    order = permutation(total, config.seed, "ppo", step, epoch, 0)
    ends = [part * total // config.minibatches for part in range(config.minibatches + 1)]
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

    A critic with its own adapter is a second pass under its own role. A shared critic is a head on the policy's states;
    while only the critic warms up, its head alone is trained.
    """
    sizes = [minibatch.judged.experience.rollout.sizes[i] for i in minibatch.rows]

    def accumulate(role: str, forward: Callable[..., Terms]) -> dict[str, float]:
        return roles.accumulate(role, minibatch.rows, partial(forward, config, roles, minibatch), sizes)

    values = dict.fromkeys(SUMMED, 0.0)
    train_policy, critic = minibatch.judged.train_policy, config.critic if config.advantage == "gae" else None
    if critic == "shared":
        return values | accumulate("policy", both_losses if train_policy else value_loss_of_frozen_states)
    if train_policy:
        values |= accumulate("policy", policy_loss_alone)
    if critic == "adapter":
        values |= accumulate("critic", value_loss_alone)
    return values


# --- forward passes over some rows of a minibatch, under the active role


def policy_loss_alone(config: PpoConfig, roles: Roles, minibatch: Minibatch, rows: list[int]) -> Terms:
    """The policy's loss."""
    return policy_terms(config, minibatch, rows, read_policy(config, roles, minibatch, rows))


def value_loss_alone(config: PpoConfig, roles: Roles, minibatch: Minibatch, rows: list[int]) -> Terms:
    """The loss of a critic with its own adapter."""
    return value_terms(config, minibatch, rows, read_values(roles, "critic", *minibatch.sequences_of(rows)))


def both_losses(config: PpoConfig, roles: Roles, minibatch: Minibatch, rows: list[int]) -> Terms:
    """Policy and value loss from one forward pass: the shared critic's head takes the policy's states."""
    outputs = read_policy(config, roles, minibatch, rows)
    policy, policy_sums = policy_terms(config, minibatch, rows, outputs)
    value, value_sums = value_terms(config, minibatch, rows, roles.heads["critic"](outputs.hidden))
    return policy + value, policy_sums | value_sums


def value_loss_of_frozen_states(config: PpoConfig, roles: Roles, minibatch: Minibatch, rows: list[int]) -> Terms:
    """Value loss of a shared critic's head alone: no gradient reaches the policy's states."""
    sequences, targets = minibatch.sequences_of(rows)
    with torch.no_grad():
        hidden = roles.base.hidden(sequences, predictors(targets))
    return value_terms(config, minibatch, rows, roles.heads["critic"](hidden))


def read_policy(config: PpoConfig, roles: Roles, minibatch: Minibatch, rows: list[int]) -> TargetOutputs:
    """Log-probabilities of the responses under the current policy, with entropies if entropy_coef needs them."""
    sequences, targets = minibatch.sequences_of(rows)
    want_entropy = config.entropy_coef > 0
    return read_targets(roles.base, sequences, targets, temperature=config.temperature, want_entropy=want_entropy)


# --- losses


def policy_terms(config: PpoConfig, minibatch: Minibatch, rows: list[int], outputs: TargetOutputs) -> Terms:
    """The clipped surrogate loss of some rows, plus KL and entropy terms if configured; and values to add up."""
    judged, experience = minibatch.judged, minibatch.judged.experience
    lengths, (old, reference, advantages, mask) = minibatch.select(
        rows, experience.logprobs, experience.reference_logprobs, judged.advantages, experience.mask
    )
    logprobs = pad(outputs.logprobs, lengths)
    counts = {"tokens": minibatch.tokens, "sequences": minibatch.sequences, "max_length": config.max_response_tokens}
    weights = token_weights(mask, config.loss_aggregation, **counts)
    clips = {"clip_high": config.clip_range_high, "dual_clip": config.dual_clip}
    loss = policy_loss(logprobs, old, advantages, mask, config.clip_range, weights=weights, **clips)
    ratio_error = (loss.ratio - 1)[mask]
    sums = {
        "policy_loss": loss.loss.item(),
        "clipped": float(loss.clipped_count),
        "moved": float(loss.approx_kl_sum),
        "ratios": float(loss.ratio.sum()),
        "squares": float(ratio_error.square().sum()),
        "largest_ratio": float(loss.ratio.max()),
        "largest_error": float(ratio_error.abs().max()),
    }
    total = loss.loss
    if config.kl_place == "loss":
        kl = kl_loss(logprobs, reference, mask, config.kl_kind, weights=weights)
        total = total + judged.kl_coef * kl
        sums["kl_loss"] = kl.item()
    if config.entropy_coef > 0:
        total = total - config.entropy_coef * aggregate(pad(outputs.entropy, lengths), mask, weights=weights)
    return total, sums | {"loss": total.item()}


def value_terms(config: PpoConfig, minibatch: Minibatch, rows: list[int], values: Tensor) -> Terms:
    """value_coef x the clipped value loss of some rows, whose values (M,) lie end to end; and values to add up."""
    judged, experience = minibatch.judged, minibatch.judged.experience
    lengths, (old, returns, mask) = minibatch.select(rows, experience.values, judged.returns, experience.mask)
    loss = value_loss(pad(values, lengths), old, returns, mask, config.value_clip_range, minibatch.tokens)
    return config.value_coef * loss.loss, {
        "value_loss": loss.loss.item(),
        "values_clipped": float(loss.clipped_count),
    }


def over_steps(history: list[dict[str, float]]) -> dict[str, float]:
    """An update's statistics: means over its steps, the largest and first ratio, and the number of skipped steps."""
    names = {name: None for metrics in history for name in metrics if name not in NOT_AVERAGED}
    out = {}
    for name in names:  # a step that was skipped lacks some
        values = [metrics[name] for metrics in history if name in metrics]
        out[name] = sum(values) / len(values)
    norms = [metrics["grad_norm"] for metrics in history if "grad_norm" in metrics]
    return out | {
        "ratio_max": max(metrics["ratio_max"] for metrics in history),
        "ratio_first": history[0]["ratio_max"],
        "ratio_first_error": history[0]["ratio_error"],
        "ratio_first_std": history[0]["ratio_std"],
        "grad_norm": sum(norms) / len(norms) if norms else 0.0,
        **{n: sum(metrics.get(n, 0.0) for metrics in history) for n in ("skipped_steps", "nonfinite_steps")},
    }
