"""The process around a command: how it starts, loads what is heavy, and ends."""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import os
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import TextIO

import typer

from rlhf_cli.console import is_terminal, say

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
        open_streams()
        with contextlib.ExitStack() as _Process.at_end:
            _Process.at_end.callback(setattr, _Process, "at_end", None)
            try:
                code = super().__call__()
            except SystemExit as end:
                code = end.code
            except OSError as error:  # of --help and --version: commands tell what became of their results themselves
                code = unprintable(error, "the answer")
            return leave(code if isinstance(code, int) else int(code is not None))


class _Process:
    at_end: contextlib.ExitStack | None = None  # of the program; None where the process is not its own, as in a test


class Lenient(io.FileIO):
    """A file that takes everything: what cannot be written, since nobody reads it or the disk is full, is dropped."""

    def write(self, data: object) -> int:
        """Write what can be written; returns the length of all."""
        try:
            return super().write(data)
        except OSError:
            return len(memoryview(data))


def open_streams() -> None:
    """Give the process standard streams that can be used, whatever it was started with.

    A stream that was closed is opened on nothing, for else the next file to be opened would take its number, and get
    what libraries write there; writing to a stdout that was closed fails as it should. Messages never fail.
    """
    for number, mode in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            nothing = os.open(os.devnull, mode)
            if nothing != number:
                os.dup2(nothing, number)
                os.close(nothing)
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115  as long as the process
    with contextlib.suppress(OSError, ValueError, AttributeError):
        encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
        file = io.BufferedWriter(Lenient(2, "w", closefd=False))
        sys.stderr = io.TextIOWrapper(file, encoding=encoding, errors="backslashreplace", line_buffering=True)
    with contextlib.suppress(AttributeError, ValueError):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the locale cannot write is no defect


@contextlib.contextmanager
def stdout_for_results() -> Iterator[TextIO]:
    """A stream to stdout that nobody else has: what Python, C or child processes write there meanwhile goes to stderr.

    The block's stream is sys.stdout itself where that is not the process's own, as in a test. Where the process ends
    with the command all is put back after it has: threads that are left may go on to write.
    """
    outer = sys.stdout
    with contextlib.ExitStack() as here:
        at_end = _Process.at_end or here
        at_end.enter_context(contextlib.redirect_stdout(sys.stderr))
        if not _is_the_process_own(outer):
            yield outer
            return
        _flush(outer)
        kept = os.dup(1)
        _private.add(kept)
        os.dup2(2, 1)
        at_end.callback(_put_back, outer, kept)
        stream = open(kept, "w", encoding=outer.encoding, errors=outer.errors, closefd=False)  # noqa: SIM115
        try:
            yield stream
        finally:
            with contextlib.suppress(OSError, ValueError):
                stream.close()
            _flush_all(outer)


def _put_back(outer: TextIO, kept: int) -> None:
    """Make `kept` the process's stdout again; what was written to it through a buffer meanwhile goes to stderr."""
    _flush_all(outer)
    os.dup2(kept, 1)
    _private.discard(kept)
    os.close(kept)


def _flush_all(stream: TextIO) -> None:
    """Have a stream, and C's own ones, write what they hold back."""
    import ctypes  # only now: it is no part of a quick answer

    _flush(stream)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).fflush(None)


def _is_the_process_own(stream: TextIO) -> bool:
    try:
        return stream.fileno() == 1
    except (OSError, ValueError, AttributeError):
        return False


def _flush(stream: TextIO) -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        stream.flush()


_private: set[int] = set()  # handles of stdout that no other process may hold: whoever reads it waits for its end


def _close_private() -> None:
    for handle in _private:
        with contextlib.suppress(OSError):
            os.close(handle)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_private)


def unprintable(error: OSError, what: str) -> int:
    """The exit code for something that cannot be printed: nothing is wrong where its reader has gone away."""
    if isinstance(error, BrokenPipeError):
        return 0
    say(f"error: {what} cannot be printed: {error.strerror or error}\n  -> see where stdout leads")
    return 2


def leave(code: int) -> None:
    """End the process at once: tearing down an interpreter that has loaded torch takes a second and frees nothing.

    Processes that were started on the way end too, but for those with a session of their own.
    """
    children = sys.modules.get("stages.training.children")
    if children is not None:
        children.end_children()
    for stream in (sys.stdout, sys.stderr):
        _flush(stream)
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
