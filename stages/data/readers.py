"""Readers of dataset files: each yields the rows, and the error in place of a row that is malformed."""

from __future__ import annotations

import contextlib
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
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        kind = f"`{path.suffix}` is not a known kind of file" if path.suffix else "the file has no suffix"
        raise DatasetError(kind, where=str(path), fix=f"known kinds are {', '.join(READERS)}")
    try:
        data = read_bytes(path)
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
    """`data`, which begins on `line`, as text."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        what = f"byte 0x{data[error.start]:02x} is not UTF-8 text"
        raise DatasetError(what, where=f"{path}:{line}", fix="save the file as UTF-8") from None


READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}


def import_library(library: str, where: str) -> typing.Any:
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
