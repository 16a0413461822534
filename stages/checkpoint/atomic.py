"""Atomic writes of files and folders.

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
from collections.abc import Callable, Iterator
from pathlib import Path

from stages.errors import OutputError
from stages.reading import to_json

TEMP = ".rlhf-tmp-"  # half-written, or being removed: never of use
ASIDE = ".rlhf-old-"  # a whole previous folder, put aside while its successor is renamed into place
_LEFTOVER = re.compile(r"\.rlhf-(tmp|old)-[0-9a-f]{8}-(.+)", re.DOTALL)
_WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)  # never about reading
_FREE_SPACE = "free some space or quota there, or choose another place, and run the same command again"
_MAY_WRITE = "choose a place that you may write to"
_FIXES = {
    errno.ENOSPC: _FREE_SPACE,
    errno.EDQUOT: _FREE_SPACE,
    errno.EACCES: _MAY_WRITE,
    errno.EPERM: _MAY_WRITE,
    errno.EROFS: _MAY_WRITE,
    errno.ENOTDIR: "choose another place: a path component is a file, not a folder",
    errno.EISDIR: "choose another place: this path is a folder, not a file",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "remove the link at this path, which must be a plain file",
}


# --- errors ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def raising_output_errors(path: str | Path, temp: Path | None = None) -> Iterator[None]:
    """Raise errors of the system while `path` is written as OutputError, those of safetensors included.

    With `temp`, the folder that is being filled in place of `path`, errors of reading elsewhere stay as they are.
    """
    try:
        yield
    except OutputError as error:
        if temp is None:
            raise
        where = (error.where or "").replace(str(temp), str(path))
        raise OutputError(error.what, where=where, fix=error.fix) from error
    except OSError as error:
        if temp is not None and error.errno not in _WRITE_ERRORS and str(temp) not in str(error.filename):
            raise
        raise _output_error(path, error.errno, error.strerror or str(error)) from error
    except Exception as error:
        number = re.search(r"\(os error (\d+)\)", str(error)) if type(error).__name__ == "SafetensorError" else None
        if number is None:
            raise
        raise _output_error(path, int(number[1]), os.strerror(int(number[1]))) from error


def _output_error(path: str | Path, number: int | None, reason: str) -> OutputError:
    fix = _FIXES.get(number or 0, "check the disk, and run the same command again")
    return OutputError(f"cannot write: {reason}", where=str(path), fix=fix)


# --- files ----------------------------------------------------------------------------------------------------------


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file whole or not at all; a link is written through, missing folders are made.

    Raises OutputError if the system refuses, or if `path` exists and is not a plain file.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise OutputError("not a plain file", where=str(path), fix="choose another name to write to")
    make_folder(target.parent)
    temp = _sibling(target, TEMP)
    with raising_output_errors(path):
        try:
            with _opened(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as handle:
                _write_all(handle, data)
                os.fsync(handle)
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
    """Append to a log, never through a link; if only a part fits on the disk, none is added. Raises OutputError."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
    with raising_output_errors(path), _opened(path, flags) as handle:
        size = os.fstat(handle).st_size
        try:
            _write_all(handle, text.encode("utf-8"))
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(handle, size)
            raise


def truncate(path: str | Path, size: int) -> None:
    """Cut a file to `size` bytes, durably. Raises OutputError."""
    with raising_output_errors(path), _opened(path, os.O_WRONLY | os.O_NOFOLLOW) as handle:
        os.ftruncate(handle, size)
        os.fsync(handle)


def remove(path: str | Path) -> None:
    """Remove a file, or a folder and its content in one step, if it is there. Raises OutputError."""
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
    with raising_output_errors(path), _opened(path, os.O_RDONLY) as handle:
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot sync a folder
                raise


@contextlib.contextmanager
def _opened(path: str | Path, flags: int) -> Iterator[int]:
    handle = os.open(path, flags, 0o666)
    try:
        yield handle
    finally:
        os.close(handle)


def _write_all(handle: int, data: bytes) -> None:
    rest = memoryview(data)
    while len(rest):
        rest = rest[os.write(handle, rest) :]


# --- folders --------------------------------------------------------------------------------------------------------


def make_folder(path: str | Path) -> None:
    """Make a folder and those above it, durably, if it does not exist. Raises OutputError."""
    path = Path(os.path.realpath(path))
    if path.is_dir():
        return
    if path.exists():
        raise _output_error(path, errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    make_folder(path.parent)
    with raising_output_errors(path):
        os.makedirs(path, exist_ok=True)  # another process may have made it meanwhile
    sync(path.parent)


def check_place(folder: str | Path, name: str) -> None:
    """Raise OutputError unless `name` could be written into a folder, which is made first if it is missing.

    Tried with an empty file in the nearest folder that exists, since only that shows what the system allows.
    """
    folder = place = Path(os.path.realpath(folder))
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        raise OutputError(f"{place} is not a folder", where=str(folder / name), fix=_FIXES[errno.ENOTDIR])
    probe = _sibling(place / name, TEMP)
    with raising_output_errors(folder / name):
        for longest in (*(place / part for part in folder.relative_to(place).parts), folder / probe.name):
            with contextlib.suppress(FileNotFoundError):
                os.lstat(longest)  # raises if a name or the whole path is too long
        try:
            with _opened(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL):
                _discard(probe)
        except FileNotFoundError:  # as /proc says it
            raise PermissionError(errno.EACCES, f"nothing can be written into {place}") from None


def folder(path: str | Path) -> contextlib.AbstractContextManager[Path]:
    """Yield an empty folder to fill; it replaces `path`, whole, if the block ends without an error.

    The previous folder at `path` is removed, whatever it holds. If the block fails nothing changes.
    Raises OutputError if the system refuses to write.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_dir():
        raise OutputError("is a file, not a folder", where=str(path), fix="choose another place")
    make_folder(target.parent)
    return _temporary_folder(path, _sibling(target, TEMP), lambda temp: _replace_folder(temp, target))


def filling(path: str | Path) -> contextlib.AbstractContextManager[Path]:
    """Yield an empty folder to fill; its files then move into the folder `path` one by one, each whole.

    For libraries that write by themselves, into a folder that holds other things too. Raises OutputError.
    """
    target = Path(os.path.realpath(path))
    make_folder(target)
    return _temporary_folder(path, _sibling(target / "files", TEMP), lambda temp: _move_files(temp, target))


@contextlib.contextmanager
def _temporary_folder(path: str | Path, temp: Path, move: Callable[[Path], None]) -> Iterator[Path]:
    """Yield the new folder `temp`; then sync and `move` what it holds. Errors name `path`."""
    try:
        with raising_output_errors(path):
            os.mkdir(temp)
        with raising_output_errors(path, temp):
            yield temp
            for place, _, names in os.walk(temp, topdown=False):
                for name in names:
                    sync(Path(place, name))
                sync(place)
        with raising_output_errors(path):
            move(temp)
    finally:
        _discard(temp)


def _replace_folder(temp: Path, target: Path) -> None:
    aside = _sibling(target, ASIDE)
    if target.exists():
        os.rename(target, aside)
    try:
        os.rename(temp, target)
    except BaseException:
        if aside.exists():
            os.rename(aside, target)
        raise
    sync(target.parent)
    _discard(aside)


def _move_files(temp: Path, target: Path) -> None:
    for name in sorted(os.listdir(temp)):
        os.replace(temp / name, target / name)
    sync(target)


def clear_leftovers(path: str | Path, of: str | None = None) -> None:
    """Remove what a killed process left directly in a folder; with `of`, only leftovers of that name.

    A folder that was put aside, and whose successor is missing, is put back. Raises OutputError.
    """
    path = Path(path)
    if not path.is_dir():
        return
    with raising_output_errors(path):
        for name in sorted(os.listdir(path)):
            match = _LEFTOVER.fullmatch(name)
            if match is None or of not in (None, match[2]):
                continue
            if match[1] == "old" and not os.path.lexists(path / match[2]):
                os.rename(path / name, path / match[2])
            else:
                _discard(path / name)


def is_leftover(name: str) -> bool:
    """True for the name of a leftover of a killed process."""
    return _LEFTOVER.fullmatch(name) is not None


def _sibling(path: Path, prefix: str) -> Path:
    return path.with_name(f"{prefix}{secrets.token_hex(4)}-{path.name}")


def _discard(path: Path) -> None:
    """Remove without errors: what cannot be removed is recognised as a leftover the next time."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            os.unlink(path)
