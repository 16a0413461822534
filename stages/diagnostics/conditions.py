"""Watches PPO while it runs: named conditions that say what is going wrong, why that happens, and which knob helps.

Pure functions of the metrics so far, so that a resumed run says the same. Where a number comes from is said beside
each condition; the rest are our own, wide enough to be silent on runs that learn. `kl` and `repetition` were calibrated
on runs known to be good and runs known to be hacked: benchmarks/alarms.py, benchmarks/results/alarms-cpu.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

Metrics = dict[str, float | None]

IN_A_ROW = 3  # updates that a drifting condition must hold before it is named
IN_A_ROW_IF_NOISY = 5  # the same for what is noisier
WARM_UP = 10  # updates that a critic is given to learn
LENGTH_CORRELATED = 0.6  # correlation of scores and lengths
REPEATED = 0.1  # repetition_rate above that of the first update
SHARED = 0.25  # shared_response_rate above that of the first update
LABEL = 4  # tokens below which different prompts may well have the same response
BAD_STEPS = 5  # gradients in a row that are not finite before that is a reason to stop
OF_EVERY_UPDATE = ("loss", "policy_loss", "value_loss", "reward_score", "reward_kl", "entropy")


@dataclass(frozen=True)
class Alarm:
    """One condition that holds now."""

    condition: str
    number: str  # what was measured
    cause: str
    advice: str
    may_stop: bool = True  # a reason to stop, where stop_on names it

    def __str__(self) -> str:
        return f"{self.condition}: {self.number}; {self.cause}\n  -> {self.advice}"


@dataclass(frozen=True)
class MetricsHistory:
    """The metrics of every update so far, in order, and what the watch has to know of the run.

    Numbers that are missing, None (as metrics.jsonl has them) or not finite are alike.
    """

    lines: list[Metrics]
    half_precision: bool = False  # the base computes in bfloat16 or float16
    eos_expected: bool = True  # False where a response that never ends costs nothing

    def first(self, name: str) -> float | None:
        return _finite(self.lines[0].get(name))

    def now(self, name: str) -> float | None:
        return _finite(self.lines[-1].get(name))

    def recent(self, name: str, count: int = IN_A_ROW) -> list[float]:
        """The last `count` values; empty where one of them is missing."""
        values = [_finite(line.get(name)) for line in self.lines[-count:]]
        return values if len(values) == count and None not in values else []  # type: ignore[return-value]


@dataclass(frozen=True)
class Condition:
    """When something is wrong, and what to tell of it."""

    holds: Callable[[MetricsHistory], str | None]  # what was measured, in words, where it holds
    cause: str
    advice: str
    may_stop: Callable[[MetricsHistory], bool] = lambda course: True


def check_conditions(history: MetricsHistory) -> list[Alarm]:
    """Every condition that holds after the last update."""
    alarms = []
    for name, condition in CONDITION_CHECKS.items():
        number = condition.holds(history)
        if number is not None:
            alarms.append(Alarm(name, number, condition.cause, condition.advice, condition.may_stop(history)))
    return alarms


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


# --- conditions


def kl_limit(length: float) -> float:
    """Sequence KL in nats beyond which a policy is over-optimised, for responses of so many tokens.

    50 for the summaries of some 50 tokens that the number comes from (Huang et al. 2024), where 2 to 19 are seen in
    good runs. Beyond 100 tokens half a nat per token, since a KL adds up over tokens: reasoning in 2000 tokens, learned
    with kl_coef 0, may go 1000 nats without a stop.

    It lets through what is hacked within it: of 14 hacked runs of 32 tokens in the calibration six ended between 14 and
    47 nats. A limit of 1 nat per token would have stopped four of those, and no good run. But it would also have
    stopped four runs against a reward model whose true reward still rose, up to 36, 53, 67 and 85 nats. So the warning
    is what finds hacking; this limit is for policies that run away.
    """
    return max(50.0, 0.5 * length)


def kl_warning(length: float) -> float:
    """Sequence KL that is worth a warning: 20 nats, and beyond 50 tokens 0.4 nats per token.

    In the calibration good runs of 32 tokens ended at 12 to 17 nats, one of 64 tokens at 19, and problems with a known
    optimum at 0.3 to 1.3 nats (1 to 3 tokens). One run that counts as good, with four times the learning rate of
    another, went to 28 and is warned of: its true reward rose, but its text fell apart. Hacked runs of 32 and 64 tokens
    were warned of after 15 to 79 % of their updates. The limit lets through a word list with kl_coef 0.2 (14.5 nats),
    and any hack in 6 tokens (5 to 10 nats).
    """
    return max(20.0, 0.4 * length)


def _kl(history: MetricsHistory) -> str | None:
    kl, length = history.now("reward_kl"), history.now("response_length")
    if kl is None or length is None or not _kl_exceeds(history, kl_warning):
        return None
    return f"the sequence KL to the reference is {kl:.1f} nats, {kl / max(length, 1):.2f} per token"


def _kl_too_far(history: MetricsHistory) -> bool:
    return _kl_exceeds(history, kl_limit)


def _kl_exceeds(history: MetricsHistory, limit: Callable[[float], float]) -> bool:
    """Whether the KL is beyond a limit by two of its standard errors, or was beyond it three times in a row.

    The mean of a few responses can be beyond it once by chance, or because of a single response.
    """
    kl, std, count = history.now("reward_kl"), history.now("reward_kl_std"), history.now("samples")
    allowed = limit(history.now("response_length") or 0)
    error = std / math.sqrt(count) if std and count else 0.0
    recent = history.recent("reward_kl")
    return kl is not None and (kl - 2 * error > allowed or (bool(recent) and min(recent) > allowed))


def _negative_kl(history: MetricsHistory) -> str | None:
    """Around 0 a mean over few responses is negative half of the time, so it must also be so beyond its noise."""
    kl, std = history.recent("reward_kl", IN_A_ROW_IF_NOISY), history.recent("reward_kl_std", IN_A_ROW_IF_NOISY)
    count = sum(history.recent("samples", IN_A_ROW_IF_NOISY))
    if not kl or not std or max(kl) >= 0 or not count:
        return None
    mean, error = sum(kl) / IN_A_ROW_IF_NOISY, math.sqrt(sum(s * s for s in std) / IN_A_ROW_IF_NOISY / count)
    if mean > -0.05 or mean > -4 * error:
        return None
    return f"the mean KL to the reference was negative {IN_A_ROW_IF_NOISY} times in a row, {mean:.2f} nats on average"


def _ratio(history: MetricsHistory) -> str | None:
    """fp32 leaves rounding alone; in bf16 single tokens are off by much more, so their deviation counts: .05 is usual
    between engines (TRL's notes on mismatch)."""
    error, deviation = history.now("ratio_first_error"), history.now("ratio_first_std")
    if history.half_precision:
        if deviation is not None and deviation > 0.05:
            return f"before the first step the probability ratio deviates from 1 by {deviation:.2g}"
    elif error is not None and error > 1e-3:
        return f"before the first step a probability ratio is off 1 by {error:.2g}"
    return None


def _entropy(history: MetricsHistory) -> str | None:
    first, recent = history.first("entropy"), history.recent("entropy")
    if first is not None and recent and first > 0.05 and max(recent) < 0.1 * first:
        return f"the entropy fell from {first:.3f} to {recent[-1]:.4f} nats per token"
    return None


def _length(history: MetricsHistory) -> str | None:
    """That scores follow length is alarming if length then moves the same way (Singhal et al. 2023, for growth).

    Responses that all have one length, the limit or a single token, have a correlation of exactly 0, which says
    nothing: the last three others count. In the calibration policies that are paid for length or shortness have 0.71 to
    1; a customer service whose answers rightly become longer has up to 0.67 once, and 0.49 three times in a row.
    """
    known = [c for line in history.lines if (c := _finite(line.get("score_length_corr")))][-IN_A_ROW:]
    first, now = history.first("response_length"), history.now("response_length")
    if len(known) < IN_A_ROW or not first or now is None:
        return None
    if min(known) > LENGTH_CORRELATED and now > 1.3 * first:
        return f"scores follow length (correlation {known[-1]:.2f}), which grew from {first:.0f} to {now:.0f} tokens"
    if max(known) < -LENGTH_CORRELATED and now < first / 1.3:
        return (
            f"scores fall with length (correlation {known[-1]:.2f}), which shrank from {first:.0f} to {now:.0f} tokens"
        )
    return None


def _no_eos(history: MetricsHistory) -> str | None:
    recent = history.recent("truncated_rate")
    if history.eos_expected and recent and min(recent) > 0.1:
        return f"{recent[-1]:.0%} of the responses never ended"
    return None


def _critic(history: MetricsHistory) -> str | None:
    recent = history.recent("explained_variance", IN_A_ROW_IF_NOISY)
    if recent and len(history.lines) >= WARM_UP and max(recent) < 0:
        return f"the critic predicts returns worse than their mean would (explained variance {recent[-1]:.2f})"
    return None


def _dead_groups(history: MetricsHistory) -> str | None:
    recent = history.recent("dead_group_rate")
    if recent and min(recent) > 0.8:
        return f"for {recent[-1]:.0%} of the prompts every response had the same score"
    return None


def _not_finite(history: MetricsHistory) -> str | None:
    steps, line = history.now("nonfinite_steps"), history.lines[-1]
    if steps:
        in_a_row = history.now("nonfinite_in_a_row") or 0
        return f"gradients that were not finite and were left out: {steps:.0f}, {in_a_row:.0f} in a row so far"
    names = [name for name in OF_EVERY_UPDATE if name in line and _finite(line[name]) is None]
    return f"{', '.join(names)} of this update not finite" if names else None


def _many_not_finite(history: MetricsHistory) -> bool:
    """A single gradient that overflows is left out and forgotten; several in a row are not going to stop."""
    return (history.now("nonfinite_in_a_row") or 0) >= BAD_STEPS


def _reward_range(history: MetricsHistory) -> str | None:
    """Against the widest standard deviation so far: a reward of 0 or 1 has little at first, and never moves far
    beyond its own.

    One update with an outlier decides nothing: the start is the median of the first three updates, the distance must
    hold three times in a row, and a deviation beyond ten times the usual one counts as ten times.
    """
    recent = history.recent("reward_score")
    early = [score for line in history.lines[:IN_A_ROW] if (score := _finite(line.get("reward_score"))) is not None]
    deviations = [std for line in history.lines if (std := _finite(line.get("reward_score_std")))]
    if not recent or not deviations:
        return None
    start, deviation = median(early or recent), min(max(deviations), 10 * median(deviations))
    if min(abs(score - start) for score in recent) <= 4 * deviation:
        return None
    distance = abs(recent[-1] - start) / deviation
    return f"the mean score moved from {start:.3g} to {recent[-1]:.3g}, {distance:.1f} standard deviations"


def _repetition(history: MetricsHistory) -> str | None:
    """Within a response, or of whole responses to different prompts; labels of one to three tokens may be shared.

    In the calibration no good run ended more than 0.07 above its first repetition_rate, and hacked runs went 0.1 above
    after 35 to 83 % of their updates, up to 0.9 at the end. It lets through hacks that do not repeat: a word list at 30
    nats or less. It would be wrong about a policy that learns tables, code or lists from a start without them.
    """
    length = history.now("response_length") or 0.0
    for name, rise, what in (
        ("repetition_rate", REPEATED, "the share of 3-token sequences that a response repeats within 64 tokens"),
        ("shared_response_rate", SHARED, "the share of responses that were also given to a different prompt"),
    ):
        first, recent = history.first(name) or 0.0, history.recent(name)
        if recent and min(recent) > first + rise and (name == "repetition_rate" or length >= LABEL):
            return f"{name}, {what}, rose from {first:.2f} to {recent[-1]:.2f}"
    return None


CONDITION_CHECKS: dict[str, Condition] = {
    "kl": Condition(
        _kl,
        "the policy has left the region where the reward can be trusted",
        "raise --kl-coef or lower --learning-rate",
        _kl_too_far,
    ),
    "negative-kl": Condition(
        _negative_kl,
        "responses are not drawn from the law whose log-probabilities are taken",
        "this is a defect: report it, with the base model and the temperature",
    ),
    "ratio": Condition(
        _ratio,
        "log-probabilities taken while sampling and while training differ",
        "use --dtype float32; where that is so already, report it",
    ),
    "entropy": Condition(
        _entropy,
        "the policy says the same again and again",
        "raise --kl-coef or --entropy-coef, or lower --learning-rate",
    ),
    "length": Condition(
        _length,
        "the reward pays for length, or for the lack of it",
        "balance the comparisons by length, or give a --length-penalty",
    ),
    "no-eos": Condition(
        _no_eos,
        "responses are cut before they end",
        "raise --max-response-tokens or --missing-eos-penalty; a penalty of 0 says that ends do not matter",
    ),
    "critic": Condition(
        _critic, "advantages are mostly noise", "change --critic-learning-rate, or set --gae-lambda to 1"
    ),
    "dead-groups": Condition(
        _dead_groups,
        "there is nothing to learn from those",
        "take harder or easier prompts, or more --responses-per-prompt",
    ),
    "nan": Condition(
        _not_finite,
        "the loss left the range of numbers",
        "lower --learning-rate, or use --dtype float32",
        _many_not_finite,
    ),
    "reward-range": Condition(
        _reward_range,
        "scores are far from those at the start, and a reward model may be wrong there",
        "raise --kl-coef, stop earlier, or train a fresh reward model on the policy's responses",
    ),
    "repetition": Condition(
        _repetition,
        "the policy repeats what the reward pays for",
        "read samples.jsonl; raise --kl-coef, or change what the reward pays for",
    ),
}
ADVICE = {name: condition.advice for name, condition in CONDITION_CHECKS.items()}
