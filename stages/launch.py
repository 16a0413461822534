"""The launch of this process: alone, or as one of several ranks of torchrun or a scheduler. No torch."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

from stages.errors import ConfigError
from stages.places import working_directory_is_gone

NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
MASTER = ("MASTER_ADDR", "MASTER_PORT")
FIX = "unset RANK WORLD_SIZE LOCAL_RANK to run alone; for several ranks: torchrun --nproc-per-node N -m rlhf_cli ..."


@dataclass(frozen=True)
class Launch:
    """This process's place among `size` ranks; `local` is its number on this machine."""

    rank: int = 0
    size: int = 1
    local: int = 0


def read_launch() -> Launch:
    """Rank and number of ranks from the environment. Raises ConfigError for variables that contradict each other."""
    texts = {name: os.environ.get(name, "").strip() for name in NUMBERS}
    for name, text in texts.items():
        if text and not (text.isascii() and text.isdigit() and len(text) < 10):
            raise _contradiction(f"{name}={text!r} in the environment is not a whole number from 0 up")
    rank, size, local = (int(text) if text else None for text in texts.values())
    if size == 0:
        raise _contradiction("WORLD_SIZE=0 in the environment: it must be at least 1")
    if size is not None and size > 1 and rank is None:
        raise _contradiction(f"WORLD_SIZE={size} in the environment, but RANK is not set")
    for name, number in (("RANK", rank), ("LOCAL_RANK", local)):
        if number is not None and number >= (size or 1):
            ranks = "WORLD_SIZE is not set" if size is None else f"WORLD_SIZE={size}"
            raise _contradiction(f"{name}={number} in the environment, but {ranks}")
    return Launch(rank or 0, size or 1, local or 0)


def check_launch() -> None:
    """Raise ConfigError if no command can run in this process: contradictory ranks, or no working directory."""
    if read_launch().size > 1:
        missing = [name for name in MASTER if not os.environ.get(name, "").strip()]
        if missing:
            ranks = ", ".join(f"{name}={os.environ[name]}" for name in NUMBERS if os.environ.get(name))
            raise _contradiction(f"{ranks} in the environment, but not {' and '.join(missing)}")
        port = os.environ["MASTER_PORT"].strip()
        if not (port.isascii() and port.isdigit() and 0 < int(port[:6]) < 2**16):
            raise _contradiction(f"MASTER_PORT={port!r} in the environment is not a port")
    try:
        os.getcwd()
    except OSError:
        raise working_directory_is_gone() from None


def check_docstrings() -> None:
    """Raise ConfigError if Python removed docstrings: transformers reads its own when it is imported."""
    if sys.flags.optimize >= 2:
        what = "Python runs without docstrings, which transformers needs"
        raise ConfigError(what, where="PYTHONOPTIMIZE=2 or python -OO", fix="unset PYTHONOPTIMIZE, or set it to 1")


def _contradiction(what: str) -> ConfigError:
    return ConfigError(what, fix=FIX)
