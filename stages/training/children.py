"""Ends the processes that a reward function or a library started, so that none outlives the command."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import signal
import sys
import time
from pathlib import Path

SECONDS_TO_END = 1.0  # seconds that a process has to end after SIGTERM
ADOPT = 36  # Linux: PR_SET_CHILD_SUBREAPER


@functools.cache
def adopt_orphans() -> None:
    """Become the parent of descendants whose parents end, so that `descendants` finds them; only on Linux."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(ADOPT, 1, 0, 0, 0)


def end_children() -> None:
    """End every descendant of this process, and the workers of `multiprocessing`.

    A process in a session of its own was meant to stay, and does. The resource tracker of `multiprocessing` ends by
    itself, after this process and the workers.
    """
    multiprocess, tracker = (sys.modules.get(f"multiprocessing.{name}") for name in ("process", "resource_tracker"))
    workers = [process.pid for process in multiprocess.active_children() if process.pid] if multiprocess else []
    spared = getattr(getattr(tracker, "_resource_tracker", None), "_pid", None)
    processes = [process for process in dict.fromkeys([*descendants(os.getpid()), *workers]) if process != spared]
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            with contextlib.suppress(OSError):
                os.kill(process, number)
        until = time.monotonic() + SECONDS_TO_END
        while processes and time.monotonic() < until:
            processes = [process for process in processes if _lives(process)]
            time.sleep(0.01 if processes else 0)


def descendants(process: int) -> list[int]:
    """Living descendants of a process in its session; none on a system without /proc."""
    session, by_parent = os.getsid(process), {}
    for place in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = place.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":  # Z: ended, and only an entry in the process table
                by_parent.setdefault(int(fields[1]), []).append(int(place.parent.name))
    children = list(by_parent.get(process, []))
    for child in children:  # the list grows in the loop
        children += by_parent.get(child, [])
    return children


def _lives(process: int) -> bool:
    """False once a process has ended; a child of this process is also removed from the process table."""
    with contextlib.suppress(ChildProcessError):
        return os.waitpid(process, os.WNOHANG)[0] != process
    with contextlib.suppress(OSError):
        os.kill(process, 0)
        return True
    return False
