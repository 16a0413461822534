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


class _Dispositions:
    """What our handlers stand in for, by signal; forked children get it back."""

    before: dict[int, object] = {}
    mask: set[int] | None = None  # of the thread that forks, while it does
    registered = False


def _always() -> bool:
    return True


def _silent(text: str) -> None:
    pass


class Signals:
    """The SIGTERM and SIGINT that come to one run."""

    def __init__(self) -> None:
        self.received: int | None = None  # the signal that came, if one did
        self._process = os.getpid()  # a forked child was not asked
        self._since = 0.0  # seconds of the clock
        self._listening = False
        self._in_user_code = False
        self._reset()

    def _reset(
        self,
        may_stop: Callable[[], bool] = _always,
        say: Callable[[str], None] = _silent,
        save: Callable[[], bool] | None = None,
        echo: bool = False,
    ) -> None:
        self.received, self._may_stop, self._say, self._save, self._echo = None, may_stop, say, save, echo

    @contextmanager
    def listening(
        self,
        may_stop: Callable[[], bool] = _always,
        say: Callable[[str], None] = _silent,
        *,
        save: Callable[[], bool] | None = None,
        echo: bool = False,
    ) -> Iterator[None]:
        """Within the block the first signal is only noted, for `check` to find; a second one acts at once.

        While `may_stop()` is false, `check` goes on and tells `say` so, once. `save` saves the run's state, if it can,
        when user code never comes back; another thread calls it. With `echo` a second signal that follows the first
        within ECHO_SECONDS is the same one.
        """
        self._reset(may_stop, say, save, echo)
        self._listening = True
        try:
            with handling(dict.fromkeys(ASKING, self._hear)):
                yield
        finally:
            self._reset()  # a signal that came after the last check: the work is done, what follows may finish
            self._listening = False

    @contextmanager
    def acting_at_once(self) -> Iterator[None]:
        """Within the block, which runs code that is not ours, signals raise StopRequested there and then.

        What the code swallows, or turns into another exception, is raised again at the end. Where a run may not stop,
        they are only noted here, too.
        """
        self.check()
        try:
            with handling(dict.fromkeys(ASKING, self._hear)):
                outer, self._in_user_code = self._in_user_code, True
                try:
                    yield
                finally:
                    self._in_user_code = outer
                    self.check()
        finally:
            if not self._listening:
                self.received = None

    def check(self) -> None:
        """Raise StopRequested if a signal came and stopping here loses nothing."""
        if self.received is None or os.getpid() != self._process:
            return
        if self._may_stop():
            raise StopRequested(self.received)
        say, self._say = self._say, _silent
        say(FINISHING)

    def save(self) -> bool:
        """Save the run's state, for a process that is about to end; False where there is none to save."""
        return self._save is not None and self._save()

    def _hear(self, number: int, frame: object) -> None:
        again, self.received = self.received is not None, number
        if not again:
            self._since = time.monotonic()
        if self._in_user_code:
            if self._may_stop():
                raise StopRequested(number)
        elif again and (not self._echo or time.monotonic() - self._since > ECHO_SECONDS):
            raise StopRequested(number, immediate=True)


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
    _unblock()
