"""Readers of dataset files: each yields raw rows, with an error in place of each malformed row."""

from __future__ import annotations

import csv
import hashlib
import importlib
import io
import json
import re
import typing
from collections.abc import Iterator
from pathlib import Path

from stages.data.cells import table_rows
from stages.data.raw_rows import RawRow, bad_row, first_line, listed, named
from stages.errors import DatasetError
from stages.reading import read_bytes

UTF8_BOM, UTF16_BOMS = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # in JSON, half of an escaped character


def read_file(path: Path) -> tuple[Iterator[RawRow | DatasetError], str]:
    """The rows of a dataset file, and its sha256. Raises DatasetError."""
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        kind = f"`{path.suffix}` is not a known kind of file" if path.suffix else "the file has no suffix"
        raise DatasetError(kind, where=str(path), fix=f"give a file that ends in {', '.join(READERS)}")
    try:
        data = read_bytes(path)
    except OSError as error:
        what = f"cannot be read: {error.strerror or error}"
        raise DatasetError(what, where=str(path), fix="check its permissions") from None
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
        raise DatasetError("the text contains a NUL byte", where=f"{path}:{line}", fix="save the file as UTF-8 text")


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
        line, fix = "", "write an array of objects"
        if isinstance(error, json.JSONDecodeError):
            line = f":{error.lineno}"
            if error.msg == "Extra data" and data.lstrip()[:1] == b"{":
                fix = "rename it to .jsonl, since it has one object per line"
        raise DatasetError(f"not valid JSON: {_json_reason(error)}", where=f"{path}{line}", fix=fix) from None
    items = content.get("data") if isinstance(content, dict) else content
    if not isinstance(items, list):
        what = f"expected an array of objects, found {named(content)}"
        fix = 'write [{...}, {...}] or {"data": [{...}, {...}]}; rename a file with one object per line to .jsonl'
        raise DatasetError(what, where=str(path), fix=fix)
    surrogates = SURROGATE.search(data) is not None
    for number, item in enumerate(items, 1):
        try:
            yield _json_row(item, f"{path}: row {number}", surrogates)
        except RecursionError as error:
            yield bad_row(f"not a JSON object: {_json_reason(error)}", f"{path}: row {number}")


def _json_row(item: object, where: str, surrogates: bool) -> RawRow | DatasetError:
    if not isinstance(item, dict):
        return bad_row(f"expected a JSON object, found {named(item)}", where)
    if surrogates:  # a lone surrogate is text that no tokenizer accepts and no UTF-8 file can store
        try:
            json.dumps(item, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return bad_row("a \\u escape spells half a character (a lone surrogate)", where)
    return RawRow(item, where)


def _parse_json(text: str) -> object:
    """JSON as a Python value; raises ValueError also for a key that an object has twice."""

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError(f"{_list_doubles([name for name, _ in pairs])} is given twice")
        return dict(pairs)

    return json.loads(text, object_pairs_hook=unique)


def _list_doubles(names: list[str]) -> str:
    """The names that are given more than once, for messages; "" if there are none."""
    doubles = sorted({name for name in names if names.count(name) > 1})
    return listed(doubles) if doubles else ""


def _json_reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _read_csv(data: bytes, path: Path) -> Iterator[RawRow | DatasetError]:
    records = _csv_records(_decode(data, path), path)
    header_line, header = next(records, (1, []))
    doubles = _list_doubles(header)
    if doubles:
        raise DatasetError(f"the header has {doubles} twice", where=f"{path}:{header_line}", fix="rename one")
    for line, cells in records:
        if len(cells) == len(header):
            yield RawRow(dict(zip(header, cells, strict=True)), f"{path}:{line}")
        else:
            yield bad_row(f"the row has {len(cells)} cells, the header has {len(header)}", f"{path}:{line}")


def _csv_records(text: str, path: Path) -> Iterator[tuple[int, list[str]]]:
    """Each record that is not blank, with the number of its first line."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    while True:
        line = reader.line_num + 1
        limit = csv.field_size_limit(2**31 - 1)  # 128 KiB per cell by default; global to the process, so restored below
        try:
            cells = next(reader, None)
        except csv.Error as error:  # the text after a broken quote is one cell, so there is no next row to skip to
            raise DatasetError(
                f"not valid CSV: {error}", where=f"{path}:{line}", fix='quote cells with "...", doubling quotes'
            ) from None
        finally:
            csv.field_size_limit(limit)
        if cells is None:
            return
        if cells:
            yield line, cells


def _read_parquet(data: bytes, path: Path) -> Iterator[RawRow | DatasetError]:
    pyarrow, parquet = (import_library(name, str(path)) for name in ("pyarrow", "pyarrow.parquet"))
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
    """UTF-8 `data` as text. Raises DatasetError, counting lines from `line`."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        what = f"byte 0x{data[error.start]:02x} is not UTF-8 text"
        raise DatasetError(what, where=f"{path}:{line}", fix="save the file as UTF-8") from None


READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}


def import_library(library: str, where: str) -> typing.Any:
    """An imported library that reads this kind of dataset. Raises DatasetError if the import fails."""
    try:
        return importlib.import_module(library)
    except Exception as error:  # a broken installation fails in any way
        package = library.partition(".")[0]
        missing = isinstance(error, ModuleNotFoundError) and error.name == package
        why = "is not installed" if missing else f"cannot be imported: {type(error).__name__}: {first_line(error)}"
        what = f"the `{package}` library {why}"
        fix = f"run pip install {package}, or give the path of a .jsonl, .json or .csv file"
        raise DatasetError(what, where=where, fix=fix) from None
