"""Tables and plots of the learning benchmark: its measured policies, interpolated to equal KL and equal seconds."""

from __future__ import annotations

import math
import re
import statistics
import typing
from dataclasses import dataclass

from gold import cheerfulness

if typing.TYPE_CHECKING:
    from matplotlib.figure import Figure

AT_KL = (1.84, 4.0, 6.0, 10.0)  # nats; the first is best-of-16's, ln 16 - 15/16
AT_SECONDS = (30.0, 60.0, 120.0)
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}  # two-sided, by degrees of freedom


@dataclass(frozen=True)
class Point:
    """One policy, measured on the held-out prompts."""

    method: str
    seed: int
    step: int
    seconds: float  # of policy training so far
    kl: float  # nats per response, from the reference
    proxy: float  # mean score by the reward model
    gold: float
    length: float
    distinct_1: float
    distinct_2: float
    duplicates: float


def of_texts(texts: list[str]) -> dict[str, float]:
    """Gold reward and diversity of responses: distinct words and word pairs (Li et al. 2016), and duplicates."""
    words = [re.findall(r"[a-z']+", text.lower()) for text in texts]
    single = [word for row in words for word in row]
    double = [pair for row in words for pair in zip(row, row[1:], strict=False)]
    return {
        "gold": statistics.mean(map(cheerfulness, texts)),
        "distinct_1": len(set(single)) / max(1, len(single)),
        "distinct_2": len(set(double)) / max(1, len(double)),
        "duplicates": 1 - len(set(texts)) / len(texts),
    }


def interpolate(points: list[Point], axis: str, at: float, measure: str) -> float | None:
    """A measure where a path first reaches a KL or a time; None where it never does."""
    for before, after in zip(points, points[1:], strict=False):
        low, high = getattr(before, axis), getattr(after, axis)
        if low <= at <= high and high > low:
            share = (at - low) / (high - low)
            return getattr(before, measure) * (1 - share) + getattr(after, measure) * share
    return None


def interval(values: list[float]) -> tuple[float, float]:
    """Mean over seeds and half the width of its 95 % interval (Student's t); nan for one seed."""
    if len(values) < 2:
        return statistics.mean(values), math.nan
    width = T_95.get(len(values) - 1, 2.0) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values), width


def paths_of(points: list[Point]) -> dict[tuple[str, int], list[Point]]:
    """Each run's points in the order in which they are compared: training steps, or for DPO's betas their KL."""
    paths: dict[tuple[str, int], list[Point]] = {}
    for point in points:
        paths.setdefault((point.method, point.seed), []).append(point)
    return {key: sorted(path, key=lambda p: p.kl) if key[0] == "dpo" else path for key, path in paths.items()}


def at_equal(points: list[Point], axis: str, places: tuple[float, ...]) -> list[dict[str, object]]:
    """Gold of every method where its runs reach each place: mean, interval, and how many seeds got there."""
    paths, rows = paths_of(points), []
    for method in dict.fromkeys(point.method for point in points):
        row: dict[str, object] = {"method": method}
        for place in places:
            found = [interpolate(path, axis, place, "gold") for (name, _), path in paths.items() if name == method]
            reached = [value for value in found if value is not None]
            mean, width = interval(reached) if reached else (math.nan, math.nan)
            row[f"{place:g}"] = {"gold": mean, "width": width, "seeds": len(reached)}
        rows.append(row)
    return rows


def best_within(points: list[Point], limit: float) -> dict[str, list[Point]]:
    """Of every run the policy that the reward model likes best within a KL: what a user would keep, gold unseen."""
    kept: dict[str, list[Point]] = {}
    for (method, _), path in paths_of(points).items():
        inside = [point for point in path if point.kl <= limit]
        if inside:
            kept.setdefault(method, []).append(max(inside, key=lambda p: p.proxy))
    return kept


def summarise(points: list[Point], best_of: dict[int, list[dict]], known: dict[int, dict], seeds: list[int]) -> dict:
    """Everything the tables are made of."""
    sampled = sorted({row["n"] for rows in best_of.values() for row in rows})
    best = {str(n): [row for rows in best_of.values() for row in rows if row["n"] == n] for n in sampled}
    kept = best_within(points, max(AT_KL))
    names = [name for name in Point.__annotations__ if name not in ("method", "seed")]
    return {
        "seeds": seeds,
        "reward_models": known,
        "at_equal_kl": at_equal(points, "kl", AT_KL),
        "at_equal_seconds": at_equal([p for p in points if p.method != "dpo"], "seconds", AT_SECONDS),
        "kept": {m: {n: interval([getattr(p, n) for p in path]) for n in names} for m, path in kept.items()},
        "best_of": {
            n: {name: interval([row[name] for row in rows]) for name in ("kl", "score", "gold", "length")}
            for n, rows in best.items()
        },
        "gold_of_every_seed": {
            **{method: {p.seed: p.gold for p in path} for method, path in kept.items()},
            **{
                f"best of {n}": {s: row["gold"] for s, row in zip(best_of, rows, strict=True)}
                for n, rows in best.items()
            },
        },
    }


def tables(found: dict) -> str:
    """The summary in Markdown."""
    rm = found["reward_models"]
    lines = [
        "## Reward models",
        "",
        "| seed | held-out accuracy | longer wins | ceiling | seconds |",
        "|---|---|---|---|---|",
    ]
    for seed, row in rm.items():
        low, high = row["accuracy_low"], row["accuracy_high"]
        accuracy = f"{row['accuracy']:.3f} [{low:.3f}, {high:.3f}] of {row['pairs']}"
        cells = (seed, accuracy, f"{row['longer_wins_accuracy']:.3f}", f"{row['ceiling']:.3f}", f"{row['seconds']:.0f}")
        lines.append(line_of(cells))
    limit = f"{max(AT_KL):g}"
    lines += [
        "",
        f"## What one would keep: the reward model's favourite with KL at most {limit}; best of n beside it",
        "",
    ]
    head = ("method", "gold", "KL", "proxy", "length", "distinct-1", "distinct-2", "duplicates", "training s")
    lines += [line_of(head), "|---" * len(head) + "|"]
    names = ("gold", "kl", "proxy", "length", "distinct_1", "distinct_2", "duplicates", "seconds")
    for method, row in found["kept"].items():
        lines.append(line_of((method, *(cell(row[name], 1 if name in ("length", "seconds") else 3) for name in names))))
    for n, row in found["best_of"].items():
        cells = (cell(row["gold"]), cell(row["kl"]), cell(row["score"]), cell(row["length"], 1))
        lines.append(line_of((f"best of {n}", *cells, "", "", "", "")))
    for title, key, unit in (
        ("Gold at equal KL", "at_equal_kl", "nats"),
        ("Gold at equal seconds", "at_equal_seconds", "s"),
    ):
        places = [name for name in found[key][0] if name != "method"]
        lines += ["", f"## {title} (mean over seeds ± half a 95 % interval; seeds that got there)", ""]
        lines += [line_of(("method", *(f"{place} {unit}" for place in places))), "|---" * (len(places) + 1) + "|"]
        for row in found[key]:
            cells = [row[place] for place in places]
            shown = [f"{cell((c['gold'], c['width']))} ({c['seeds']})" if c["seeds"] else "" for c in cells]
            lines.append(line_of((row["method"], *shown)))
    return "\n".join(lines) + "\n"


def line_of(cells: tuple) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(map(str, cells)) + " |"


def cell(value: tuple[float, float], digits: int = 3) -> str:
    """A mean with half its interval."""
    mean, width = value
    return f"{mean:.{digits}f}" + (f" ± {width:.{digits}f}" if math.isfinite(width) else "")


def draw(points: list[Point], best_of: dict[int, list[dict]], measure: str, title: str) -> Figure:
    """A measure against KL as a picture: every run a line, a colour for each method."""
    from stages.diagnostics import plot

    column = {"gold": "gold", "proxy": "score"}[measure]
    curves = [
        (method, seed, [(p.kl, getattr(p, measure)) for p in path]) for (method, seed), path in paths_of(points).items()
    ]
    curves += [("best of n", seed, [(row["kl"], row[column]) for row in rows]) for seed, rows in best_of.items()]
    methods = list(dict.fromkeys(method for method, _, _ in curves))
    series = [
        plot.Series(f"{method}, seed {seed}", [plot.Point(*xy) for xy in path], colour=methods.index(method))
        for method, seed, path in sorted(curves, key=lambda curve: methods.index(curve[0]))
    ]
    label = "KL to the reference, nats per response"
    return plot.scatter(series, title=title, x_label=label, y_label=f"{measure} reward")
