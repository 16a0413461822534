"""Paths of knobs and flags, and the names of reward sources among them. No torch."""

from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path

from stages.errors import ConfigError

BUILTIN = "builtin:"  # begins the name of a reward function that comes with this tool
FREE_TEXT = (BUILTIN + "regex:", BUILTIN + "format:")  # their argument may hold commas


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


def split_paths(text: str) -> list[str]:
    """Comma-separated files and folders, each with its weight (`=0.5`) or function (`:name`) if it has one.

    A pattern or template of a built-in function extends to the end of the text.
    """
    parts, paths = text.split(","), []
    while parts:
        if parts[0].lstrip().startswith(FREE_TEXT):
            return [*filter(None, paths), ",".join(parts).lstrip()]
        joined = next((n for n in range(len(parts), 1, -1) if _exists(",".join(parts[:n]))), 1)
        paths.append(",".join(parts[:joined]).strip())
        parts = parts[joined:]
    return [item for item in paths if item]


def _exists(text: str) -> bool:
    """True if a reward source or a model of this name exists on disk."""
    whole = text.strip()
    name = re.sub(r"=[^=/,]*$", "", whole)  # without a weight
    file = re.sub(r"(?<=\.py):\w*$", "", name)  # and without a function
    return any("\0" not in place and os.path.lexists(os.path.expanduser(place)) for place in (whole, name, file))


def is_function(source: str) -> bool:
    """True for a reward source `file.py` or `file.py:function`, with or without its weight."""
    if source.startswith(BUILTIN):
        return False
    name = re.sub(r"=[^=/]*$", "", source)
    return name.endswith(".py") or ".py:" in name
