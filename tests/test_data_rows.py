"""Typed rows: each format's meaning, how formats are told apart, and what is said of rows that do not fit."""

from __future__ import annotations

import json

import pytest

from stages.data.comparisons import Comparison, Pair
from stages.data.rows import (
    Demonstration,
    Prompt,
    detect_kind,
    read_comparisons,
    read_demonstrations,
    read_prompts,
)
from stages.errors import DatasetError


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def system(content):
    return {"role": "system", "content": content}


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"

    def write(*rows):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


def refuse(read, *args, **options):
    with pytest.raises(DatasetError) as caught:
        read(*args, **options)
    return caught.value


# --- demonstrations -----------------------------------------------------------------------------------------------


def test_prompt_and_completion_are_kept_to_the_letter(data):
    path = data({"prompt": "Q:\n", "completion": "  a \n", "extra": 1})
    found = read_demonstrations(path)
    assert found.rows == [Demonstration(f"{path}:1", "Q:\n", "  a \n", ())]
    assert (found.kind, found.source, found.skipped, found.problems) == ("demonstration", path, 0, [])
    assert len(found.digest) == 64


def test_a_text_row_is_a_completion_without_prompt(data):
    path = data({"text": " Once upon"})
    assert read_demonstrations(path).rows == [Demonstration(f"{path}:1", "", " Once upon", ())]


@pytest.mark.parametrize("key", ["messages", "conversations"])
def test_conversations_of_both_styles_are_the_same_demonstration(data, key):
    path = data(
        {key: [{"role": "system", "content": "S"}, user("Q"), assistant("A")]},
        {key: [{"from": "system", "value": "S"}, {"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
    )
    first, second = read_demonstrations(path).rows
    assert first == Demonstration(f"{path}:1", "", "", (system("S"), user("Q"), assistant("A")))
    assert second.messages == first.messages


def test_prompt_and_completion_as_messages_are_joined(data):
    path = data({"prompt": [user("Q")], "completion": [assistant("A")]}, {"prompt": [user("Q")], "completion": "A"})
    expected = (user("Q"), assistant("A"))
    assert [(row.prompt, row.completion, row.messages) for row in read_demonstrations(path).rows] == [
        ("", "", expected),
        ("", "", expected),
    ]


def test_alpaca_rows_have_both_forms(data):
    path = data({"instruction": "Add.", "input": "1 2", "output": " 3"})
    assert read_demonstrations(path).rows == [
        Demonstration(
            f"{path}:1",
            "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n",
            " 3",
            (user("Add.\n\n1 2"), assistant(" 3")),
        )
    ]


@pytest.mark.parametrize("extra", [{}, {"input": ""}, {"input": " \n"}, {"input": None}])
def test_alpaca_rows_without_input_have_no_input_section(data, extra):
    row = read_demonstrations(data({"instruction": "Sing.", "output": "la", **extra})).rows[0]
    assert row.prompt == "### Instruction:\nSing.\n\n### Response:\n"
    assert row.messages == (user("Sing."), assistant("la"))


@pytest.mark.parametrize(
    ("row", "field", "what"),
    [
        ({"prompt": "Q", "completion": ""}, "completion", "the text is empty"),
        ({"prompt": "\n", "completion": "A"}, "prompt", "the text is empty"),
        ({"prompt": "Q", "completion": 42}, "completion", "expected text, found the number 42"),
        ({"prompt": None, "completion": "A"}, "prompt", "expected text, found null"),
        ({"prompt": "Q", "completion": [assistant("A")]}, "completion", "the prompt is text but the completion is"),
        ({"prompt": [user("Q")], "completion": [user("A")]}, "completion", "every assistant turn is empty or missing"),
        ({"prompt": [user("Q"), assistant("A")], "completion": "B"}, "prompt", "the prompt ends with an assistant"),
        ({"prompt": [user(" ")], "completion": "B"}, "prompt", "every message of the prompt is empty"),
        ({"messages": [user("Q")]}, "messages", "every assistant turn is empty or missing"),
        ({"messages": [user("Q"), assistant("")]}, "messages", "every assistant turn is empty or missing"),
        ({"messages": []}, "messages", "the list of messages is empty"),
        ({"messages": [user("Q"), {"role": "bot", "content": "A"}]}, "messages[1]", "unknown role `bot`"),
        ({"text": " "}, "text", "the text is empty"),
        ({"instruction": "", "output": "x"}, "instruction", "the text is empty"),
        ({"instruction": "Do", "output": ""}, "output", "the text is empty"),
        ({"instruction": "Do", "input": 3, "output": "x"}, "input", "expected text, found the number 3"),
    ],
)
def test_bad_demonstrations_name_line_and_field(data, row, field, what):
    path = data(row)
    error = refuse(read_demonstrations, path)
    assert error.where == f"{path}:1: {field}"
    assert error.what.startswith(what)
    assert "--skip-bad-rows" in error.fix


def test_a_later_row_that_lacks_a_field_is_named(data):
    path = data({"prompt": "Q", "completion": "A"}, {"prompt": "Q", "answer": "A"})
    error = refuse(read_demonstrations, path)
    assert error.where == f"{path}:2: completion"
    assert error.what == "`completion` is missing; the row has `prompt`, `answer`"


# --- prompts ------------------------------------------------------------------------------------------------------


def test_prompts_keep_their_other_columns(data):
    path = data({"prompt": "Q ", "answer": "72", "completion": "A", "n": None})
    expected = Prompt(f"{path}:1", "Q ", {"answer": "72", "completion": "A", "n": None}, ())
    found = read_prompts(path)
    assert found.rows == [expected]
    assert found.kind == "prompt"


def test_message_prompts_stay_messages(data):
    path = data({"prompt": [{"from": "human", "value": "Q"}], "answer": 1})
    assert read_prompts(path).rows == [Prompt(f"{path}:1", (user("Q"),), {"answer": 1}, ())]


@pytest.mark.parametrize("key", ["messages", "conversations"])
def test_the_prompt_of_a_conversation_is_all_but_its_closing_answer(data, key):
    turns = [system("S"), user("Q"), assistant("A"), user("R")]
    closing = ([assistant("B")], [], [assistant("B"), assistant("C")])
    found = read_prompts(data(*[{key: [*turns, *more], "id": len(more)} for more in closing])).rows
    assert [row.prompt for row in found] == [tuple(turns)] * 3
    assert [row.columns for row in found] == [{"id": 1}, {"id": 0}, {"id": 2}]


def test_alpaca_prompts_have_both_forms(data):
    row = read_prompts(data({"instruction": "Add.", "input": "1 2", "output": "3"})).rows[0]
    assert row.prompt == "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
    assert row.messages == (user("Add.\n\n1 2"),)
    assert row.columns == {"output": "3"}


@pytest.mark.parametrize(
    ("row", "field", "what"),
    [
        ({"prompt": ""}, "prompt", "the text is empty"),
        ({"prompt": 5}, "prompt", "expected text, found the number 5"),
        ({"prompt": [user("Q"), assistant("A")]}, "prompt", "the prompt ends with an assistant turn"),
        ({"messages": [assistant("A")]}, "messages", "there is no turn for the assistant to answer"),
        ({"messages": [user(""), assistant("A")]}, "messages", "every message of the prompt is empty"),
        ({"messages": "Q"}, "messages", "expected a list of messages"),
    ],
)
def test_bad_prompts_name_line_and_field(data, row, field, what):
    path = data(row)
    error = refuse(read_prompts, path)
    assert error.where == f"{path}:1: {field}"
    assert error.what.startswith(what)


# --- comparisons --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "prompt", "responses"),
    [
        ({"prompt": "Q", "chosen": "a", "rejected": "b"}, "Q", ("a", "b")),
        ({"chosen": "Q: a", "rejected": "Q: b"}, "Q:", (" a", " b")),
        ({"prompt": "Q", "responses": ["a", "b"], "ranks": [1, 2]}, "Q", ("a", "b")),
    ],
)
def test_each_comparison_format_is_recognised(data, row, prompt, responses):
    path = data(row)
    found = read_comparisons(path)
    assert found.rows == [Comparison(f"{path}:1", prompt, responses, (Pair(0, 1),))]
    assert found.kind == "comparison"


def test_equal_responses_are_named_in_a_file(data):
    path = data({"prompt": "Q", "chosen": "a", "rejected": "b"}, {"prompt": "Q", "chosen": "c", "rejected": "c"})
    error = refuse(read_comparisons, path)
    assert error.where == f"{path}:2: rejected"
    assert "--skip-bad-rows" in error.fix


# --- telling formats apart ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"prompt": "Q", "chosen": "a", "rejected": "b", "completion": "a", "messages": []}, "comparison"),
        ({"chosen": "a", "rejected": "b"}, "comparison"),
        ({"prompt": "Q", "responses": [], "ranks": []}, "comparison"),
        ({"prompt": "Q", "response": "a", "rating": 3}, "rating"),
        ({"prompt": "Q", "completion": "a"}, "demonstration"),
        ({"prompt": "Q", "messages": []}, "demonstration"),
        ({"conversations": []}, "demonstration"),
        ({"instruction": "x", "output": "y"}, "demonstration"),
        ({"text": "x"}, "demonstration"),
        ({"prompt": "Q", "answer": "a"}, "prompt"),
        ({"instruction": "x", "input": "y"}, "prompt"),
    ],
)
def test_the_kind_follows_from_the_columns(data, row, kind):
    assert detect_kind(data(row)) == kind


def test_the_kind_is_told_after_mapping(data):
    assert detect_kind(data({"question": "Q", "prompt_id": 1}), map={"prompt": "question"}) == "prompt"


def test_columns_that_fit_nothing_are_listed_with_what_would_fit(data):
    path = data({"foo": 1, "bar": 2})
    error = refuse(detect_kind, path)
    assert error.where == f"{path}:1"
    assert "the row has `foo`, `bar`" in error.what
    assert "prompt+chosen+rejected" in error.what
    assert error.fix == "rename columns with --map name=column"
    what = refuse(read_demonstrations, path).what
    assert what == (
        "the row has `foo`, `bar`; a demonstration row has one of: "
        "prompt+completion; messages; conversations; instruction+output; text"
    )


@pytest.mark.parametrize(
    ("read", "row", "fix"),
    [
        (read_demonstrations, {"question": "Q", "answer": "A"}, "try --map prompt=question,completion=answer"),
        (read_demonstrations, {"prompt": "Q", "response": "A"}, "try --map completion=response"),
        (read_demonstrations, {"Prompt": "Q", "Completion": "A"}, "try --map prompt=Prompt,completion=Completion"),
        (read_demonstrations, {"input": "Q", "output": "A"}, "try --map prompt=input,completion=output"),
        (read_demonstrations, {"conversation": []}, "try --map messages=conversation"),
        (read_prompts, {"query": "Q"}, "try --map prompt=query"),
        (read_comparisons, {"prompt": "Q", "better": "a", "worse": "b"}, "try --map chosen=better,rejected=worse"),
        (read_comparisons, {"prompt": "Q", "answer": "a", "score": 1}, "try --map response=answer,rating=score"),
        (read_comparisons, {"question": "Q", "chosen": "a"}, "rename columns with --map name=column"),
    ],
)
def test_known_aliases_are_suggested(data, read, row, fix):
    assert refuse(read, data(row)).fix == fix


def test_the_suggested_mapping_works(data):
    path = data({"question": "Q", "answer": "A"})
    assert read_demonstrations(path, map={"prompt": "question", "completion": "answer"}).rows[0].completion == "A"


def test_rows_of_another_kind_are_called_by_it(data):
    error = refuse(read_demonstrations, data({"prompt": "Q", "chosen": "a", "rejected": "b"}))
    assert "which is a comparison row; a demonstration row has one of" in error.what
    assert error.fix == "try --map completion=chosen"


# --- --map --------------------------------------------------------------------------------------------------------


def test_a_mapped_column_takes_its_new_name_and_loses_the_old(data):
    path = data({"question": "Q", "gold": "72", "id": 1})
    row = read_prompts(path, map={"prompt": "question", "answer": "gold"}).rows[0]
    assert row == Prompt(f"{path}:1", "Q", {"answer": "72", "id": 1}, ())


def test_two_columns_can_swap_names(data):
    path = data({"prompt": "Q", "chosen": "a", "rejected": "b"})
    found = read_comparisons(path, map={"chosen": "rejected", "rejected": "chosen"})
    assert found.rows[0].responses == ("b", "a")


def test_a_mapped_column_that_does_not_exist_lists_those_that_do(data):
    error = refuse(read_prompts, data({"prompt": "Q", "id": 1}), map={"prompt": "question"})
    assert error.what == "there is no column `question`"
    assert error.fix == "use one of the columns `prompt`, `id`"
    assert "--map prompt=question" in error.where


def test_a_column_that_only_some_rows_have_can_be_mapped(data):
    path = data({"prompt": "Q"}, {"prompt": "R", "gold": "1"})
    assert [row.columns for row in read_prompts(path, map={"answer": "gold"}).rows] == [{}, {"answer": "1"}]


def test_mapping_onto_a_name_in_use_is_refused_unless_that_one_moves(data):
    path = data({"prompt": "P", "question": "Q"})
    assert refuse(read_prompts, path, map={"prompt": "question"}).what == "two columns would be called `prompt`"
    row = read_prompts(path, map={"prompt": "question", "old": "prompt"}).rows[0]
    assert (row.prompt, row.columns) == ("Q", {"old": "P"})


def test_one_column_cannot_get_two_names(data):
    error = refuse(read_demonstrations, data({"x": "Q"}), map={"prompt": "x", "completion": "x"})
    assert error.what == "the column `x` gets two names"


# --- bad rows and limits ------------------------------------------------------------------------------------------


def test_skipping_counts_bad_rows_and_malformed_lines_alike(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"prompt": "Q", "completion": "A"}\nnot json\n{"prompt": "Q", "completion": ""}\n{"prompt": "Q"}\n'
    )
    found = read_demonstrations(str(path), skip_bad_rows=True)
    assert [row.where for row in found.rows] == [f"{path}:1"]
    assert found.skipped == 3
    assert found.problems[0].startswith(f"{path}:2: not a JSON object")
    assert found.problems[1:] == [
        f"{path}:3: completion: the text is empty",
        f"{path}:4: completion: `completion` is missing; the row has `prompt`",
    ]


def test_only_the_first_few_problems_are_kept_but_all_are_counted(data):
    found = read_prompts(data({"prompt": "Q"}, *[{"prompt": ""}] * 9), skip_bad_rows=True)
    assert (found.skipped, len(found.problems)) == (9, 5)


def test_a_bad_first_row_does_not_decide_the_format_when_skipping(data):
    path = data({"id": 1}, {"prompt": "Q", "completion": "A"})
    assert refuse(read_demonstrations, path).where == f"{path}:1"
    found = read_demonstrations(path, skip_bad_rows=True)
    assert (len(found.rows), found.skipped) == (1, 1)


def test_nothing_usable_is_an_error_even_when_skipping(data):
    path = data({"prompt": "", "completion": "A"}, {"prompt": "Q", "completion": ""})
    error = refuse(read_demonstrations, path, skip_bad_rows=True)
    assert error.where == path
    assert f"none of the 2 rows can be used; {path}:1: prompt: the text is empty" == error.what


def test_limit_rows_takes_the_first_usable_rows(data):
    path = data({"prompt": "a"}, {"prompt": ""}, {"prompt": "b"}, {"prompt": "c"}, {"prompt": ""})
    found = read_prompts(path, skip_bad_rows=True, limit_rows=2)
    assert [row.prompt for row in found.rows] == ["a", "b"]
    assert found.skipped == 1
    assert [row.prompt for row in read_prompts(path, limit_rows=1).rows] == ["a"]
    assert len(read_prompts(path, skip_bad_rows=True, limit_rows=99).rows) == 3


def test_csv_rows_are_typed_like_any_other(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('prompt,chosen,rejected,margin\nQ,"a\nb",c,0.5\n"R\n",d,d,\n')
    error = refuse(read_comparisons, str(path))
    assert error.where == f"{path}:4: rejected"
    found = read_comparisons(str(path), skip_bad_rows=True)
    assert found.rows == [Comparison(f"{path}:2", "Q", ("a\nb", "c"), (Pair(0, 1, 1.0, 0.5),))]


def test_parquet_rows_are_typed_like_any_other(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    turns = [{"role": "user", "content": "Q", "tool_calls": None}, {"role": "assistant", "content": "A"}]
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": turns}, {"messages": []}]), path)
    assert refuse(read_demonstrations, str(path)).where == f"{path}: row 2: messages"
    found = read_demonstrations(str(path), skip_bad_rows=True)
    assert found.rows == [Demonstration(f"{path}: row 1", "", "", (user("Q"), assistant("A")))]
