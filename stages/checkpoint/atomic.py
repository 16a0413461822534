"""Writes that are there whole or not at all.

Every byte this tool writes itself goes through here, so a process killed at any instant leaves either the old
file or the new one, plus at most a leftover whose name starts with `TEMP` or `ASIDE`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from stages.errors import OutputError
from stages.reading import to_json

TEMP = ".rlhf-tmp-"  # half-written, or on its way out: never of use
ASIDE = ".rlhf-old-"  # a whole previous folder, put aside while its successor is renamed into place
_LEFTOVER = re.compile(r"\.rlhf-(tmp|old)-[0-9a-f]{8}-(.+)", re.DOTALL)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)  # only ever about writing


# --- errors ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def raising_output_errors(path: str | Path) -> Iterator[None]:
    """Turn whatever the system says while `path` is written into an OutputError; also for safetensors' own writes."""
    try:
        yield
    except Exception as error:
        told = _explain(path, error)
        if told is None:
            raise
        raise told from error


def _explain(path: str | Path, error: Exception) -> OutputError | None:
    if isinstance(error, OSError):
        return _output_error(path, error.errno, error.strerror or str(error))
    if type(error).__name__ != "SafetensorError":
        return None
    number = re.search(r"\(os error (\d+)\)", str(error))
    return _output_error(path, int(number[1]), os.strerror(int(number[1]))) if number else None


def _output_error(path: str | Path, number: int | None, reason: str) -> OutputError:
    fixes = {
        errno.ENOSPC: "free some space there, or choose another place, and run the same command again",
        errno.EDQUOT: "free some of your quota, or choose another place, and run the same command again",
        errno.EACCES: "choose a place that you may write to",
        errno.EPERM: "choose a place that you may write to",
        errno.EROFS: "choose a place that you may write to",
        errno.ENOTDIR: "a file stands where a folder is needed: choose another place",
        errno.EISDIR: "a folder stands where a file is needed: choose another place",
        errno.ENAMETOOLONG: "choose a shorter name",
        errno.ELOOP: "a link stands where a file of our own is needed: remove it",
    }
    fix = fixes.get(number or 0, "see that the disk is well, and run the same command again")
    return OutputError(f"cannot write: {reason}", where=str(path), fix=fix)


# --- files ----------------------------------------------------------------------------------------------------------


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file whole or not at all; a link is written through, missing folders are made.

    Raises OutputError where the system refuses, or where `path` is something other than a plain file.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise OutputError("not a plain file", where=str(path), fix="choose another name to write to")
    make_folder(target.parent)
    temp = _sibling(target, TEMP)
    with raising_output_errors(path):
        try:
            _write_new(temp, data)
            os.replace(temp, target)
        except BaseException:
            _discard(temp)
            raise
    sync(target.parent)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text as `write_bytes` does."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | Path, value: object) -> None:
    """Write JSON as `write_bytes` does: keys in their order, NaN and infinities as null."""
    write_text(path, to_json(value, indent=2) + "\n")


def append_text(path: str | Path, text: str) -> None:
    """Append to a log, never through a link; what a full disk took only part of is taken back. Raises OutputError."""
    with raising_output_errors(path):
        log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
        try:
            size = os.fstat(log).st_size
            try:
                _write_all(log, text.encode("utf-8"))
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(log, size)
                raise
        finally:
            os.close(log)


def truncate(path: str | Path, size: int) -> None:
    """Cut a file to `size` bytes, durably. Raises OutputError."""
    with raising_output_errors(path):
        log = os.open(path, os.O_WRONLY | os.O_NOFOLLOW)
        try:
            os.ftruncate(log, size)
            os.fsync(log)
        finally:
            os.close(log)


def remove(path: str | Path) -> None:
    """Remove a file, or a folder with all that is in it (at once, for a reader), if it is there. Raises OutputError."""
    path = Path(path)
    with raising_output_errors(path):
        if path.is_dir() and not path.is_symlink():
            temp = _sibling(path, TEMP)
            os.rename(path, temp)
            shutil.rmtree(temp, ignore_errors=True)
        else:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)


def sync(path: str | Path) -> None:
    """Have a file or a folder reach the disk before anything that follows. Raises OutputError."""
    with raising_output_errors(path):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot sync a folder
                raise
        finally:
            os.close(handle)


def _write_new(path: Path, data: bytes) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        _write_all(handle, data)
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_all(handle: int, data: bytes) -> None:
    rest = memoryview(data)
    while len(rest):
        rest = rest[os.write(handle, rest) :]


# --- folders --------------------------------------------------------------------------------------------------------


def make_folder(path: str | Path) -> None:
    """Make a folder and those above it, durably; one that is there already is fine. Raises OutputError."""
    path = Path(os.path.realpath(path))
    if path.is_dir():
        return
    if path.exists():
        raise _output_error(path, errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    make_folder(path.parent)
    with raising_output_errors(path):
        os.makedirs(path, exist_ok=True)  # somebody else may have made it meanwhile
    sync(path.parent)


@contextlib.contextmanager
def folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty folder to fill; it takes the place of `path`, whole, when the block ends well.

    A previous folder at `path` goes, whoever made it: the caller has asked. When the block fails nothing changes.
    Raises OutputError where the system refuses to write.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_dir():
        raise OutputError("a file stands where a folder is needed", where=str(path), fix="choose another place")
    make_folder(target.parent)
    temp = _sibling(target, TEMP)
    try:
        with raising_output_errors(path):
            os.mkdir(temp)
        with _explained_inside(temp, path):
            yield temp
        _sync_tree(temp)
        with raising_output_errors(path):
            _put_in_place(temp, target)
    except BaseException:
        _discard(temp)
        raise


@contextlib.contextmanager
def filling(where: str | Path) -> Iterator[Path]:
    """Yield an empty folder to fill; its files then move into `where` one by one, each whole.

    For libraries that write by themselves, into a folder that holds other things too. Raises OutputError.
    """
    where = Path(os.path.realpath(where))
    make_folder(where)
    temp = _sibling(where / "files", TEMP)
    try:
        with raising_output_errors(where):
            os.mkdir(temp)
        with _explained_inside(temp, where):
            yield temp
        _sync_tree(temp)
        with raising_output_errors(where):
            for name in sorted(os.listdir(temp)):
                os.replace(temp / name, where / name)
        sync(where)
    finally:
        _discard(temp)


@contextlib.contextmanager
def _explained_inside(temp: Path, path: str | Path) -> Iterator[None]:
    """Explain what goes wrong with writing into `temp`; a caller's trouble with reading elsewhere stays its own."""
    try:
        yield
    except OutputError as error:
        where = (error.where or "").replace(str(temp), str(path))
        raise OutputError(error.what, where=where, fix=error.fix) from error
    except Exception as error:
        told = _explain(path, error)
        elsewhere = isinstance(error, OSError) and error.errno not in _FULL and str(temp) not in str(error.filename)
        if told is None or elsewhere:
            raise
        raise told from error


def _put_in_place(temp: Path, target: Path) -> None:
    if not target.exists():
        os.rename(temp, target)
        sync(target.parent)
        return
    aside = _sibling(target, ASIDE)
    os.rename(target, aside)
    try:
        os.rename(temp, target)
    except BaseException:
        os.rename(aside, target)
        raise
    sync(target.parent)
    _discard(aside)


def _sync_tree(top: Path) -> None:
    for where, _, names in os.walk(top, topdown=False):
        for name in names:
            sync(Path(where, name))
        sync(where)


def clear_leftovers(where: str | Path, of: str | None = None) -> None:
    """Remove what a killed process left directly in a folder (with `of`: only what was to become that name).

    A folder that had been put aside while its successor never arrived is put back. Raises OutputError.
    """
    where = Path(where)
    if not where.is_dir():
        return
    with raising_output_errors(where):
        for name in sorted(os.listdir(where)):
            match = _LEFTOVER.fullmatch(name)
            if match is None or of not in (None, match[2]):
                continue
            if match[1] == "old" and not os.path.lexists(where / match[2]):
                os.rename(where / name, where / match[2])
            else:
                _discard(where / name)


def is_leftover(name: str) -> bool:
    """True for the name of something a killed process may leave behind."""
    return _LEFTOVER.fullmatch(name) is not None


def _sibling(path: Path, prefix: str) -> Path:
    return path.with_name(f"{prefix}{secrets.token_hex(4)}-{path.name}")


def _discard(path: Path) -> None:
    """Remove quietly: what stays is recognised as a leftover and goes the next time."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            os.unlink(path)
