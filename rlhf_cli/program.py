"""The process of a command: its streams, the import of heavy modules, and its end."""

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

SETTINGS = {  # for quiet libraries and for torch; variables that the user has set are not changed
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "DATASETS_VERBOSITY": "error",
    "THP_MEM_ALLOC_ENABLE": "1",  # torch uses large memory pages: fewer page faults, a few per cent less time
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin while waiting slow a shared machine down by a factor of up to 8
}
QUIET_PIPED = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}


class App(typer.Typer):
    """A Typer app that, called without arguments, runs as the program and ends the process itself."""

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Run the command line and end the process; with arguments, behave like any Typer app."""
        if args or kwargs:
            return super().__call__(*args, **kwargs)
        open_streams()
        with contextlib.ExitStack() as _Process.at_end:
            _Process.at_end.callback(setattr, _Process, "at_end", None)
            try:
                code = super().__call__()
            except SystemExit as end:
                code = end.code
            except OSError as error:  # of --help and --version; commands handle those of their results
                code = unprintable(error, "the answer")
            return leave(code if isinstance(code, int) else int(code is not None))


class _Process:
    at_end: contextlib.ExitStack | None = None  # of the program; None if the process is not ours, as in a test


class Lenient(io.FileIO):
    """A file that ignores write errors, such as a closed pipe or a full disk."""

    def write(self, data: object) -> int:
        """Write what can be written; returns the length of all data."""
        try:
            return super().write(data)
        except OSError:
            return len(memoryview(data))


def open_streams() -> None:
    """Make the standard streams usable, even if the process was started with closed ones.

    A closed stream is opened on /dev/null; otherwise the next opened file would get its number, and the output that
    libraries write to it. Results on a closed stdout fail, as they should; messages on stderr never fail.
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
        sys.stdout.reconfigure(errors="backslashreplace")  # for names that the locale cannot encode


@contextlib.contextmanager
def stdout_for_results() -> Iterator[TextIO]:
    """A private stream to stdout: within the block, what Python, C or child processes write to stdout goes to stderr.

    The block's stream is sys.stdout itself if that is not the process's stdout, as in a test. If the process ends with
    the command, stdout is restored only at its end, since other threads may still write.
    """
    outer = sys.stdout
    with contextlib.ExitStack() as here:
        at_end = _Process.at_end or here
        at_end.enter_context(contextlib.redirect_stdout(sys.stderr))
        if not _is_the_process_own(outer):
            yield outer
            return
        _flush(outer)
        stdout = os.dup(1)
        _private.add(stdout)
        os.dup2(2, 1)
        at_end.callback(_restore, outer, stdout)
        stream = open(stdout, "w", encoding=outer.encoding, errors=outer.errors, closefd=False)  # noqa: SIM115
        try:
            yield stream
        finally:
            with contextlib.suppress(OSError, ValueError):
                stream.close()
            _flush_all(outer)


def _restore(outer: TextIO, stdout: int) -> None:
    """Make `stdout` the process's stdout again, after output that is still in buffers has gone to stderr."""
    _flush_all(outer)
    os.dup2(stdout, 1)
    _private.discard(stdout)
    os.close(stdout)


def _flush_all(stream: TextIO) -> None:
    import ctypes  # only now, to start faster

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


_private: set[int] = set()  # handles of stdout that no child may keep: its reader waits until all are closed


def _close_private() -> None:
    for handle in _private:
        with contextlib.suppress(OSError):
            os.close(handle)


os.register_at_fork(after_in_child=_close_private)


def unprintable(error: OSError, what: str) -> int:
    """The exit code if `what` cannot be printed: 0 for a closed pipe, else 2 with a message."""
    if isinstance(error, BrokenPipeError):
        return 0
    say(f"error: {what} cannot be printed: {error.strerror or error}\n  -> check where stdout is redirected to")
    return 2


def leave(code: int) -> None:
    """End the process immediately: finalising an interpreter that has loaded torch takes a second and frees nothing.

    Child processes end too, except those in a session of their own.
    """
    children = sys.modules.get("stages.training.children")
    if children is not None:
        children.end_children()
    for stream in (sys.stdout, sys.stderr):
        _flush(stream)
    os._exit(code)


def load(name: str) -> ModuleType:
    """Import `stages.<name>` and all that it needs, with quiet libraries.

    The garbage collector is off meanwhile: imports make a million lasting objects, and scanning them repeatedly takes a
    fifth of the time.
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
