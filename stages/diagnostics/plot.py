"""Plots of points with error bars, one line for each series, drawn by matplotlib (an extra) as SVG, PNG or PDF."""

from __future__ import annotations

import importlib
import io
import math
import typing
import warnings
from dataclasses import dataclass
from pathlib import Path

from stages.checkpoint.atomic import write_bytes
from stages.errors import ConfigError

if typing.TYPE_CHECKING:
    from matplotlib.figure import Figure

PLOT_MARK = "drawn by rlhf"  # in the metadata of every plot: files with it may be overwritten
# Okabe and Ito 2008: distinguishable with the common kinds of colour blindness.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
# Metadata by format: the mark, and no date, so that the same numbers always give the same bytes.
METADATA: dict[str, dict[str, str | None]] = {
    ".svg": {"Description": PLOT_MARK, "Date": None},
    ".png": {"Software": PLOT_MARK},
    ".pdf": {"Creator": PLOT_MARK, "CreationDate": None},
}


@dataclass(frozen=True)
class Point:
    """A measurement and its standard errors."""

    x: float
    y: float
    x_error: float = 0.0
    y_error: float = 0.0


@dataclass(frozen=True)
class Series:
    """Points that belong together, joined in their order."""

    name: str
    points: list[Point]
    dashed: bool = False
    colour: int | None = None  # index into COLOURS; None: the number of the series


def check_matplotlib(where: str) -> None:
    """Raise ConfigError at `where` if matplotlib cannot be imported."""
    try:
        importlib.import_module("matplotlib.figure")
    except Exception as error:  # a broken installation may raise anything
        missing = isinstance(error, ModuleNotFoundError) and str(error.name).startswith("matplotlib")
        raise ConfigError(
            "matplotlib is not installed" if missing else f"matplotlib cannot be imported: {error}",
            where=where,
            fix=f"run pip install 'rlhf[plot]', or remove {where}: the numbers are printed as a table",
        ) from None


def scatter(series: list[Series], *, title: str, x_label: str, y_label: str) -> Figure:
    """A figure of all finite points (at least one) over the square root of x; negative x is drawn at 0."""
    import numpy
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    finite = [[p for p in one.points if math.isfinite(p.x) and math.isfinite(p.y)] for one in series]
    assert any(finite), "nothing to draw"
    for number, (one, points) in enumerate(zip(series, finite, strict=True)):
        colour = COLOURS[(number if one.colour is None else one.colour) % len(COLOURS)]
        x = [max(p.x, 0.0) for p in points]
        x_errors = [min(p.x_error, at) for at, p in zip(x, points, strict=True)], [p.x_error for p in points]
        axes.errorbar(
            x, [p.y for p in points], [p.y_error for p in points], x_errors, label=_printable(one.name), color=colour,
            linestyle="--" if one.dashed else "-", marker="o", markerfacecolor="white" if one.dashed else colour,
            markersize=5, elinewidth=1,
        )  # fmt: skip
    axes.set_xscale("function", functions=(lambda v: numpy.sqrt(numpy.maximum(v, 0)), numpy.square))
    axes.set_xlim(left=0)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    legend = figure.legend(loc="outside right upper", frameon=False)
    titles = (
        axes.set_title(_printable(title)),
        axes.set_xlabel(_printable(x_label)),
        axes.set_ylabel(_printable(y_label)),
    )
    for text in (*titles, *legend.get_texts()):
        text.set_parse_math(False)  # a $ in a folder's name is no formula
    return figure


def write_plot(path: str | Path, figure: Figure) -> None:
    """Write a figure atomically, in the format of its suffix, one of METADATA. Raises OutputError."""
    import matplotlib

    suffix, content = Path(path).suffix, io.BytesIO()
    # Text stays text in SVG; its identifiers are otherwise random.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": PLOT_MARK}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about characters that the font lacks
        figure.savefig(content, format=suffix[1:], metadata=METADATA[suffix])
    write_bytes(path, content.getvalue())


def _printable(text: str) -> str:
    """Text without the characters that XML or UTF-8 cannot represent."""
    return "".join(character if character.isprintable() else "\ufffd" for character in text)
