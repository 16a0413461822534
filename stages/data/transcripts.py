"""Text rows as conversations: transcripts (`Human: ... Assistant: ...`) and plain questions become messages."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from stages.data.comparisons import Comparison
from stages.data.raw_rows import Message, bad_row
from stages.data.rows import Demonstration, Prompt, Row

SPEAKER = re.compile(r"(?:\A|\n)[^\S\n]*(Human|User|Assistant|System):")  # at the start of a line
ROLES = {"Human": "user", "User": "user", "Assistant": "assistant", "System": "system"}
UNANSWERABLE = "as a conversation the text {}, so --text-as chat cannot read it"


def text_of(row: Row) -> str | None:
    """The text of a row that is read as plain text, up to and with its first response; None for messages."""
    if isinstance(row, Prompt):
        return row.prompt if isinstance(row.prompt, str) and not row.messages else None
    if isinstance(row, Comparison):
        return row.prompt + row.responses[0] if isinstance(row.prompt, str) else None  # type: ignore[operator]
    return None if row.messages else row.prompt + row.completion


def is_transcript(text: str) -> bool:
    """Whether a text begins with a speaker's mark, and both a user and an assistant speak in it."""
    roles = [role for role, _ in _turns(text)]
    return bool(roles) and roles[0] != "assistant" and {"user", "assistant"} <= set(roles)


def as_text(row: Row) -> Row:
    """The row without the messages that it has beside its text, as instruction rows do."""
    if isinstance(row, Comparison) or not row.messages or isinstance(row, Demonstration) and not row.completion:
        return row
    return replace(row, messages=())


def as_messages(row: Row) -> Row:
    """The row with its texts as messages: a transcript by its speakers, any other text as a user's question.

    Raises DatasetError for a text that is no conversation.
    """
    if isinstance(row, Demonstration):
        return _demonstration(row)
    if isinstance(row, Prompt):
        prompt = row.messages or (_prompt(row.where, row.prompt) if isinstance(row.prompt, str) else row.prompt)
        return replace(row, prompt=prompt, messages=())
    if not isinstance(row.prompt, str):
        return row
    if row.guessed and not _is_opened(row.prompt):
        raise bad_row(UNANSWERABLE.format("has no `Human:` turn that both responses answer"), row.where)
    prompt, *responses = _split(row.prompt, row.responses)  # type: ignore[arg-type]
    return replace(row, prompt=prompt, responses=tuple(responses), guessed=False)


def _demonstration(row: Demonstration) -> Demonstration:
    if row.messages:
        return replace(row, prompt="", completion="")
    if row.prompt:
        messages = sum(_split(row.prompt, [row.completion]), ())
    else:
        if not is_transcript(row.completion):
            raise bad_row(UNANSWERABLE.format("has no `Human:` and `Assistant:` turns"), row.where)
        messages = _joined(_turns(row.completion))
    if not any(message["role"] == "assistant" for message in messages):
        raise bad_row(UNANSWERABLE.format("has only empty assistant turns"), row.where)
    return Demonstration(row.where, "", "", messages)


def _prompt(where: str, text: str) -> tuple[Message, ...]:
    """The messages of a text that the assistant is to answer."""
    question, begun = _ask(text)
    if begun and begun.strip():
        raise bad_row(UNANSWERABLE.format("ends within an assistant turn"), where)
    return question


def _ask(text: str) -> tuple[tuple[Message, ...], str | None]:
    """The messages before the assistant's mark that ends a transcript, and the words after it.

    Without such a mark they are those of the whole text, and None; a text that is no transcript is a user's message.
    """
    if not _is_opened(text):
        return ({"role": "user", "content": text.strip()},), None
    last = list(SPEAKER.finditer(text))[-1]
    if last[1] != "Assistant":
        return _joined(_turns(text)), None
    return _joined(_turns(text[: last.start()])), text[last.end() :]


def _is_opened(text: str) -> bool:
    """Whether a text begins with a speaker's mark, and a user says something in it."""
    turns = _turns(text)
    return bool(turns) and turns[0][0] != "assistant" and any(role == "user" and words for role, words in turns)


def _split(prompt: str, responses: Sequence[str]) -> list[tuple[Message, ...]]:
    """The messages of a prompt, and those of each response to it."""
    question, begun = _ask(prompt)
    return [question, *(_response(question, begun, response) for response in responses)]


def _response(question: tuple[Message, ...], begun: str | None, response: str) -> tuple[Message, ...]:
    """A response as the turns that are written in it, without those of the question if it repeats them; as one turn if
    the assistant does not have its last word."""
    text = (begun or "") + response
    repeats = begun is None and _is_opened(response)
    messages = _joined(_turns(response if repeats else "Assistant:" + text))
    if repeats and messages[: len(question)] == question:
        messages = messages[len(question) :]
    whole = ({"role": "assistant", "content": text.strip()},)
    return messages if messages and messages[-1]["role"] == "assistant" else whole


def _turns(text: str) -> list[tuple[str, str]]:
    """Role and words of every turn of a transcript; empty for a text that does not begin with a speaker's mark."""
    marks = list(SPEAKER.finditer(text))
    if not marks or text[: marks[0].start()].strip():
        return []
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    return [(ROLES[mark[1]], text[mark.end() : end].strip()) for mark, end in zip(marks, ends, strict=True)]


def _joined(turns: Sequence[tuple[str, str]]) -> tuple[Message, ...]:
    """Turns as messages: empty ones are left out, and those of one speaker in a row become one."""
    messages: list[Message] = []
    for role, words in turns:
        if words and messages and messages[-1]["role"] == role:
            messages[-1]["content"] += f"\n\n{words}"
        elif words:
            messages.append({"role": role, "content": words})
    return tuple(messages)


# --- which form rows are in


def uses_template(row: Row, *, has_template: bool) -> bool:
    """Whether a row is read as messages under the chat template, rather than as plain text."""
    if isinstance(row, Demonstration):
        return bool(row.messages) and (has_template or not row.completion)
    return not isinstance(row.prompt, str) or isinstance(row, Prompt) and has_template and bool(row.messages)


def form_of(rows: Sequence[Row], *, has_template: bool) -> str:
    """How rows are read: "messages", "text", or "mixed"."""
    kinds = {uses_template(row, has_template=has_template) for row in rows}
    return "mixed" if len(kinds) > 1 else "messages" if True in kinds else "text"


def count_turns(row: Row) -> int:
    """The assistant's turns in a demonstration; 1 for any other row."""
    turns = sum(message["role"] == "assistant" for message in row.messages) if isinstance(row, Demonstration) else 1
    return max(1, turns)
