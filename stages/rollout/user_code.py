"""Runs code that is not ours, such as a reward function: it may be stopped, and leaves no trace in the process."""

from __future__ import annotations

import contextlib
import gc
import locale
import os
import select
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from stages.errors import RewardError, StopRequested
from stages.training import signals
from stages.training.children import adopt_orphans, end_children

RING = signal.SIGURG  # what the watching thread interrupts with: ignored by default, and hardly ever used
RING_AGAIN = 2.0  # seconds between two attempts to interrupt: cleaning up may wait for what hangs
PATIENCE = 10.0  # seconds of such attempts before the process ends without its main thread's consent


Setting = tuple[Callable[[], object], Callable[[object], object]]  # how it is read, and how it is set


class TookTooLong(BaseException):
    """A time limit was reached; not an Exception, so that no user code swallows it."""


@dataclass
class World:
    """What importing a file changed in the process's settings: its functions find it so, and nobody else does."""

    changes: list[tuple[Callable[[object], object], object]] = field(default_factory=list)  # a setter and its value


@contextmanager
def user_code(who: str, world: World | None = None, *, timeout: float = 0) -> Iterator[None]:
    """Run a block of code that is not ours; `who` names it where it has to be ended by force.

    SIGTERM and Ctrl-C raise StopRequested in it at once; after `timeout` seconds (0: never) TookTooLong is raised.
    Both are raised again while the block does not end, and after PATIENCE the process ends: a call into C that never
    returns can be left in no other way. (One that holds Python's lock all the time cannot be left at all.)

    Afterwards the settings of the process, and torch's, are what they were. With a `world` the block starts from it.
    A process that the block forks and that comes out of it ends here.
    """
    process = os.getpid()
    with signals.acting_at_once(), _kept_settings(), watching(who, timeout):
        for change, value in world.changes if world else ():
            with contextlib.suppress(Exception):
                change(value)
        try:
            yield
        finally:
            if os.getpid() != process:
                os._exit(1)


@contextmanager
def noting_changes(world: World) -> Iterator[None]:
    """Write down which settings the block changes; it runs within `user_code`."""
    before = [read() for read, _ in CARRIED]
    environment = dict(os.environ)
    try:
        yield
    finally:
        world.changes += [
            (put, now) for (read, put), old in zip(CARRIED, before, strict=True) if (now := read()) != old
        ]
        changed = {name: os.environ.get(name) for name in {*environment, *os.environ}}
        world.changes.append((_update_environment, {n: v for n, v in changed.items() if environment.get(n) != v}))


def _update_environment(changed: dict[str, str | None]) -> None:
    for name, value in changed.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


# --- stopping it ------------------------------------------------------------------------------------------------------


@contextmanager
def watching(who: str, timeout: float) -> Iterator[None]:
    """Let a thread interrupt the main thread where it stays in the block for too long, after a signal or by `timeout`.

    Outside the main thread, and where the system has no such signals, there is no limit.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "pthread_kill"):
        yield
        return
    adopt_orphans()
    watch = _Watch(who, timeout)
    with signals.handling({RING: watch.interrupt}):
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
    def __init__(self, who: str, timeout: float):
        self.who, self.timeout = who, timeout
        self.over = False
        self.asked: int | None = None  # the signal that asks the block to end; RING: its time is up
        self.began = time.monotonic()

    def interrupt(self, number: int, frame: object) -> None:
        """In the main thread: leave the block."""
        if self.over or self.asked is None:
            return
        raise TookTooLong if self.asked == RING else StopRequested(self.asked)

    def run(self, reader: int) -> None:
        """In the thread: read the numbers of signals as they come, and a zero at the end."""
        began = self.began
        while not self.over:
            wait = RING_AGAIN if self.asked else self._left()
            if select.select([reader], [], [], wait)[0]:
                numbers = os.read(reader, 512)
                if 0 in numbers:
                    return
                came = next((number for number in numbers if number in signals.ASKING), None)
                if came is not None and self.asked in (None, RING):
                    self.asked, began = came, time.monotonic()
            elif self.asked is None:
                self.asked, began = RING, time.monotonic()
                self._ring()
            elif time.monotonic() - began < PATIENCE:
                self._ring()
            elif not self.over:
                self._give_up()

    def _left(self) -> float | None:
        return max(0.0, self.began + self.timeout - time.monotonic()) if self.timeout else None

    def _ring(self) -> None:
        signal.pthread_kill(threading.main_thread().ident, RING)

    def _give_up(self) -> None:
        """End the process, state saved where there is any: its main thread does not come back."""
        saved = False
        with contextlib.suppress(Exception):  # what was saved last stays
            saved = signals.save()
        if self.asked == RING:
            told = f"error: {too_slow(self.who, self.timeout, 'and cannot be interrupted')}"
        else:
            told = f"interrupted; {self.who} does not return{', state saved' if saved else ''}; run the command again"
        with contextlib.suppress(OSError, ValueError):
            print(told, file=sys.stderr, flush=True)
        end_children(all_of_them=True)
        os._exit(RewardError.exit_code if self.asked == RING else 128 + self.asked)


def too_slow(who: str, timeout: float, more: str) -> RewardError:
    """The error for a function that ran into its time limit."""
    return RewardError(
        f"it took longer than {timeout:g} seconds {more}",
        where=who,
        fix="mend the function, or give it longer with --reward-timeout",
    )


# --- putting everything back ------------------------------------------------------------------------------------------


@contextmanager
def _kept_settings() -> Iterator[None]:
    """Put the settings of the process and of torch back after the block."""
    place = _open_working_directory()
    had_torch = "torch" in sys.modules
    settings = [*PROCESS, *CARRIED, *(_torch_settings() if had_torch else [])]
    kept = [(read, put, read()) for read, put in settings]
    try:
        with warnings.catch_warnings(), _kept_autograd(had_torch):
            yield
    finally:
        if place is not None:
            with contextlib.suppress(OSError):
                os.fchdir(place)
            os.close(place)
        for read, put, value in kept:
            _put_back(read, put, value)
        if not had_torch and "torch" in sys.modules:  # first imported within: what it begins with is known
            for (read, put), value in zip(_torch_settings(), _torch_defaults(), strict=False):
                _put_back(read, put, value)


def _put_back(read: Callable[[], object], put: Callable[[object], object], value: object) -> None:
    with contextlib.suppress(Exception):
        if read() != value:
            put(value)


def _open_working_directory() -> int | None:
    try:
        return os.open(".", os.O_RDONLY)
    except OSError:
        return None


def _working_directory() -> str | None:
    try:
        return os.getcwd()
    except OSError:
        return None


def _set_locale(value: object) -> None:
    locale.setlocale(locale.LC_ALL, value)  # type: ignore[arg-type]


def _set_path(value: object) -> None:
    sys.path[:] = value  # type: ignore[index]


def _set_filters(value: object) -> None:
    warnings.filters[:] = value  # type: ignore[index]
    warnings._filters_mutated() if hasattr(warnings, "_filters_mutated") else None


def _set_environment(value: object) -> None:
    os.environ.clear()
    os.environ.update(value)  # type: ignore[call-overload]


def _umask() -> int:
    now = os.umask(0o022)
    os.umask(now)
    return now


def _streams() -> tuple:
    return sys.stdin, sys.stdout, sys.stderr, sys.__stdin__, sys.__stdout__, sys.__stderr__


def _set_streams(value: object) -> None:
    sys.stdin, sys.stdout, sys.stderr, sys.__stdin__, sys.__stdout__, sys.__stderr__ = value  # type: ignore


def _handlers() -> dict[int, object]:
    return {number: signal.getsignal(number) for number in signal.valid_signals()}


def _set_handlers(value: object) -> None:
    for number, handler in value.items():  # type: ignore[attr-defined]
        if handler is not None and signal.getsignal(number) != handler:
            signal.signal(number, handler)


def _set_alarm(value: object) -> None:
    signal.setitimer(signal.ITIMER_REAL, *value)  # type: ignore[misc]


def _alarm() -> tuple[float, float]:
    left, interval = signal.getitimer(signal.ITIMER_REAL)
    return (0.0, 0.0) if not left else (_Alarm(left), interval)


class _Alarm(float):
    """Seconds that an alarm has left; they pass by themselves, so any two are equal."""

    def __eq__(self, other: object) -> bool:
        return bool(other)

    __hash__ = float.__hash__


# What the functions of a file find as importing it left it:
CARRIED: tuple[Setting, ...] = (
    (_working_directory, os.chdir),
    (lambda: list(sys.path), _set_path),
    (lambda: list(warnings.filters), _set_filters),
    (lambda: locale.setlocale(locale.LC_ALL), _set_locale),
    (sys.getrecursionlimit, sys.setrecursionlimit),
)
# What every call finds as we have it, but for the environment's changes:
PROCESS: tuple[Setting, ...] = (
    (_alarm, _set_alarm),
    (_handlers, _set_handlers),
    (lambda: dict(os.environ), _set_environment),
    (_streams, _set_streams),
    (_umask, os.umask),
    (gc.isenabled, lambda on: gc.enable() if on else gc.disable()),
)


def _torch_settings() -> list[Setting]:
    import torch

    cudnn, attention = torch.backends.cudnn, torch.backends.cuda

    def set_device(name: object) -> None:
        torch.set_default_device(None if name == "cpu" else name)
        if torch.empty(0).device.type == "cuda" and name == "cpu":  # an older way to set it outlasts the newer one
            torch.set_default_tensor_type(torch.FloatTensor)

    def deterministic() -> tuple[bool, bool]:
        return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()

    found: list[Setting] = [
        (lambda: str(torch.empty(0).device), set_device),
        (torch.get_default_dtype, torch.set_default_dtype),
        (torch.is_grad_enabled, torch.set_grad_enabled),
        (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
        (deterministic, lambda on: torch.use_deterministic_algorithms(on[0], warn_only=on[1])),
        (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
        (lambda: torch.is_autocast_enabled("cpu"), lambda on: torch.set_autocast_enabled("cpu", on)),
        (lambda: torch.is_autocast_enabled("cuda"), lambda on: torch.set_autocast_enabled("cuda", on)),
        (lambda: torch.get_autocast_dtype("cpu"), lambda dtype: torch.set_autocast_dtype("cpu", dtype)),
        (lambda: torch.get_autocast_dtype("cuda"), lambda dtype: torch.set_autocast_dtype("cuda", dtype)),
        (torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled),
        (attention.flash_sdp_enabled, attention.enable_flash_sdp),
        (attention.mem_efficient_sdp_enabled, attention.enable_mem_efficient_sdp),
        (attention.math_sdp_enabled, attention.enable_math_sdp),
        (lambda: cudnn.enabled, lambda on: setattr(cudnn, "enabled", on)),
        (lambda: cudnn.benchmark, lambda on: setattr(cudnn, "benchmark", on)),
        (lambda: cudnn.deterministic, lambda on: setattr(cudnn, "deterministic", on)),
        (torch.get_num_threads, torch.set_num_threads),
    ]
    if torch.cuda.is_initialized():
        found += [
            (torch.cuda.current_device, torch.cuda.set_device),
            (torch.cuda.current_stream, torch.cuda.set_stream),
        ]
    return found


def _torch_defaults() -> tuple[object, ...]:
    """What torch begins with, for the first of its settings; the others are left as importing a file made them."""
    import torch

    return "cpu", torch.float32, True, False, (False, False), "highest", False, False


_lasting: list[object] = []  # a mode that has to be held on to


@contextmanager
def _kept_autograd(had_torch: bool) -> Iterator[None]:
    """Put back torch's inference mode, which can only be left by whoever entered it, or gone around."""
    if not had_torch:
        yield
        if "torch" in sys.modules and (torch := sys.modules["torch"]).is_inference_mode_enabled():
            _lasting.append(torch.inference_mode(False))
            _lasting[-1].__enter__()
        return
    import torch

    recording = torch.is_grad_enabled()
    with torch.inference_mode(torch.is_inference_mode_enabled()), torch.set_grad_enabled(recording):
        yield
