"""Files that a command writes beside checkpoints, checked before any work: responses, reports and plots."""

from __future__ import annotations

import json
import os
from pathlib import Path

from stages.data.rows import SUFFIXES
from stages.errors import OutputError
from stages.places import absolute, describe_special
from stages.reading import read_bytes, read_text

RESPONSE_KEYS = ("prompt", "response", "index", "ended", "tokens")  # of a line that `rlhf sample` writes
REPORT_KEYS = ("model", "dataset")  # of what `rlhf evaluate` writes


def check_output_file(
    name: str, flag: str, suffixes: tuple[str, ...], mark: tuple[str, ...] | str, dataset: str
) -> None:
    """Raise OutputError unless a name is a new file, or one that this command wrote before and does not read now.

    `mark` is what a file of ours holds: the keys of its first JSON object, or a text.
    """
    path, read = absolute(name, flag), Path(os.path.expanduser(dataset))
    problem = _find_problem(path, suffixes, mark, read)
    if problem:
        raise OutputError(
            f"{name} {problem}", where=flag, fix=f"give another file name ending in {' or '.join(suffixes)}"
        )
    inside = Path(os.path.realpath(path)).parent
    place = next(parent for parent in (inside, *inside.parents) if parent.exists())
    if not place.is_dir():
        raise OutputError(f"{place} is a file", where=flag, fix="give a path inside a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise OutputError(f"nothing can be written into {place}", where=flag, fix="choose another place")


def _find_problem(path: Path, suffixes: tuple[str, ...], mark: tuple[str, ...] | str, read: Path) -> str:
    if path.is_dir():
        return "is a folder"
    if path.suffix not in suffixes:
        return f"does not end in {' or '.join(suffixes)}"
    special = describe_special(path)
    if special and not special.startswith("a link to"):  # such a link is written through
        return f"is {special}"
    if path.exists() and not _is_ours(path, mark):
        return "was not written by this command and will not be overwritten"
    if path.exists() and read.exists() and os.path.samefile(path, read):
        return "is the dataset that is read"
    inside_dataset = read.is_dir() and os.path.realpath(read) == os.path.dirname(os.path.realpath(path))
    if path.suffix in SUFFIXES and inside_dataset:
        return "lies in the dataset's folder, where it would be read as rows"
    return ""


def _is_ours(path: Path, mark: tuple[str, ...] | str) -> bool:
    """True for a file that is empty, holds a text of ours, or begins with a JSON object of these keys."""
    try:
        if isinstance(mark, str):
            content = read_bytes(path)
            return not content.strip() or mark.encode() in content
        text = read_text(path)
        if not text.strip():
            return True
        value = json.loads(text if path.suffix == ".json" else text.partition("\n")[0])
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(value, dict) and set(mark) <= value.keys()
