"""File descriptors that a user's code may close or replace: recognised by their file, and put back."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager

STANDARD = (0, 1, 2)
SPARE = 900  # spares get numbers from here on, beyond the ranges that os.closerange is usually given


class Descriptor:
    """One of our descriptors, whose number may have become that of another file."""

    def __init__(self, number: int):
        self.number, self.file = number, file_behind(number)

    def intact(self) -> bool:
        """True while it leads to its first file."""
        return self.file is not None and file_behind(self.number) == self.file

    def close(self) -> None:
        """Close it, if it still leads to its first file."""
        if self.intact():
            os.close(self.number)


def file_behind(number: int) -> tuple[int, int] | None:
    """Device and inode of a descriptor's file; None if it is closed."""
    try:
        status = os.fstat(number)
    except OSError:
        return None
    return status.st_dev, status.st_ino


@contextmanager
def restoring_descriptors() -> Iterator[None]:
    """Have the standard descriptors lead to the same files after the block as before it."""
    spares = {number: Descriptor(_duplicate(number)) for number in STANDARD if file_behind(number)}
    try:
        yield
    finally:
        for number, spare in spares.items():
            if file_behind(number) != spare.file and spare.intact():
                with contextlib.suppress(OSError):
                    os.dup2(spare.number, number)
            spare.close()


def _duplicate(number: int) -> int:
    try:
        return fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, SPARE)
    except OSError:  # so many files may not be open
        return os.dup(number)
