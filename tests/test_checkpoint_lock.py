"""stages/checkpoint/lock.py: who holds an output folder, and how long."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import pytest

from stages.checkpoint.lock import check_lock, release_lock, take_lock
from stages.errors import OutputError


def names(folder) -> list[str]:
    return sorted(os.listdir(folder))


def test_a_lock_is_held_once_and_leaves_no_file(tmp_path):
    path = tmp_path / "run.lock"
    handle = take_lock(path)
    for take in (check_lock, take_lock):
        with pytest.raises(OutputError, match=f"in use by process {os.getpid()} on "):
            take(path)
    release_lock(handle, path)
    assert names(tmp_path) == []
    check_lock(path)
    release_lock(take_lock(path), path)


def test_a_dead_processes_lock_is_no_obstacle(tmp_path):
    path = tmp_path / "run.lock"
    lines = "import os, sys", "from stages.checkpoint.lock import take_lock", "held = take_lock(sys.argv[1])"
    code = "; ".join((*lines, "os.kill(os.getpid(), 9)"))
    ended = subprocess.run([sys.executable, "-c", code, str(path)])
    assert ended.returncode == -9
    assert json.loads(path.read_text())["pid"] != os.getpid()
    check_lock(path)
    handle = take_lock(path)
    assert json.loads(path.read_text())["pid"] == os.getpid()
    release_lock(handle, path)


def test_a_file_system_without_locks_gives_none(tmp_path, monkeypatch):
    def refuse(handle, kind):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    assert take_lock(tmp_path / "run.lock") is None
    check_lock(tmp_path / "run.lock")
    assert names(tmp_path) == []


def test_a_forked_child_does_not_hold_the_lock(tmp_path):
    path, ends = tmp_path / "run.lock", os.pipe()
    held = take_lock(path)
    child = os.fork()
    if not child:
        os.read(ends[0], 1)
        os._exit(0)
    held.release()  # as the end of this process would
    check_lock(path)
    release_lock(take_lock(path), path)
    os.write(ends[1], b"x")
    assert os.waitpid(child, 0)[1] == 0


def test_a_lock_file_that_was_removed_meanwhile_is_no_lock(tmp_path):
    path = tmp_path / "run.lock"
    held = take_lock(path)
    path.unlink()
    other = take_lock(path)  # whoever removed it took the risk
    with pytest.raises(OutputError, match="in use"):
        check_lock(path)
    release_lock(other, path)
    held.release()
    assert names(tmp_path) == []
