"""Pictures as SVG text, drawn by our own code: points with error bars, joined by lines, and a legend."""

from __future__ import annotations

import math
from dataclasses import dataclass
from xml.sax.saxutils import escape

MARK = "drawn by rlhf"  # in every picture: by it a file is known as one that may be written over
WIDTH, HEIGHT = 720, 480
LEFT, RIGHT, TOP, BOTTOM = 70, 200, 40, 60  # margins around the plotted area; the legend stands in the right one
# Told apart by people who see colours differently: Okabe and Ito 2008.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
SCALES = {"linear": lambda x: x, "sqrt": lambda x: math.sqrt(max(x, 0.0))}
FONT = "font-family='sans-serif' font-size='12'"


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
    colour: int | None = None  # place in COLOURS; None takes the series' own number


@dataclass(frozen=True)
class Axis:
    """Maps numbers to pixels: `low` to `start`, `high` to `end`, evenly after the scale's function."""

    low: float
    high: float
    start: float
    end: float
    scale: str = "linear"

    def place(self, value: float) -> float:
        f = SCALES[self.scale]
        return self.start + (f(value) - f(self.low)) / (f(self.high) - f(self.low)) * (self.end - self.start)


def scatter(series: list[Series], *, title: str, x_label: str, y_label: str, x_scale: str = "linear") -> str:
    """An SVG picture of at least one finite point; points that are not finite are left out.

    `x_scale` "sqrt" spaces x by its square root, from 0 on, and places what lies below at 0.
    """
    drawn = [(s, [p for p in s.points if math.isfinite(p.x) and math.isfinite(p.y)]) for s in series]
    points = [p for _, found in drawn for p in found]
    assert points, "nothing to draw"
    x = _x_axis(points, x_scale)
    y = _axis([p.y - p.y_error for p in points] + [p.y + p.y_error for p in points], HEIGHT - BOTTOM, TOP)
    parts = [*_frame(x, y, title, x_label, y_label)]
    for number, (one, found) in enumerate(drawn):
        colour = COLOURS[(number if one.colour is None else one.colour) % len(COLOURS)]
        parts += [*_drawn(one, found, x, y, colour), *_legend(one, number, colour)]
    size = f"width='{WIDTH}' height='{HEIGHT}' viewBox='0 0 {WIDTH} {HEIGHT}'"
    head = f"<svg xmlns='http://www.w3.org/2000/svg' {size}>\n<title>{_text(title)}</title>\n<desc>{MARK}</desc>\n"
    return head + "\n".join(parts) + "\n</svg>\n"


# --- axes -----------------------------------------------------------------------------------------------------------


def _x_axis(points: list[Point], scale: str) -> Axis:
    ends = LEFT, WIDTH - RIGHT
    if scale == "linear":
        return _axis([p.x - p.x_error for p in points] + [p.x + p.x_error for p in points], *ends)
    high = max(max(p.x + p.x_error for p in points), 0.0)
    return Axis(0.0, high * 1.05 or 1.0, *ends, scale)


def _axis(values: list[float], start: float, end: float) -> Axis:
    low, high = min(values), max(values)
    gap = 0.05 * (high - low) or 0.5 * abs(high) or 0.5
    return Axis(low - gap, high + gap, start, end)


def ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Round numbers from low to high, some `about` of them: steps of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= 0.75 * rough)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def root_ticks(high: float, about: int = 6) -> list[float]:
    """Round numbers from 0 to high, some `about` of them, whose square roots lie far enough apart to be read."""
    power = math.floor(math.log10(high))
    small = (m * 10.0**p for p in (power - 2, power - 1, power) for m in (1, 2, 5))
    kept: list[float] = []
    for value in sorted({*ticks(0.0, high, 2 * about), *small}, reverse=True):
        root, above = math.sqrt(value / high), math.sqrt(kept[-1] / high) if kept else math.inf
        if value <= high and min(root, above - root) >= 0.8 / about:
            kept.append(value)
    return [0.0, *reversed(kept)]


# --- parts ----------------------------------------------------------------------------------------------------------


def _frame(x: Axis, y: Axis, title: str, x_label: str, y_label: str) -> list[str]:
    """Background, axes with ticks and titles."""
    right, bottom, middle = WIDTH - RIGHT, HEIGHT - BOTTOM, (TOP + HEIGHT - BOTTOM) / 2
    parts = [
        f"<rect width='{WIDTH}' height='{HEIGHT}' fill='white'/>",
        f"<path d='M{LEFT} {TOP}V{bottom}H{right}' fill='none' stroke='black'/>",
        _label((LEFT + right) / 2, TOP - 18, title, "middle", "font-weight='bold'"),
        _label((LEFT + right) / 2, HEIGHT - 18, x_label, "middle"),
        _label(18, middle, y_label, "middle", f"transform='rotate(-90 18 {_number(middle)})'"),
    ]
    for value in ticks(x.low, x.high) if x.scale == "linear" else root_ticks(x.high):
        place = _number(x.place(value))
        parts.append(f"<path d='M{place} {bottom}v5' stroke='black'/>")
        parts.append(_label(x.place(value), bottom + 20, f"{value:.4g}", "middle"))
    for value in ticks(y.low, y.high):
        place = _number(y.place(value))
        parts.append(f"<path d='M{LEFT} {place}h-5M{LEFT} {place}H{right}' stroke='black' stroke-opacity='0.3'/>")
        parts.append(_label(LEFT - 9, y.place(value) + 4, f"{value:.4g}", "end"))
    return parts


def _drawn(one: Series, points: list[Point], x: Axis, y: Axis, colour: str) -> list[str]:
    """A series' line, error bars and markers."""
    places = [(x.place(p.x), y.place(p.y)) for p in points]
    dash = " stroke-dasharray='6 4'" if one.dashed else ""
    line = " ".join(f"{_number(a)},{_number(b)}" for a, b in places)
    parts = [f"<polyline points='{line}' fill='none' stroke='{colour}' stroke-width='1.5'{dash}/>"] if line else []
    for p, (a, b) in zip(points, places, strict=True):
        if p.y_error:
            parts.append(_bar((a, y.place(p.y - p.y_error)), (a, y.place(p.y + p.y_error)), colour))
        if p.x_error:
            parts.append(_bar((x.place(p.x - p.x_error), b), (x.place(p.x + p.x_error), b), colour))
        hollow = "white" if one.dashed else colour
        parts.append(f"<circle cx='{_number(a)}' cy='{_number(b)}' r='3.5' fill='{hollow}' stroke='{colour}'/>")
    return parts


def _bar(one: tuple[float, float], other: tuple[float, float], colour: str) -> str:
    ends = " ".join(f"{n}='{_number(v)}'" for n, v in zip(("x1", "y1", "x2", "y2"), (*one, *other), strict=True))
    return f"<line {ends} stroke='{colour}'/>"


def _legend(one: Series, number: int, colour: str) -> list[str]:
    left, top = WIDTH - RIGHT + 14, TOP + 10 + 20 * number
    dash = " stroke-dasharray='6 4'" if one.dashed else ""
    return [
        f"<line x1='{left}' y1='{top}' x2='{left + 26}' y2='{top}' stroke='{colour}' stroke-width='1.5'{dash}/>",
        _label(left + 32, top + 4, one.name, "start"),
    ]


def _label(x: float, y: float, text: str, anchor: str, more: str = "") -> str:
    about = " ".join(filter(None, (f"x='{_number(x)}' y='{_number(y)}' text-anchor='{anchor}'", FONT, more)))
    return f"<text {about}>{_text(text)}</text>"


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _text(text: str) -> str:
    """Text that XML can hold: markup escaped, and characters that XML forbids left out."""
    return escape("".join(c for c in text if c in "\t\n" or (c >= "\x20" and not "\ud800" <= c <= "\udfff")
                          and c not in "\ufffe\uffff"))  # fmt: skip
