"""Raw rows from a file, a saved datasets folder or the hub, and typed access to their cells. Executes nothing."""

from __future__ import annotations

import contextlib
import csv
import difflib
import hashlib
import importlib
import io
import json
import math
import os
import re
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from stages.config import describe_special
from stages.errors import DatasetError
from stages.files import atomic
from stages.files.cells import json_value, table_rows

Message = dict[str, str]  # {"role": one of ROLES, "content": text}
Content = str | tuple[Message, ...]  # plain text, or turns for the chat template

ROLES = ("system", "user", "assistant", "tool")
ROLE_ALIASES = {"developer": "system", "human": "user", "gpt": "assistant"}
NAME_SHOWN, NAMES_LISTED = 60, 20  # characters of a name, and how many names, in one message
ROW_FIX = "correct the row, or drop such rows with --skip-bad-rows"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:.+)?")
UTF8_BOM, UTF16_BOMS = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # in JSON, half of an escaped character


@dataclass(frozen=True)
class RawRow:
    """One row as it was read; `where` is "path:line" or "path: row N"."""

    values: dict[str, object]
    where: str

    def at(self, field: str) -> str:
        """Where one field of this row stands, for messages."""
        return f"{self.where}: {field}"

    def get(self, field: str) -> object:
        """A cell that must be there. Raises DatasetError."""
        if field not in self.values:
            raise bad_row(f"`{field}` is missing; the row has {listed(self.values)}", self.at(field))
        return self.values[field]

    def text(self, field: str) -> str:
        """A text that is not blank, exactly as it stands. Raises DatasetError."""
        return check_text(self.get(field), self.at(field))

    def number(self, field: str) -> float:
        """A finite number (CSV's texts are converted). Raises DatasetError."""
        return check_number(self.get(field), self.at(field))

    def content(self, field: str) -> Content:
        """A text that is not blank, or a list of messages. Raises DatasetError."""
        return check_content(self.get(field), self.at(field))

    def messages(self, field: str) -> tuple[Message, ...]:
        """A list of messages, role names unified. Raises DatasetError."""
        return check_messages(self.get(field), self.at(field))

    def prompt(self, field: str = "prompt") -> Content:
        """A prompt: text, or messages that leave the next word to the assistant. Raises DatasetError."""
        return check_prompt(self.content(field), self.at(field))

    def others(self, *used: str) -> dict[str, object]:
        """Every other cell as JSON (stages/files/cells.py). Raises DatasetError for one that has no JSON form."""
        found = {}
        for name, value in self.values.items():
            if name not in used:
                try:
                    found[name] = json_value(value)
                except ValueError as error:
                    raise bad_row(str(error), self.at(quoted(name))) from None
        return found


@dataclass(frozen=True)
class RawDataset:
    """Everything one dataset holds; `problems` are the rows that were skipped because they cannot be read."""

    name: str
    rows: list[RawRow]
    digest: str  # sha256 of the file, or of the rows as canonical JSON where there is no single file
    problems: tuple[str, ...] = ()


def read_raw_dataset(source: str, *, skip_bad_rows: bool = False) -> RawDataset:
    """Read every row of a file, of a folder saved by `datasets`, or of a hub dataset `org/name[:split]`.

    Raises DatasetError for what is missing, unreadable or empty, and, unless they are skipped, for the first row
    that is malformed.
    """
    path, split = _locate(source)
    if path is None:
        found, digest = _from_datasets(_load_hub(source, split), source)
    elif path.is_dir() and _is_saved_dataset(path):
        found, digest = _from_datasets(_load_saved(path, split), source)
    else:
        file = _only_file(path) if path.is_dir() else path
        if split is not None:
            raise DatasetError(f"`{file}` has no splits", where=source, fix=f"leave `:{split}` away")
        found, digest = _read_file(file)
    rows, problems = [], []
    for row in found:
        if isinstance(row, RawRow):
            rows.append(row)
        elif skip_bad_rows:
            problems.append(f"{row.where}: {row.what}")
        else:
            raise row
    if not rows:
        reason = f"none of its {len(problems)} rows can be read; {problems[0]}" if problems else "it holds no rows"
        raise DatasetError(reason, where=source, fix="give a dataset with at least one row")
    return RawDataset(source, rows, digest, tuple(problems))


# --- finding it ---------------------------------------------------------------------------------------------------


def _locate(source: str) -> tuple[Path | None, str | None]:
    """The local path (None: the hub) and the split asked for, if any."""
    if not source.strip():
        raise DatasetError("no dataset is named", where="dataset", fix="give a file, a folder or a hub id org/name")
    local = os.path.expanduser(source)
    special = describe_special(local)
    if special:
        raise DatasetError(
            f"it is {special}", where=source, fix="give an existing file or folder, or a hub id org/name"
        )
    if os.path.exists(local):
        return Path(local), None
    head, _, split = local.rpartition(":")
    if head and split and os.path.exists(head):
        return Path(head), split
    repository, _, split = source.partition(":")
    if HUB_ID.fullmatch(source) and Path(repository).suffix.lower() not in READERS:
        return None, split or "train"
    folder = Path(local).parent
    names = [entry.name for entry in folder.iterdir()] if os.access(folder, os.R_OK) and folder.is_dir() else []
    near = difflib.get_close_matches(Path(local).name, names, n=1)
    fix = f"did you mean `{folder / near[0]}`?" if near else "give an existing file or folder, or a hub id org/name"
    raise DatasetError("there is no such file or folder", where=source, fix=fix)


def _is_saved_dataset(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _only_file(folder: Path) -> Path:
    try:
        entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise DatasetError(
            f"cannot be read: {error.strerror or error}", where=str(folder), fix="see that you may read it"
        ) from None
    files = [entry for entry in entries if entry.suffix.lower() in READERS and entry.is_file()]
    if len(files) == 1:
        return files[0]
    holds = ", ".join(entry.name for entry in entries[:12]) + (", ..." if len(entries) > 12 else "")
    raise DatasetError(
        f"the folder holds {len(files) or 'no'} dataset files and was not saved by `datasets`: {holds or 'empty'}",
        where=str(folder),
        fix="name one file" if files else f"give a folder with one {', '.join(READERS)} file",
    )


# --- reading files: each reader yields rows, and the error in place of a row that is malformed --------------------


def _read_file(path: Path) -> tuple[Iterator[RawRow | DatasetError], str]:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        kind = f"`{path.suffix}` is not a known kind of file" if path.suffix else "the file has no suffix"
        raise DatasetError(kind, where=str(path), fix=f"known kinds are {', '.join(READERS)}")
    try:
        data = atomic.read_bytes(path)
    except OSError as error:
        raise DatasetError(
            f"cannot be read: {error.strerror or error}", where=str(path), fix="see that you may read it"
        ) from None
    if not data.strip():
        raise DatasetError("the file is empty", where=str(path), fix="give a dataset with at least one row")
    if reader is not _read_parquet:
        _refuse_other_encodings(data, path)
    return reader(data.removeprefix(UTF8_BOM), path), hashlib.sha256(data).hexdigest()


def _refuse_other_encodings(data: bytes, path: Path) -> None:
    """Raise DatasetError for UTF-16 and UTF-32, by their marks or by the NUL bytes that no text has in UTF-8."""
    wide = data.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")) or b"\0\0\0" in data[:4]
    if data.startswith(UTF16_BOMS) or wide or b"\0" in data[:2]:
        what = f"the file is UTF-{32 if wide else 16}, not UTF-8"
        raise DatasetError(what, where=f"{path}:1", fix="save it as UTF-8")
    if b"\0" in data and path.suffix.lower() == ".csv":
        line = 1 + data.count(b"\n", 0, data.index(b"\0"))
        raise DatasetError("a NUL byte stands in the text", where=f"{path}:{line}", fix="save the file as UTF-8 text")


def _read_jsonl(data: bytes, path: Path) -> Iterator[RawRow | DatasetError]:
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            yield _json_row(_parse_json(_decode(line, path, number)), where, SURROGATE.search(line) is not None)
        except (ValueError, RecursionError) as error:
            yield bad_row(f"not a JSON object on one line: {_json_reason(error)}", where)
        except DatasetError as error:
            yield error


def _read_json(data: bytes, path: Path) -> Iterator[RawRow | DatasetError]:
    try:
        content = _parse_json(_decode(data, path))
    except (ValueError, RecursionError) as error:
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        lines = isinstance(error, json.JSONDecodeError) and error.msg == "Extra data" and data.lstrip()[:1] == b"{"
        fix = "it looks like one object per line: rename it to .jsonl" if lines else "write an array of objects"
        raise DatasetError(f"not valid JSON: {_json_reason(error)}", where=f"{path}{line}", fix=fix) from None
    items = content.get("data") if isinstance(content, dict) else content
    if not isinstance(items, list):
        raise DatasetError(
            f"expected an array of objects, found {named(content)}",
            where=str(path),
            fix='write [{...}, {...}] or {"data": [{...}, {...}]}; one object per line belongs into a .jsonl file',
        )
    surrogates = SURROGATE.search(data) is not None
    for number, item in enumerate(items, 1):
        try:
            yield _json_row(item, f"{path}: row {number}", surrogates)
        except RecursionError as error:
            yield bad_row(f"not a JSON object: {_json_reason(error)}", f"{path}: row {number}")


def _json_row(item: object, where: str, surrogates: bool) -> RawRow | DatasetError:
    if not isinstance(item, dict):
        return bad_row(f"expected a JSON object, found {named(item)}", where)
    if surrogates:  # half a pair would be text that no tokenizer and no UTF-8 file takes
        try:
            json.dumps(item, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return bad_row("a \\u escape spells half a character (a lone surrogate)", where)
    return RawRow(item, where)


def _parse_json(text: str) -> object:
    """JSON as a Python value; raises ValueError also for a name that an object has twice."""
    return json.loads(text, object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{listed(sorted({n for n in names if names.count(n) > 1}))} is given twice")
    return found


def _json_reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _read_csv(data: bytes, path: Path) -> Iterator[RawRow | DatasetError]:
    records = _csv_records(_decode(data, path), path)
    header_line, header = next(records, (1, []))
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DatasetError(f"the header has {listed(twice)} twice", where=f"{path}:{header_line}", fix="rename one")
    for line, cells in records:
        if len(cells) == len(header):
            yield RawRow(dict(zip(header, cells, strict=True)), f"{path}:{line}")
        else:
            yield bad_row(f"the row has {len(cells)} cells, the header has {len(header)}", f"{path}:{line}")


def _csv_records(text: str, path: Path) -> Iterator[tuple[int, list[str]]]:
    """Each record that is not blank, with the physical line it starts on."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    while True:
        line = reader.line_num + 1
        with _long_cells():
            try:
                cells = next(reader, None)
            except csv.Error as error:  # a broken quote swallows what follows, so there is no next row to skip to
                raise DatasetError(
                    f"not valid CSV: {error}", where=f"{path}:{line}", fix='quote cells with "...", doubling quotes'
                ) from None
        if cells is None:
            return
        if cells:
            yield line, cells


@contextlib.contextmanager
def _long_cells() -> Iterator[None]:
    """Lift csv's limit of 128 KiB per cell, which is global to the process, for a moment."""
    before = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _read_parquet(data: bytes, path: Path) -> Iterator[RawRow | DatasetError]:
    pyarrow, parquet = (_import(name, str(path)) for name in ("pyarrow", "pyarrow.parquet"))
    try:
        table = parquet.ParquetFile(pyarrow.BufferReader(data)).read()
        if len(set(table.column_names)) < len(table.column_names):
            raise DatasetError("two columns have the same name", where=str(path), fix="rename one")
        rows = list(table_rows(table))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DatasetError(
            f"not a readable parquet file: {first_line(error)}", where=str(path), fix="write or download it again"
        ) from None
    for number, values in enumerate(rows, 1):
        yield RawRow(values, f"{path}: row {number}")


def _decode(data: bytes, path: Path, line: int = 1) -> str:
    """`data`, which begins on `line`, as text."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        what = f"byte 0x{data[error.start]:02x} is not UTF-8 text"
        raise DatasetError(what, where=f"{path}:{line}", fix="save the file as UTF-8") from None


READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}


# --- the datasets library -----------------------------------------------------------------------------------------


def _import(library: str, where: str) -> typing.Any:
    """A library that reads this kind of dataset. Raises DatasetError where it cannot be imported."""
    try:
        return importlib.import_module(library)
    except Exception as error:  # a broken installation fails in any way
        package = library.partition(".")[0]
        missing = isinstance(error, ModuleNotFoundError) and error.name == package
        why = "is not installed" if missing else f"cannot be imported: {type(error).__name__}: {first_line(error)}"
        raise DatasetError(
            f"the `{package}` library {why}",
            where=where,
            fix=f"pip install {package}, or give the path of a .jsonl, .json or .csv file",
        ) from None


def _load_saved(folder: Path, split: str | None) -> Iterable:
    datasets = _import("datasets", str(folder))
    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:  # whatever the library trips over, the folder is what is wrong
        raise DatasetError(
            f"not a readable saved dataset: {first_line(error)}", where=str(folder), fix="save it again"
        ) from None
    if not isinstance(found, dict):
        if split is not None:
            raise DatasetError("this saved dataset has no splits", where=str(folder), fix=f"leave `:{split}` away")
        return found
    if (split or "train") not in found:
        raise DatasetError(
            f"there is no split `{split}`" if split else "no split is named and there is no `train`",
            where=str(folder),
            fix=f"choose one: {', '.join(f'{folder}:{name}' for name in found)}",
        )
    return found[split or "train"]


def _load_hub(source: str, split: str | None) -> Iterable:
    datasets = _import("datasets", source)
    repository = source.partition(":")[0]
    try:
        return datasets.load_dataset(repository, split=split)
    except Exception as error:  # the library raises anything from HTTP errors to ValueError here
        offline = isinstance(error, (ConnectionError, TimeoutError)) or type(error).__module__.startswith("httpx")
        reason = "could not be reached" if offline else f"did not give it: {first_line(error)}"
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


# --- cells --------------------------------------------------------------------------------------------------------


def bad_row(what: str, where: str) -> DatasetError:
    """The error of a row that cannot be used."""
    return DatasetError(what, where=where, fix=ROW_FIX)


def check_text(value: object, where: str) -> str:
    """`value` if it is a text that is not blank. Raises DatasetError."""
    if not isinstance(value, str):
        raise bad_row(f"expected text, found {named(value)}", where)
    if not value.strip():
        raise bad_row("the text is empty", where)
    return value


def check_number(value: object, where: str) -> float:
    """`value` as a finite number. Raises DatasetError."""
    if isinstance(value, (str, int, float, Decimal)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            if math.isfinite(number := float(value)):
                return number
    raise bad_row(f"expected a number, found {named(value)}", where)


def check_content(value: object, where: str) -> Content:
    """`value` as text or as messages, whichever it is. Raises DatasetError."""
    return check_messages(value, where) if isinstance(value, list) else check_text(value, where)


def check_messages(value: object, where: str) -> tuple[Message, ...]:
    """A list of {role, content} or ShareGPT {from, value} objects as messages. Raises DatasetError."""
    if not isinstance(value, list):
        raise bad_row(f"expected a list of messages, found {named(value)}", where)
    if not value:
        raise bad_row("the list of messages is empty", where)
    return tuple(_check_message(item, f"{where}[{index}]") for index, item in enumerate(value))


def _check_message(item: object, where: str) -> Message:
    if not isinstance(item, dict):
        raise bad_row(f"expected a message with `role` and `content`, found {named(item)}", where)
    role_key, content_key = ("from", "value") if "from" in item and "role" not in item else ("role", "content")
    if item.get("tool_calls"):
        raise bad_row("tool calls are not supported; write what the assistant says into `content`", where)
    for key in (role_key, content_key):
        if not isinstance(item.get(key), str):
            raise bad_row(f"expected text in `{key}`, found {named(item.get(key))}", where)
    role = ROLE_ALIASES.get(item[role_key], item[role_key])
    if role not in ROLES:
        raise bad_row(f"unknown role `{quoted(role)}`; roles are {', '.join(ROLES)}", where)
    return {"role": role, "content": item[content_key]}


def check_prompt(content: Content, where: str) -> Content:
    """`content` if a response can follow it. Raises DatasetError."""
    if isinstance(content, str):
        return content
    if content[-1]["role"] == "assistant":
        raise bad_row("the prompt ends with an assistant turn, so there is nothing to answer", where)
    if not any(message["content"].strip() for message in content):
        raise bad_row("every message of the prompt is empty", where)
    return content


def quoted(name: object) -> str:
    """A name as a file has it, short and in one line, for messages."""
    text = str(name) if str(name).isprintable() else repr(str(name))[1:-1]
    return text if len(text) <= NAME_SHOWN else text[:NAME_SHOWN] + "..."


def listed(names: Iterable[str]) -> str:
    """Names in backticks, for messages; of many the first few."""
    names = list(names)
    more = f" and {len(names) - NAMES_LISTED} more" if len(names) > NAMES_LISTED else ""
    return ", ".join(f"`{quoted(name)}`" for name in names[:NAMES_LISTED]) + more or "no fields"


def named(value: object) -> str:
    """What a value is, in JSON's words."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, (int, float)):
        return f"the number {value}"
    if isinstance(value, str):
        return f"the text {value[:40]!r}" + ("..." if len(value) > 40 else "")
    if hasattr(value, "as_py"):  # of Arrow: a date, a time and the like
        return f"a {value.type}"  # type: ignore[attr-defined]
    names = {dict: "an object", list: "a list"}
    return names.get(type(value), f"a {type(value).__name__}")


def first_line(error: Exception) -> str:
    """An exception's message, cut to its first line."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
