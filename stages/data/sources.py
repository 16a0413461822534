"""Raw rows of a file, a saved datasets folder or a hub dataset. Executes no code of theirs."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from stages.data.cells import json_value, table_rows
from stages.data.raw_rows import RawRow, first_line
from stages.data.readers import READERS, import_library, read_file
from stages.errors import DatasetError, counted
from stages.places import describe_special

HUB_DATASET = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:.+)?")


@dataclass(frozen=True)
class RawDataset:
    """The rows of a dataset before they are typed; `problems` are errors of the rows that were skipped."""

    name: str
    rows: list[RawRow]
    digest: str  # sha256 of the file, or of the rows as canonical JSON if there is no single file
    problems: tuple[str, ...] = ()


def read_raw_dataset(source: str, *, skip_bad_rows: bool = False) -> RawDataset:
    """Every row of a file, of a folder saved by `datasets`, or of a hub dataset `org/name[:split]`.

    Raises DatasetError for a dataset that is missing, unreadable or empty and, unless bad rows are skipped, for the
    first malformed row.
    """
    path, split = _locate(source)
    if path is None:
        items, digest = _from_datasets(_load_hub(source, split), source)
    elif (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        items, digest = _from_datasets(_load_saved(path, split), source)
    else:
        file = _only_file(path) if path.is_dir() else path
        if split is not None:
            raise DatasetError(f"`{file}` has no splits", where=source, fix=f"leave out `:{split}`")
        items, digest = read_file(file)
    rows, problems = [], []
    for row in items:
        if isinstance(row, RawRow):
            rows.append(row)
        elif skip_bad_rows:
            problems.append(f"{row.where}: {row.what}")
        else:
            raise row
    if not rows:
        none = f"none of its {counted(len(problems), 'rows')} can be read"
        reason = f"{none}; {problems[0]}" if problems else "it holds no rows"
        raise DatasetError(reason, where=source, fix="give a dataset with at least one row")
    return RawDataset(source, rows, digest, tuple(problems))


# --- finding a dataset --------------------------------------------------------------------------------------------


def _locate(source: str) -> tuple[Path | None, str | None]:
    """The local path (None: the hub) and the split in `source`, if any."""
    fix = "give an existing file or folder, or a hub id org/name"
    if not source.strip():
        raise DatasetError("no dataset is named", where="dataset", fix=fix)
    local = os.path.expanduser(source)
    special = describe_special(local)
    if special:
        raise DatasetError(f"it is {special}", where=source, fix=fix)
    if os.path.exists(local):
        return Path(local), None
    head, _, split = local.rpartition(":")
    if head and split and os.path.exists(head):
        return Path(head), split
    repository, _, split = source.partition(":")
    if HUB_DATASET.fullmatch(source) and Path(repository).suffix.lower() not in READERS:
        return None, split or "train"
    folder = Path(local).parent
    names = [entry.name for entry in folder.iterdir()] if os.access(folder, os.R_OK) and folder.is_dir() else []
    similar = difflib.get_close_matches(Path(local).name, names, n=1)
    if similar:
        fix = f"did you mean `{folder / similar[0]}`?"
    raise DatasetError("there is no such file or folder", where=source, fix=fix)


def _only_file(folder: Path) -> Path:
    try:
        entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        what = f"cannot be read: {error.strerror or error}"
        raise DatasetError(what, where=str(folder), fix="check its permissions") from None
    files = [entry for entry in entries if entry.suffix.lower() in READERS and entry.is_file()]
    if len(files) == 1:
        return files[0]
    holds = ", ".join(entry.name for entry in entries[:12]) + (", ..." if len(entries) > 12 else "")
    what = f"the folder holds {len(files) or 'no'} dataset files and was not saved by `datasets`: {holds or 'empty'}"
    fix = "name one file" if files else f"give a folder with one {', '.join(READERS)} file"
    raise DatasetError(what, where=str(folder), fix=fix)


# --- the datasets library -----------------------------------------------------------------------------------------


def _load_saved(folder: Path, split: str | None) -> Iterable:
    datasets = import_library("datasets", str(folder))
    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:  # of any type, but the cause is the folder
        raise DatasetError(
            f"not a readable saved dataset: {first_line(error)}", where=str(folder), fix="save it again"
        ) from None
    if not isinstance(saved, dict):
        if split is not None:
            raise DatasetError("this saved dataset has no splits", where=str(folder), fix=f"leave out `:{split}`")
        return saved
    if (split or "train") not in saved:
        what = f"there is no split `{split}`" if split else "no split is named and there is no `train`"
        fix = f"choose one: {', '.join(f'{folder}:{name}' for name in saved)}"
        raise DatasetError(what, where=str(folder), fix=fix)
    return saved[split or "train"]


def _load_hub(source: str, split: str | None) -> Iterable:
    datasets = import_library("datasets", source)
    repository = source.partition(":")[0]
    try:
        return datasets.load_dataset(repository, split=split)
    except Exception as error:  # of any type, from HTTP errors to ValueError
        offline = isinstance(error, (ConnectionError, TimeoutError)) or type(error).__module__.startswith("httpx")
        reason = "could not be reached" if offline else f"does not provide it: {first_line(error)}"
        fix = "check the path; for a hub dataset, check the network, the name and the split (org/name:split)"
        raise DatasetError(f"there is no such local path, and the hub {reason}", where=source, fix=fix) from None


def _from_datasets(dataset: object, name: str) -> tuple[Iterator[RawRow], str]:
    try:
        values = list(table_rows(dataset.with_format("arrow")[:]))  # type: ignore[attr-defined,index]
    except ValueError as error:
        raise DatasetError(f"not a readable dataset: {first_line(error)}", where=name, fix="save it again") from None
    digest = hashlib.sha256()
    for row in values:
        digest.update(json.dumps(row, sort_keys=True, default=json_value).encode() + b"\n")
    return (RawRow(row, f"{name}: row {number}") for number, row in enumerate(values, 1)), digest.hexdigest()
