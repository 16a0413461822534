"""Cells of a dataset as JSON: one rule for what reward functions are handed and what `rlhf sample` writes.

A cell is null, true, false, a number, text, a list, or an object with text keys. What other files hold becomes:

    NaN, infinity                        null
    decimal                              number
    date, time, timestamp                ISO 8601 text, a timestamp with a zone in that zone
    duration                             seconds
    bytes                                base64 text
    UUID                                 text
    map                                  object; keys that are no text as their JSON
    category, array of numpy             their values

Objects and lists may be nested `DEEPEST` levels deep.
"""

from __future__ import annotations

import base64
import datetime
import decimal
import json
import math
import typing
import uuid
from collections.abc import Iterator

from stages.reading import DEEPEST

if typing.TYPE_CHECKING:
    import pyarrow

_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


def json_value(value: object, depth: int = 0) -> object:
    """A cell as JSON. Raises ValueError, in words, for what has no JSON form."""
    if isinstance(value, str):
        if not value.isascii():
            _check_unicode(value)
        return value
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (dict, list, tuple)):
        if depth >= DEEPEST:
            raise ValueError(f"nested more than {DEEPEST} levels deep")
        return _json_object(value, depth) if isinstance(value, dict) else [json_value(v, depth + 1) for v in value]
    return _json_leaf(value, depth)


def _json_object(value: dict, depth: int) -> dict[str, object]:
    found = {_json_key(key): json_value(item, depth + 1) for key, item in value.items()}
    if len(found) < len(value):
        raise ValueError("two keys of an object are the same text")
    return found


def _json_key(key: object) -> str:
    plain = json_value(key)
    return plain if isinstance(plain, str) else json.dumps(plain)


def _check_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("the text holds half a character (a lone surrogate)") from None


def _json_leaf(value: object, depth: int) -> object:
    """JSON for a value of a type that JSON does not have."""
    if isinstance(value, decimal.Decimal):
        if not value.is_finite():
            return None
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, (bytes, bytearray, memoryview)):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, uuid.UUID):
        return str(value)
    if hasattr(value, "as_py"):
        return _json_scalar(value)
    if hasattr(value, "tolist"):  # a scalar or an array of numpy
        return json_value(value.tolist(), depth + 1)
    raise ValueError(f"a {type(value).__name__} has no JSON form")


# --- Arrow tables: parquet files and saved datasets -----------------------------------------------------------------


def table_rows(table: pyarrow.Table) -> Iterator[dict[str, object]]:
    """Rows of a table: lists and objects of Python's values; dates, times and the like stay Arrow's own scalars.

    Python has no year 10,000 and no zone it does not know: such a cell is read all the same, and `json_value` gives
    its text. Raises ValueError for an object with two fields of one name.
    """
    columns = [_column_values(table.column(place)) for place in range(table.num_columns)]
    return (dict(zip(table.column_names, cells, strict=True)) for cells in zip(*columns, strict=True))


def _column_values(column: pyarrow.ChunkedArray) -> list[object]:
    return column.to_pylist() if _is_plain(column.type) else [_value_of(scalar) for scalar in column]


def _is_plain(kind: pyarrow.DataType) -> bool:
    """True for types whose every value Python has."""
    from pyarrow import types

    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _is_plain(kind.value_type)
    if types.is_struct(kind):
        return all(_is_plain(kind.field(place).type) for place in range(kind.num_fields))
    if types.is_dictionary(kind):
        return _is_plain(kind.value_type)
    text = (types.is_string, types.is_large_string, types.is_string_view)
    binary = (types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary)
    others = (types.is_null, types.is_boolean, types.is_integer, types.is_floating, types.is_decimal)
    return any(matches(kind) for matches in (*text, *binary, *others))


def _value_of(scalar: typing.Any) -> object:
    """A scalar as Python's value; a leaf that Python might not have as it is."""
    import pyarrow
    from pyarrow import types

    kind = scalar.type
    if not scalar.is_valid:
        return None
    if isinstance(kind, pyarrow.BaseExtensionType) and kind.extension_name != "arrow.uuid":
        return _value_of(scalar.value)
    if types.is_dictionary(kind):
        return _value_of(scalar.value)
    if types.is_map(kind):
        entries = scalar.values
        keys, items = ([_value_of(s) for s in entries.field(place)] for place in (0, 1))
        found = dict(zip(keys, items, strict=True))
        if len(found) < len(keys):
            raise ValueError("a map has one key twice")
        return found
    if types.is_struct(kind):
        names = [kind.field(place).name for place in range(kind.num_fields)]
        if len(set(names)) < len(names):
            raise ValueError("an object has two fields of one name")
        return {name: _value_of(scalar[name]) for name in names}
    if types.is_nested(kind) and hasattr(scalar, "values"):
        return [_value_of(item) for item in scalar.values]
    return scalar.as_py() if _is_plain(kind) else scalar


def _json_scalar(scalar: typing.Any) -> object:
    """JSON for an Arrow scalar that `table_rows` left as it was; Arrow's text, in UTC, of a time that Python lacks."""
    import pyarrow
    from pyarrow import types

    kind = scalar.type
    if types.is_duration(kind):
        whole, rest = divmod(scalar.value, _PER_SECOND[kind.unit])
        return scalar.value / _PER_SECOND[kind.unit] if rest else whole
    try:
        return json_value(scalar.as_py())
    except (OverflowError, ValueError, KeyError):  # the year 10,000, a zone that nobody knows
        plain = scalar.cast(pyarrow.timestamp("s"), safe=False) if types.is_timestamp(kind) else scalar
        return plain.cast(pyarrow.string()).as_py().replace(" ", "T")
