"""How a running stage looks: a live line on a terminal, plain lines when piped; always on stderr, rank 0 alone."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TextIO

from stages.errors import ConfigError
from stages.launch import read_launch
from stages.results import Reporter, Silent

LIVE_PPO = ("reward_score", "reward_kl", "entropy", "response_length", "tokens_per_second")
LIVE = ("loss", "eval_loss", "accuracy", "eval_accuracy", "lr")
SHOWN_AT_MOST = 5
LINE_EVERY_SHARE = 0.05  # of a phase's steps
LINES_APART = 2.0  # seconds, at least
LINE_AFTER = 60.0  # seconds, even where a share of the steps takes longer

# Control characters (C0 without newline and tab, DEL, C1), bidirectional marks and overrides, and lone surrogates.
UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def plain(text: object) -> str:
    """Text that cannot steer a terminal: every control character but newline and tab becomes U+FFFD."""
    return UNPRINTABLE.sub("\ufffd", str(text).replace("\r\n", "\n"))


def rank() -> int:
    """This process's rank, as torchrun tells it; 0 when alone, and where the environment contradicts itself."""
    try:
        return read_launch().rank
    except ConfigError:
        return 0


def is_terminal(stream: TextIO) -> bool:
    """Whether a stream is a terminal that can redraw a line."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a line to stderr; a reader that has gone away is no reason to stop."""
    with contextlib.suppress(OSError, ValueError):
        print(plain(text), file=stream or sys.stderr, flush=True)


@contextlib.contextmanager
def reporting() -> Iterator[Reporter]:
    """The `Reporter` of one command: a `Console` on rank 0, silence elsewhere; an open phase is closed at the end."""
    if rank():
        yield Silent()
        return
    console = Console(sys.stderr, live=is_terminal(sys.stderr))
    try:
        yield console
    finally:
        console.close()


def live_metrics(metrics: dict[str, float]) -> str:
    """The few numbers worth watching, by the names they have in metrics.jsonl."""
    names = [n for n in (LIVE_PPO if "reward_score" in metrics else LIVE) if n in metrics]
    return "  ".join(f"{n} {number(metrics[n])}" for n in (names or list(metrics)[:SHOWN_AT_MOST]))


def number(value: object) -> str:
    """A number at the precision an eye can use."""
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
    """A stretch of `total` steps under way."""

    title: str
    total: int
    begun_at: int  # steps behind it when it began, from an earlier run
    begun: float  # seconds of the clock
    step: int
    shown_step: int  # of the last line printed
    shown: float  # seconds of the clock at the last line printed
    metrics: dict[str, float] = field(default_factory=dict)
    task: object = None  # the terminal's progress task

    def remaining(self, now: float) -> float | None:
        """Seconds left at the speed so far; None before the first step."""
        steps = self.step - self.begun_at
        return (now - self.begun) / steps * max(self.total - self.step, 0) if steps > 0 else None

    def line(self, now: float) -> str:
        """The phase in one line."""
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
        """One line worth knowing."""
        self._say(text)

    def warn(self, text: str) -> None:
        """One line that asks for attention."""
        self._say(f"warning: {text}")

    def begin(self, title: str, total: int, done: int = 0) -> None:
        """A phase of `total` steps starts, `done` of them behind it."""
        now = self.clock()
        phase = Phase(plain(title), total, done, now, step=done, shown_step=done, shown=now)
        self.phases.append(phase)
        if self.live:
            self.progress = self.progress or _progress(self.stream)
            phase.task = self.progress.add_task(phase.title, total=total, completed=done, metrics="", left="")
            self.progress.start()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """The phase stands at `step`; `metrics` are this step's numbers (may be empty)."""
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
        """The phase is over."""
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
        """End every phase that is still open, so that what is printed next has a line of its own."""
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

    # markup=False: titles and metric names are not ours to interpret.
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[metrics]}", markup=False),
        TextColumn("{task.fields[left]}", markup=False, style="dim"),
        console=Terminal(file=stream, highlight=False),
        refresh_per_second=4,
    )
