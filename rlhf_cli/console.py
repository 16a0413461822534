"""Output of a command: progress and messages on stderr, from rank 0 only; its result on stdout."""

from __future__ import annotations

import contextlib
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TextIO

from stages.errors import ConfigError
from stages.launch import read_launch
from stages.results import Passage, Piece, Reporter, Result, Silent, Table, bracketed

LIVE_PPO = ("reward_score", "reward_kl", "entropy", "response_length", "tokens_per_second")
LIVE = ("loss", "eval_loss", "accuracy", "eval_accuracy", "lr")
SHOWN_AT_MOST = 5
LINE_EVERY_SHARE = 0.05  # of a phase's steps
LINES_APART = 2.0  # seconds, at least
LINE_AFTER = 60.0  # seconds, at most, even if that share of the steps takes longer
PIPED_WIDTH = 100  # columns, if stdout is no terminal
NUMERIC = re.compile(r"[-+−]?[\d.,]+( ?[%s])?( ± [\d.,]+( ?%)?)?|[-–]?|nan|inf|-inf")

# Control characters (C0 without newline and tab, DEL, C1), bidirectional marks and overrides, and lone surrogates.
UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def plain(text: object) -> str:
    """Text without effect on a terminal: every control character but newline and tab becomes U+FFFD."""
    return UNPRINTABLE.sub("\ufffd", str(text).replace("\r\n", "\n"))


def rank() -> int:
    """This process's rank under torchrun; 0 for a single process, and if the environment contradicts itself."""
    try:
        return read_launch().rank
    except ConfigError:
        return 0


def is_terminal(stream: TextIO) -> bool:
    """Whether a stream is a terminal that can redraw a line."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a line to stderr; a closed pipe is ignored."""
    with contextlib.suppress(OSError, ValueError):
        print(plain(text), file=stream or sys.stderr, flush=True)


@contextlib.contextmanager
def reporting() -> Iterator[Reporter]:
    """The `Reporter` of one command: a `Console` on rank 0, else `Silent`; open phases are closed at the end."""
    if rank():
        yield Silent()
        return
    console = Console(sys.stderr, live=is_terminal(sys.stderr))
    try:
        yield console
    finally:
        console.close()


def live_metrics(metrics: dict[str, float]) -> str:
    """The most important numbers of a step, by their names in metrics.jsonl."""
    names = [n for n in (LIVE_PPO if "reward_score" in metrics else LIVE) if n in metrics]
    return "  ".join(f"{n} {number(metrics[n])}" for n in (names or list(metrics)[:SHOWN_AT_MOST]))


def number(value: object) -> str:
    """A number with four significant digits, or without decimals from 1,000 on."""
    if not isinstance(value, (int, float)):
        return plain(value)
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e12 else f"{value:.4g}"


def duration(seconds: float) -> str:
    """Seconds as 45s, 3m12s or 1h05m."""
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole}s"
    return f"{whole // 60}m{whole % 60:02d}s" if whole < 3600 else f"{whole // 3600}h{whole % 3600 // 60:02d}m"


@dataclass
class Phase:
    """A phase of `total` steps in progress."""

    title: str
    total: int
    begun_at: int  # steps that an earlier run has made
    begun: float  # seconds of the clock
    step: int
    shown_step: int  # of the last line printed
    shown: float  # seconds of the clock at the last line printed
    metrics: dict[str, float] = field(default_factory=dict)
    task: object = None  # the terminal's progress task

    def remaining(self, now: float) -> float | None:
        """Seconds left at the mean speed so far; None before the first step."""
        steps = self.step - self.begun_at
        return (now - self.begun) / steps * max(self.total - self.step, 0) if steps > 0 else None

    def line(self, now: float) -> str:
        """The phase's step, metrics and remaining time in one line."""
        left = self.remaining(now)
        ending = f"  ({duration(left)} left)" if left and self.step < self.total else ""
        return "  ".join(filter(None, [f"{self.title} {self.step}/{self.total}", live_metrics(self.metrics)])) + ending


class Console:
    """A `Reporter` on a stream; phases may nest (an evaluation inside training)."""

    def __init__(self, stream: TextIO, *, live: bool, clock: Callable[[], float] = time.monotonic):
        self.stream, self.live, self.clock = stream, live, clock
        self.phases: list[Phase] = []
        self.progress = None

    def note(self, text: str) -> None:
        """Print one line of information."""
        self._say(text)

    def warn(self, text: str) -> None:
        """Print one line that asks for attention."""
        self._say(f"warning: {text}")

    def begin(self, title: str, total: int, done: int = 0) -> None:
        """Start a phase of `total` steps, of which `done` are made."""
        now = self.clock()
        phase = Phase(plain(title), total, done, now, step=done, shown_step=done, shown=now)
        self.phases.append(phase)
        if self.live:
            self.progress = self.progress or _progress(self.stream)
            phase.task = self.progress.add_task(phase.title, total=total, completed=done, metrics="", left="")
            self.progress.start()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Show that the phase is at `step`; `metrics` are this step's numbers (may be empty)."""
        if not self.phases:
            return
        phase, now = self.phases[-1], self.clock()
        phase.step = step
        phase.metrics = metrics or phase.metrics
        if self.progress:
            left = phase.remaining(now)
            left_text = "" if left is None else f"{duration(left)} left"
            self.progress.update(phase.task, completed=step, metrics=plain(live_metrics(phase.metrics)), left=left_text)
        elif self._due(phase, now):
            self._line(phase, now)

    def end(self) -> None:
        """End the phase."""
        if not self.phases:
            return
        phase = self.phases.pop()
        if self.progress and self.phases:
            self.progress.remove_task(phase.task)
        elif self.progress:
            self.progress.stop()
            self.progress = None
        elif phase.step != phase.shown_step:
            self._line(phase, self.clock())

    def close(self) -> None:
        """End every open phase, so that the next output begins on a new line."""
        while self.phases:
            self.end()

    def _due(self, phase: Phase, now: float) -> bool:
        waited = now - phase.shown
        share = (phase.step - phase.shown_step) / max(phase.total, 1)
        last = phase.step >= phase.total > phase.shown_step
        return last or waited >= LINE_AFTER or (waited >= LINES_APART and share >= LINE_EVERY_SHARE)

    def _line(self, phase: Phase, now: float) -> None:
        phase.shown, phase.shown_step = now, phase.step
        say(phase.line(now), self.stream)

    def _say(self, text: str) -> None:
        if self.progress:
            from rich.text import Text

            self.progress.console.print(Text(plain(text)), soft_wrap=True)
        else:
            say(text, self.stream)


def _progress(stream: TextIO):
    from rich.console import Console as Terminal
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    # markup=False: brackets in titles and metric names are text.
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[metrics]}", markup=False),
        TextColumn("{task.fields[left]}", markup=False, style="dim"),
        console=Terminal(file=stream, highlight=False),
        refresh_per_second=4,
    )


# --- results on stdout -----------------------------------------------------------------------------------------------


def show(result: Result, as_json: bool, stream: TextIO | None = None) -> None:
    """Print a result, with `as_json` as exactly one JSON object; raises OSError if stdout cannot be written."""
    stream = stream or sys.stdout
    if as_json:
        import json  # only now, to start faster

        print(json.dumps(payload(result), indent=2), file=stream)
    else:
        show_passages(result.passages, stream)
        show_tables(result.tables, stream)
        for line in closing(result):
            print(plain(line), file=stream)
    stream.flush()


def payload(result: Result) -> dict[str, object]:
    """The object of --json: the result's data, with command, status, output and next; non-finite numbers as null."""
    fixed = {"command": result.command, "status": result.status, "output": result.output, "next": list(result.next)}
    return jsonable({**fixed, **result.data, **fixed})  # type: ignore[return-value]


def jsonable(value: object) -> object:
    """A value for JSON: NaN and infinities become null, scalars of other libraries numbers, everything else text."""
    if isinstance(value, dict):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [jsonable(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return jsonable(value.item()) if hasattr(value, "item") else str(value)


def closing(result: Result) -> list[str]:
    """The lines below the tables: what was written, and the next commands."""
    lines = []
    if result.status == "dry run":
        lines.append("dry run: nothing was written")
    elif result.output is not None:
        lines.append(f"wrote {result.output}" if result.status == "done" else f"{result.status}: {result.output}")
    elif result.status != "done":
        lines.append(result.status)
    return lines + [f"next: {command}" for command in result.next]


def show_passages(passages: tuple[Passage, ...], stream: TextIO) -> None:
    """Print texts: marked pieces in colour, or without colours in double brackets."""
    if not passages:
        return
    from rich.console import Console as Terminal
    from rich.text import Text

    terminal = is_terminal(stream)
    console = Terminal(file=stream, highlight=False, markup=False, emoji=False, force_terminal=terminal)
    coloured = terminal and not console.no_color and console.color_system is not None
    for passage in passages:
        title = plain(passage.title)
        if not coloured:
            stream.write(f"{title}\n{plain(bracketed(passage.pieces))}\n\n")
            continue
        text = Text("")
        for piece in passage.pieces:
            text.append(plain(piece.text), style=piece_style(piece))
        console.print(Text(title.replace("[[...]]", "green"), style="bold"), text, "", sep="\n", soft_wrap=True)


def piece_style(piece: Piece) -> str:
    """The style of a piece on a terminal with colours."""
    if piece.note:
        return "dim italic"
    return " ".join(filter(None, ["bold green" if piece.marked else "", "magenta" if piece.special else ""]))


def show_tables(tables: tuple[Table, ...], stream: TextIO) -> None:
    """Print the tables that have rows: on a terminal at its width and with rules, otherwise as aligned plain text."""
    tables = tuple(table for table in tables if table.rows)
    if not tables:
        return
    from rich.console import Console as Terminal

    terminal = is_terminal(stream)
    width = None if terminal else PIPED_WIDTH
    console = Terminal(file=stream, width=width, highlight=False, markup=False, emoji=False, force_terminal=terminal)
    for table in tables:
        if terminal:
            console.print(*_rendered(table, terminal), "", sep="\n")
            continue
        with console.capture() as captured:
            console.print(*_rendered(table, terminal), sep="\n")
        # Rich pads cells to their column; remove spaces at the end of lines.
        stream.write("\n".join(line.rstrip() for line in captured.get().splitlines()) + "\n\n")


def _rendered(table: Table, terminal: bool) -> list[object]:
    from rich import box
    from rich.table import Table as Grid
    from rich.text import Text

    rows = [[plain(cell) for cell in row] for row in table.rows]
    tall = any("\n" in cell or len(cell) > 60 for row in rows for cell in row)
    grid = Grid(
        box=(box.ROUNDED if tall else box.SIMPLE_HEAD) if terminal else None,
        show_lines=tall,
        show_edge=terminal and tall,
        pad_edge=terminal and tall,
        padding=(0, 1) if terminal else (0, 2, 0, 0),
        header_style="bold",
    )
    for place, name in enumerate(table.columns):
        cells = [row[place] for row in rows if place < len(row)]
        numeric = not tall and bool(cells) and all(NUMERIC.fullmatch(cell) for cell in cells)
        grid.add_column(Text(plain(name)), justify="right" if numeric else "left", overflow="fold")
    for place, row in enumerate(rows):
        gap = "\n" if tall and not terminal and place < len(rows) - 1 else ""  # instead of a rule between tall rows
        grid.add_row(*(Text(cell + gap) for cell in row))
    return [Text(plain(table.title), style="bold"), grid] if table.title else [grid]
