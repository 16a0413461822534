"""Settings of the process and of torch that a user's code may change: read before it runs, and put back afterwards."""

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
from functools import partial
from typing import Any


@dataclass(frozen=True)
class Setting:
    """How one setting is read and written."""

    read: Callable[[], Any]
    write: Callable[[Any], object]
    initial: Any = None  # of torch: the value right after its import, if that is the same on every machine


Values = list[tuple[Setting, Any]]


@dataclass
class ImportChanges:
    """The settings that importing a file changed; the file's functions run with them, and no other code does."""

    changes: Values = field(default_factory=list)

    def apply(self) -> None:
        for setting, value in self.changes:
            with contextlib.suppress(Exception):
                setting.write(value)


@contextmanager
def recording_changes(imported: ImportChanges) -> Iterator[None]:
    """Add to `imported` the settings that the block changes; it runs within `user_code`."""
    before = _read(CARRIED)
    had_torch = "torch" in sys.modules
    try:
        yield
    finally:
        for setting, old in [*before, *_initial_torch(had_torch)]:
            with contextlib.suppress(Exception):  # a torch mode that the block has not left may raise here
                if (new := setting.read()) != old:
                    imported.changes.append((setting, new))


@contextmanager
def restoring_settings() -> Iterator[None]:
    """Put the settings of the process and of torch back after the block."""
    before = _read(PROCESS + CARRIED)
    had_torch = "torch" in sys.modules
    try:
        with _restoring_inference_mode() if had_torch else contextlib.nullcontext():
            yield
    finally:
        if "torch" in sys.modules:
            with contextlib.suppress(Exception):  # another version of torch may lack these private names
                _leave_torch_modes()
        for setting, value in [*before, *_initial_torch(had_torch)]:
            for _ in range(2):  # the block's own handler of a signal that arrives right now may raise here, once
                with contextlib.suppress(Exception):
                    if setting.read() != value:
                        setting.write(value)
                    break


@contextmanager
def restoring_alarm() -> Iterator[None]:
    """Put the process's alarm back, so that one that the block has set does not ring in code of ours."""
    before = signal.getitimer(signal.ITIMER_REAL)
    try:
        yield
    finally:
        for _ in range(2):
            with contextlib.suppress(BaseException):  # it may ring right now
                signal.setitimer(signal.ITIMER_REAL, *before)


def _read(settings: list[Setting]) -> Values:
    return [(s, s.read()) for s in settings + (_torch_settings() if "torch" in sys.modules else [])]


def _initial_torch(had_torch: bool) -> Values:
    """Torch's settings as they were right after its import, if the block was the first to import it."""
    first_import = "torch" in sys.modules and not had_torch
    return [(s, s.initial) for s in _torch_settings() if s.initial is not None] if first_import else []


def _attribute(owner: object, name: str) -> Setting:
    return Setting(partial(getattr, owner, name), partial(setattr, owner, name))


def _working_directory() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # it was removed
        return None


def _set_path(value: list[str]) -> None:
    sys.path[:] = value


def _set_filters(value: list[Any]) -> None:
    warnings.resetwarnings()  # also clears what Python caches of the filters
    warnings.filters.extend(value)  # type: ignore[attr-defined]


def _set_environment(value: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(value)


def read_umask() -> int:
    """Permissions that new files of this process do not get; the system returns them only when they are changed."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _handlers() -> dict[int, Any]:
    return {number: signal.getsignal(number) for number in signal.valid_signals()}


def _set_handlers(value: dict[int, Any]) -> None:
    for number, handler in value.items():
        if handler is not None and signal.getsignal(number) != handler:
            signal.signal(number, handler)


# Changes that importing a file makes to these last for the calls of its functions:
CARRIED = [
    Setting(_working_directory, os.chdir),
    Setting(lambda: dict(os.environ), _set_environment),
    Setting(lambda: list(sys.path), _set_path),
    Setting(lambda: list(warnings.filters), _set_filters),  # type: ignore[attr-defined]
    Setting(partial(locale.setlocale, locale.LC_ALL), partial(locale.setlocale, locale.LC_ALL)),
    Setting(sys.getrecursionlimit, sys.setrecursionlimit),
]
# These are the process's own at the start of every call:
PROCESS = [
    Setting(_handlers, _set_handlers),
    Setting(read_umask, os.umask),
    Setting(gc.isenabled, lambda on: gc.enable() if on else gc.disable()),
    *(_attribute(sys, name) for name in ("stdin", "stdout", "stderr", "excepthook", "unraisablehook")),
    _attribute(threading, "excepthook"),
]


def _torch_settings() -> list[Setting]:
    import torch

    cudnn, attention = torch.backends.cudnn, torch.backends.cuda

    def set_device(name: str) -> None:
        torch.set_default_device(None if name == "cpu" else name)
        if torch.empty(0).device.type == "cuda" and name == "cpu":  # set_default_tensor_type overrides the above
            torch.set_default_tensor_type(torch.FloatTensor)

    def deterministic() -> tuple[bool, bool]:
        return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()

    settings = [
        Setting(lambda: str(torch.empty(0).device), set_device, "cpu"),
        Setting(torch.get_default_dtype, torch.set_default_dtype, torch.float32),
        Setting(torch.is_grad_enabled, torch.set_grad_enabled, True),
        Setting(torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly, False),
        Setting(deterministic, lambda on: torch.use_deterministic_algorithms(on[0], warn_only=on[1]), (False, False)),
        Setting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"),
        Setting(torch.get_num_threads, torch.set_num_threads),
        *(_attribute(cudnn, name) for name in ("enabled", "benchmark", "deterministic")),
    ]
    for kind in ("flash", "mem_efficient", "math"):
        settings.append(Setting(getattr(attention, f"{kind}_sdp_enabled"), getattr(attention, f"enable_{kind}_sdp")))
    for device in ("cpu", "cuda"):
        enabled, dtype = partial(torch.is_autocast_enabled, device), partial(torch.get_autocast_dtype, device)
        settings.append(Setting(enabled, partial(torch.set_autocast_enabled, device), False))
        settings.append(Setting(dtype, partial(torch.set_autocast_dtype, device)))
    if torch.cuda.is_initialized():
        settings.append(Setting(torch.cuda.current_device, torch.cuda.set_device))
    return settings


def _restoring_inference_mode() -> contextlib.AbstractContextManager:
    """Restores torch's inference mode at its end, which has no function that sets it."""
    import torch

    return torch.inference_mode(torch.is_inference_mode_enabled())


def _leave_torch_modes() -> None:
    """Leave every function and dispatch mode; each would see, or change, all that we compute. We enter none ourselves.

    A default device is a function mode too, which torch also notes in two places of its own.
    """
    import torch
    from torch import overrides
    from torch.utils import _device, _python_dispatch

    while torch._C._len_torch_dispatch_stack():  # this exit also resets torch's flags of the modes that are on
        _python_dispatch.TorchDispatchMode.__exit__(_python_dispatch._get_current_dispatch_mode(), None, None, None)
    while torch._C._len_torch_function_stack():
        overrides._pop_mode()
    torch._GLOBAL_DEVICE_CONTEXT.device_context = _device.CURRENT_DEVICE = None
