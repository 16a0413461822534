"""File descriptors that code which is not ours may close or replace: told apart, kept, and put back."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager

STANDARD = (0, 1, 2)
OUT_OF_THE_WAY = 900  # where spares are kept, if that many files may be open: past what os.closerange is mostly given

_spares: set[int] = set()


def file_behind(number: int) -> tuple[int, int] | None:
    """Which file a descriptor leads to; None where it is closed."""
    try:
        found = os.fstat(number)
    except OSError:
        return None
    return found.st_dev, found.st_ino


class Descriptor:
    """One of ours, whose number may have become that of somebody else's file."""

    def __init__(self, number: int):
        self.number, self.file = number, file_behind(number)

    def intact(self) -> bool:
        """True while it leads where it did."""
        return self.file is not None and file_behind(self.number) == self.file

    def close(self) -> None:
        """Close it, if it is still ours."""
        if self.intact():
            os.close(self.number)


@contextmanager
def kept_descriptors() -> Iterator[None]:
    """Have the standard descriptors lead where they did after the block; forked children keep no spares of them."""
    kept = {number: Descriptor(_spare(number)) for number in STANDARD if file_behind(number)}
    _spares.update(spare.number for spare in kept.values())
    try:
        yield
    finally:
        for number, spare in kept.items():
            with contextlib.suppress(OSError):
                _put_back(number, spare)
            _spares.discard(spare.number)


def _spare(number: int) -> int:
    try:
        import fcntl

        return fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, OUT_OF_THE_WAY)
    except (ImportError, AttributeError, OSError):
        return os.dup(number)


def _put_back(number: int, spare: Descriptor) -> None:
    if file_behind(number) != spare.file:
        if spare.intact():
            os.dup2(spare.number, number)
        elif file_behind(number) is None:  # nothing is left of it; the next file to be opened shall not take its number
            nothing = os.open(os.devnull, os.O_RDWR)
            if nothing != number:
                os.dup2(nothing, number)
                os.close(nothing)
    spare.close()


def _close_spares() -> None:
    for number in _spares:
        with contextlib.suppress(OSError):
            os.close(number)
    _spares.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_spares)
