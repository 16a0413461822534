"""Processes that were started on the way, by a reward function or a library: none of them outlives the command."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import signal
import sys
import time
from pathlib import Path

PATIENCE = 1.0  # seconds that a process has to end after SIGTERM
ADOPT = 36  # Linux: PR_SET_CHILD_SUBREAPER


@functools.cache
def adopt_orphans() -> None:
    """Have descendants stay ours when their parents end, so that they are found; only Linux can."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(ADOPT, 1, 0, 0, 0)


def end_children() -> None:
    """End what this process started: every descendant, and the workers of `multiprocessing`.

    A process that was given a session of its own was meant to stay, and does. The one that `multiprocessing` has to
    clean up after its workers ends by itself, once we and they have.
    """
    found = [child for child in dict.fromkeys([*descendants(os.getpid()), *_workers()]) if child != _cleaner()]
    for number in (signal.SIGTERM, signal.SIGKILL):
        for child in found:
            with contextlib.suppress(OSError):
                os.kill(child, number)
        until = time.monotonic() + PATIENCE
        while found and time.monotonic() < until:
            found = [child for child in found if _lives(child)]
            time.sleep(0.01 if found else 0)


def descendants(process: int) -> list[int]:
    """Living children of a process in its session, theirs, and so on; none where the system has no /proc."""
    session, children = os.getsid(process), {}
    for place in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = place.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":  # one that has ended is only a line in the system's list
                children.setdefault(int(fields[1]), []).append(int(place.parent.name))
    found = list(children.get(process, []))
    for child in found:  # grows on the way
        found += children.get(child, [])
    return found


def _workers() -> list[int]:
    process = sys.modules.get("multiprocessing.process")  # not there: nobody started any
    return [child.pid for child in process.active_children() if child.pid] if process else []


def _cleaner() -> int | None:
    tracker = sys.modules.get("multiprocessing.resource_tracker")
    return getattr(getattr(tracker, "_resource_tracker", None), "_pid", None)


def _lives(process: int) -> bool:
    """False once a process has ended; one of our own is taken off the system's list."""
    with contextlib.suppress(OSError):
        if os.waitpid(process, os.WNOHANG)[0] == process:
            return False
    try:
        os.kill(process, 0)
    except OSError:
        return False
    try:
        state = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2]
    except OSError:
        return True
    return not state.strip().startswith("Z")
