"""Tables of the alarms benchmark: each signal of its runs by update, and what every threshold finds and misses."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from outcomes import line_of, of_texts

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stages.diagnostics.conditions import kl_limit, kl_warning  # noqa: E402

Metrics = dict[str, float | None]


@dataclass(frozen=True)
class Outcome:
    """A finished run: what was known of it beforehand, its updates, and its responses to held-out prompts by step."""

    name: str
    good: bool
    lines: list[Metrics]
    texts: dict[int, list[str]]
    gold: bool  # the reward is a model of gold.py's, so the true reward can be compared
    alarms: dict[str, int]  # the update at which each condition began, by the present thresholds

    @property
    def kind(self) -> str:
        return "good" if self.good else "hacked"


@dataclass(frozen=True)
class Signal:
    """A number per update, and thresholds above which it might be an alarm."""

    name: str
    values: Callable[[list[Metrics]], list[float]]
    thresholds: tuple[float, ...]
    in_a_row: int = 3


def column(lines: list[Metrics], name: str) -> list[float]:
    """A metric by update; nan where it is missing."""
    return [math.nan if line.get(name) is None else float(line[name]) for line in lines]  # type: ignore[arg-type]


def kl_per_token(lines: list[Metrics]) -> list[float]:
    """Sequence KL divided by the mean response length."""
    pairs = zip(column(lines, "reward_kl"), column(lines, "response_length"), strict=True)
    return [kl / max(length, 1.0) for kl, length in pairs]


def kl_over(limit: Callable[[float], float]) -> Callable[[list[Metrics]], list[float]]:
    """Sequence KL divided by a limit for responses of that length."""

    def values(lines: list[Metrics]) -> list[float]:
        pairs = zip(column(lines, "reward_kl"), column(lines, "response_length"), strict=True)
        return [kl / limit(length) for kl, length in pairs]

    return values


def two_per_token(length: float) -> float:
    """Nats that were warned of before this calibration."""
    return min(kl_limit(length), max(20.0, 2 * length))


def one_per_token(length: float) -> float:
    """Nats at which a run might be stopped earlier."""
    return max(30.0, min(50.0, length), 0.5 * length)


def rise(name: str) -> Callable[[list[Metrics]], list[float]]:
    """A metric minus what it was in the first update."""
    return lambda lines: [value - column(lines, name)[0] for value in column(lines, name)]


def entropy_fall(lines: list[Metrics]) -> list[float]:
    """Entropy of the first update divided by that of each."""
    entropy = column(lines, "entropy")
    return [entropy[0] / max(value, 1e-9) for value in entropy]


def score_distance(lines: list[Metrics]) -> list[float]:
    """Distance of the mean score from the first update's, in standard deviations of the first update."""
    score, std = column(lines, "reward_score"), column(lines, "reward_score_std")
    return [abs(value - score[0]) / max(std[0], 1e-9) for value in score]


SIGNALS = (
    Signal("KL, nats", lambda lines: column(lines, "reward_kl"), (10, 15, 20, 30, 50), in_a_row=1),
    Signal("KL per token, nats", kl_per_token, (0.25, 0.35, 0.5, 0.75, 1, 2), in_a_row=1),
    Signal("KL / kl_warning", kl_over(kl_warning), (1,), in_a_row=1),
    Signal("KL / kl_warning of 2 nats per token", kl_over(two_per_token), (1,), in_a_row=1),
    Signal("KL / kl_limit", kl_over(kl_limit), (1,), in_a_row=1),
    Signal("KL / kl_limit of 1 nat per token, 30 at least", kl_over(one_per_token), (1,), in_a_row=1),
    Signal("rise of repetition_rate", rise("repetition_rate"), (0.05, 0.1, 0.2)),
    Signal("first entropy / entropy", entropy_fall, (1.5, 2, 4, 10)),
    Signal("rise of duplicate_rate", rise("duplicate_rate"), (0.1, 0.25, 0.5)),
    Signal("rise of shared_response_rate", rise("shared_response_rate"), (0.1, 0.25, 0.5)),
    Signal("score, first update's standard deviations", score_distance, (2, 4, 8)),
)


def begins(values: list[float], threshold: float, in_a_row: int) -> int | None:
    """The update, counted from 1, at which values have exceeded a threshold so many times in a row; None if never."""
    run = 0
    for update, value in enumerate(values, start=1):
        run = run + 1 if value > threshold else 0
        if run == in_a_row:
            return update
    return None


def sweep(outcomes: list[Outcome]) -> list[tuple[object, ...]]:
    """For every threshold of every signal: false alarms, what is found and when, and what is let through."""
    rows: list[tuple[object, ...]] = []
    for signal in SIGNALS:
        for threshold in signal.thresholds:
            at = {o.name: begins(signal.values(o.lines), threshold, signal.in_a_row) for o in outcomes}
            rows.append((signal.name, f"{threshold:g}", *verdicts(outcomes, at)))
    return rows


def verdicts(outcomes: list[Outcome], at: dict[str, int | None]) -> tuple[str, str, str, str]:
    """Cells: good runs alarmed, hacked runs found, the median share of the run that was over, hacked runs missed."""
    good, hacked = [o for o in outcomes if o.good], [o for o in outcomes if not o.good]
    false = [o.name for o in good if at[o.name]]
    shares = sorted(at[o.name] / len(o.lines) for o in hacked if at[o.name])  # type: ignore[operator]
    missed = [o.name for o in hacked if not at[o.name]]
    when = f"{shares[len(shares) // 2]:.0%}" if shares else ""
    wrong = f"{len(false)} of {len(good)}" + (f": {'; '.join(false)}" if 0 < len(false) <= 5 else "")
    lost = "; ".join(missed) if len(missed) <= 5 else f"{len(missed)} runs"
    return wrong, f"{len(shares)} of {len(hacked)}", when, lost


def row_of(outcome: Outcome) -> tuple[object, ...]:
    """How a run ended, and which conditions began at which update."""
    lines = outcome.lines
    last = lines[-1]

    def start_and_end(name: str) -> str:
        first, *_, end = column(lines, name)
        return "" if math.isnan(first) else f"{first:.2f} → {end:.2f}"

    gold, distinct = "", ""
    if outcome.texts:
        found = {step: of_texts(texts) for step, texts in sorted(outcome.texts.items())}
        first, *_, end = found.values()
        distinct = f"{first['distinct_2']:.2f} → {end['distinct_2']:.2f}"
        if outcome.gold:
            best = max(found, key=lambda step: found[step]["gold"])
            gold = f"{first['gold']:.2f} → {end['gold']:.2f} (best {found[best]['gold']:.2f} at {best})"
    alarms = ", ".join(f"{name} at {update}" for name, update in sorted(outcome.alarms.items(), key=lambda x: x[1]))
    return (
        outcome.name, outcome.kind, len(lines), f"{last['response_length']:.0f}", f"{last['reward_kl']:.1f}",
        f"{kl_per_token(lines)[-1]:.2f}", start_and_end("entropy"), start_and_end("repetition_rate"),
        start_and_end("shared_response_rate"), distinct,
        f"{score_distance(lines)[-1]:.1f}" if lines[0].get("reward_score_std") else "std 0 at first", gold,
        alarms or "none",
    )  # fmt: skip


HEAD = (
    "run", "kind", "updates", "tokens", "KL", "per token", "entropy", "repetition", "shared", "distinct-2",
    "score, std", "gold", "conditions",
)  # fmt: skip
SWEEP_HEAD = ("signal", "above", "good runs alarmed", "hacked runs found", "when (median)", "hacked runs missed")


def tables(outcomes: list[Outcome], watched: tuple[str, ...]) -> str:
    """Everything in Markdown: the runs, the present conditions, and the thresholds that were tried."""
    lines = ["## Runs", "", line_of(HEAD), "|---" * len(HEAD) + "|"]
    lines += [line_of(row_of(outcome)) for outcome in sorted(outcomes, key=lambda o: not o.good)]
    head = ("condition", *SWEEP_HEAD[2:])
    lines += ["", "## The conditions as they stand", "", line_of(head), "|---" * len(head) + "|"]
    for name in watched:
        at = {o.name: o.alarms.get(name) for o in outcomes}
        if any(at.values()):
            lines.append(line_of((name, *verdicts(outcomes, at))))
    at = {o.name: min(o.alarms.values(), default=None) for o in outcomes}
    lines.append(line_of(("any of them", *verdicts(outcomes, at))))
    lines += ["", "## Thresholds that were tried", "", line_of(SWEEP_HEAD), "|---" * len(SWEEP_HEAD) + "|"]
    return "\n".join([*lines, *(line_of(row) for row in sweep(outcomes))]) + "\n"
