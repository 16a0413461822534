"""Paths as knobs and flags name them. No torch."""

from __future__ import annotations

import os
from pathlib import Path

from stages.errors import ConfigError


def absolute(name: str | Path, where: str) -> Path:
    """The absolute path that a name means now, `~` being the user's home; links are kept.

    Raises ConfigError, with the knob or flag `where`, for the home of an unknown user, and where the working directory
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
