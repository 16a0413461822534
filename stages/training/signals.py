"""SIGTERM and Ctrl-C ask a run to end: noticed between forward passes, so that it ends within seconds, state saved.

In code that is not ours, such as a reward function, they act at once: how long it takes is not ours to say, and
nothing is in the middle of a change there. Processes that it forks have the handlers of before, not ours.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from stages.errors import StopRequested

FINISHING = "interrupted; this step is finished first, then saved (a second signal ends it at once)"
ECHO_SECONDS = 2.0  # torchrun passes a Ctrl-C on that the terminal has sent to every rank already

ASKING = (signal.SIGTERM, signal.SIGINT)


def _always() -> bool:
    return True


def _silent(text: str) -> None:
    pass


class _Heard:
    number: int | None = None
    since = 0.0  # seconds of the clock
    may_stop: Callable[[], bool] = staticmethod(_always)
    say: Callable[[str], None] = staticmethod(_silent)
    save: Callable[[], bool] | None = None
    echo = False
    listening = False
    in_user_code = False


class _Dispositions:
    """What our handlers stand in for, by signal; forked children get it back."""

    before: dict[int, object] = {}
    mask: set[int] | None = None  # of the thread that forks, while it does
    registered = False


@contextmanager
def listening(
    may_stop: Callable[[], bool] = _always,
    say: Callable[[str], None] = _silent,
    *,
    save: Callable[[], bool] | None = None,
    echo: bool = False,
) -> Iterator[None]:
    """Within the block the first SIGTERM or SIGINT is only noted, for `check` to find; a second one acts at once.

    While `may_stop()` is false, `check` goes on and tells `say` so, once. `save` saves the run's state, if it can, when
    user code never comes back; another thread calls it. With `echo` a second signal that follows the first within
    ECHO_SECONDS is the same one.
    """
    _Heard.number, _Heard.may_stop, _Heard.say, _Heard.save, _Heard.echo = None, may_stop, say, save, echo
    _Heard.listening = True
    try:
        with handling(dict.fromkeys(ASKING, _hear)):
            yield
    finally:
        # A signal that came after the last check: the work is done, what follows may finish.
        _Heard.number, _Heard.may_stop, _Heard.say, _Heard.save, _Heard.echo = None, _always, _silent, None, False
        _Heard.listening = False


@contextmanager
def acting_at_once() -> Iterator[None]:
    """Within the block, which runs code that is not ours, SIGTERM and SIGINT raise StopRequested there and then.

    What the code swallows, or turns into another exception, is raised again at the end. Where a run may not stop, they
    are only noted here, too.
    """
    check()
    try:
        with handling(dict.fromkeys(ASKING, _hear)):
            outer, _Heard.in_user_code = _Heard.in_user_code, True
            try:
                yield
            finally:
                _Heard.in_user_code = outer
                check()
    finally:
        if not _Heard.listening:
            _Heard.number = None


def _hear(number: int, frame: object) -> None:
    again, _Heard.number = _Heard.number is not None, number
    if not again:
        _Heard.since = time.monotonic()
    if _Heard.in_user_code:
        if _Heard.may_stop():
            raise StopRequested(number)
    elif again and (not _Heard.echo or time.monotonic() - _Heard.since > ECHO_SECONDS):
        raise StopRequested(number, immediate=True)


def received_signal() -> int | None:
    """The signal that came, if one did."""
    return _Heard.number


def save() -> bool:
    """Save the run's state, for a process that is about to end; False where there is none to save."""
    return _Heard.save is not None and _Heard.save()


def check() -> None:
    """Raise StopRequested if a signal came and stopping here loses nothing."""
    if _Heard.number is None:
        return
    if _Heard.may_stop():
        raise StopRequested(_Heard.number)
    say, _Heard.say = _Heard.say, _silent
    say(FINISHING)


@contextmanager
def handling(handlers: dict[int, object]) -> Iterator[None]:
    """Handle signals so within the block; forked children handle them as before. Does nothing outside the main thread.

    Whoever runs us in another thread handles signals there.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _register_forks()
    outer = dict(_Dispositions.before)
    before = {}
    try:
        for number, handler in handlers.items():
            before[number] = signal.getsignal(number)
            _Dispositions.before.setdefault(number, before[number])
            signal.signal(number, handler)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, _or_default(handler))
        _Dispositions.before = outer


def _or_default(handler: object) -> object:
    """A handler that Python can set; one that a C library had set (None) cannot be put back."""
    return signal.SIG_DFL if handler is None else handler


# --- forked children: a worker that only noted SIGTERM would never end -----------------------------------------------


def _register_forks() -> None:
    if not _Dispositions.registered and hasattr(os, "register_at_fork"):
        os.register_at_fork(before=_before_fork, after_in_parent=_unblock, after_in_child=_as_before)
        _Dispositions.registered = True


def _before_fork() -> None:
    """Signals wait until the child has its own handlers, so that none meets ours there and is lost."""
    if _Dispositions.before:
        _Dispositions.mask = signal.pthread_sigmask(signal.SIG_BLOCK, _Dispositions.before)


def _unblock() -> None:
    if _Dispositions.mask is not None:
        mask, _Dispositions.mask = _Dispositions.mask, None
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _as_before() -> None:
    if _Dispositions.before:
        signal.set_wakeup_fd(-1)
    for number, handler in _Dispositions.before.items():
        signal.signal(number, _or_default(handler))
    _Dispositions.before = {}
    _Heard.number, _Heard.in_user_code = None, False
    _unblock()
