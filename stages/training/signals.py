"""SIGTERM and Ctrl-C end a run within seconds and with its state saved: they are checked between forward passes.

In user code, such as a reward function, they act immediately: it may take arbitrarily long, and no state changes
during it. Processes that it forks get the handlers from before ours.
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
ECHO_SECONDS = 2.0  # torchrun repeats a Ctrl-C that the terminal has already sent to every rank
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class _Dispositions:
    """Handlers that ours replaced, by signal; forked children get them back."""

    before: dict[int, object] = {}
    mask: set[int] | None = None  # of the thread that forks, while it does


def _always() -> bool:
    return True


def _silent(text: str) -> None:
    pass


class Signals:
    """The SIGTERM and SIGINT that one run receives."""

    def __init__(self) -> None:
        self.received: int | None = None  # the signal that came, if one did
        self._process = os.getpid()  # a forked child ignores the signals of its parent
        self._since = 0.0  # monotonic seconds of the first signal
        self._listening = False
        self._in_user_code = False
        self._forget()

    def _forget(self) -> None:
        self.received, self._may_stop, self._say, self._save, self._echo = None, _always, _silent, None, False

    @contextmanager
    def listening(
        self,
        may_stop: Callable[[], bool] = _always,
        say: Callable[[str], None] = _silent,
        *,
        save: Callable[[], bool] | None = None,
        echo: bool = False,
    ) -> Iterator[None]:
        """Within the block the first signal is only recorded, for `check` to find; a second one acts immediately.

        While `may_stop()` is false, `check` does not raise, and calls `say` once. `save` saves the run's state, if
        possible, when user code never returns; another thread calls it. With `echo` a second signal within ECHO_SECONDS
        of the first is ignored.
        """
        self.received, self._may_stop, self._say, self._save, self._echo = None, may_stop, say, save, echo
        self._listening = True
        try:
            with handling(dict.fromkeys(STOP_SIGNALS, self._receive)):
                yield
        finally:
            self._forget()  # drops a signal after the last check: the work is done, and what follows may finish
            self._listening = False

    @contextmanager
    def acting_at_once(self) -> Iterator[None]:
        """Within the block, which runs user code, signals raise StopRequested immediately.

        If the code suppresses it, or raises another exception instead, it is raised again at the end. While the run may
        not stop, signals are only recorded.
        """
        self.check()
        try:
            with handling(dict.fromkeys(STOP_SIGNALS, self._receive)):
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
        """Raise StopRequested if a signal was received and stopping loses nothing."""
        if self.received is None or os.getpid() != self._process:
            return
        if self._may_stop():
            raise StopRequested(self.received)
        say, self._say = self._say, _silent
        say(FINISHING)

    def save(self) -> bool:
        """Save the run's state before the process ends; returns False if there is none to save."""
        return self._save is not None and self._save()

    def _receive(self, number: int, frame: object) -> None:
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
    """Handle signals with these handlers within the block; forked children keep the ones from before.

    Does nothing outside the main thread, since only that can set handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
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
    """A handler that Python can set; one that a C library set (None) becomes the default."""
    return signal.SIG_DFL if handler is None else handler


# --- forked children: a worker that only recorded SIGTERM would never end


def _before_fork() -> None:
    """Block signals until the child has its own handlers, so that none is lost to ours there."""
    if _Dispositions.before:
        _Dispositions.mask = signal.pthread_sigmask(signal.SIG_BLOCK, _Dispositions.before)


def _unblock() -> None:
    if _Dispositions.mask is not None:
        mask, _Dispositions.mask = _Dispositions.mask, None
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _restore_in_child() -> None:
    if _Dispositions.before:
        signal.set_wakeup_fd(-1)
    for number, handler in _Dispositions.before.items():
        signal.signal(number, _or_default(handler))
    _Dispositions.before = {}
    _unblock()


os.register_at_fork(before=_before_fork, after_in_parent=_unblock, after_in_child=_restore_in_child)
