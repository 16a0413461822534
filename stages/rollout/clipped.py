"""PPO's clipped steps: several passes over one batch of experience, cut into minibatches (Schulman et al. 2017)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from stages.config import PpoConfig
from stages.maths.losses import aggregate, kl_loss, policy_loss, token_weights, value_loss
from stages.models.forward import pad, predictors, read_targets
from stages.models.roles import Roles
from stages.rollout.experience import Experience, read_values
from stages.training.devices import Ranks
from stages.training.loop import Progress, add_gradients, apply_gradients
from stages.training.passes import accumulate
from stages.training.seeds import permutation

Terms = tuple[Tensor, dict[str, float]]
SUMS = ("loss", "policy_loss", "kl_loss", "value_loss", "clipped", "values_clipped", "moved", "ratios", "squares")
NOT_AVERAGED = ("ratio_max", "ratio_error", "ratio_std", "skipped_steps", "nonfinite_steps", "grad_norm")


@dataclass(frozen=True)
class ExperienceWithAdvantages:
    """Experience with what is learned from it."""

    experience: Experience
    advantages: Tensor  # (B, T)
    returns: Tensor  # (B, T) the critic's targets
    kl_coef: float = 0.0  # weight of the KL where it is a loss
    train_policy: bool = True  # False while only the critic warms up


@dataclass(frozen=True)
class Minibatch:
    """The rows of one optimiser step on this rank."""

    judged: ExperienceWithAdvantages
    rows: list[int]
    tokens: float  # response tokens of the step over all ranks: what losses are divided by
    sequences: float  # responses of the step over all ranks
    ratios: list[float] = field(default_factory=list)  # largest probability ratio of each forward pass
    errors: list[float] = field(default_factory=list)  # largest distance of a ratio from 1


def clipped_steps(
    config: PpoConfig,
    roles: Roles,
    ranks: Ranks,
    progress: Progress,
    judged: ExperienceWithAdvantages,
    rate: float,
    step: int,
    add_extra_gradient: Callable[[int], dict[str, float]] = lambda number: {},
) -> dict[str, float]:
    """`ppo_epochs` passes of `minibatches` steps each; ends early once the policy has moved too far.

    A minibatch is not learned from where its mean probability ratio exceeds `ratio_limit`, or where the policy has
    moved more than 1.5 x `target_approx_kl` from the one that sampled. `also(number)` adds the gradient of another
    loss, of this rank's rows, to optimiser step `number` of the update. Returns the update's mean statistics.
    """
    device = roles.base.device
    rates = {
        "policy": rate,
        "critic": rate * (config.critic_learning_rate or config.learning_rate) / config.learning_rate,
    }
    rates = {name: rates[name] for name in progress.optimizers if name == "critic" or judged.train_policy}
    history: list[dict[str, float]] = []
    for epoch in range(config.ppo_epochs):
        for rows in minibatches_of(config, ranks, judged, step, epoch):
            own = {"tokens": float(judged.experience.mask[rows].sum()), "sequences": float(len(rows))}
            counts = ranks.sum_floats(own, device)
            if counts["tokens"] == 0:  # more minibatches than there are responses
                continue
            minibatch = Minibatch(judged, rows, counts["tokens"], counts["sequences"])
            found = backward_minibatch(config, roles, ranks, minibatch)
            moved_too_far = config.target_approx_kl and found["approx_kl"] > 1.5 * config.target_approx_kl
            if moved_too_far or found["ratio_mean"] > config.ratio_limit:
                for optimizer in progress.optimizers.values():
                    optimizer.zero()
                found |= {"skipped_steps": 1.0}
            else:
                if judged.train_policy:
                    again = partial(add_minibatch, config, roles, minibatch)
                    more = add_gradients(roles, ranks, partial(add_extra_gradient, len(history)), again=again)
                    found |= ranks.sum_floats(more, device) if more else {}
                found |= apply_gradients(progress, rates, config.max_grad_norm, ranks, step + 1, patience=math.inf)
            history.append(found)
            if moved_too_far:
                return {"lr": rate, "early_stop": 1.0, **over_steps(history)}
    return {"lr": rate, "early_stop": 0.0, **over_steps(history)}


def minibatches_of(
    config: PpoConfig, ranks: Ranks, judged: ExperienceWithAdvantages, step: int, epoch: int
) -> list[list[int]]:
    """This rank's rows of every minibatch of one pass.

    All ranks' responses are shuffled as one list, so that a minibatch holds the same ones however many ranks there are.
    """
    mine, several = len(judged.experience.rollout.responses), config.responses_per_prompt
    whole = int(ranks.sum_floats({"responses": float(mine)}, judged.experience.mask.device)["responses"])
    places = [(ranks.rank + ranks.size * (i // several)) * several + i % several for i in range(mine)]
    row_at = dict(zip(places, range(mine), strict=True))
    order = permutation(whole, config.seed, "ppo", step, epoch, 0)
    ends = [part * whole // config.minibatches for part in range(config.minibatches + 1)]
    return [[row_at[i] for i in order[a:b] if i in row_at] for a, b in pairwise(ends)]


def backward_minibatch(config: PpoConfig, roles: Roles, ranks: Ranks, minibatch: Minibatch) -> dict[str, float]:
    """Add the gradient of policy loss + value_coef x value loss over a minibatch; returns all ranks' statistics."""
    sums = add_gradients(roles, ranks, partial(add_minibatch, config, roles, minibatch))
    sums = ranks.sum_floats(sums, roles.base.device)
    return {
        "policy_loss": sums["policy_loss"],
        "value_loss": sums["value_loss"],
        "loss": sums["loss"] + config.value_coef * sums["value_loss"],
        "kl_loss": sums["kl_loss"],
        "approx_kl": sums["moved"] / minibatch.tokens,
        "clip_fraction": sums["clipped"] / minibatch.tokens,
        "value_clip_fraction": sums["values_clipped"] / minibatch.tokens,
        "ratio_mean": sums["ratios"] / minibatch.tokens,
        "ratio_max": ranks.max(max(minibatch.ratios, default=0.0), roles.base.device),
        "ratio_error": ranks.max(max(minibatch.errors, default=0.0), roles.base.device),
        "ratio_std": math.sqrt(sums["squares"] / minibatch.tokens),
    }


def add_minibatch(config: PpoConfig, roles: Roles, minibatch: Minibatch) -> dict[str, float]:
    """Add the gradient of this rank's rows of a minibatch; returns their sums.

    A critic with an adapter of its own is a second pass under its own role; a shared one reads the policy's states,
    and while only the critic warms up its head alone learns from them.
    """
    learns = minibatch.judged.train_policy
    passes: list[tuple[str, Callable[[list[int]], Terms]]] = []
    if config.advantage != "gae":
        passes = [("policy", lambda micro: policy_terms(config, roles, minibatch, micro)[0])]
    elif config.critic == "shared":
        passes = [("policy", lambda micro: both_terms(config, roles, minibatch, micro))]
        if not learns:
            passes = [("policy", lambda micro: head_terms(config, roles, minibatch, micro))]
    else:
        passes = [("policy", lambda micro: policy_terms(config, roles, minibatch, micro)[0])] if learns else []
        passes += [("critic", lambda micro: value_terms(config, roles, minibatch, micro, None))]
    sizes = [minibatch.judged.experience.rollout.sizes[i] for i in minibatch.rows]
    sums = dict.fromkeys(SUMS, 0.0)
    for role, terms in passes:
        with roles.use(role):
            sums |= accumulate(sizes, config.micro_batch_size, terms, on_cuda=roles.base.device.type == "cuda")
    return sums


def both_terms(config: PpoConfig, roles: Roles, minibatch: Minibatch, micro: list[int]) -> Terms:
    """Policy and value loss from one forward pass."""
    (policy, counted), hidden = policy_terms(config, roles, minibatch, micro)
    value, more = value_terms(config, roles, minibatch, micro, hidden)
    return policy + value, counted | more


def head_terms(config: PpoConfig, roles: Roles, minibatch: Minibatch, micro: list[int]) -> Terms:
    """Value loss of a shared critic's head alone: the policy's states are taken as they are."""
    _, _, sequences, targets = select_micro_batch(minibatch, micro)
    with torch.no_grad():
        hidden = roles.base.hidden(sequences, predictors(targets))
    return value_terms(config, roles, minibatch, micro, hidden)


def policy_terms(config: PpoConfig, roles: Roles, minibatch: Minibatch, micro: list[int]) -> tuple[Terms, Tensor]:
    """The clipped surrogate of some rows of a minibatch, its sums, and the hidden states (M, H) it was read from."""
    rows, lengths, sequences, targets = select_micro_batch(minibatch, micro)
    bonus = config.entropy_coef > 0
    reading = read_targets(roles.base, sequences, targets, temperature=config.temperature, want_entropy=bonus)
    judged = minibatch.judged
    old, reference, advantages, mask = (
        x[rows, : max(lengths)]
        for x in (
            judged.experience.logprobs,
            judged.experience.reference_logprobs,
            judged.advantages,
            judged.experience.mask,
        )
    )
    logprobs = pad(reading.logprobs, lengths)
    counts = {"tokens": minibatch.tokens, "sequences": minibatch.sequences, "max_length": config.max_response_tokens}
    weights = token_weights(mask, config.loss_aggregation, **counts)
    clips = {"clip_high": config.clip_range_high, "dual_clip": config.dual_clip}
    found = policy_loss(logprobs, old, advantages, mask, config.clip_range, weights=weights, **clips)
    minibatch.ratios.append(float(found.ratio.max()))
    off = (found.ratio - 1)[mask]
    minibatch.errors.append(float(off.abs().max()))
    total = found.loss
    counted = {
        "policy_loss": found.loss.item(),
        "clipped": float(found.clipped_count),
        "moved": float(found.approx_kl_sum),
        "ratios": float(found.ratio.sum()),
        "squares": float(off.square().sum()),
    }
    if config.kl_place == "loss":
        distance = kl_loss(logprobs, reference, mask, config.kl_kind, weights=weights)
        total = total + judged.kl_coef * distance
        counted["kl_loss"] = distance.item()
    if bonus:
        total = total - config.entropy_coef * aggregate(pad(reading.entropy, lengths), mask, weights=weights)
    return (total, counted | {"loss": total.item()}), reading.hidden


def value_terms(
    config: PpoConfig, roles: Roles, minibatch: Minibatch, micro: list[int], hidden: Tensor | None
) -> Terms:
    """value_coef x the clipped value loss of some rows, from given hidden states or a forward pass of its own."""
    rows, lengths, sequences, targets = select_micro_batch(minibatch, micro)
    flat = read_values(roles, "critic", sequences, targets) if hidden is None else roles.heads["critic"](hidden)
    old, returns, mask = (
        x[rows, : max(lengths)]
        for x in (
            minibatch.judged.experience.values,
            minibatch.judged.returns,
            minibatch.judged.experience.mask,
        )
    )
    found = value_loss(pad(flat, lengths), old, returns, mask, config.value_clip_range, minibatch.tokens)
    counted = {"value_loss": found.loss.item(), "values_clipped": float(found.clipped_count)}
    return config.value_coef * found.loss, counted


def select_micro_batch(minibatch: Minibatch, micro: list[int]) -> tuple[Tensor, list[int], list[Tensor], list[Tensor]]:
    """Row numbers, response lengths, sequences and targets of one forward pass."""
    rollout = minibatch.judged.experience.rollout
    rows = [minibatch.rows[i] for i in micro]
    lengths = [rollout.lengths[i] for i in rows]
    sequences, targets = [rollout.sequences[i] for i in rows], [rollout.targets[i] for i in rows]
    return torch.tensor(rows, device=minibatch.judged.experience.mask.device), lengths, sequences, targets


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
