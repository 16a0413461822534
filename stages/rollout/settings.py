"""Settings of the process and of torch that a user's code may change: read before it runs, and put back afterwards."""

from __future__ import annotations

import contextlib
import locale
import os
import signal
import sys
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
            if (new := setting.read()) != old:
                imported.changes.append((setting, new))


@contextmanager
def restoring_settings() -> Iterator[None]:
    """Put the settings of the process and of torch back after the block."""
    before = _read([HANDLERS, *CARRIED])
    had_torch = "torch" in sys.modules
    try:
        yield
    finally:
        for setting, value in [*before, *_initial_torch(had_torch)]:
            with contextlib.suppress(Exception):  # such as a working directory that the block has removed
                if setting.read() != value:
                    setting.write(value)


@contextmanager
def restoring_alarm() -> Iterator[None]:
    """Put the process's alarm back, so that one that the block has set does not ring in code of ours."""
    before = signal.getitimer(signal.ITIMER_REAL)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *before)


def _read(settings: list[Setting]) -> Values:
    return [(s, s.read()) for s in settings + (_torch_settings() if "torch" in sys.modules else [])]


def _initial_torch(had_torch: bool) -> Values:
    """Torch's settings as they were right after its import, if the block was the first to import it."""
    first_import = "torch" in sys.modules and not had_torch
    return [(s, s.initial) for s in _torch_settings() if s.initial is not None] if first_import else []


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


def _handlers() -> dict[int, Any]:
    return {number: signal.getsignal(number) for number in signal.valid_signals()}


def _set_handlers(value: dict[int, Any]) -> None:
    for number, handler in value.items():
        if handler is not None and signal.getsignal(number) != handler:
            signal.signal(number, handler)


HANDLERS = Setting(_handlers, _set_handlers)  # the process's own at the start of every call
# Changes that importing a file makes to these last for the calls of its functions:
CARRIED = [
    Setting(_working_directory, os.chdir),
    Setting(lambda: dict(os.environ), _set_environment),
    Setting(lambda: list(sys.path), _set_path),
    Setting(lambda: list(warnings.filters), _set_filters),  # type: ignore[attr-defined]
    Setting(partial(locale.setlocale, locale.LC_ALL), partial(locale.setlocale, locale.LC_ALL)),
    Setting(sys.getrecursionlimit, sys.setrecursionlimit),
]


def _torch_settings() -> list[Setting]:
    import torch

    cudnn, attention = torch.backends.cudnn, torch.backends.cuda

    def deterministic() -> tuple[bool, bool]:
        return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()

    def set_device(name: str) -> None:
        torch.set_default_device(None if name == "cpu" else name)

    settings = [
        Setting(lambda: str(torch.empty(0).device), set_device, "cpu"),
        Setting(torch.get_default_dtype, torch.set_default_dtype, torch.float32),
        Setting(torch.is_grad_enabled, torch.set_grad_enabled, True),
        Setting(deterministic, lambda on: torch.use_deterministic_algorithms(on[0], warn_only=on[1]), (False, False)),
        Setting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"),
        Setting(torch.get_num_threads, torch.set_num_threads),
    ]
    for name in ("enabled", "benchmark", "deterministic"):
        settings.append(Setting(partial(getattr, cudnn, name), partial(setattr, cudnn, name)))
    for kind in ("flash", "mem_efficient", "math"):
        settings.append(Setting(getattr(attention, f"{kind}_sdp_enabled"), getattr(attention, f"enable_{kind}_sdp")))
    if torch.cuda.is_initialized():
        settings.append(Setting(torch.cuda.current_device, torch.cuda.set_device))
    return settings
