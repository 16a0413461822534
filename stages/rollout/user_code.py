"""Runs code that is not ours, such as a reward function: it may be stopped, and leaves no trace in the process."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from stages.errors import RewardError, StopRequested
from stages.rollout.descriptors import Descriptor, kept_descriptors
from stages.rollout.settings import World, kept_settings, no_alarm_left
from stages.training.children import adopt_orphans, end_children
from stages.training.signals import ASKING, Signals, handling

RING = signal.SIGURG  # what the watching thread interrupts with: ignored by default, and hardly ever used
RING_AGAIN = 2.0  # seconds between two attempts to interrupt: cleaning up may wait for what hangs
LOOK_UP = 1.0  # seconds after which the watching thread looks whether what it waits for can still come
PATIENCE = 10.0  # seconds of such attempts before the process ends without its main thread's consent


class TookTooLong(BaseException):
    """A time limit was reached; not an Exception, so that no user code swallows it."""


class ClosedFiles(RewardError):
    """The code closed, or replaced, files that are not its own."""

    def __init__(self, who: str):
        super().__init__(
            "it closed files that it has not opened", where=who, fix="close only what the function itself has opened"
        )


@contextmanager
def user_code(who: str, signals: Signals, world: World | None = None, *, timeout: float = 0) -> Iterator[None]:
    """Run a block of code that is not ours; `who` names it where it has to be ended by force.

    SIGTERM and Ctrl-C raise StopRequested in it at once; after `timeout` seconds (0: never) TookTooLong is raised.
    Both are raised again while the block does not end, and after PATIENCE the process ends: a call into C that never
    returns can be left in no other way. (One that holds Python's lock all the time cannot be left at all.)

    Afterwards the settings of the process, and torch's, are what they were; its standard descriptors lead where they
    did, and ClosedFiles is raised where the block closed other files of ours. With a `world` the block starts from it.
    A process that the block forks and that comes out of it ends here.
    """
    process = os.getpid()
    with (
        kept_descriptors(),
        kept_settings(),
        watching(who, signals, timeout),
        signals.acting_at_once(),
        no_alarm_left(),
    ):
        for change, value in world.changes if world else ():
            with contextlib.suppress(Exception):
                change(value)
        try:
            yield
        finally:
            if os.getpid() != process:
                os._exit(1)


# --- stopping it ------------------------------------------------------------------------------------------------------


@contextmanager
def watching(who: str, signals: Signals, timeout: float) -> Iterator[None]:
    """Let a thread interrupt the main thread where it stays in the block for too long, after a signal or by `timeout`.

    Outside the main thread, and where the system has no such signals, there is no limit.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "pthread_kill"):
        yield
        return
    adopt_orphans()
    watch = _Watch(who, signals, timeout)
    with handling({RING: watch.interrupt}):
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        pipe = Descriptor(reader), Descriptor(writer)
        outer = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        thread = threading.Thread(target=watch.run, args=(pipe[0],), daemon=True)
        thread.start()
        try:
            yield
        finally:
            watch.over = True
            try:
                signal.set_wakeup_fd(outer)
            except (OSError, ValueError):  # the block closed it
                signal.set_wakeup_fd(-1)
            intact = all(end.intact() for end in pipe)
            if intact:
                os.write(writer, b"\0")
            thread.join()
            for end in pipe:
                end.close()
        if not intact:
            raise ClosedFiles(who)


class _Watch:
    def __init__(self, who: str, signals: Signals, timeout: float):
        self.who, self.signals, self.timeout = who, signals, timeout
        self.over = False
        self.asked: int | None = None  # the signal that asks the block to end; RING: its time is up
        self.began = time.monotonic()

    def interrupt(self, number: int, frame: object) -> None:
        """In the main thread: leave the block."""
        if self.over or self.asked is None:
            return
        raise TookTooLong if self.asked == RING else StopRequested(self.asked)

    def run(self, reader: Descriptor) -> None:
        """In the thread: read the numbers of signals as they come, and a zero at the end."""
        began = self.began
        while not self.over:
            wait = RING_AGAIN if self.asked else self._left()
            numbers = self._read(reader, wait)
            if self.over or 0 in numbers:
                return
            if numbers:
                came = next((number for number in numbers if number in ASKING), None)
                if came is not None and self.asked in (None, RING):
                    self.asked, began = came, time.monotonic()
            elif self.asked is None:
                self.asked, began = RING, time.monotonic()
                self._ring()
            elif time.monotonic() - began < PATIENCE:
                self._ring()
            elif not self.over:
                self._give_up()

    def _read(self, reader: Descriptor, seconds: float | None) -> bytes:
        """What comes within so many seconds (None: ever); the block may have closed `reader`, and then nothing does."""
        until = float("inf") if seconds is None else time.monotonic() + seconds
        while not self.over:
            left = max(0.0, min(LOOK_UP, until - time.monotonic()))
            lost = not reader.intact()
            if not lost:
                with contextlib.suppress(OSError, ValueError):
                    if select.select([reader.number], [], [], left)[0] and reader.intact():
                        if numbers := os.read(reader.number, 512):
                            return numbers
                        lost = True
            if time.monotonic() >= until:
                return b""
            if lost:
                time.sleep(min(left, 0.05))
        return b""

    def _left(self) -> float | None:
        return max(0.0, self.began + self.timeout - time.monotonic()) if self.timeout else None

    def _ring(self) -> None:
        signal.pthread_kill(threading.main_thread().ident, RING)

    def _give_up(self) -> None:
        """End the process, state saved where there is any: its main thread does not come back."""
        saved = False
        with contextlib.suppress(Exception):  # what was saved last stays
            saved = self.signals.save()
        if self.asked == RING:
            told = f"error: {too_slow(self.who, self.timeout, 'and cannot be interrupted')}"
        else:
            told = f"interrupted; {self.who} does not return{', state saved' if saved else ''}; run the command again"
        with contextlib.suppress(OSError, ValueError):
            print(told, file=sys.stderr, flush=True)
        end_children()
        os._exit(RewardError.exit_code if self.asked == RING else 128 + self.asked)


def too_slow(who: str, timeout: float, more: str) -> RewardError:
    """The error for a function that ran into its time limit."""
    return RewardError(
        f"it took longer than {timeout:g} seconds {more}",
        where=who,
        fix="mend the function, or give it longer with --reward-timeout",
    )
