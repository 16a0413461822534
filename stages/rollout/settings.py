"""Settings of the process and of torch that code which is not ours may change: read, kept, and put back."""

from __future__ import annotations

import contextlib
import gc
import locale
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from stages.rollout.descriptors import Descriptor

Setting = tuple[Callable[[], object], Callable[[object], object]]  # how it is read, and how it is set


@dataclass
class World:
    """What importing a file changed in the process's settings: its functions find it so, and nobody else does."""

    changes: list[tuple[Callable[[object], object], object]] = field(default_factory=list)  # a setter and its value


@contextmanager
def noting_changes(world: World) -> Iterator[None]:
    """Write down which settings the block changes; it runs within `user_code`."""
    had_torch = "torch" in sys.modules
    before = [read() for read, _ in [*CARRIED, *(_torch_settings() if had_torch else [])]]
    environment = dict(os.environ)
    try:
        yield
    finally:
        has_torch = "torch" in sys.modules
        after = [*CARRIED, *(_torch_settings() if has_torch else [])]
        before += _torch_defaults() if has_torch and not had_torch else ()
        for (read, put), old in zip(after, before, strict=False):  # of torch, there may be more or fewer than before
            with contextlib.suppress(Exception):  # a mode of torch's that the block has not left may raise in here
                if (now := read()) != old:
                    world.changes.append((put, now))
        changed = {name: os.environ.get(name) for name in {*environment, *os.environ}}
        world.changes.append((_update_environment, {n: v for n, v in changed.items() if environment.get(n) != v}))


def _update_environment(changed: dict[str, str | None]) -> None:
    for name, value in changed.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextmanager
def kept_settings() -> Iterator[None]:
    """Put the settings of the process and of torch back after the block."""
    place = _open_working_directory()
    had_torch = "torch" in sys.modules
    settings = [*PROCESS, *CARRIED, *(_torch_settings() if had_torch else [])]
    kept = [(read, put, read()) for read, put in settings]
    try:
        with warnings.catch_warnings(), _kept_autograd(had_torch), _kept_modes(had_torch):
            yield
    finally:
        if place is not None and place.intact():
            with contextlib.suppress(OSError):
                os.fchdir(place.number)
            place.close()
        for read, put, value in kept:
            _put_back(read, put, value)
        if not had_torch and "torch" in sys.modules:  # first imported within: what it begins with is known
            for (read, put), value in zip(_torch_settings(), _torch_defaults(), strict=False):
                _put_back(read, put, value)


def _put_back(read: Callable[[], object], put: Callable[[object], object], value: object) -> None:
    for _ in range(2):  # the block's own handler of a signal that is just coming may raise in here, once
        with contextlib.suppress(Exception):
            if read() != value:
                put(value)
            return


@contextmanager
def no_alarm_left() -> Iterator[None]:
    """Turn off an alarm that the block set, before its handler, or the system's, meets code of ours."""
    handler, (left, _) = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)
    try:
        yield
    finally:
        for _ in range(2):
            with contextlib.suppress(BaseException):  # it rang just now
                if not left or signal.getsignal(signal.SIGALRM) != handler:
                    signal.setitimer(signal.ITIMER_REAL, 0)


def _open_working_directory() -> Descriptor | None:
    try:
        return Descriptor(os.open(".", os.O_RDONLY))
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


def read_umask() -> int:
    """Permissions that new files of this process do not get; the system tells only while they are changed."""
    now = os.umask(0o022)
    os.umask(now)
    return now


def _streams() -> tuple:
    return sys.stdin, sys.stdout, sys.stderr, sys.__stdin__, sys.__stdout__, sys.__stderr__


def _set_streams(value: object) -> None:
    sys.stdin, sys.stdout, sys.stderr, sys.__stdin__, sys.__stdout__, sys.__stderr__ = value  # type: ignore


def _hooks() -> tuple:
    return sys.excepthook, threading.excepthook, sys.unraisablehook


def _set_hooks(value: object) -> None:
    sys.excepthook, threading.excepthook, sys.unraisablehook = value  # type: ignore[misc]


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
    (_hooks, _set_hooks),
    (read_umask, os.umask),
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


@contextmanager
def _kept_modes(had_torch: bool) -> Iterator[None]:
    """Take off torch's modes that the block entered and did not leave; each would see, or change, all that we compute.

    Other versions of torch may have no such stacks, or call them otherwise; their modes stay.
    """
    functions, dispatches, device = (*_mode_depths(), _context_device()) if had_torch else (0, 0, None)
    try:
        yield
    finally:
        if "torch" in sys.modules:
            with contextlib.suppress(Exception):
                _leave_dispatch_modes(dispatches)
            with contextlib.suppress(Exception):
                _leave_function_modes(functions, device)


def _mode_depths() -> tuple[int, int]:
    import torch

    found = (getattr(torch._C, f"_len_torch_{kind}_stack", None) for kind in ("function", "dispatch"))
    functions, dispatches = (depth() if depth else 0 for depth in found)
    return functions, dispatches


def _leave_dispatch_modes(depth: int) -> None:
    from torch.utils import _python_dispatch as modes

    for _ in range(_mode_depths()[1] - depth):
        now = _mode_depths()[1]
        with contextlib.suppress(Exception):  # this also puts back what torch notes of the modes that are on
            modes.TorchDispatchMode.__exit__(modes._get_current_dispatch_mode(), None, None, None)
        if _mode_depths()[1] == now and hasattr(modes, "_pop_mode"):
            modes._pop_mode()


def _leave_function_modes(depth: int, device: object) -> None:
    import torch
    from torch import overrides

    left = _mode_depths()[0] - depth
    if left <= 0 or not hasattr(overrides, "_pop_mode"):
        return
    for _ in range(left):
        overrides._pop_mode()
    lasting = getattr(getattr(torch, "_GLOBAL_DEVICE_CONTEXT", None), "device_context", None)
    if depth == 0:
        if lasting is not None:  # of torch.set_default_device, which expects to find its own mode
            overrides._push_mode(lasting)
            torch.set_default_device(None)
        if "torch.utils._device" in sys.modules:
            sys.modules["torch.utils._device"].CURRENT_DEVICE = device


def _context_device() -> object:
    """What torch notes of the device that a mode has set; None where there is none."""
    return getattr(sys.modules.get("torch.utils._device"), "CURRENT_DEVICE", None)
