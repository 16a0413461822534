"""PPO's clipped steps: several passes over one batch of experience, cut into minibatches (Schulman et al. 2017)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stages.config import PpoConfig
from stages.maths.losses import policy_loss, value_loss
from stages.models.forward import pad, read_targets
from stages.models.roles import Roles
from stages.rollout.experience import Experience, read_values
from stages.training.devices import Ranks
from stages.training.loop import Progress, apply_gradients
from stages.training.passes import accumulate
from stages.training.seeds import permutation

Terms = tuple[Tensor, dict[str, float]]


@dataclass(frozen=True)
class Judged:
    """Experience with what is learned from it."""

    experience: Experience
    advantages: Tensor  # (B, T)
    returns: Tensor  # (B, T) the critic's targets


@dataclass(frozen=True)
class Minibatch:
    """The rows of one optimiser step on this rank."""

    judged: Judged
    rows: list[int]
    tokens: float  # response tokens of the step over all ranks: what losses are divided by
    ratios: list[float] = field(default_factory=list)  # largest probability ratio of each forward pass


def clipped_steps(
    config: PpoConfig, roles: Roles, ranks: Ranks, progress: Progress, judged: Judged, rate: float, step: int
) -> dict[str, float]:
    """`ppo_epochs` passes of `minibatches` steps each; ends early once the policy has moved too far.

    A minibatch is not learned from where its mean probability ratio exceeds `ratio_limit`, or where the policy has
    moved more than 1.5 x `target_approx_kl` from the one that sampled. Returns the update's mean statistics.
    """
    device = roles.base.device
    rates = {
        "policy": rate,
        "critic": rate * (config.critic_learning_rate or config.learning_rate) / config.learning_rate,
    }
    history: list[dict[str, float]] = []
    for epoch in range(config.ppo_epochs):
        order = permutation(len(judged.experience.rollout.responses), config.seed, "ppo", step, epoch, ranks.rank)
        for part in range(config.minibatches):
            rows = order[part * len(order) // config.minibatches : (part + 1) * len(order) // config.minibatches]
            own = {"tokens": float(judged.experience.mask[rows].sum())}
            tokens = ranks.sum_floats(own, device)["tokens"]
            if tokens == 0:  # more minibatches than any rank has responses
                continue
            minibatch = Minibatch(judged, rows, tokens)
            found = backward(config, roles, ranks, minibatch)
            moved_too_far = config.target_approx_kl and found["approx_kl"] > 1.5 * config.target_approx_kl
            if moved_too_far or found["ratio_mean"] > config.ratio_limit:
                for optimizer in progress.optimizers.values():
                    optimizer.zero()
                found |= {"skipped_steps": 1.0}
            else:
                found |= apply_gradients(progress, rates, config.max_grad_norm, ranks, step + 1)
            history.append(found)
            if moved_too_far:
                return {"lr": rate, "early_stop": 1.0, **over_steps(history)}
    return {"lr": rate, "early_stop": 0.0, **over_steps(history)}


def backward(config: PpoConfig, roles: Roles, ranks: Ranks, minibatch: Minibatch) -> dict[str, float]:
    """Add the gradient of policy loss + value_coef x value loss over a minibatch; returns its statistics.

    A critic with an adapter of its own is a second pass under its own role; a shared one reads the policy's states.
    """
    if config.critic == "shared":
        passes: dict[str, Callable[[list[int]], Terms]] = {
            "policy": lambda micro: both_terms(config, roles, minibatch, micro)
        }
    else:
        passes = {
            "policy": lambda micro: policy_terms(config, roles, minibatch, micro)[0],
            "critic": lambda micro: value_terms(config, roles, minibatch, micro, None),
        }
    sizes = [minibatch.judged.experience.rollout.sizes[i] for i in minibatch.rows]
    sums = dict.fromkeys(("policy_loss", "value_loss", "clipped", "values_clipped", "moved", "ratios"), 0.0)
    for role, terms in passes.items():
        with roles.use(role):
            sums |= accumulate(sizes, config.micro_batch_size, terms, on_cuda=roles.base.device.type == "cuda")
    sums = ranks.sum_floats(sums, roles.base.device)
    return {
        "policy_loss": sums["policy_loss"],
        "value_loss": sums["value_loss"],
        "loss": sums["policy_loss"] + config.value_coef * sums["value_loss"],
        "approx_kl": sums["moved"] / minibatch.tokens,
        "clip_fraction": sums["clipped"] / minibatch.tokens,
        "value_clip_fraction": sums["values_clipped"] / minibatch.tokens,
        "ratio_mean": sums["ratios"] / minibatch.tokens,
        "ratio_max": ranks.max(max(minibatch.ratios, default=0.0), roles.base.device),
    }


def both_terms(config: PpoConfig, roles: Roles, minibatch: Minibatch, micro: list[int]) -> Terms:
    """Policy and value loss from one forward pass."""
    (policy, counted), hidden = policy_terms(config, roles, minibatch, micro)
    value, more = value_terms(config, roles, minibatch, micro, hidden)
    return policy + value, counted | more


def policy_terms(config: PpoConfig, roles: Roles, minibatch: Minibatch, micro: list[int]) -> tuple[Terms, Tensor]:
    """The clipped surrogate of some rows of a minibatch, its sums, and the hidden states (M, H) it was read from."""
    rows, lengths, sequences, targets = cut(minibatch, micro)
    reading = read_targets(roles.base, sequences, targets, temperature=config.temperature)
    old, advantages, mask = (
        x[rows, : max(lengths)]
        for x in (minibatch.judged.experience.logprobs, minibatch.judged.advantages, minibatch.judged.experience.mask)
    )
    found = policy_loss(pad(reading.logprobs, lengths), old, advantages, mask, config.clip_range, minibatch.tokens)
    minibatch.ratios.append(float(found.ratio.max()))
    counted = {
        "policy_loss": found.loss.item(),
        "clipped": float(found.clipped_count),
        "moved": float(found.approx_kl_sum),
        "ratios": float(found.ratio.sum()),
    }
    return (found.loss, counted), reading.hidden


def value_terms(
    config: PpoConfig, roles: Roles, minibatch: Minibatch, micro: list[int], hidden: Tensor | None
) -> Terms:
    """value_coef x the clipped value loss of some rows, from given hidden states or a forward pass of its own."""
    rows, lengths, sequences, targets = cut(minibatch, micro)
    flat = read_values(roles, "critic", sequences, targets) if hidden is None else roles.heads["critic"](hidden)
    old, returns, mask = (
        x[rows, : max(lengths)]
        for x in (minibatch.judged.experience.values, minibatch.judged.returns, minibatch.judged.experience.mask)
    )
    found = value_loss(pad(flat, lengths), old, returns, mask, config.value_clip_range, minibatch.tokens)
    counted = {"value_loss": found.loss.item(), "values_clipped": float(found.clipped_count)}
    return config.value_coef * found.loss, counted


def cut(minibatch: Minibatch, micro: list[int]) -> tuple[Tensor, list[int], list[Tensor], list[Tensor]]:
    """Row numbers, response lengths, sequences and targets of one forward pass."""
    rollout = minibatch.judged.experience.rollout
    rows = [minibatch.rows[i] for i in micro]
    lengths = [rollout.lengths[i] for i in rows]
    sequences, targets = [rollout.sequences[i] for i in rows], [rollout.targets[i] for i in rows]
    return torch.tensor(rows, device=minibatch.judged.experience.mask.device), lengths, sequences, targets


def over_steps(history: list[dict[str, float]]) -> dict[str, float]:
    """An update's statistics: means over its steps, the largest ratio, the first ratio, and how many were skipped."""
    names = [n for n in history[0] if n not in ("ratio_max", "skipped_steps", "grad_norm")]
    out = {name: sum(found[name] for found in history) / len(history) for name in names}
    norms = [found["grad_norm"] for found in history if "grad_norm" in found]
    return out | {
        "ratio_max": max(found["ratio_max"] for found in history),
        "ratio_first": history[0]["ratio_max"],
        "grad_norm": sum(norms) / len(norms) if norms else 0.0,
        "skipped_steps": sum(found.get("skipped_steps", 0.0) for found in history),
    }
