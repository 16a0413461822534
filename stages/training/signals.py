"""SIGTERM and Ctrl-C ask a run to end: noticed between forward passes, so that it ends within seconds, state saved."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

FINISHING = "interrupted; this step is finished first, then saved (a second signal ends it at once)"
ECHO_SECONDS = 2.0  # torchrun passes a Ctrl-C on that the terminal has sent to every rank already


class StopRequested(BaseException):
    """Raised between forward passes after a signal; not an Exception, so that no user code swallows it."""

    def __init__(self, number: int, *, at_once: bool = False):
        self.number = number
        self.at_once = at_once  # raised anywhere, perhaps in the middle of an optimiser step
        super().__init__(f"signal {number}")


def _always() -> bool:
    return True


def _silent(text: str) -> None:
    pass


class _Heard:
    number: int | None = None
    since = 0.0  # seconds of the clock
    may_stop: Callable[[], bool] = staticmethod(_always)
    say: Callable[[str], None] = staticmethod(_silent)


@contextmanager
def listening(
    may_stop: Callable[[], bool] = _always, say: Callable[[str], None] = _silent, *, echo: bool = False
) -> Iterator[None]:
    """Within the block the first SIGTERM or SIGINT is only noted, for `check` to find; a second one acts at once.

    While `may_stop()` is false, `check` goes on and tells `say` so, once. With `echo` a second signal that follows the
    first within ECHO_SECONDS is the same one.
    """
    before = {}

    def hear(number: int, frame: object) -> None:
        if _Heard.number is None:
            _Heard.number, _Heard.since = number, time.monotonic()
        elif not echo or time.monotonic() - _Heard.since > ECHO_SECONDS:
            raise StopRequested(number, at_once=True)

    _Heard.number, _Heard.may_stop, _Heard.say = None, may_stop, say
    for number in (signal.SIGTERM, signal.SIGINT):
        try:
            before[number] = signal.signal(number, hear)
        except ValueError:  # not the main thread: whoever runs us there handles signals
            break
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        # A signal that came after the last check: the work is done, what follows may finish.
        _Heard.number, _Heard.may_stop, _Heard.say = None, _always, _silent


def heard() -> int | None:
    """The signal that came, if one did."""
    return _Heard.number


def check() -> None:
    """Raise StopRequested if a signal came and stopping here loses nothing."""
    if _Heard.number is None:
        return
    if _Heard.may_stop():
        raise StopRequested(_Heard.number)
    say, _Heard.say = _Heard.say, _silent
    say(FINISHING)
