"""Where an assistant's turn lies in a rendered conversation.

Found by rendering the conversation again, cut short or with a mark in the turn, and comparing whole texts: a search for
the turn's words would also match a question, an equal turn, or markup.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stages.errors import DatasetError

GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
PROBE_CONTENT = "zQxvJkWq"  # letters of both cases: a template that changes the case of contents is noticed
TEMPLATE_ADVICE = "use a template that writes contents as they are, or one with {% generation %} marks"

Render = Callable[..., str]  # (messages, *, generate=False) -> text; raises DatasetError
Messages = Sequence[dict[str, str]]


@dataclass(frozen=True)
class Span:
    """A turn's place in the rendered text, in characters."""

    begin: int  # where the generation prompt ends; without one, where the content begins
    end: int | None  # end of the content; None if only the whole turn was found
    closed: int | None  # end of the text that closes the turn; None if the template closes final turns otherwise


def find_turn(render: Render, messages: Messages, turn: int, text: str) -> Span:
    """The span of message `turn` in `text`, the conversation as rendered.

    Raises DatasetError if it is uncertain, as with a template that changes contents.
    """
    before = _rendered(render, messages[:turn], generate=True) if turn else None
    opened = before is not None and text.startswith(before)
    after = text if turn == len(messages) - 1 else _rendered(render, messages[: turn + 1])
    whole = after is not None and text.startswith(after)
    if opened and whole and len(after) > len(before):
        return Span(len(before), None, len(after))
    end = content_end(render, messages, turn, text)
    begin = len(before) if opened else _turn_begin(render, messages, turn, text, before)
    if begin is None or end is None or begin > end:
        raise DatasetError(
            "the chat template changes the assistant's text, so it cannot be found again", fix=TEMPLATE_ADVICE
        )
    return Span(begin, end, len(after) if whole else _closed(render, messages[: turn + 1], text, end))


def content_end(render: Render, messages: Messages, turn: int, text: str) -> int | None:
    """Where the content of message `turn` ends in `text`; None if that is uncertain."""
    mark = _unused(text)
    parts = _split(render, messages, turn, messages[turn]["content"] + mark, mark)
    if parts is None or not text.endswith(parts[1]):
        return None
    end = len(text) - len(parts[1])
    return end if parts[0].startswith(text[:end]) and not parts[0][end:].strip() else None


def _turn_begin(render: Render, messages: Messages, turn: int, text: str, before: str | None) -> int | None:
    """Where message `turn` begins in `text` that does not begin with `before`, its generation prompt.

    Text that the template writes between a generation prompt and a final turn's content belongs to this turn too, if
    present: a space after [/INST] is sampled, not given.
    """
    begin, mark = _content_begin(render, messages, turn, text), _unused(text)
    parts = _split(render, messages[: turn + 1], turn, mark + messages[turn]["content"], mark)
    if begin is None or before is None or parts is None or not parts[0].startswith(before):
        return begin
    lead = parts[0][len(before) :]
    return begin - len(lead) if text[:begin].endswith(lead) else begin


def _content_begin(render: Render, messages: Messages, turn: int, text: str) -> int | None:
    """Where the content of message `turn` begins in `text`; None if that is uncertain."""
    mark, content = _unused(text), messages[turn]["content"]
    parts = _split(render, messages, turn, mark + content, mark)
    if parts is not None and text.startswith(parts[0]):
        rest = text[len(parts[0]) :]
        if parts[1].endswith(rest) and not parts[1][: len(parts[1]) - len(rest)].strip():
            return len(parts[0])
    parts = _split(render, messages, turn, mark, mark)  # for a template that drops the first part, such as a thought
    if parts is not None and text.startswith(parts[0]) and text[len(parts[0]) :].endswith(parts[1]):
        written = text[len(parts[0]) : len(text) - len(parts[1])]
        return len(parts[0]) if content.rstrip().endswith(written.strip()) else None
    return None


def marked_spans(tokenizer, messages: Messages, text: str) -> list[tuple[int, int]] | None:
    """The spans in `text`, in characters, that the template marks with {% generation %}; None without marks."""
    template = tokenizer.chat_template
    template = template.get("default", "") if isinstance(template, dict) else template
    if not GENERATION.search(template):
        return None
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, spans = render_jinja_template(
        conversations=[list(messages)],
        chat_template=template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    return spans[0] if texts == [text] else None


def _closed(render: Render, messages: Messages, text: str, end: int) -> int | None:
    """Where the closing of a turn ends whose content ends at `end`, if the template closes it like a final turn."""
    mark = _unused(text)
    parts = _split(render, messages, len(messages) - 1, messages[-1]["content"] + mark, mark)
    return end + len(parts[1]) if parts is not None and text[end:].startswith(parts[1]) else None


def _rendered(render: Render, messages: Messages, *, generate: bool = False) -> str | None:
    """The rendered text; None if the template refuses a conversation that was cut or changed."""
    try:
        return render(messages, generate=generate)
    except DatasetError:
        return None


def _split(render: Render, messages: Messages, turn: int, content: str, mark: str) -> tuple[str, str] | None:
    """The text before and after the mark, with `content` in place of the turn's; None unless it occurs once."""
    changed = [*messages[:turn], {**messages[turn], "content": content}, *messages[turn + 1 :]]
    parts = (_rendered(render, changed) or "").split(mark)
    return (parts[0], parts[1]) if len(parts) == 2 else None


def _unused(text: str) -> str:
    mark = PROBE_CONTENT
    while mark in text:
        mark += "Zq"
    return mark
