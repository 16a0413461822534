"""Raw rows: every kind of file, where each row stands, and what is said of files that cannot be read."""

from __future__ import annotations

import csv
import hashlib
import json
import subprocess
import sys
import types

import pyarrow
import pytest

from stages.data.raw_rows import RawRow, check_messages, check_number
from stages.data.sources import read_raw_dataset
from stages.errors import DatasetError


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return str(path)


def refuse(source, **options):
    with pytest.raises(DatasetError) as caught:
        read_raw_dataset(source, **options)
    return caught.value


# --- jsonl --------------------------------------------------------------------------------------------------------


def test_jsonl_gives_each_row_its_line_and_skips_blank_lines(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"prompt": " x\\n"}\n\n   \n{"prompt": "y", "n": 1}\n')
    found = read_raw_dataset(path)
    assert found.rows == [RawRow({"prompt": " x\n"}, f"{path}:1"), RawRow({"prompt": "y", "n": 1}, f"{path}:4")]
    assert found.name == path
    assert found.problems == ()


def test_the_digest_is_the_sha256_of_the_file(tmp_path):
    content = b'\xef\xbb\xbf{"a": 1}\n'
    assert read_raw_dataset(write(tmp_path, "a.jsonl", content)).digest == hashlib.sha256(content).hexdigest()


def test_a_byte_order_mark_and_windows_line_ends_are_tolerated(tmp_path):
    path = write(tmp_path, "a.jsonl", b'\xef\xbb\xbf{"a": "x"}\r\n{"a": "y"}\r\n')
    assert [row.values for row in read_raw_dataset(path).rows] == [{"a": "x"}, {"a": "y"}]


def test_a_unicode_line_separator_inside_a_text_does_not_end_the_line(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"a": "x\u2028y\u0085z"}\n{"a": 2}\n')
    assert [row.values["a"] for row in read_raw_dataset(path).rows] == ["x\u2028y\u0085z", 2]


def test_malformed_json_names_its_line(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"a": 1}\n{"a": \n')
    error = refuse(path)
    assert error.where == f"{path}:2"
    assert "Expecting value at column" in error.what
    assert "--skip-bad-rows" in error.fix


def test_a_line_that_is_no_object_is_refused(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"a": 1}\n[1, 2]\n')
    error = refuse(path)
    assert (error.where, error.what) == (f"{path}:2", "expected a JSON object, found a list")


def test_bytes_that_are_not_utf8_name_their_line(tmp_path):
    path = write(tmp_path, "a.jsonl", b'{"a": 1}\n\n{"a": "caf\xe9"}\n')
    error = refuse(path)
    assert (error.where, error.what) == (f"{path}:3", "byte 0xe9 is not UTF-8 text")
    assert error.fix == "save the file as UTF-8"


def test_utf16_is_recognised(tmp_path):
    error = refuse(write(tmp_path, "a.jsonl", '{"a": 1}\n'.encode("utf-16")))
    assert "UTF-16" in error.what


def test_nan_is_tolerated_as_a_value(tmp_path):
    value = read_raw_dataset(write(tmp_path, "a.jsonl", '{"a": NaN}\n')).rows[0].values["a"]
    assert value != value


def test_a_lone_surrogate_is_refused_and_a_pair_is_not(tmp_path):
    good = write(tmp_path, "good.jsonl", '{"a": "\\ud83d\\ude00"}\n')
    assert read_raw_dataset(good).rows[0].values == {"a": "\U0001f600"}
    bad = write(tmp_path, "bad.jsonl", '{"a": "\\ud83d"}\n')
    error = refuse(bad)
    assert error.where == f"{bad}:1"
    assert "surrogate" in error.what


def test_json_nested_too_deeply_is_a_bad_row_and_not_a_crash(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"a": ' + "[" * 200_000 + "\n")
    assert refuse(path).where == f"{path}:1"


def test_skipping_drops_unreadable_rows_and_says_which(tmp_path):
    path = write(tmp_path, "a.jsonl", b'{"a": 1}\noops\n[]\n{"a": "\xff"}\n{"a": 2}\n')
    found = read_raw_dataset(path, skip_bad_rows=True)
    assert [row.where for row in found.rows] == [f"{path}:1", f"{path}:5"]
    assert [problem.split(": ")[0] for problem in found.problems] == [f"{path}:2", f"{path}:3", f"{path}:4"]


def test_skipping_every_row_is_an_error(tmp_path):
    path = write(tmp_path, "a.jsonl", "oops\nno\n")
    error = refuse(path, skip_bad_rows=True)
    assert "none of its 2 rows can be read" in error.what
    assert f"{path}:1" in error.what


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_refused(tmp_path, name, content):
    path = write(tmp_path, name, content)
    error = refuse(path)
    assert (error.where, error.what) == (path, "the file is empty")


# --- json ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ['[{"a": 1}, {"a": 2}]', '{"data": [{"a": 1}, {"a": 2}], "version": 3}'])
def test_json_takes_an_array_or_data(tmp_path, content):
    path = write(tmp_path, "a.json", content)
    assert read_raw_dataset(path).rows == [RawRow({"a": 1}, f"{path}: row 1"), RawRow({"a": 2}, f"{path}: row 2")]


def test_a_json_item_that_is_no_object_names_its_row(tmp_path):
    path = write(tmp_path, "a.json", '[{"a": 1}, "two"]')
    error = refuse(path)
    assert (error.where, error.what) == (f"{path}: row 2", "expected a JSON object, found the text 'two'")
    assert len(read_raw_dataset(path, skip_bad_rows=True).rows) == 1


def test_malformed_json_file_names_its_line(tmp_path):
    path = write(tmp_path, "a.json", '[{"a": 1},\n {"a": }\n]')
    assert refuse(path).where == f"{path}:2"


def test_json_lines_in_a_json_file_are_told_to_be_jsonl(tmp_path):
    assert ".jsonl" in refuse(write(tmp_path, "a.json", '{"a": 1}\n{"a": 2}\n')).fix


def test_a_json_object_without_data_is_refused(tmp_path):
    assert "expected an array of objects" in refuse(write(tmp_path, "a.json", '{"rows": []}')).what


def test_an_empty_json_array_holds_no_rows(tmp_path):
    assert refuse(write(tmp_path, "a.json", "[]")).what == "it holds no rows"


# --- csv ----------------------------------------------------------------------------------------------------------


def test_csv_gives_the_line_a_record_starts_on(tmp_path):
    path = write(tmp_path, "a.csv", 'prompt,completion\n"two\nlines","say ""hi"""\n\n x , y\n')
    assert read_raw_dataset(path).rows == [
        RawRow({"prompt": "two\nlines", "completion": 'say "hi"'}, f"{path}:2"),
        RawRow({"prompt": " x ", "completion": " y"}, f"{path}:5"),
    ]


def test_csv_with_byte_order_mark_keeps_the_first_column_name(tmp_path):
    path = write(tmp_path, "a.csv", b"\xef\xbb\xbfprompt,b\r\nx,y\r\n")
    assert read_raw_dataset(path).rows == [RawRow({"prompt": "x", "b": "y"}, f"{path}:2")]


@pytest.mark.parametrize(("row", "cells"), [("x", 1), ("x,y,z", 3)])
def test_csv_with_too_few_or_too_many_cells_names_its_line(tmp_path, row, cells):
    path = write(tmp_path, "a.csv", f"a,b\n1,2\n{row}\n3,4\n")
    error = refuse(path)
    assert (error.where, error.what) == (f"{path}:3", f"the row has {cells} cells, the header has 2")
    assert [r.where for r in read_raw_dataset(path, skip_bad_rows=True).rows] == [f"{path}:2", f"{path}:4"]


def test_csv_with_a_column_twice_is_refused(tmp_path):
    path = write(tmp_path, "a.csv", "a,b,a\n1,2,3\n")
    error = refuse(path)
    assert (error.where, error.what) == (f"{path}:1", "the header has `a` twice")


def test_csv_with_a_header_alone_holds_no_rows(tmp_path):
    assert refuse(write(tmp_path, "a.csv", "a,b\n")).what == "it holds no rows"


def test_csv_with_an_open_quote_names_the_line_it_opens_on(tmp_path):
    path = write(tmp_path, "a.csv", 'a,b\n1,2\n3,"four\n5,6\n')
    error = refuse(path)
    assert error.where == f"{path}:3"
    assert "not valid CSV" in error.what


def test_csv_that_is_not_utf8_names_its_line(tmp_path):
    path = write(tmp_path, "a.csv", b"a\nx\ncaf\xe9\n")
    assert refuse(path).where == f"{path}:3"


def test_csv_takes_long_cells_and_leaves_the_process_limit_alone(tmp_path):
    before = csv.field_size_limit()
    path = write(tmp_path, "a.csv", "a\n" + "x" * (before + 1) + "\n")
    assert len(read_raw_dataset(path).rows[0].values["a"]) == before + 1
    assert csv.field_size_limit() == before


# --- parquet and saved datasets -----------------------------------------------------------------------------------


def test_parquet_keeps_nested_values(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = str(tmp_path / "a.parquet")
    rows = [{"messages": [{"role": "user", "content": "hi"}], "n": 1}, {"messages": [], "n": None}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert read_raw_dataset(path).rows == [RawRow(rows[0], f"{path}: row 1"), RawRow(rows[1], f"{path}: row 2")]


def test_damaged_parquet_is_refused(tmp_path):
    pytest.importorskip("pyarrow")
    path = write(tmp_path, "a.parquet", b"PAR1 but not really")
    assert "not a readable parquet file" in refuse(path).what


def test_parquet_with_a_column_twice_is_refused(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table([[1], [2]], names=["a", "a"]), tmp_path / "a.parquet")
    assert refuse(str(tmp_path / "a.parquet")).what == "two columns have the same name"


@pytest.fixture
def saved(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    train = datasets.Dataset.from_list([{"prompt": "x"}, {"prompt": "y"}])
    test = datasets.Dataset.from_list([{"prompt": "z"}])
    train.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict(train=train, test=test).save_to_disk(tmp_path / "splits")
    datasets.DatasetDict(test=test).save_to_disk(tmp_path / "no_train")
    return tmp_path


def test_saved_dataset_folders_are_read_and_default_to_train(saved):
    plain = read_raw_dataset(str(saved / "plain"))
    assert plain.rows[1] == RawRow({"prompt": "y"}, f"{saved}/plain: row 2")
    assert plain.digest == hashlib.sha256(b'{"prompt": "x"}\n{"prompt": "y"}\n').hexdigest()
    assert read_raw_dataset(str(saved / "splits")).digest == plain.digest
    assert [row.values for row in read_raw_dataset(f"{saved}/splits:test").rows] == [{"prompt": "z"}]


def test_saved_dataset_splits_that_do_not_exist_are_listed(saved):
    error = refuse(f"{saved}/splits:valid")
    assert error.what == "there is no split `valid`"
    assert f"{saved}/splits:train, {saved}/splits:test" in error.fix
    assert f"{saved}/no_train:test" in refuse(str(saved / "no_train")).fix
    assert refuse(f"{saved}/plain:train").what == "this saved dataset has no splits"


def test_a_damaged_saved_dataset_is_refused(saved):
    (saved / "plain" / "state.json").write_text("{")
    assert "not a readable saved dataset" in refuse(str(saved / "plain")).what


# --- finding the source -------------------------------------------------------------------------------------------


def test_a_folder_with_one_dataset_file_stands_for_it(tmp_path):
    path = write(tmp_path, "train.jsonl", '{"a": 1}\n')
    write(tmp_path, "README.md", "words")
    write(tmp_path, ".hidden.jsonl", "{}")
    assert read_raw_dataset(str(tmp_path)).rows == [RawRow({"a": 1}, f"{path}:1")]


def test_a_folder_with_several_or_no_dataset_files_is_listed(tmp_path):
    write(tmp_path, "notes.txt", "words")
    error = refuse(str(tmp_path))
    assert "no dataset files" in error.what
    assert "notes.txt" in error.what
    write(tmp_path, "a.jsonl", "{}")
    write(tmp_path, "b.csv", "a\n1\n")
    error = refuse(str(tmp_path))
    assert "2 dataset files" in error.what
    assert "a.jsonl, b.csv, notes.txt" in error.what


def test_a_file_has_no_splits(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"a": 1}\n')
    assert refuse(f"{path}:train").fix == "leave out `:train`"


def test_an_unknown_suffix_lists_the_known_ones(tmp_path):
    error = refuse(write(tmp_path, "a.txt", "words"))
    assert error.what == "`.txt` is not a known kind of file"
    assert error.fix == "give a file that ends in .jsonl, .json, .csv, .parquet"
    assert refuse(write(tmp_path, "words", "words")).what == "the file has no suffix"


def test_a_suffix_may_be_in_capitals(tmp_path):
    assert len(read_raw_dataset(write(tmp_path, "A.JSONL", '{"a": 1}\n')).rows) == 1


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, "a.jsonl", '{"a": 1}\n')
    assert len(read_raw_dataset("~/a.jsonl").rows) == 1


@pytest.mark.parametrize(
    "source", ["nowhere", "nowhere.jsonl", "data/nowhere.jsonl", "./no/where", "/no/where", "~/nowhere", "a/b/c"]
)
def test_a_local_path_that_is_missing_is_refused_without_asking_the_hub(source, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)  # importing it would raise
    error = refuse(source)
    assert (error.where, error.what) == (source, "there is no such file or folder")


def test_a_misspelt_file_name_is_suggested(tmp_path):
    write(tmp_path, "train.jsonl", "{}")
    assert refuse(str(tmp_path / "trian.jsonl")).fix == f"did you mean `{tmp_path / 'train.jsonl'}`?"


def test_a_blank_source_is_refused():
    assert refuse(" ").what == "no dataset is named"


# --- the hub ------------------------------------------------------------------------------------------------------


class FakeHubRows:
    """What `load_dataset` returns, as far as it is used."""

    def with_format(self, kind):
        assert kind == "arrow"
        return pyarrow.table({"prompt": ["x"]})


def fake_hub(monkeypatch, answer):
    asked = []

    def load_dataset(name, *, split):
        asked.append((name, split))
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return asked


@pytest.mark.parametrize(("source", "split"), [("org/name", "train"), ("org/name:test[:5%]", "test[:5%]")])
def test_a_hub_id_is_loaded_with_its_split(monkeypatch, tmp_path, source, split):
    monkeypatch.chdir(tmp_path)
    asked = fake_hub(monkeypatch, FakeHubRows())
    found = read_raw_dataset(source)
    assert asked == [("org/name", split)]
    assert found.rows == [RawRow({"prompt": "x"}, f"{source}: row 1")]
    assert found.digest == hashlib.sha256(b'{"prompt": "x"}\n').hexdigest()


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ModuleNotFoundError("No module named 'datasets'", name="datasets"), "the `datasets` library is not installed"),
        (
            ImportError("libarrow.so: undefined symbol"),
            "cannot be imported: ImportError: libarrow.so: undefined symbol",
        ),
        (AttributeError("half installed"), "cannot be imported: AttributeError: half installed"),
    ],
)
@pytest.mark.parametrize("saved", [False, True], ids=["hub", "saved"])
def test_a_datasets_library_that_is_not_there_is_named(monkeypatch, tmp_path, saved, error, says):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "datasets":
                raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "datasets", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    if saved:
        write(tmp_path, "state.json", "{}")
    found = refuse(str(tmp_path) if saved else "org/name")
    assert says in found.what and found.fix.startswith("run pip install datasets, or ")


def test_a_local_folder_wins_over_the_hub(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    asked = fake_hub(monkeypatch, FakeHubRows())
    (tmp_path / "org" / "name").mkdir(parents=True)
    write(tmp_path / "org" / "name", "a.jsonl", '{"a": 1}\n')
    assert read_raw_dataset("org/name").rows[0].values == {"a": 1}
    assert asked == []


def test_an_unreachable_hub_says_that_the_path_is_missing_too(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    fake_hub(monkeypatch, ConnectionError("no route\nto host"))
    error = refuse("org/name")
    assert (error.where, error.what) == ("org/name", "there is no such local path, and the hub could not be reached")


def test_what_the_hub_says_is_passed_on(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    fake_hub(monkeypatch, ValueError('Unknown split "tset".\nmore'))
    error = refuse("org/name:tset")
    assert error.what == 'there is no such local path, and the hub does not provide it: Unknown split "tset".'
    assert "split" in error.fix


# --- cells --------------------------------------------------------------------------------------------------------


def test_cells_keep_their_text_as_it_stands():
    row = RawRow({"a": "  x \n"}, "f.jsonl:3")
    assert row.text("a") == "  x \n"


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (None, "expected text, found null"),
        (3, "expected text, found the number 3"),
        (True, "expected text, found true"),
        ({}, "expected text, found an object"),
        (" \n", "the text is empty"),
    ],
)
def test_a_cell_that_is_no_text_names_line_and_field(value, what):
    with pytest.raises(DatasetError) as caught:
        RawRow({"a": value}, "f.jsonl:3").text("a")
    assert (caught.value.where, caught.value.what) == ("f.jsonl:3: a", what)
    assert "--skip-bad-rows" in caught.value.fix


def test_a_missing_cell_says_what_the_row_has():
    with pytest.raises(DatasetError, match="^f.jsonl:3: a: `a` is missing; the row has `b`, `c`"):
        RawRow({"b": 1, "c": 2}, "f.jsonl:3").text("a")


@pytest.mark.parametrize(("value", "number"), [(4, 4.0), (-0.5, -0.5), ("4.5", 4.5), (" 3 ", 3.0)])
def test_numbers_may_come_as_text(value, number):
    assert check_number(value, "here") == number


@pytest.mark.parametrize("value", [True, None, "", "many", float("nan"), float("inf"), "nan", [1], 10**400])
def test_what_is_no_finite_number_is_refused(value):
    with pytest.raises(DatasetError, match="^here: expected a number"):
        check_number(value, "here")


def test_messages_of_both_styles_come_out_the_same():
    ours = [{"role": "developer", "content": "s"}, {"role": "user", "content": "u", "weight": 1}]
    sharegpt = [{"from": "system", "value": "s"}, {"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]
    assert check_messages(ours, "m") == ({"role": "system", "content": "s"}, {"role": "user", "content": "u"})
    assert check_messages(sharegpt, "m") == (
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
    )


@pytest.mark.parametrize(
    ("value", "where", "what"),
    [
        ("hi", "m", "expected a list of messages"),
        ([], "m", "the list of messages is empty"),
        ([{"role": "user", "content": "x"}, "hi"], "m[1]", "expected a message with"),
        ([{"role": "user"}], "m[0]", "expected text in `content`, found null"),
        ([{"role": "user", "content": 3}], "m[0]", "expected text in `content`, found the number 3"),
        ([{"content": "x"}], "m[0]", "expected text in `role`"),
        ([{"from": "human", "content": "x"}], "m[0]", "expected text in `value`"),
        ([{"role": "narrator", "content": "x"}], "m[0]", "unknown role `narrator`"),
        ([{"role": "assistant", "content": "", "tool_calls": [{}]}], "m[0]", "tool calls are not supported"),
    ],
)
def test_bad_messages_are_named_by_index(value, where, what):
    with pytest.raises(DatasetError) as caught:
        check_messages(value, "m")
    assert caught.value.where == where
    assert caught.value.what.startswith(what)


def test_reading_imports_nothing_heavy(tmp_path):
    path = write(tmp_path, "a.jsonl", json.dumps({"prompt": "x", "chosen": "a", "rejected": "b"}) + "\n")
    code = (
        "import sys\n"
        "from stages.data.rows import read_comparisons\n"
        "from stages.data.splits import split_held_out\n"
        f"split_held_out(read_comparisons({path!r}).rows, 0.1, 5)\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
