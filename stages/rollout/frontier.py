"""Score against KL, policy by policy: rows as `rlhf evaluate` writes them, as tables, as a picture, and in a sentence.

No torch: `rlhf report` reads the same rows from a file, where anything may be missing.
"""

from __future__ import annotations

import math
import typing
from pathlib import PurePath

from stages.results import Table
from stages.rollout.plot import Point, Series, scatter

if typing.TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, object]
# Key, heading, decimals.
MEASURES = (
    ("kl", "KL", 2),
    ("score", "score", 3),
    ("gold", "gold", 3),
    ("length", "length", 1),
    ("eos_rate", "ended", 2),
    ("duplicate_rate", "repeated", 2),
    ("distinct_1", "distinct-1", 2),
    ("distinct_2", "-2", 2),
)
ABSENT = "-"


def is_number(value: object) -> bool:
    """Whether a value from JSON is a finite number; true and false are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def rows_of(value: object, name: str) -> list[Row]:
    """The rows in a value from JSON that have a `name` and a KL, by rising KL."""
    rows = [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []
    return sorted((r for r in rows if name in r and is_number(r.get("kl"))), key=lambda r: r["kl"])


def curve_tables(evaluation: dict[str, object], label: str = "") -> tuple[Table, ...]:
    """What evaluate.json says of the best of n and of several policies, as far as it says something."""
    best, rows = rows_of(evaluation.get("best_of"), "n"), rows_of(evaluation.get("frontier"), "model")
    tables = (best_of_table(best, f"{label}best of n by score"),) if best else ()
    if rows:
        tables += (kl_curve_table(rows, best, f"{label}by KL to the reference"),)
    turn = evaluation.get("over_optimisation")
    if isinstance(turn, str):
        tables += (Table("", (f"{label}over-optimisation",), ((turn,),)),)
    return tables


def best_of_table(rows: list[Row], title: str) -> Table:
    """What becomes of a policy of which the best of n responses is taken."""
    return _table(title, "n", [(str(row["n"]), row) for row in rows], {"kl": "KL (at most)"})


def kl_curve_table(rows: list[Row], best_of: list[Row], title: str) -> Table:
    """Policies, and the best of n of the first one where that was measured, by rising KL."""
    named = [(str(row.get("label", row["model"])), row) for row in rows]
    named += [(f"best of {row['n']}", row) for row in best_of]
    return _table(title, "model", sorted(named, key=lambda pair: pair[1]["kl"]))


def _table(title: str, first: str, named: list[tuple[str, Row]], headings: dict[str, str] | None = None) -> Table:
    measures = [m for m in MEASURES if any(is_number(row.get(m[0])) for _, row in named)]
    columns = (first, *((headings or {}).get(key, heading) for key, heading, _ in measures))
    cells = [(name, *(_with_error(row, key, digits) for key, _, digits in measures)) for name, row in named]
    return Table(title, columns, tuple(cells))


def _with_error(row: Row, key: str, digits: int) -> str:
    if not is_number(row.get(key)):
        return ABSENT
    error = row.get(f"{key}_error")
    return f"{row[key]:.{digits}f}" + (f" ± {error:.{digits}f}" if is_number(error) else "")


# --- where the gold score turns -------------------------------------------------------------------------------------


def turning_point(rows: list[Row]) -> tuple[Row, Row] | None:
    """The row of the highest gold score and, at more KL, the one of the highest score that is better only by that.

    None where no row with more KL has a higher score and a lower gold score.
    """
    known = [row for row in rows if is_number(row.get("score")) and is_number(row.get("gold"))]
    if not known:
        return None
    peak = max(known, key=lambda row: row["gold"])
    beyond = [r for r in known if r["kl"] > peak["kl"] and r["score"] > peak["score"] and r["gold"] < peak["gold"]]
    return (peak, max(beyond, key=lambda row: row["score"])) if beyond else None


def describe_over_optimisation(rows: list[Row], loss_error: float | None) -> str:
    """One sentence on over-optimisation; `loss_error` is the standard error of the gold score's fall over prompts."""
    turn = turning_point(rows)
    if turn is None:
        return "the gold score nowhere falls while the score rises: no over-optimisation up to the largest KL measured"
    peak, beyond = turn
    lost = peak["gold"] - beyond["gold"]
    error = f" ± {loss_error:.3f}" if is_number(loss_error) else ""
    unsure = " (less than twice its error: it may be chance)" if error and lost < 2 * loss_error else ""
    return (
        f"the gold score peaks at KL {peak['kl']:.2f} ({_name(peak)}); from there to KL {beyond['kl']:.2f} "
        f"({_name(beyond)}) the score still rises by {beyond['score'] - peak['score']:.3f} "
        f"while gold falls by {lost:.3f}{error}{unsure}"
    )


def _name(row: Row) -> str:
    return str(row.get("label", row.get("model", "")))


# --- the picture ----------------------------------------------------------------------------------------------------


def plot_kl_curve(rows: list[Row], best_of: list[Row], title: str) -> Figure:
    """Score (solid) and gold score (dashed) over the KL to the reference: a line for each run with states."""
    series = []
    for colour, (kind, points) in enumerate([*by_run(rows).items(), ("best of n", best_of)]):
        for key, dashed in (("score", False), ("gold", True)):
            found = [_point(row, key) for row in points if is_number(row.get(key))]
            if found:
                series.append(Series(f"{key}, {kind}", found, dashed, colour))
    return scatter(series, title=title, x_label="KL to the reference, nats (square-root scale)", y_label="score",
                   x_scale="sqrt")  # fmt: skip


def by_run(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows that belong to one line, by its name: the states of a run with its checkpoint, and all other checkpoints."""
    runs = {str(row["model"]).rpartition("/state/step-")[0] for row in rows} - {""}
    short = {run: PurePath(run).name for run in runs}
    named = {run: name if list(short.values()).count(name) == 1 else run for run, name in short.items()}
    out: dict[str, list[Row]] = {}
    for row in rows:
        model = str(row["model"])
        run = model.rpartition("/state/step-")[0] or model.rstrip("/")
        out.setdefault(named.get(run, "checkpoints"), []).append(row)
    return out


def _point(row: Row, key: str) -> Point:
    errors = [float(row[name]) if is_number(row.get(name)) else 0.0 for name in ("kl_error", f"{key}_error")]
    return Point(float(row["kl"]), float(row[key]), *errors)
