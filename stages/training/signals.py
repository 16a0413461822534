"""SIGTERM and Ctrl-C ask a run to end: noticed between forward passes, so that it ends within seconds, state saved.

In code that is not ours, such as a reward function, they act at once: how long it takes is not ours to say, and
nothing is in the middle of a change there. Processes that it forks have the handlers of before, not ours.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from stages.errors import StopRequested

ASKING = (signal.SIGTERM, signal.SIGINT)


class _Heard:
    number: int | None = None
    raises = True
    listening = False
    in_user_code = False
    save: Callable[[], object] | None = None


class _Dispositions:
    """What our handlers stand in for, by signal; forked children get it back."""

    before: dict[int, object] = {}
    mask: set[int] | None = None  # of the thread that forks, while it does
    registered = False


@contextmanager
def listening(*, raises: bool = True, save: Callable[[], object] | None = None) -> Iterator[None]:
    """Within the block the first SIGTERM or SIGINT is only noted; a second one acts at once.

    Without `raises` `check` goes on all the same: this is a rank that others wait for. `save` saves the run's state
    where user code never comes back; another thread calls it.
    """
    _Heard.number, _Heard.raises, _Heard.listening, _Heard.save = None, raises, True, save
    try:
        with handling(dict.fromkeys(ASKING, _hear)):
            yield
    finally:
        # A signal that came after the last check: the work is done, what follows may finish.
        _Heard.number, _Heard.raises, _Heard.listening, _Heard.save = None, True, False, None


@contextmanager
def acting_at_once() -> Iterator[None]:
    """Within the block, which runs code that is not ours, SIGTERM and SIGINT raise StopRequested there and then.

    What the code swallows, or turns into another exception, is raised again at the end. A rank that others wait for
    only notes them here, too.
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
    if _Heard.in_user_code and _Heard.raises:
        raise StopRequested(number)
    if again and not _Heard.in_user_code:
        raise StopRequested(number, at_once=True)


def heard() -> int | None:
    """The signal that came, if one did."""
    return _Heard.number


def save() -> bool:
    """Save the run's state, for a process that is about to end; False where nothing is being trained."""
    if _Heard.save is None:
        return False
    _Heard.save()
    return True


def check() -> None:
    """Raise StopRequested if a signal came."""
    if _Heard.number is not None and _Heard.raises:
        raise StopRequested(_Heard.number)


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
