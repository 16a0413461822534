"""stages/data/cells.py: cells of every type become JSON when a dataset is read, the same way for every reader."""

from __future__ import annotations

import datetime
import decimal
import json
import math
import uuid

import numpy
import pyarrow
import pytest
from pyarrow import parquet

from stages.data.cells import DEEPEST, json_value
from stages.data.rows import read_demonstrations, read_prompts
from stages.errors import DatasetError
from tests.commands import SHORT, lines_of, refused, result
from tests.tiny import write_jsonl

YEAR_10000 = 253_402_300_800  # seconds since 1970 at 10000-01-01T00:00:00
BERLIN = datetime.timezone(datetime.timedelta(hours=1))


def integers(kind, *values):
    return pyarrow.array(values, pyarrow.int64() if kind.bit_width == 64 else pyarrow.int32()).cast(kind)


def uuids(*values):
    return pyarrow.ExtensionArray.from_storage(pyarrow.uuid(), pyarrow.array(values, pyarrow.binary(16)))


# name: (column of one row, its JSON)
COLUMNS = {
    "nanoseconds": (integers(pyarrow.timestamp("ns"), 10**18 + 1), "2001-09-09T01:46:40.000000001"),
    "microseconds": (integers(pyarrow.timestamp("us"), 10**15 + 1), "2001-09-09T01:46:40.000001"),
    "seconds": (integers(pyarrow.timestamp("s"), 10**9), "2001-09-09T01:46:40"),
    "before 1970": (integers(pyarrow.timestamp("ms"), -1), "1969-12-31T23:59:59.999000"),
    "winter in Berlin": (integers(pyarrow.timestamp("s", "Europe/Berlin"), 0), "1970-01-01T01:00:00+01:00"),
    "summer in Berlin": (integers(pyarrow.timestamp("s", "Europe/Berlin"), 10**9), "2001-09-09T03:46:40+02:00"),
    "an offset": (integers(pyarrow.timestamp("ns", "-05:30"), 0), "1969-12-31T18:30:00-05:30"),
    "a zone that nobody knows": (integers(pyarrow.timestamp("s", "Mars/Olympus"), 0), "1970-01-01T00:00:00"),
    "year 10000": (integers(pyarrow.timestamp("s"), YEAR_10000), "10000-01-01T00:00:00"),
    "year 10000 in a zone": (integers(pyarrow.timestamp("s", "+01:00"), YEAR_10000), "10000-01-01T00:00:00"),
    "year 0": (integers(pyarrow.timestamp("s"), -62_135_596_801), "0000-12-31T23:59:59"),
    "a far date": (integers(pyarrow.date32(), 2_932_898), "10000-01-02"),
    "a date": (pyarrow.array([datetime.date(2020, 2, 29)]), "2020-02-29"),
    "a date in milliseconds": (integers(pyarrow.date64(), 86_400_000), "1970-01-02"),
    "a time": (pyarrow.array([datetime.time(1, 2, 3)]), "01:02:03"),
    "a time in nanoseconds": (integers(pyarrow.time64("ns"), 10**9 + 1_000), "00:00:01.000001"),
    "a duration": (integers(pyarrow.duration("ns"), 1_500_000_000), 1.5),
    "a whole duration": (integers(pyarrow.duration("ms"), 3000), 3),
    "a decimal": (pyarrow.array([decimal.Decimal("12.50")], pyarrow.decimal128(10, 2)), 12.5),
    "a large decimal": (pyarrow.array([decimal.Decimal(10**50)], pyarrow.decimal256(60, 0)), 10**50),
    "bytes": (pyarrow.array([b"\xff\x00"]), "/wA="),
    "a picture": (pyarrow.array([{"bytes": b"\x89", "path": "a"}]), {"bytes": "iQ==", "path": "a"}),
    "NaN": (pyarrow.array([math.nan]), None),
    "infinity": (pyarrow.array([[math.inf, 1.0]]), [None, 1.0]),
    "null": (pyarrow.array([None], pyarrow.timestamp("ns")), None),
    "a map": (pyarrow.array([[("a", 1)]], pyarrow.map_(pyarrow.string(), pyarrow.int64())), {"a": 1}),
    "a map from numbers": (
        pyarrow.array([[(1, datetime.date(2020, 1, 1))]], pyarrow.map_(pyarrow.int64(), pyarrow.date32())),
        {"1": "2020-01-01"},
    ),
    "a category": (pyarrow.array(["x"]).dictionary_encode(), "x"),
    "a category of dates": (pyarrow.array([datetime.date(2020, 1, 1)]).dictionary_encode(), "2020-01-01"),
    "a UUID": (uuids(uuid.UUID(int=5).bytes), "00000000-0000-0000-0000-000000000005"),
    "64 bits without a sign": (pyarrow.array([2**64 - 1], pyarrow.uint64()), 2**64 - 1),
    "half a float": (pyarrow.array([1.5], pyarrow.float16()), 1.5),
    "nested dates": (pyarrow.array([{"a": [{"b": datetime.date(2020, 1, 1)}]}]), {"a": [{"b": "2020-01-01"}]}),
}  # fmt: skip


def parquet_of(place, column):
    parquet.write_table(pyarrow.table({"prompt": ["red"], "about": column}), place)
    return str(place)


@pytest.mark.parametrize("name", COLUMNS)
def test_a_parquet_column_of_any_type_is_json(tmp_path, name):
    column, expected = COLUMNS[name]
    found = read_prompts(parquet_of(tmp_path / "x.parquet", column)).rows[0].columns
    assert found == {"about": expected} and type(found["about"]) is type(expected)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


@pytest.mark.parametrize("name", sorted(COLUMNS.keys() - {"a map", "a map from numbers", "a UUID"}))
def test_a_saved_dataset_gives_the_same(tmp_path, name):
    import datasets

    column, expected = COLUMNS[name]
    datasets.Dataset(pyarrow.table({"prompt": ["red"], "about": column})).save_to_disk(tmp_path / "saved")
    assert read_prompts(str(tmp_path / "saved")).rows[0].columns == {"about": expected}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (numpy.float32(0.5), 0.5),
        (numpy.int64(3), 3),
        (numpy.bool_(True), True),
        (numpy.array([[1, 2]]), [[1, 2]]),
        (numpy.array([numpy.nan]), [None]),
        (numpy.datetime64("2020-01-01"), "2020-01-01"),
        (decimal.Decimal("NaN"), None),
        (datetime.datetime(2020, 1, 1, tzinfo=BERLIN), "2020-01-01T00:00:00+01:00"),
        (datetime.timedelta(minutes=1), 60.0),
        ((1, {2: "b"}), [1, {"2": "b"}]),
        (10**100, 10**100),
        ("ünïcödé 🙂", "ünïcödé 🙂"),
    ],
)
def test_values_of_python_and_numpy(value, expected):
    assert json_value(value) == expected


def deep(levels):
    return json.loads("[" * levels + "]" * levels)


def recursive():
    found = {}
    found["self"] = [found]
    return found


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (deep(DEEPEST + 1), "nested more than 100 levels deep"),
        (recursive(), "nested more than 100 levels deep"),
        ("half \ud800", "lone surrogate"),
        ({"half \ud800": 1}, "lone surrogate"),
        ({1: "a", "1": "b"}, "two keys of an object are the same text"),
        (object(), "a object has no JSON form"),
    ],
)
def test_what_has_no_json_form_is_refused_in_words(value, says):
    with pytest.raises(ValueError, match=says):
        json_value(value)


def test_the_deepest_value_that_is_taken_can_be_written():
    assert json.dumps(json_value(deep(DEEPEST))).count("[") == DEEPEST


# --- through the commands -----------------------------------------------------------------------------------------


def test_sample_writes_columns_of_every_type(chain, tmp_path):
    columns = {name: column for name, (column, _) in COLUMNS.items()}
    data = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.table({"prompt": ["red"], **columns}), data)
    result("sample", "--model", chain().base, "--dataset", data, "--output", tmp_path / "out.jsonl", *SHORT)
    (row,) = lines_of(tmp_path / "out.jsonl")
    assert {name: row[name] for name in COLUMNS} == {name: expected for name, (_, expected) in COLUMNS.items()}


def test_a_cell_too_deep_is_named_before_anything_is_sampled(chain, tmp_path):
    rows = [{"prompt": "red", "about": 1}, {"prompt": "blue", "about": deep(400)}]
    data = write_jsonl(tmp_path / "x.jsonl", rows)
    line = ("sample", "--model", chain().base, "--dataset", data, "--output", tmp_path / "out.jsonl", *SHORT)
    said = refused(*line)
    assert f"{data}:2: about: nested more than 100 levels deep" in said and "--skip-bad-rows" in said
    assert "sample 2/2" not in said and not (tmp_path / "out.jsonl").exists()
    assert result(*line, "--skip-bad-rows")["responses"] == 1


def test_dates_beyond_python_stop_no_other_stage(tmp_path):
    """A column that a stage has no use for must not keep it from reading the rest."""
    table = {"prompt": ["a"], "completion": ["b"], "made": COLUMNS["year 10000"][0]}
    parquet.write_table(pyarrow.table(table), tmp_path / "x.parquet")
    (row,) = read_demonstrations(str(tmp_path / "x.parquet")).rows
    assert (row.prompt, row.completion) == ("a", "b")


def test_messages_may_carry_a_time(tmp_path):
    said = pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string()), ("at", pyarrow.timestamp("ns"))])
    turns = [[{"role": "user", "content": "red", "at": 1}]]
    parquet.write_table(pyarrow.table({"prompt": pyarrow.array(turns, pyarrow.list_(said))}), tmp_path / "x.parquet")
    assert read_prompts(str(tmp_path / "x.parquet")).rows[0].prompt == ({"role": "user", "content": "red"},)


@pytest.mark.parametrize(("name", "kind"), [("a date", "date32"), ("bytes", "bytes"), ("nanoseconds", "timestamp")])
def test_a_prompt_is_still_text(tmp_path, name, kind):
    parquet.write_table(pyarrow.table({"prompt": COLUMNS[name][0]}), tmp_path / "x.parquet")
    with pytest.raises(DatasetError, match=f"expected text, found a {kind}"):
        read_prompts(str(tmp_path / "x.parquet"))
