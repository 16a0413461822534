"""Watches PPO while it runs: named conditions that say what is going wrong, why that happens, and which knob helps.

Pure functions of the metrics so far, so that a resumed run says the same. Thresholds: Huang et al. 2024 (KL of 50 and
more is over-optimisation), Zheng et al. 2023 (collapse), Singhal et al. 2023 (length), Ziegler et al. 2019 (critic).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

Metrics = dict[str, float]

IN_A_ROW = 3  # updates that a drifting condition must hold before it is named
WARM_UP = 10  # updates that a critic is given to learn


@dataclass(frozen=True)
class Alarm:
    """One condition that holds now."""

    condition: str
    number: str  # what was measured
    cause: str
    advice: str

    def __str__(self) -> str:
        return f"{self.condition}: {self.number}; {self.cause}\n  -> {self.advice}"


@dataclass(frozen=True)
class Condition:
    """A name, when it holds, and what to tell."""

    holds: Callable[[list[Metrics]], str | None]  # the number in words where it holds
    cause: str
    advice: str


def watch(history: list[Metrics]) -> list[Alarm]:
    """Every condition that holds after the last update; `history` has one entry per update, in order."""
    alarms = []
    for name, condition in CONDITIONS.items():
        number = condition.holds(history)
        if number is not None:
            alarms.append(Alarm(name, number, condition.cause, condition.advice))
    return alarms


def _lately(history: list[Metrics], name: str, count: int = IN_A_ROW) -> list[float]:
    """The last `count` values of a metric; empty until there are so many."""
    values = [m[name] for m in history[-count:] if m.get(name) is not None and math.isfinite(m[name])]
    return values if len(values) == count else []


def _kl(history: list[Metrics]) -> str | None:
    kl, length = history[-1].get("reward_kl", 0.0), history[-1].get("response_length", 1.0)
    if kl > 50 or (kl > 10 and kl / length > 0.5):
        return f"the sequence KL to the reference is {kl:.1f} nats, {kl / length:.2f} per token"
    return None


def _negative_kl(history: list[Metrics]) -> str | None:
    lately = _lately(history, "reward_kl", 5)
    if lately and max(lately) < 0 and sum(lately) / 5 < -0.05:
        return f"the KL to the reference was negative 5 times in a row, {sum(lately) / 5:.2f} on average"
    return None


def _ratio(history: list[Metrics]) -> str | None:
    first, tolerance = history[-1].get("ratio_first_error", 0.0), history[-1].get("ratio_tolerance", 1e-3)
    return f"the first probability ratio is off 1 by {first:.2g}" if first > tolerance else None


def _entropy(history: list[Metrics]) -> str | None:
    first, now = history[0].get("entropy", 0.0), history[-1].get("entropy", 0.0)
    if first > 0.05 and now < 0.1 * first:
        return f"the entropy fell from {first:.3f} to {now:.4f} nats per token"
    return None


def _length(history: list[Metrics]) -> str | None:
    lately = _lately(history, "score_length_corr")
    first, now = history[0].get("response_length", 0.0), history[-1].get("response_length", 0.0)
    if lately and min(lately) > 0.5 and now > 1.3 * first:
        return f"scores follow length (correlation {lately[-1]:.2f}), which grew from {first:.0f} to {now:.0f} tokens"
    return None


def _no_eos(history: list[Metrics]) -> str | None:
    lately = _lately(history, "truncated_rate")
    if lately and min(lately) > 0.1 and history[-1].get("missing_eos_penalty", 1.0) > 0:
        return f"{lately[-1]:.0%} of the responses never ended"
    return None


def _critic(history: list[Metrics]) -> str | None:
    lately = _lately(history, "explained_variance", 5)
    if lately and len(history) >= WARM_UP and max(lately) < 0:
        return f"the critic explains less than nothing of the returns (explained variance {lately[-1]:.2f})"
    return None


def _dead_groups(history: list[Metrics]) -> str | None:
    lately = _lately(history, "dead_group_rate")
    if lately and min(lately) > 0.8:
        return f"{lately[-1]:.0%} of the prompts had responses of one score only"
    return None


def _not_finite(history: list[Metrics]) -> str | None:
    count = history[-1].get("nonfinite_steps", 0.0)
    return f"{count:.0f} steps of this update had a gradient that is not finite and were left out" if count else None


def _reward_range(history: list[Metrics]) -> str | None:
    first, spread = history[0].get("reward_score", 0.0), history[0].get("reward_score_std", 0.0)
    now = history[-1].get("reward_score", 0.0)
    if len(history) > 1 and spread > 0 and abs(now - first) > 5 * spread:
        return (
            f"the mean score moved from {first:.2f} to {now:.2f}, {abs(now - first) / spread:.1f} standard deviations"
        )
    return None


CONDITIONS: dict[str, Condition] = {
    "kl": Condition(
        _kl, "the policy has left the region where the reward was learned", "raise --kl-coef or lower --learning-rate"
    ),
    "negative-kl": Condition(
        _negative_kl,
        "the sampled law is not the one whose log-probabilities are taken",
        "this should not happen: report it, with the base model and the temperature",
    ),
    "ratio": Condition(
        _ratio, "sampling-time and training-time log-probabilities differ", "use --dtype float32, or report it"
    ),
    "entropy": Condition(
        _entropy, "the policy repeats itself", "raise --kl-coef, lower --learning-rate, or go back to an earlier state"
    ),
    "length": Condition(
        _length, "the reward pays for length", "balance the comparisons by length, or add a length penalty"
    ),
    "no-eos": Condition(
        _no_eos,
        "responses are cut before they end",
        "raise --max-response-tokens or --missing-eos-penalty; 0 says that ends do not matter",
    ),
    "critic": Condition(_critic, "advantages are noise", "raise --critic-learning-rate, or --gae-lambda to 1"),
    "dead-groups": Condition(
        _dead_groups,
        "nothing can be learned from them",
        "take harder or easier prompts, or more --responses-per-prompt",
    ),
    "nan": Condition(
        _not_finite, "the loss left the range of numbers", "lower --learning-rate, or use --dtype float32"
    ),
    "reward-range": Condition(
        _reward_range,
        "scores are far from those that the reward model was trained on, so it may be wrong there",
        "raise --kl-coef, stop earlier, or train a fresh reward model on the policy's responses",
    ),
}
