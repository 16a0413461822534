"""The process around a command: how it starts, loads what is heavy, and ends."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import sys
from types import ModuleType

import typer

from rlhf_cli.console import is_terminal

SETTINGS = {  # libraries that talk unasked, and torch; whoever set one of these is left in peace
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "DATASETS_VERBOSITY": "error",
    "THP_MEM_ALLOC_ENABLE": "1",  # torch's tensors in large pages of memory: fewer faults, some per cent of the time
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin while they wait cost others on a shared machine a factor of 8
}
QUIET_PIPED = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}


class App(typer.Typer):
    """A Typer app that, called without arguments, is the program: it ends the process itself."""

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Run a command line and leave; with arguments, behave like any Typer app."""
        if args or kwargs:
            return super().__call__(*args, **kwargs)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(AttributeError, ValueError):
                stream.reconfigure(errors="backslashreplace")  # a name that the locale cannot write is no defect
        try:
            code = super().__call__()
        except SystemExit as end:
            code = end.code
        return leave(code if isinstance(code, int) else int(code is not None))


def leave(code: int) -> None:
    """End the process at once: tearing down an interpreter that has loaded torch takes a second and frees nothing."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code)


def load(name: str) -> ModuleType:
    """Import `stages.<name>` and all that it needs, with quiet libraries.

    The garbage collector rests meanwhile: imports make a million lasting objects, and walking them over and over
    costs a fifth of the time.
    """
    for key, value in (SETTINGS if is_terminal(sys.stderr) else SETTINGS | QUIET_PIPED).items():
        os.environ.setdefault(key, value)
    collecting = gc.isenabled()
    gc.disable()
    try:
        return importlib.import_module(f"stages.{name}")
    finally:
        if collecting:
            gc.enable()
