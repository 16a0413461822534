"""A lock against two processes using one output folder: flock, by `filelock`, which ends with its process.

Added here: the lock file names the process that holds it, and is removed when the run ends.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import os
import socket
import typing
from pathlib import Path

from stages.checkpoint.atomic import raising_output_errors
from stages.errors import OutputError

if typing.TYPE_CHECKING:
    from filelock import BaseFileLock

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
_TIMEOUT = 0.1  # seconds: another process may hold it for a moment, as `check_lock` does


def take_lock(path: str | Path) -> BaseFileLock | None:
    """A lock file that names this process, locked until `release_lock` or the end of the process.

    A forked child does not hold it. None if the file system has no locks. Raises OutputError naming the process that
    holds it.
    """
    import filelock

    lock = filelock.FileLock(path, timeout=_TIMEOUT, poll_interval=0.02, thread_local=False, fallback_to_soft=False)
    with raising_output_errors(path):
        try:
            lock.acquire()
        except filelock.Timeout:
            raise _in_use(path) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            with contextlib.suppress(OSError):
                os.unlink(path)
            return None
        try:
            started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            holder = {"pid": os.getpid(), "host": socket.gethostname(), "started": started}
            Path(path).write_text(json.dumps(holder), "utf-8")  # in place: a new file would not be the locked one
        except BaseException:
            lock.release()
            raise
    return lock


def check_lock(path: str | Path) -> None:
    """Raise OutputError, with the process, if a living process holds this lock; changes nothing."""
    import filelock

    if not os.path.isfile(path):
        return
    try:
        with filelock.FileLock(path, timeout=_TIMEOUT, poll_interval=0.02, fallback_to_soft=False):
            return
    except filelock.Timeout:
        raise _in_use(path) from None
    except OSError:  # no locks there, or no permission: `take_lock` raises or warns
        return


def release_lock(lock: BaseFileLock, path: str | Path) -> None:
    """Release a lock taken by `take_lock`; its file is removed while locked, so never another process's."""
    with contextlib.suppress(OSError):
        os.unlink(path)
    lock.release()


def _in_use(path: str | Path) -> OutputError:
    try:
        about = json.loads(Path(path).read_text("utf-8"))
        holder = f"process {about['pid']} on {about['host']} (since {about['started']})"
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        holder = "another process"
    fix = "wait for it to end, stop it, or choose another --output"
    return OutputError(f"in use by {holder}", where=str(Path(path).parent), fix=fix)
