"""Runs a user's code, such as a reward function: it can be interrupted, and the process is the same afterwards."""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from stages.errors import RewardError, StopRequested
from stages.rollout.settings import ImportChanges, restoring_alarm, restoring_settings
from stages.training.children import adopt_orphans, end_children
from stages.training.signals import STOP_SIGNALS, Signals, handling

RING = signal.SIGURG  # the watching thread interrupts with it: ignored by default, and hardly ever used
RING_AGAIN = 2.0  # seconds between two interrupts: the block's cleaning up may wait for what hangs
SECONDS_TO_INTERRUPT = 10.0  # seconds of interrupts before the process is ended


class TookTooLong(BaseException):
    """A time limit was reached; not an Exception, so that no user code swallows it."""


@contextmanager
def user_code(
    who: str, signals: Signals, imported: ImportChanges | None = None, *, timeout: float = 0
) -> Iterator[None]:
    """Run a block of a user's code; `who` names it in the message if it has to be ended by force.

    SIGTERM and Ctrl-C raise StopRequested in it at once; after `timeout` seconds (0: never) TookTooLong is raised.
    Both are raised again until the block ends, and after SECONDS_TO_INTERRUPT the process ends: a call into C that
    never returns can be left in no other way. (One that holds Python's lock all the time cannot be left at all.)

    Afterwards the settings of the process and of torch are as before. The block starts with the changes of `imported`,
    if given. A process that the block forks and that leaves the block ends here.
    """
    process = os.getpid()
    with restoring_settings(), watching(who, signals, timeout), signals.acting_at_once(), restoring_alarm():
        if imported is not None:
            imported.apply()
        try:
            yield
        finally:
            if os.getpid() != process:
                os._exit(1)


# --- stopping it ------------------------------------------------------------------------------------------------------


@contextmanager
def watching(who: str, signals: Signals, timeout: float) -> Iterator[None]:
    """Have a thread interrupt the block if it goes on for too long after a signal, or beyond `timeout` seconds.

    Outside the main thread there is no limit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    adopt_orphans()
    watch = _Watch(who, signals, timeout)
    with handling({RING: watch.interrupt}):
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        outer = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        thread = threading.Thread(target=watch.run, args=(reader,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            watch.over = True
            signal.set_wakeup_fd(outer)
            os.write(writer, b"\0")
            thread.join()
            os.close(reader)
            os.close(writer)


class _Watch:
    """The thread that waits for signals or the end of the time, then interrupts the main thread until it leaves."""

    def __init__(self, who: str, signals: Signals, timeout: float):
        self.who, self.signals, self.timeout = who, signals, timeout
        self.over = False
        self.stop_signal: int | None = None  # the signal that the block has to end for; RING at the time limit
        self.stop_time = math.inf
        self.next_ring = time.monotonic() + timeout if timeout else math.inf

    def interrupt(self, number: int, frame: object) -> None:
        """In the main thread: leave the block."""
        if self.over or self.stop_signal is None:
            return
        raise TookTooLong if self.stop_signal == RING else StopRequested(self.stop_signal)

    def run(self, reader: int) -> None:
        """In the thread: read the numbers of signals as they come, and interrupt when it is time."""
        while not self.over:
            left = None if self.next_ring == math.inf else max(0.0, self.next_ring - time.monotonic())
            numbers = os.read(reader, 512) if select.select([reader], [], [], left)[0] else b""
            signals = [number for number in numbers if number in STOP_SIGNALS]
            if signals and self.stop_signal in (None, RING):
                self._stop(signals[0])
                self.next_ring = self.stop_time + RING_AGAIN  # the signal's own handler comes first
            elif time.monotonic() >= self.next_ring and not self.over:
                if self.stop_signal is None:
                    self._stop(RING)
                if time.monotonic() - self.stop_time >= SECONDS_TO_INTERRUPT:
                    self._give_up()
                signal.pthread_kill(threading.main_thread().ident, RING)
                self.next_ring = time.monotonic() + RING_AGAIN

    def _stop(self, number: int) -> None:
        self.stop_signal, self.stop_time = number, time.monotonic()

    def _give_up(self) -> None:
        """End the process, after saving the state if there is any: its main thread does not return."""
        saved = False
        with contextlib.suppress(Exception):  # the last saved state stays
            saved = self.signals.save()
        if self.stop_signal == RING:
            message = f"error: {too_slow(self.who, self.timeout, 'and cannot be interrupted')}"
        else:
            message = (
                f"interrupted; {self.who} does not return{', state saved' if saved else ''}; run the command again"
            )
        with contextlib.suppress(OSError, ValueError):
            print(message, file=sys.stderr, flush=True)
        end_children()
        os._exit(RewardError.exit_code if self.stop_signal == RING else 128 + self.stop_signal)


def too_slow(who: str, timeout: float, more: str) -> RewardError:
    """The error for a function that ran into its time limit."""
    return RewardError(
        f"it took longer than {timeout:g} {'second' if timeout == 1 else 'seconds'} {more}",
        where=who,
        fix="fix the function, or raise --reward-timeout",
    )
