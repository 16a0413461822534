"""Conditions that PPO is watched for: what is going wrong in a run, the cause, and the knob that helps.

Pure functions of the metrics so far, so a resumed run warns of the same. The source of a threshold stands beside its
condition; those without one are our own, wide enough not to hold in runs that learn. `kl` and `repetition` were
calibrated on good and on hacked runs: benchmarks/alarms.py, benchmarks/results/alarms-cpu.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

Metrics = dict[str, float | None]

IN_A_ROW = 3  # updates for which a drift must last
IN_A_ROW_IF_NOISY = 5  # the same for noisier metrics
WARM_UP = 10  # updates before the critic is watched
LENGTH_CORRELATED = 0.6  # correlation of scores and lengths
REPEATED = 0.1  # repetition_rate above that of the first update
SHARED = 0.25  # shared_response_rate above that of the first update
LABEL_TOKENS = 4  # shorter responses may well be the same for different prompts
BAD_STEPS = 5  # non-finite gradients in a row that are a reason to stop
UPDATE_METRICS = ("loss", "policy_loss", "value_loss", "reward_score", "reward_kl", "entropy")


@dataclass(frozen=True)
class Alarm:
    """A condition that holds after the last update."""

    condition: str
    measurement: str
    cause: str
    advice: str
    may_stop: bool = True  # a reason to stop, if stop_on names it

    def __str__(self) -> str:
        return f"{self.condition}: {self.measurement}; {self.cause}\n  -> {self.advice}"


@dataclass(frozen=True)
class MetricsHistory:
    """The metrics of every update so far, in order, and two properties of the run.

    A missing metric, None (as in metrics.jsonl) and a non-finite number are treated alike.
    """

    lines: list[Metrics]
    half_precision: bool = False  # the base computes in bfloat16 or float16
    eos_expected: bool = True  # False if a response without EOS is not penalised

    def first(self, name: str) -> float | None:
        return _finite(self.lines[0].get(name))

    def latest(self, name: str) -> float | None:
        return _finite(self.lines[-1].get(name))

    def recent(self, name: str, count: int = IN_A_ROW) -> list[float]:
        """The last `count` values; empty if one of them is missing."""
        values = [_finite(line.get(name)) for line in self.lines[-count:]]
        return values if len(values) == count and None not in values else []  # type: ignore[return-value]


@dataclass(frozen=True)
class Condition:
    """A condition to check, with its cause and advice."""

    check: Callable[[MetricsHistory], str | None]  # the measurement in words if the condition holds
    cause: str
    advice: str
    may_stop: Callable[[MetricsHistory], bool] = lambda history: True


def check_conditions(history: MetricsHistory) -> list[Alarm]:
    """Every condition that holds after the last update."""
    alarms = []
    for name, condition in CONDITION_CHECKS.items():
        measurement = condition.check(history)
        if measurement is not None:
            alarms.append(Alarm(name, measurement, condition.cause, condition.advice, condition.may_stop(history)))
    return alarms


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


# --- conditions


def kl_limit(length: float) -> float:
    """Sequence KL in nats beyond which a policy is over-optimised, for responses of so many tokens.

    50 for the summaries of some 50 tokens that the number comes from (Huang et al. 2024), where 2 to 19 are seen in
    good runs. Beyond 100 tokens half a nat per token, since a KL adds up over tokens: reasoning in 2000 tokens, learned
    with kl_coef 0, may go 1000 nats without a stop.

    Hacked runs below it pass: of 14 hacked runs of 32 tokens in the calibration six ended between 14 and
    47 nats. A limit of 1 nat per token would have stopped four of those, and no good run. But it would also have
    stopped four runs against a reward model whose true reward still rose, up to 36, 53, 67 and 85 nats. So hacking is
    left to the warning; this limit stops policies that run away.
    """
    return max(50.0, 0.5 * length)


def kl_warning(length: float) -> float:
    """Sequence KL that is worth a warning: 20 nats, and beyond 50 tokens 0.4 nats per token.

    In the calibration good runs of 32 tokens ended at 12 to 17 nats, one of 64 tokens at 19, and problems with a known
    optimum at 0.3 to 1.3 nats (1 to 3 tokens). One run that counts as good, with four times the learning rate of
    another, went to 28 nats and gets a warning: its true reward rose, but its text became incoherent. Hacked runs of 32
    and 64 tokens got one after 15 to 79 % of their updates. Not found: a word list with kl_coef 0.2 (14.5 nats), and
    any hack in 6 tokens (5 to 10 nats).
    """
    return max(20.0, 0.4 * length)


def _kl(history: MetricsHistory) -> str | None:
    kl, length = history.latest("reward_kl"), history.latest("response_length")
    if kl is None or length is None or not _kl_exceeds(history, kl_warning):
        return None
    limits = f"warning above {kl_warning(length):.0f}, stop above {kl_limit(length):.0f} nats"
    return f"the sequence KL to the reference is {kl:.1f} nats, {kl / max(length, 1):.2f} per token ({limits})"


def _kl_exceeds(history: MetricsHistory, limit: Callable[[float], float]) -> bool:
    """Whether the KL is beyond a limit by two of its standard errors, or was beyond it three times in a row.

    The mean of a few responses can be beyond it once by chance, or because of a single response.
    """
    kl, std, count = history.latest("reward_kl"), history.latest("reward_kl_std"), history.latest("samples")
    allowed = limit(history.latest("response_length") or 0)
    error = std / math.sqrt(count) if std and count else 0.0
    recent = history.recent("reward_kl")
    return kl is not None and (kl - 2 * error > allowed or (bool(recent) and min(recent) > allowed))


def _negative_kl(history: MetricsHistory) -> str | None:
    """Around 0 a mean over few responses is negative half of the time, so it must also exceed its noise."""
    kl, std = history.recent("reward_kl", IN_A_ROW_IF_NOISY), history.recent("reward_kl_std", IN_A_ROW_IF_NOISY)
    count = sum(history.recent("samples", IN_A_ROW_IF_NOISY))
    if not kl or not std or max(kl) >= 0 or not count:
        return None
    mean, error = sum(kl) / IN_A_ROW_IF_NOISY, math.sqrt(sum(s * s for s in std) / IN_A_ROW_IF_NOISY / count)
    if mean > -0.05 or mean > -4 * error:
        return None
    return f"the mean KL to the reference was negative {IN_A_ROW_IF_NOISY} times in a row, {mean:.2f} nats on average"


def _ratio(history: MetricsHistory) -> str | None:
    """In fp32 only rounding differs. In bf16 single tokens differ by much more, so the standard deviation counts:
    0.05 is usual between engines (TRL's notes on mismatch)."""
    error, deviation = history.latest("ratio_first_error"), history.latest("ratio_first_std")
    if history.half_precision:
        if deviation is not None and deviation > 0.05:
            return f"before the first step probability ratios differ from 1 by {deviation:.2g} (rms; limit 0.05)"
    elif error is not None and error > 1e-3:
        return f"before the first step a probability ratio differs from 1 by {error:.2g} (limit 0.001)"
    return None


def _entropy(history: MetricsHistory) -> str | None:
    first, recent = history.first("entropy"), history.recent("entropy")
    if first is not None and recent and first > 0.05 and max(recent) < 0.1 * first:
        return f"the entropy fell from {first:.3f} to {recent[-1]:.4f} nats per token (limit {0.1 * first:.3f})"
    return None


def _length(history: MetricsHistory) -> str | None:
    """Scores that follow length are an alarm if length then moves the same way (Singhal et al. 2023, for growth).

    If all responses have the same length, the limit or a single token, the correlation is exactly 0 and carries no
    information: the last three other values count. In the calibration, policies rewarded for length or shortness have
    0.71 to 1; a customer service whose answers rightly become longer has up to 0.67 once, and 0.49 three times in a
    row.
    """
    recent = [c for line in history.lines if (c := _finite(line.get("score_length_corr")))][-IN_A_ROW:]
    first, latest = history.first("response_length"), history.latest("response_length")
    if len(recent) < IN_A_ROW or not first or latest is None:
        return None
    correlation, tokens = f"{recent[-1]:.2f}, limit ±{LENGTH_CORRELATED:g}", f"from {first:.0f} to {latest:.0f} tokens"
    if min(recent) > LENGTH_CORRELATED and latest > 1.3 * first:
        return f"scores follow length (correlation {correlation}), which grew {tokens}"
    if max(recent) < -LENGTH_CORRELATED and latest < first / 1.3:
        return f"scores fall with length (correlation {correlation}), which shrank {tokens}"
    return None


def _no_eos(history: MetricsHistory) -> str | None:
    recent = history.recent("truncated_rate")
    if history.eos_expected and recent and min(recent) > 0.1:
        return f"{recent[-1]:.0%} of the responses never ended (limit 10%)"
    return None


def _critic(history: MetricsHistory) -> str | None:
    recent = history.recent("explained_variance", IN_A_ROW_IF_NOISY)
    if recent and len(history.lines) >= WARM_UP and max(recent) < 0:
        return f"the critic predicts returns worse than their mean would (explained variance {recent[-1]:.2f}, limit 0)"
    return None


def _dead_groups(history: MetricsHistory) -> str | None:
    recent = history.recent("dead_group_rate")
    if recent and min(recent) > 0.8:
        return f"for {recent[-1]:.0%} of the prompts every response had the same score (limit 80%)"
    return None


def _not_finite(history: MetricsHistory) -> str | None:
    steps, line = history.latest("nonfinite_steps"), history.lines[-1]
    if steps:
        in_a_row = history.latest("nonfinite_in_a_row") or 0
        return f"non-finite gradients skipped: {steps:.0f} in this update, {in_a_row:.0f} in a row"
    names = [name for name in UPDATE_METRICS if name in line and _finite(line[name]) is None]
    return f"{', '.join(names)} not finite in this update" if names else None


def _reward_range(history: MetricsHistory) -> str | None:
    """Compared with the largest standard deviation so far: that of a reward of 0 or 1 may be small at first.

    A single outlier decides nothing: the start is the median of the first three updates, the distance must last for
    three updates in a row, and a standard deviation beyond ten times the median one counts as ten times.
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
    return f"the mean score moved from {start:.3g} to {recent[-1]:.3g}, {distance:.1f} standard deviations (limit 4)"


def _repetition(history: MetricsHistory) -> str | None:
    """Repetition within a response, or of whole responses to different prompts; one to three tokens may be shared.

    In the calibration no good run ended more than 0.07 above its first repetition_rate, and hacked runs went 0.1 above
    after 35 to 83 % of their updates, up to 0.9 at the end. Not found: hacks that do not repeat, such as a word list at
    30 nats or less. A policy that learns tables, code or lists from a start without them raises a false alarm.
    """
    length = history.latest("response_length") or 0.0
    for name, rise, meaning in (
        ("repetition_rate", REPEATED, "the share of 3-token sequences that a response repeats within 64 tokens"),
        ("shared_response_rate", SHARED, "the share of responses that were also given to a different prompt"),
    ):
        first, recent = history.first(name) or 0.0, history.recent(name)
        if recent and min(recent) > first + rise and (name == "repetition_rate" or length >= LABEL_TOKENS):
            return f"{name}, {meaning}, rose from {first:.2f} to {recent[-1]:.2f} (limit {first + rise:.2f})"
    return None


CONDITION_CHECKS: dict[str, Condition] = {
    "kl": Condition(
        _kl,
        "the policy has left the region where the reward can be trusted",
        "raise --kl-coef or lower --learning-rate",
        lambda history: _kl_exceeds(history, kl_limit),
    ),
    "negative-kl": Condition(
        _negative_kl,
        "responses are not sampled from the distribution whose log-probabilities are used",
        "report this defect, with the base model and the temperature",
    ),
    "ratio": Condition(
        _ratio,
        "the log-probabilities of sampling and training differ",
        "use --dtype float32; if it is in use already, report a defect",
    ),
    "entropy": Condition(
        _entropy,
        "the policy samples nearly the same tokens every time",
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
        "raise --max-response-tokens or --missing-eos-penalty; set the penalty to 0 if responses need not end",
    ),
    "critic": Condition(
        _critic, "advantages are mostly noise", "change --critic-learning-rate, or set --gae-lambda to 1"
    ),
    "dead-groups": Condition(
        _dead_groups,
        "such prompts give no learning signal",
        "take harder or easier prompts, or more --responses-per-prompt",
    ),
    "nan": Condition(
        _not_finite,
        "the loss or its gradient overflowed",
        "lower --learning-rate, or use --dtype float32",
        lambda history: (history.latest("nonfinite_in_a_row") or 0) >= BAD_STEPS,  # a single overflow is skipped
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
CONDITION_ADVICE = {name: condition.advice for name, condition in CONDITION_CHECKS.items()}
