"""The words of a prompt, equal for equal prompts in any form: text, messages, or a rendered conversation.

Chat templates are not available here, so turns are found by the marks of the usual templates, and their words are
compared. Unknown marks count as words. If two different prompts are taken for one, they are only put on the same side
of the split.
"""

from __future__ import annotations

import heapq
import re
import unicodedata
from collections.abc import Iterator

from stages.data.comparisons import Comparison
from stages.data.raw_rows import Content
from stages.data.rows import Demonstration, Prompt

TAG = re.compile(
    r"""
    [<\[](?:
      \|im_start\|>\s*(?P<chatml>\w+)                                    # ChatML, Qwen
    | \|start_header_id\|>\s*(?P<header>\w+)\s*<\|end_header_id\|>       # Llama 3
    | start_of_turn>\s*(?P<turn>\w+)                                     # Gemma
    | [|｜](?P<bars>user|human|assistant|chatbot|bot|model|system)(?:_token)?[|｜]>  # Zephyr, Phi, DeepSeek, Command
    | (?P<brackets>/?INST\]|</?SYS>>|/?SYSTEM_PROMPT\])                  # Llama 2, Mistral
    )""",
    re.VERBOSE | re.IGNORECASE,
)
# Transcripts, our own `plain`, Vicuna and Alpaca; both cases spelled out, since IGNORECASE takes six times as long.
SPEAKER = re.compile(
    r"[HhUuAaSsBbIiRr](?:uman|UMAN|ser|SER|ssistant|SSISTANT|ystem|YSTEM|ot|i|I|nstruction|nput|esponse):"
)
INLINE = ("human", "user", "assistant")  # also within a line, if capitalised
SPEAKERS, HEADINGS = (*INLINE, "system", "bot", "ai"), (*INLINE, "system", "instruction", "input", "response")
# The first words of Alpaca's and Vicuna's templates; every other beginning is part of the question.
BOILERPLATE = re.compile(
    r"Below is an instruction[^.]*\.(?: Write a response[^.]*\.)?"
    r"|A chat (?:between|with) [^.]*assistant\.(?: The assistant gives[^.]*\.)?"
)
SPECIAL = re.compile(r"<[|｜][^<>\s]{1,40}[|｜]>|</?s>|<(?:bos|eos|pad|end_of_turn)>")
USER, ASSISTANT, SYSTEM = "user", "assistant", "system"
SPEAKER_ROLES = {
    "assistant": ASSISTANT, "chatbot": ASSISTANT, "bot": ASSISTANT, "ai": ASSISTANT, "model": ASSISTANT,
    "response": ASSISTANT, "/inst]": ASSISTANT, "system": SYSTEM, "developer": SYSTEM, "<sys>>": SYSTEM,
    "system_prompt]": SYSTEM,
}  # fmt: skip


def first_question(row: Demonstration | Prompt | Comparison) -> str:
    """The user's words before the first assistant turn, which identify a conversation at any turn.

    Text before the first mark counts as the user's. A system line and the usual first words of templates do not count,
    since templates add them; without any other words, the system's are used. A text without turns counts whole.
    """
    turns: dict[str, list[str]] = {USER: [], SYSTEM: []}
    for role, words in _turns(_prompt_of(row)):
        if role != ASSISTANT:
            turns[SYSTEM if role == SYSTEM or BOILERPLATE.fullmatch(words) else USER].append(words)
        elif any(turns[USER]):
            break
    return " ".join(filter(None, turns[USER])) or " ".join(filter(None, turns[SYSTEM])) or whole_prompt(row)


def whole_prompt(row: Demonstration | Prompt | Comparison) -> str:
    """The words of every turn before the response, including the system's."""
    content = _prompt_of(row)
    turns = list(_turns(content))
    while turns and (turns[-1][0] == ASSISTANT or not turns[-1][1]):
        turns.pop()
    return " ".join(words for _, words in turns if words) or repr(content)


def _prompt_of(row: Demonstration | Prompt | Comparison) -> Content:
    """The prompt of a row; for a demonstration without one its whole text, perhaps a rendered conversation."""
    if isinstance(row, Demonstration):
        return row.prompt or row.messages or row.completion
    return _whole_lines(row) if isinstance(row, Comparison) and row.guessed else row.prompt


def _whole_lines(row: Comparison) -> Content:
    """A guessed prompt without its last line, which holds words that the responses happen to share.

    It stays whole if the responses begin with a line break, or if it ends in an assistant turn.
    """
    prompt, response = row.prompt, row.responses[0]
    new_line = isinstance(response, str) and response.startswith("\n")
    if not isinstance(prompt, str) or new_line or list(_marked_turns(prompt))[-1][0] == ASSISTANT:
        return prompt
    cut = prompt[: max(prompt.rfind("\n"), 0)]
    return cut if cut.strip() else prompt


def _turns(content: Content) -> Iterator[tuple[str, str]]:
    """Roles and words of a prompt's turns; text before the first mark is the user's."""
    if isinstance(content, str):
        yield from _marked_turns(content)
        return
    for message in content:
        role = SPEAKER_ROLES.get(message["role"], USER)
        if role == USER:
            yield from _marked_turns(message["content"])
        else:
            yield role, _words(message["content"])


def _marked_turns(text: str) -> Iterator[tuple[str, str]]:
    role, start = USER, 0
    for begin, end, name in _marks(text):
        yield role, _words(text[start:begin])
        role, start = SPEAKER_ROLES.get(name, USER), end
    yield role, _words(text[start:])


def _marks(text: str) -> Iterator[tuple[int, int, str]]:
    """Begin, end and name of each mark of a turn in a text.

    A name marks a turn at the start of a line or directly after another mark.
    """
    last = 0
    for mark in heapq.merge(TAG.finditer(text), SPEAKER.finditer(text), key=lambda mark: mark.start()):
        begin = mark.start()
        if mark.re is TAG:
            last = mark.end()
            yield begin, last, mark[mark.lastgroup or 0].lower()
            continue
        name = mark[0][:-1].lower()
        before = text[max(last, text.rfind("\n", 0, begin) + 1) : begin].strip()
        within = name in INLINE and text[begin].isupper() and text[begin - 1].isspace()
        if before == "###" and name in HEADINGS:
            begin = text.rindex("###", 0, begin)
        elif name not in SPEAKERS or before and not within:
            continue
        last = mark.end()
        yield begin, last, name


def _words(text: str) -> str:
    plain = SPECIAL.sub(" ", text) if "<" in text else text
    return " ".join((plain if plain.isascii() else unicodedata.normalize("NFC", plain)).split())


def prompt_of(row: Demonstration) -> Prompt | None:
    """The prompt of a demonstration, to be answered, with its completion as a column; None if there is none."""
    if row.messages and not row.completion:
        last = max(i for i, message in enumerate(row.messages) if message["role"] == "assistant")
        return Prompt(row.where, row.messages[:last], {"completion": row.messages[last]["content"]}) if last else None
    return Prompt(row.where, row.prompt, {"completion": row.completion}, row.messages[:-1]) if row.prompt else None
