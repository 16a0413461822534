"""The KL curve, score over KL of several policies: rows of `rlhf evaluate` as a plot and in a sentence. No torch."""

from __future__ import annotations

import typing
from pathlib import PurePath

from stages.cells import JsonRow, is_finite
from stages.diagnostics.plot import Point, Series, scatter

if typing.TYPE_CHECKING:
    from matplotlib.figure import Figure

# --- over-optimisation ----------------------------------------------------------------------------------------------


def turning_point(rows: list[JsonRow]) -> tuple[JsonRow, JsonRow] | None:
    """The row of the highest gold score, and the row of the highest score among those with more KL, a higher score
    and a lower gold score; None if there is no such row.
    """
    complete = [row for row in rows if is_finite(row.get("score")) and is_finite(row.get("gold"))]
    if not complete:
        return None
    peak = max(complete, key=lambda row: row["gold"])
    beyond = [r for r in complete if r["kl"] > peak["kl"] and r["score"] > peak["score"] and r["gold"] < peak["gold"]]
    return (peak, max(beyond, key=lambda row: row["score"])) if beyond else None


def describe_over_optimisation(rows: list[JsonRow], loss_error: float | None) -> str:
    """One sentence on over-optimisation; `loss_error` is the standard error over prompts of the gold score's fall."""
    turn = turning_point(rows)
    if turn is None:
        return "the gold score never falls while the score rises: no over-optimisation up to the largest KL measured"
    peak, beyond = turn
    fall = peak["gold"] - beyond["gold"]
    error = f" ± {loss_error:.3f}" if is_finite(loss_error) else ""
    chance = " (less than twice its standard error: it may be chance)" if error and fall < 2 * loss_error else ""
    return (
        f"the gold score peaks at KL {peak['kl']:.2f} ({_name(peak)}); from there to KL {beyond['kl']:.2f} "
        f"({_name(beyond)}) the score still rises by {beyond['score'] - peak['score']:.3f} "
        f"while the gold score falls by {fall:.3f}{error}{chance}"
    )


def _name(row: JsonRow) -> str:
    return str(row.get("label", row.get("model", "")))


# --- plot -----------------------------------------------------------------------------------------------------------


def plot_kl_curve(rows: list[JsonRow], best_of: list[JsonRow], title: str) -> Figure:
    """Score (solid) and gold score (dashed) over the KL to the reference: a line for each run with states."""
    series = []
    for colour, (kind, points) in enumerate([*by_run(rows).items(), ("best of n", best_of)]):
        for key, dashed in (("score", False), ("gold", True)):
            finite = [_point(row, key) for row in points if is_finite(row.get(key))]
            if finite:
                series.append(Series(f"{key}, {kind}", finite, dashed, colour))
    return scatter(series, title=title, x_label="KL to the reference, nats (square-root scale)", y_label="score")


def by_run(rows: list[JsonRow]) -> dict[str, list[JsonRow]]:
    """Rows of each line of the plot, by name: the states of a run with its checkpoint, and all other checkpoints."""
    runs = {str(row["model"]).rpartition("/state/step-")[0] for row in rows} - {""}
    short = {run: PurePath(run).name for run in runs}
    named = {run: name if list(short.values()).count(name) == 1 else run for run, name in short.items()}
    out: dict[str, list[JsonRow]] = {}
    for row in rows:
        model = str(row["model"])
        run = model.rpartition("/state/step-")[0] or model.rstrip("/")
        out.setdefault(named.get(run, "checkpoints"), []).append(row)
    return out


def _point(row: JsonRow, key: str) -> Point:
    errors = [float(row[name]) if is_finite(row.get(name)) else 0.0 for name in ("kl_error", f"{key}_error")]
    return Point(float(row["kl"]), float(row[key]), *errors)
