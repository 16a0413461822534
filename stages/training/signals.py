"""SIGTERM and Ctrl-C ask a run to end: noticed between forward passes, so that it ends within seconds, state saved."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


class StopRequested(BaseException):
    """Raised between forward passes after a signal; not an Exception, so that no user code swallows it."""

    def __init__(self, number: int):
        self.number = number
        super().__init__(f"signal {number}")


class _Heard:
    number: int | None = None


@contextmanager
def listening() -> Iterator[None]:
    """Within the block the first SIGTERM or SIGINT is only noted; a second one acts at once."""
    before = {}

    def hear(number: int, frame: object) -> None:
        if _Heard.number is not None:
            raise StopRequested(number)
        _Heard.number = number

    _Heard.number = None
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


def check() -> None:
    """Raise StopRequested if a signal came."""
    if _Heard.number is not None:
        raise StopRequested(_Heard.number)
