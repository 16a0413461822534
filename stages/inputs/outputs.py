"""Checks of the files that commands write outside checkpoints: responses, reports and plots."""

from __future__ import annotations

import json
import os
from pathlib import Path

from stages.checkpoint.atomic import check_place
from stages.data.rows import SUFFIXES
from stages.errors import OutputError
from stages.places import absolute, describe_special
from stages.reading import read_bytes, read_text

RESPONSE_KEYS = ("prompt", "response", "index", "ended", "tokens")  # of a line that `rlhf sample` writes
BEST_KEYS = ("prompt", "completion", "score", "index", "ended", "tokens")  # of a line with the best of several
REPORT_KEYS = ("model", "dataset")  # of what `rlhf evaluate` writes


def check_output_file(
    name: str, flag: str, suffixes: tuple[str, ...], mark: tuple[str, ...] | str, dataset: str
) -> None:
    """Raise OutputError unless `name` is a new file, or one that this command wrote earlier and does not read now.

    `mark` identifies a file of ours: the keys of its first JSON object, or a text in it.
    """
    path = absolute(name, flag)
    problem = _find_problem(path, suffixes, mark, Path(os.path.expanduser(dataset)))
    if problem:
        raise OutputError(
            f"{name} {problem}", where=flag, fix=f"give another file name ending in {' or '.join(suffixes)}"
        )
    target = Path(os.path.realpath(path))  # a link is written through
    check_place(target.parent, target.name)


def _find_problem(path: Path, suffixes: tuple[str, ...], mark: tuple[str, ...] | str, dataset: Path) -> str:
    """The reason why a file cannot be written; "" if it can."""
    if path.is_dir():
        return "is a folder"
    if path.suffix not in suffixes:
        return f"does not end in {' or '.join(suffixes)}"
    special = describe_special(path)
    if special and not special.startswith("a link to"):  # such a link is written through
        return f"is {special}"
    if path.exists() and not _is_ours(path, mark):
        return "was not written by this command and will not be overwritten"
    if path.exists() and dataset.exists() and os.path.samefile(path, dataset):
        return "is the dataset that is read"
    inside_dataset = dataset.is_dir() and os.path.realpath(dataset) == os.path.dirname(os.path.realpath(path))
    if path.suffix in SUFFIXES and inside_dataset:
        return "is inside the dataset's folder, where it would be read as rows"
    return ""


def _is_ours(path: Path, mark: tuple[str, ...] | str) -> bool:
    """True for a file that is empty, contains the text `mark`, or begins with a JSON object of the keys `mark`."""
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
