"""Text rows as messages: `Human: ... Assistant: ...` transcripts, plain questions, and what is said of their form."""

from __future__ import annotations

import json

import pytest

from stages.data.comparisons import Comparison, Pair
from stages.data.prompts import first_question
from stages.data.rows import Demonstration, Prompt, read_comparisons, read_demonstrations
from stages.data.transcripts import as_messages, as_text, form_of, is_transcript, uses_template
from stages.errors import DatasetError
from stages.inputs.forms import describe_form
from stages.inputs.parts import read_rows
from stages.measuring_config import PreviewConfig
from stages.models.model_ref import open_model
from tests.commands import done, refused, result
from tests.tiny import write_jsonl

USER, ASSISTANT, SYSTEM = "user", "assistant", "system"
HH = "Human: red?\n\nAssistant: green.\n\nHuman: why?\n\nAssistant:"
PAIRS = (Pair(0, 1),)


def turns(*said: tuple[str, str]) -> tuple[dict[str, str], ...]:
    return tuple({"role": role, "content": content} for role, content in said)


ASKED = turns((USER, "red?"), (ASSISTANT, "green."), (USER, "why?"))


@pytest.mark.parametrize(
    ("prompt", "completion", "messages"),
    [
        (HH, " so it is", (*ASKED, *turns((ASSISTANT, "so it is")))),
        ("\n\n" + HH, " so it is", (*ASKED, *turns((ASSISTANT, "so it is")))),
        ("Human: red?", "\n\nAssistant: blue", turns((USER, "red?"), (ASSISTANT, "blue"))),
        ("User: red?\nAssistant: It", " is blue", turns((USER, "red?"), (ASSISTANT, "It is blue"))),
        ("System: be kind\n\nHuman: red?\n\nAssistant:", " no",
         turns((SYSTEM, "be kind"), (USER, "red?"), (ASSISTANT, "no"))),
        ("what is red?", " a song", turns((USER, "what is red?"), (ASSISTANT, "a song"))),
        ("", "\n\nHuman: red?\n\nAssistant: blue\n\nHuman: ok",
         turns((USER, "red?"), (ASSISTANT, "blue"), (USER, "ok"))),
        ("Human: red?\n\nAssistant:", " one\n\nHuman: more\n\nAssistant: two",
         turns((USER, "red?"), (ASSISTANT, "one"), (USER, "more"), (ASSISTANT, "two"))),
        ("Human: red?\n\nAssistant:", " Human: is no mark",
         turns((USER, "red?"), (ASSISTANT, "Human: is no mark"))),
        ("Human: red?\n\nAssistant:", " one\n\nHuman: bye", turns((USER, "red?"), (ASSISTANT, "one\n\nHuman: bye"))),
        ("Human: joke?\n\nAssistant: here:\n\nAssistant:", " ha",
         turns((USER, "joke?"), (ASSISTANT, "here:"), (ASSISTANT, "ha"))),
    ],
)  # fmt: skip
def test_a_text_becomes_its_turns(prompt, completion, messages):
    assert as_messages(Demonstration("r:1", prompt, completion)) == Demonstration("r:1", "", "", messages)


def test_an_instruction_row_keeps_one_of_its_forms():
    row = Demonstration("r:1", "### Instruction:\nred\n", "blue", turns((USER, "red"), (ASSISTANT, "blue")))
    assert as_messages(row) == Demonstration("r:1", "", "", row.messages)
    assert as_text(row) == Demonstration("r:1", row.prompt, "blue")
    prompt = Prompt("r:1", "### Instruction:\nred\n", {}, turns((USER, "red")))
    assert as_messages(prompt) == Prompt("r:1", turns((USER, "red"))) and as_text(prompt).messages == ()
    conversation = Demonstration("r:1", "", "", row.messages)
    assert as_messages(conversation) == as_text(conversation) == conversation


def test_a_comparison_is_read_as_one_question_and_its_answers():
    row = as_messages(Comparison("r:1", HH, (" so", " thus"), PAIRS))
    assert row.prompt == ASKED and row.responses == (turns((ASSISTANT, "so")), turns((ASSISTANT, "thus")))
    repeated = Comparison("r:1", "red?", ("Human: red?\n\nAssistant: so", "\n\nHuman: red?\n\nAssistant: thus"), PAIRS)
    row = as_messages(repeated)
    assert row.prompt == turns((USER, "red?")) and row.responses == (
        turns((ASSISTANT, "so")),
        turns((ASSISTANT, "thus")),
    )


def test_a_prompt_is_what_the_assistant_answers():
    assert as_messages(Prompt("r:1", HH, {"answer": 4})) == Prompt("r:1", ASKED, {"answer": 4})
    assert as_messages(Prompt("r:1", " red? ")).prompt == turns((USER, "red?"))
    again = as_messages(Prompt("r:1", "Human: joke?\n\nAssistant: here:\n\nAssistant:"))
    assert again.prompt == turns((USER, "joke?"), (ASSISTANT, "here:"))
    with pytest.raises(DatasetError, match="ends within an assistant turn"):
        as_messages(Prompt("r:1", "Human: red?\n\nAssistant: It is"))


@pytest.mark.parametrize("text", ["once upon a time", "Assistant: hello", "red\nHuman: hi\nAssistant: ho", "Human: hi"])
def test_a_text_without_a_conversation_is_refused(text):
    assert not is_transcript(text)
    with pytest.raises(DatasetError, match="--text-as chat cannot read it"):
        as_messages(Demonstration("r:1", "", text))


def test_transcripts_are_recognised():
    for text in (HH, "\n\n" + HH, "User: hi\nAssistant: ho", "System: x\n\nHuman: hi\n\nAssistant: ho"):
        assert is_transcript(text)
    assert not is_transcript("Customer: hi\nIntent:")


def test_a_row_is_held_out_in_either_form():
    """Else one stage would train on what another evaluates."""
    for row in (Prompt("r:1", HH), Demonstration("r:1", HH, " x"), Comparison("r:1", HH, (" a", " b"), PAIRS)):
        assert first_question(as_messages(row)) == first_question(row) == "red?"
    assert first_question(as_messages(Prompt("r:1", "why is it red?"))) == first_question(
        Prompt("r:1", "why is it red?")
    )


def test_shared_beginnings_become_the_question(tmp_path):
    data = write_jsonl(tmp_path / "c.jsonl", [{"chosen": f"\n\n{HH} so", "rejected": f"\n\n{HH} thus"}])
    (row,) = read_comparisons(str(data), refine=as_messages).rows
    assert row.prompt == ASKED and row.responses[1] == turns((ASSISTANT, "thus"))
    data = write_jsonl(tmp_path / "d.jsonl", [{"chosen": "the cat sat here", "rejected": "the cat sat there"}])
    with pytest.raises(DatasetError, match="no `Human:` turn that both responses answer"):
        read_comparisons(str(data), refine=as_messages)


def test_form_follows_the_template():
    alpaca = Demonstration("r:1", "red", "blue", turns((USER, "red"), (ASSISTANT, "blue")))
    text, talk = Demonstration("r:2", "a", "b"), Demonstration("r:3", "", "", ASKED)
    assert [uses_template(row, has_template=True) for row in (alpaca, text, talk)] == [True, False, True]
    assert [uses_template(row, has_template=False) for row in (alpaca, text, talk)] == [False, False, True]
    assert form_of([alpaca, talk], has_template=True) == "messages"
    assert form_of([alpaca, text], has_template=False) == "text"
    assert form_of([text, talk], has_template=False) == "mixed"


# --- what is said


def said_of(folder, data, rows, **knobs):
    """Warnings and notes of a preview's inputs for rows in a file."""
    write_jsonl(data, rows)
    config = PreviewConfig(model=str(folder), dataset=str(data), **knobs)
    source = open_model(str(folder), stages=(), what="--model", weights=False)
    return describe_form(config, source, read_rows(read_demonstrations, config, str(data)))


TEXT, TALK = {"prompt": "red", "completion": " blue"}, {"messages": [{"role": "user", "content": "red"}]}
TALK["messages"].append({"role": "assistant", "content": "blue"})
ALPACA = {"instruction": "red", "output": "blue"}


def test_what_is_said_of_the_form_of_rows(model_folder, tmp_path):
    plain, chat, data = model_folder("llama"), model_folder("llama", chat=True), tmp_path / "d.jsonl"
    assert said_of(plain, data, [TEXT]) == ((), ())
    told = "2 of 2 rows are plain text, read as it is, without the chat template; --text-as chat reads them as messages"
    assert said_of(chat, data, [TEXT] * 2) == ((), (told,))
    assert said_of(chat, data, [TEXT] * 2, text_as="raw") == ((), ())
    assert said_of(chat, data, [TEXT] * 2, text_as="chat") == ((), ("2 text rows are read as messages",))
    assert said_of(chat, data, [TALK]) == ((), ())
    (told,) = said_of(chat, data, [ALPACA])[1]
    assert told.startswith("instruction rows are read as messages under the chat template; --text-as raw")
    assert said_of(plain, data, [ALPACA]) == ((), ())
    transcript = {"prompt": HH, "completion": " so"}
    assert (
        "1 of 1 row is written as `Human: ... Assistant: ...`, and read as plain text"
        in said_of(chat, data, [transcript])[1][0]
    )
    assert said_of(plain, data, [transcript])[1][0].endswith("--text-as chat reads them as messages, with a "
                                                             "--chat-template")  # fmt: skip


def test_knobs_without_effect_on_the_rows_are_told(model_folder, tmp_path):
    plain, data = model_folder("llama"), tmp_path / "d.jsonl"
    (told,), _ = said_of(plain, data, [TEXT], chat_template="chatml")
    assert told.startswith("--chat-template chatml has no effect on these rows, which are plain text")
    assert said_of(plain, data, [TALK], chat_template="chatml") == ((), ())
    (told,), _ = said_of(plain, data, [TALK], chat_template="chatml", text_as="chat")
    assert told == "--text-as chat has no effect because all rows are messages already"
    (told,), _ = said_of(plain, data, [TEXT], mask="assistant")
    assert told == "--mask assistant has no effect because no row has more than one response"
    (told,), _ = said_of(plain, data, [{"text": "red blue"}], mask="all")
    assert told.startswith("--mask all has no effect because the rows are texts without prompts")
    assert said_of(plain, data, [TEXT], mask="all") == ((), ())
    twice = {"messages": TALK["messages"] * 2}
    assert said_of(plain, data, [TALK, twice], chat_template="chatml", mask="assistant") == ((), ())


def test_text_as_chat_needs_a_template(model_folder, tmp_path):
    data = write_jsonl(tmp_path / "d.jsonl", [TEXT] * 4)
    line = ("sft", "--model", model_folder("llama"), "--dataset", data, "--output", tmp_path / "x", "--text-as", "chat")
    told = refused(*line)
    assert "--text-as: text is to be read as messages, but the tokenizer has no chat template" in told


@pytest.mark.full
def test_a_model_of_conversations_that_is_given_text_says_so(model_folder, tmp_path):
    base, out = model_folder("llama", chat=True), tmp_path / "sft"
    rows = write_jsonl(tmp_path / "d.jsonl", [TEXT | {"prompt": f"red {i}"} for i in range(24)])
    short = ("--max-steps", 1, "--batch-size", 4, "--samples", 0, "--lora-rank", 2)
    done("sft", "--model", base, "--dataset", rows, "--output", out, "--text-as", "chat", *short)
    train = json.loads((out / "checkpoint.json").read_text(encoding="utf-8"))["datasets"]["train"]
    assert train["form"] == "messages" and train["rows"] == 24 == train["used"] + train["held_out_rows"]
    told = f"{out} was trained on conversations in its chat template, but 24 of 24 rows are plain text"
    room = ("--max-response-tokens", 4)
    shown = result("preview", "--model", out, "--dataset", rows, "--stage", "ppo", *room)
    assert any(told in line for line in shown["warnings"])
    shown = result("preview", "--model", out, "--dataset", rows, "--stage", "ppo", "--text-as", "chat", *room)
    assert not any(told in line for line in shown["warnings"])
