"""Every table that a command prints, from one list of measures. No torch, so `rlhf report` is fast.

The numbers come from JSON, in which any of them may be missing or of another type.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.cells import (
    ABSENT,
    JsonRow,
    beginning,
    ending,
    format_interval,
    format_number,
    format_share,
    format_short,
    format_text,
    inner,
    is_finite,
    is_number,
    part,
)
from stages.errors import counted
from stages.results import Table

BAR_WIDTH = 40  # characters of the longest bar of a histogram
REPORTED_STAGES = ("sft", "reward", "ppo", "dpo")


@dataclass(frozen=True)
class Measure:
    """A measure of a policy on prompts: its key in evaluate.json, and its format in tables."""

    key: str
    label: str  # in tables with a row per measure
    heading: str  # in tables with a column per measure
    digits: int
    percent: bool = False


MEASURES = (
    Measure("kl", "KL to the reference, nats per response", "KL", 2),
    Measure("score", "score", "score", 3),
    Measure("gold", "gold score (never trained on)", "gold", 3),
    Measure("length", "response length, tokens", "length", 1),
    Measure("eos_rate", "ended with EOS", "EOS", 1, percent=True),
    Measure("duplicate_rate", "responses that repeat another", "repeated", 1, percent=True),
    Measure("distinct_1", "distinct tokens / tokens", "dist-1", 2),
    Measure("distinct_2", "distinct pairs of tokens / pairs", "dist-2", 2),
)


# --- measures


def format_measure(row: JsonRow, measure: Measure) -> str:
    """One measure of one policy, with its standard error if it has one."""
    if measure.percent:
        return format_share(row.get(measure.key))
    text, error = format_number(row.get(measure.key), measure.digits), row.get(f"{measure.key}_error")
    return f"{text} ± {format_number(error, measure.digits)}" if is_number(error) else text


# --- any stage


def metrics_table(title: str, metrics: dict[str, Any]) -> Table:
    """Final numbers as a two-column table."""
    shown = [(k, v) for k, v in metrics.items() if isinstance(v, (int, float)) and not isinstance(v, bool)]
    return Table(title, ("measure", "value"), tuple((k, f"{v:.4g}") for k, v in shown))


def facts_table(title: str, facts: dict[str, Any]) -> Table:
    """Numbers, texts and switches as a two-column table."""
    return Table(title, ("what", "value"), tuple((k.replace("_", " "), _fact(v)) for k, v in facts.items()))


def histogram_table(title: str, bins: list[dict[str, int]], limit: int) -> Table:
    """Rows by tokens as bars, with a line after the bin that ends at the limit."""
    most = max(one["rows"] for one in bins)
    rows = []
    for one in bins:
        bar = "#" * math.ceil(BAR_WIDTH * one["rows"] / most) if most else ""
        rows.append((f"{one['above'] + 1:,} to {one['up_to']:,}", f"{one['rows']:,}", bar))
        if one["up_to"] == limit:
            rows.append((f"--- {limit:,}", "---", "--- longer rows are cut or dropped (--long-rows) ---"))
    return Table(title, ("tokens", "rows", ""), tuple(rows))


def _fact(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if value is None:
        return ABSENT
    return f"{value:,}" if isinstance(value, (int, float)) else str(value)


def memory_table(parts: dict[str, float], title: str = "estimated peak memory") -> Table:
    """Bytes by part, in GB."""
    return Table(title, ("part", "GB"), tuple((name, f"{size / 1e9:.3f}") for name, size in parts.items()))


def alarm_table(alarms: dict[str, list[int]], updates: int, advice: dict[str, str]) -> Table:
    """A row for each watched condition that held, with the first and last of its updates."""
    rows = tuple(
        (name, f"{len(steps)} of {updates}", f"{steps[0]}", f"{steps[-1]}", advice[name])
        for name, steps in alarms.items()
    )
    return Table("alarms", ("condition", "updates", "first", "last", "what helps"), rows)


def before_and_after_table(metrics: dict[str, Any]) -> Table:
    """PPO on held-out prompts before the first update and after the last; without rows if nothing was held out."""
    rows = tuple(
        (
            measure.label,
            format_short(metrics[f"eval_{measure.key}_before"]),
            format_short(metrics[f"eval_{measure.key}"]),
        )
        for measure in MEASURES
        if f"eval_{measure.key}_before" in metrics
    )
    return Table("ppo on held-out prompts", ("measure", "start", "end"), rows)


# --- comparisons: reward models and implicit rewards


def describe_pairs(report: dict, what: str = "") -> str:
    """The number of pairs of a report, called `what`, and of their prompts if those are fewer."""
    pairs = counted(report["pairs"], what).strip()
    return pairs if report["clusters"] == report["pairs"] else f"{pairs} of {counted(report['clusters'], 'prompts')}"


def comparison_tables(report: dict, title: str) -> tuple[Table, ...]:
    """A report on comparisons: its measures, calibration, and accuracy by difference in length."""
    summary = (
        ("held-out pairs", describe_pairs(report)),
        *((("ties, which count half", str(report["ties"])),) if report["ties"] else ()),
        ("accuracy [95 % interval]", format_interval(report, "accuracy")),
        ("accuracy of 'longer wins'", format_number(report["longer_wins_accuracy"], 3)),
        ("calibration error", format_number(report["calibration_error"], 3)),
        ("log-loss (chance is 0.693)", format_number(report["log_loss"], 4)),
        ("margin, mean and std", _mean_and_std(report, "margin")),
        ("score of chosen, mean and std", _mean_and_std(report, "score_chosen")),
        ("score of rejected, mean and std", _mean_and_std(report, "score_rejected")),
        ("correlation of score and length", format_number(report["score_length_corr"], 3)),
    )
    calibration = tuple(
        (
            f"{b['low']:.2f}-{b['high']:.2f}",
            str(b["count"]),
            format_number(b["predicted"], 3),
            format_number(b["observed"], 3),
        )
        for b in report["calibration"]
        if b["count"]
    )
    by_length = tuple(
        (_range(b["low"], b["high"]), str(b["count"]), format_number(b["accuracy"], 3))
        for b in report["by_length_difference"]
        if b["count"]
    )
    return (
        Table(title, ("measure", "value"), summary),
        Table("calibration", ("predicted", "pairs", "mean predicted", "observed"), calibration),
        Table("by length", ("chosen length - rejected length, tokens", "pairs", "accuracy"), by_length),
    )


def _mean_and_std(report: dict, name: str) -> str:
    return f"{format_number(report[f'{name}_mean'], 3)}  {format_number(report[f'{name}_std'], 3)}"


def _range(low: float, high: float) -> str:
    if low <= -1e9:
        return f"under {high:g}"
    return f"{low:g} or more" if high >= 1e9 else f"{low:g} to {high:g}"


def scorers_table(reports: list[dict]) -> Table:
    """Several models' reports on the same comparisons, a row each, and the baseline of the longer response."""
    rows = [
        (
            str(report["label"]),
            "reward model" if report["kind"] == "reward_model" else "implicit",
            format_interval(report, "accuracy"),
            *(f"{report[name]:.3f}" for name in ("log_loss", "margin_mean", "score_length_corr", "agreement")),
        )
        for report in reports
    ]
    longer = f"{reports[0]['longer_wins_accuracy']:.3f}"
    rows.append(("baseline: longer wins", ABSENT, longer, *[ABSENT] * 4))
    columns = ("model", "score", "accuracy [95 %]", "log-loss", "margin", "length corr.", "agreement")
    return Table(f"{describe_pairs(reports[0], 'pairs')}, side by side", columns, tuple(rows))


# --- policies on prompts: what evaluate.json holds


def evaluation_tables(evaluation: JsonRow, label: str = "", *, with_examples: bool = True) -> tuple[Table, ...]:
    """Every table that evaluate.json has numbers for: the policies, the curves over KL, and examples."""
    tables = (policy_table(evaluation, label), *curve_tables(evaluation, label))
    return (*tables, examples_table(evaluation, label)) if with_examples else tables


def name_sides(evaluation: JsonRow) -> tuple[str, ...]:
    """Names of the compared policies: their folders', as in every table; without folders sft and ppo, or ppo alone."""
    paths = [inner(evaluation, key) for key in ("compared_with", "model")]
    names = [Path(path).name if isinstance(path, str) else "" for path in paths]
    if names[0] and names[0] == names[1]:  # two runs of one stage: only their whole paths differ
        return str(paths[0]), str(paths[1])
    other, model = names
    alone = not (other or part(evaluation, "against"))
    return (model or "ppo",) if alone else (other or "sft", model or "ppo")


def policy_table(evaluation: JsonRow, label: str = "") -> Table:
    """The evaluated policy, beside the one it was compared with if any, with a row per measure."""
    names = name_sides(evaluation)
    sides = [part(evaluation, side) for side in ("against", "policy")][-len(names) :]
    rows = [
        (measure.label, *(format_measure(side, measure) for side in sides))
        for measure in MEASURES
        if any(is_number(side.get(measure.key)) for side in sides)
    ]
    for name in dict.fromkeys(name for side in sides for name in side if name.startswith("source_")):
        if not name.endswith("_error"):
            measure = Measure(name, f"score by {name.removeprefix('source_')}", name, 3)
            rows.append((measure.label, *(format_measure(side, measure) for side in sides)))
    rows += [(meaning, *[ABSENT] * (len(names) - 1), wins) for meaning, wins in _win_rows(evaluation)]
    prompts = evaluation.get("prompts")
    on = f" on {format_number(prompts, 0)} {'prompt' if prompts == 1 else 'prompts'}" if is_number(prompts) else ""
    return Table(f"{label}{' against '.join(names)}{on}", ("measure", *names), tuple(rows))


def _win_rows(evaluation: JsonRow) -> list[tuple[str, str]]:
    """Win rates by each source that compared the two policies, with the rate at equal lengths if it was estimated."""
    rows = []
    for source, meaning in {"reward": "score", "gold": "gold score", "judge": "the judge"}.items():
        rate = part(evaluation, "win_rate", source)
        if not is_number(rate.get("rate")):
            continue
        number = f", n {format_number(rate['n'], 0)}" if is_number(rate.get("n")) else ""
        rows.append((f"wins by {meaning}", format_share(rate["rate"], rate.get("low"), rate.get("high"), number)))
        if is_number(rate.get("adjusted")):
            adjusted = format_share(rate["adjusted"], rate.get("adjusted_low"), rate.get("adjusted_high"))
            rows.append((f"wins by {meaning}, at equal length", adjusted))
        if source == "judge":
            numbers = (format_number(rate.get(name), 0) for name in ("wins", "ties", "losses"))
            counts = "{} wins, {} ties, {} losses".format(*numbers)
            rows.append(("the judge in both orders", f"{counts}; {format_share(rate.get('orders_differ'))} differ"))
    return rows


def examples_table(evaluation: JsonRow, label: str = "") -> Table:
    """The same prompts with the response and scores of each policy."""
    names = name_sides(evaluation)
    keys = (("against", "against_score", "against_gold"), ("response", "score", "gold"))[-len(names) :]
    listed = evaluation.get("examples")
    examples = [e for e in listed if isinstance(e, dict)] if isinstance(listed, list) else []
    rows = [(ending(format_text(e.get("prompt"))), *(_response(e, *side) for side in keys)) for e in examples]
    return Table(f"{label}the same prompts, answered by {' and '.join(names)}", ("prompt", *names), tuple(rows))


def _response(example: JsonRow, text: str, score: str, gold: str) -> str:
    """A response with its scores in a line below."""
    scored = [(name, example.get(key)) for name, key in (("score", score), ("gold", gold))]
    scores = ", ".join(f"{name} {format_number(value, 2)}" for name, value in scored if is_number(value))
    lines = [beginning(format_text(example.get(text))), f"[{scores}]" if scores else ""]
    return "\n".join(filter(None, lines))


def curve_rows(value: object, name: str) -> list[JsonRow]:
    """The rows of a list from JSON that have the key `name` and a finite KL, by rising KL."""
    rows = [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []
    return sorted((row for row in rows if name in row and is_finite(row.get("kl"))), key=lambda row: row["kl"])


def curve_tables(evaluation: JsonRow, label: str = "") -> tuple[Table, ...]:
    """Tables of best-of-n, of several policies by KL, and of over-optimisation, as far as they were measured."""
    best, policies = curve_rows(evaluation.get("best_of"), "n"), curve_rows(evaluation.get("frontier"), "model")
    tables: tuple[Table, ...] = ()
    if best:
        tables += (_curve_table(f"{label}best of n by score (KL: upper bound)", "n", [(str(r["n"]), r) for r in best]),)
    if policies:
        named = [(str(row.get("label", row["model"])), row) for row in policies]
        named += [(f"best of {row['n']}", row) for row in best]
        by_kl = sorted(named, key=lambda pair: pair[1]["kl"])
        tables += (_curve_table(f"{label}by KL to the reference", "model", by_kl),)
    turn = evaluation.get("over_optimisation")
    if isinstance(turn, str):
        tables += (Table("", (f"{label}over-optimisation",), ((turn,),)),)
    return tables


def _curve_table(title: str, first: str, named: list[tuple[str, JsonRow]]) -> Table:
    """Measures by column, with a row per name."""
    measures = [m for m in MEASURES if any(is_number(row.get(m.key)) for _, row in named)]
    cells = [(name, *(format_measure(row, measure) for measure in measures)) for name, row in named]
    return Table(title, (first, *(measure.heading for measure in measures)), tuple(cells))
