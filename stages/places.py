"""Paths of knobs and flags. No torch."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from stages.errors import ConfigError


def absolute(name: str | Path, where: str) -> Path:
    """The absolute path of a name, `~` being the user's home; links are not resolved.

    Raises ConfigError, with the knob or flag `where`, for the home of an unknown user, and if the working directory
    was removed.
    """
    text = os.path.expanduser(os.fspath(name))
    if text.startswith("~"):
        user = text.partition(os.sep)[0]
        what = f"{name}: there is no user whose home is {user}"
        raise ConfigError(what, where=where, fix=f"write the whole path, or ./{user} for a folder of that name")
    try:
        return Path(text).absolute()
    except FileNotFoundError:
        raise working_directory_is_gone() from None


def working_directory_is_gone() -> ConfigError:
    """The error for a process whose working directory was removed."""
    return ConfigError("the working directory does not exist any more", fix="change to a folder that exists")


def describe_special(path: str | Path) -> str:
    """A description of a path that is neither a file nor a folder, a dead link included; "" if nothing exists there."""
    try:
        mode = os.stat(path).st_mode
    except ValueError:
        return ""
    except OSError as error:
        if not os.path.islink(path):
            return ""
        if error.errno == errno.ELOOP:
            return "a link that leads in a circle"
        return f"a link to {os.readlink(path)}, which does not exist" if error.errno == errno.ENOENT else ""
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return ""
    return "a named pipe" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"
