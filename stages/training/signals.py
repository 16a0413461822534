"""SIGTERM and Ctrl-C ask a run to end: noticed between forward passes, so that it ends within seconds, state saved."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


class StopRequested(BaseException):
    """Raised between forward passes after a signal; not an Exception, so that no user code swallows it."""

    def __init__(self, number: int, *, at_once: bool = False):
        self.number = number
        self.at_once = at_once  # raised anywhere, perhaps in the middle of an optimiser step
        super().__init__(f"signal {number}")


class _Heard:
    number: int | None = None
    raises = True


@contextmanager
def listening(*, raises: bool = True) -> Iterator[None]:
    """Within the block the first SIGTERM or SIGINT is only noted; a second one acts at once.

    Without `raises` `check` goes on all the same: this is a rank that others wait for.
    """
    before = {}

    def hear(number: int, frame: object) -> None:
        if _Heard.number is not None:
            raise StopRequested(number, at_once=True)
        _Heard.number = number

    _Heard.number, _Heard.raises = None, raises
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
        _Heard.number = None  # one that came after the last check: the work is done, what follows may finish


def heard() -> int | None:
    """The signal that came, if one did."""
    return _Heard.number


def check() -> None:
    """Raise StopRequested if a signal came."""
    if _Heard.number is not None and _Heard.raises:
        raise StopRequested(_Heard.number)
