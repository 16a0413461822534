"""rlhf_cli/console.py: the result that a command prints on stdout."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from rlhf_cli.console import NUMERIC, closing, jsonable, payload, show
from stages.results import Result, Table


def result(**more):
    return Result(**({"command": "sft", "status": "done", "output": "runs/x", "data": {}} | more))


def printed(*tables, **more):
    stream = io.StringIO()
    show(result(tables=tables, **more), as_json=False, stream=stream)
    return stream.getvalue()


class Screen(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self):
        return True


# --- JSON ---------------------------------------------------------------------------------------------------------


def test_json_has_the_data_and_how_it_ended():
    stream = io.StringIO()
    show(result(data={"loss": 1.5}, next=("rlhf ppo",), tables=(Table("t", ("a",), (("b",),)),)), True, stream)
    assert json.loads(stream.getvalue()) == {
        **{"command": "sft", "status": "done", "output": "runs/x", "next": ["rlhf ppo"]},
        "loss": 1.5,
    }


def test_json_is_ascii_so_that_no_escape_code_gets_through():
    stream = io.StringIO()
    show(result(data={"text": "\x1b[31m \x9b 空"}), True, stream)
    assert stream.getvalue().isascii() and "\x1b" not in stream.getvalue()
    assert json.loads(stream.getvalue())["text"] == "\x1b[31m \x9b 空"


def test_data_cannot_hide_how_it_ended():
    assert payload(result(data={"status": "failed", "command": 3}))["status"] == "done"
    assert list(payload(result(data={"b": 1, "a": 2}))) == ["command", "status", "output", "next", "b", "a"]


class Scalar:
    """What tensors and numpy scalars have in common."""

    def __init__(self, value):
        self.value = value

    def item(self):
        return self.value


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (float("nan"), None),
        (float("inf"), None),
        (-float("inf"), None),
        (1.5, 1.5),
        (True, True),
        (None, None),
        ({"a": (1, {"b": float("nan")})}, {"a": [1, {"b": None}]}),
        ({1: 2}, {"1": 2}),
        (Path("a/b"), str(Path("a/b"))),
        (Scalar(0.5), 0.5),
        (Scalar(float("inf")), None),
    ],
)
def test_values_as_json_has_them(value, expected):
    assert jsonable(value) == expected


# --- text ---------------------------------------------------------------------------------------------------------


def test_a_piped_table_is_aligned_and_has_no_trailing_spaces():
    table = Table("held out", ("measure", "value"), (("loss", "1.5"), ("accuracy of pairs", "0.75")))
    assert printed(table) == (
        "held out\nmeasure            value\nloss                 1.5\naccuracy of pairs   0.75\n\nwrote runs/x\n"
    )


def test_a_column_of_words_is_aligned_left():
    assert printed(Table("", ("a", "b"), (("x", "long word"), ("y", "z"))), output=None) == (
        "a  b\nx  long word\ny  z\n\n"
    )


def test_wide_cells_wrap_within_100_columns_and_nothing_is_lost():
    words = " ".join(f"word{i}" for i in range(60))
    text = printed(Table("t", ("prompt", "a", "b"), (("say words", words, "x" * 250),)), output=None)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    assert text.count("x") == 250 and all(f"word{i}" in text for i in range(60))
    assert not any(line != line.rstrip() for line in lines)


def test_cells_of_several_lines_keep_them_and_rows_stand_apart():
    rows = (("first\n\nlines", "one"), ("second", "two\nlines"))
    assert printed(Table("t", ("a", "b"), rows), output=None) == (
        "t\na       b\nfirst   one\n\nlines\n\nsecond  two\n        lines\n\n"
    )


def test_wide_characters_keep_columns_aligned():
    text = printed(Table("t", ("a", "b"), (("空は", "x"), ("abcd", "y"))), output=None)
    assert "空は  x\nabcd  y\n" in text


def test_a_table_without_rows_is_not_printed():
    empty, full = Table("empty", ("a",), ()), Table("full", ("a",), (("x",),))
    assert printed(empty, full, empty, output=None) == "full\na\nx\n\n"


def test_cells_are_not_interpreted():
    text = printed(Table("[bold]t", ("[red]a",), (("[link=x]y[/link] :smile: \x1b[31m",),)))
    assert "[bold]t\n[red]a\n[link=x]y[/link] :smile: \ufffd[31m\n" in text


@pytest.mark.parametrize("cell", ["1", "-1.5", "1,234", "97.0 %", "0.2 ± 0.05", "-", "", "nan", "63 % ± 2 %", "−3"])
def test_what_counts_as_a_number(cell):
    assert NUMERIC.fullmatch(cell)


@pytest.mark.parametrize("cell", ["a", "1 of 3", "63.0 % (55 to 70)", "1 -> 2"])
def test_what_does_not_count_as_a_number(cell):
    assert not NUMERIC.fullmatch(cell)


@pytest.mark.parametrize(
    ("status", "output", "lines"),
    [
        ("done", "runs/x", ["wrote runs/x"]),
        ("done", None, []),
        ("already done", "runs/x", ["already done: runs/x"]),
        ("already done", None, ["already done"]),
        ("dry run", "runs/x", ["dry run: nothing was written"]),
        ("dry run", None, ["dry run: nothing was written"]),
    ],
)
def test_the_line_under_the_tables(status, output, lines):
    assert closing(result(status=status, output=output)) == lines


def test_commands_to_run_next_are_never_wrapped():
    command = "rlhf ppo " + "--flag value " * 30
    assert printed(next=(command, "rlhf report x")).endswith(f"next: {command}\nnext: rlhf report x\n")


def test_paths_and_commands_are_made_plain():
    assert printed(output="a\x1b[2Jb", next=("c\x07d",)) == "wrote a\ufffd[2Jb\nnext: c\ufffdd\n"


def test_on_a_terminal_examples_get_rules_and_the_terminal_width(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm")
    screen = Screen()
    table = Table("examples", ("prompt", "SFT"), (("why\nso", "because " * 30), ("[b]", "2")))
    show(result(tables=(table,)), False, screen)
    text = screen.getvalue()
    assert "\x1b[1m" in text and text.count("├") == 2 and "[b]" in text
    assert text.count("because") == 30
