"""Cells of a dataset as JSON, for the columns of reward functions and the rows that `rlhf sample` writes.

A cell is null, true, false, a number, text, a list, or an object with text keys. Other types are converted:

    NaN, infinity                        null
    decimal                              number
    date, time, timestamp                ISO 8601 text, a timestamp with a zone in that zone
    duration                             seconds
    bytes                                base64 text
    UUID                                 text
    map                                  object; keys that are not text as their JSON
    category, numpy array                their values

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
    """A cell as JSON. Raises ValueError, with the reason, for a value that has no JSON form."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("the text holds half a character (a lone surrogate)") from None
        return value
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if not isinstance(value, (dict, list, tuple)):
        return _json_leaf(value, depth)
    if depth >= DEEPEST:
        raise ValueError(f"nested more than {DEEPEST} levels deep")
    if not isinstance(value, dict):
        return [json_value(item, depth + 1) for item in value]
    keys = (json_value(key) for key in value)
    names = [key if isinstance(key, str) else json.dumps(key) for key in keys]
    if len(set(names)) < len(names):
        raise ValueError("two keys of an object are the same text")
    return {name: json_value(item, depth + 1) for name, item in zip(names, value.values(), strict=True)}


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
    if hasattr(value, "tolist"):  # a numpy scalar or array
        return json_value(value.tolist(), depth + 1)
    raise ValueError(f"a {type(value).__name__} has no JSON form")


# --- Arrow tables: parquet files and saved datasets -----------------------------------------------------------------


def table_rows(table: pyarrow.Table) -> Iterator[dict[str, object]]:
    """Rows of a table: lists and objects of Python values; dates, times and the like remain Arrow scalars.

    Python has no year 10,000 and not every time zone: such a cell is read all the same, and `json_value` gives
    its text. Raises ValueError for an object with two fields of one name.
    """
    columns = [
        column.to_pylist() if _is_plain(column.type) else [_value_of(scalar) for scalar in column]
        for column in table.itercolumns()
    ]
    return (dict(zip(table.column_names, cells, strict=True)) for cells in zip(*columns, strict=True))


def _is_plain(kind: pyarrow.DataType) -> bool:
    """True for types all of whose values exist in Python."""
    import pyarrow
    from pyarrow import types

    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind) or types.is_dictionary(kind):
        return _is_plain(kind.value_type)
    if types.is_struct(kind):
        return all(_is_plain(field.type) for field in kind)
    return not (types.is_nested(kind) or types.is_temporal(kind) or isinstance(kind, pyarrow.BaseExtensionType))


def _value_of(scalar: typing.Any) -> object:
    """A scalar as a Python value; a leaf that might not exist in Python as it is."""
    import pyarrow
    from pyarrow import types

    kind = scalar.type
    if not scalar.is_valid:
        return None
    if types.is_dictionary(kind) or (
        isinstance(kind, pyarrow.BaseExtensionType) and kind.extension_name != "arrow.uuid"
    ):
        return _value_of(scalar.value)
    if types.is_map(kind):
        keys, items = ([_value_of(item) for item in scalar.values.field(place)] for place in (0, 1))
        entries = dict(zip(keys, items, strict=True))
        if len(entries) < len(keys):
            raise ValueError("a map has one key twice")
        return entries
    if types.is_struct(kind):
        names = [field.name for field in kind]
        if len(set(names)) < len(names):
            raise ValueError("an object has two fields of one name")
        return {name: _value_of(scalar[name]) for name in names}
    if types.is_nested(kind) and hasattr(scalar, "values"):
        return [_value_of(item) for item in scalar.values]
    return scalar.as_py() if _is_plain(kind) else scalar


def _json_scalar(scalar: typing.Any) -> object:
    """JSON for an Arrow scalar; Arrow's text, in UTC, for a time that Python cannot represent."""
    import pyarrow
    from pyarrow import types

    kind = scalar.type
    if types.is_duration(kind):
        whole, rest = divmod(scalar.value, _PER_SECOND[kind.unit])
        return scalar.value / _PER_SECOND[kind.unit] if rest else whole
    try:
        return json_value(scalar.as_py())
    except (OverflowError, ValueError, KeyError):  # the year 10,000, an unknown time zone
        plain = scalar.cast(pyarrow.timestamp("s"), safe=False) if types.is_timestamp(kind) else scalar
        return plain.cast(pyarrow.string()).as_py().replace(" ", "T")
