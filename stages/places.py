"""Paths as knobs and flags name them. No torch."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from stages.errors import ConfigError


def absolute(name: str | Path, where: str) -> Path:
    """The absolute path that a name means now, `~` being the user's home; links are kept.

    Raises ConfigError, with the knob or flag `where`, for the home of an unknown user, and if the working directory
    is gone.
    """
    text = os.path.expanduser(os.fspath(name))
    if text.startswith("~"):
        user = text.partition(os.sep)[0]
        raise ConfigError(
            f"{name}: there is no user whose home is {user}",
            where=where,
            fix=f"write the whole path, or ./{user} for a folder of that name",
        )
    try:
        return Path(text).absolute()
    except FileNotFoundError:
        raise working_directory_is_gone() from None


def working_directory_is_gone() -> ConfigError:
    """The error for a process whose working directory was removed under it."""
    return ConfigError("the working directory does not exist any more", fix="change to a folder that exists")


def describe_special(path: str | Path) -> str:
    """What a path that is neither a file nor a folder is, in words; "" if nothing exists there."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return _describe_link(path)
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return ""
    return "a named pipe" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"


def _describe_link(path: str | Path) -> str:
    """A link that leads nowhere, or in a circle, in words; "" for no link."""
    try:
        if not os.path.islink(path):
            return ""
        target = os.readlink(path)
        os.stat(path)
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "a link that leads in a circle"
        return f"a link to {target}, where nothing is" if error.errno == errno.ENOENT else ""
    except ValueError:
        return ""
    return ""
