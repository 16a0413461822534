"""Text to tokens and back: templates, stop tokens, target masks, cutting to length.

Whole texts are tokenised once and masks come from character offsets, because pieces tokenised apart need not join up.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from stages.data.raw_rows import first_line
from stages.data.rows import Comparison, Content, Demonstration, Prompt
from stages.errors import DatasetError, ModelError
from stages.models.templates import TEMPLATES, choose_template, opening_tokens
from stages.models.turns import content_end, find_turn, marked_spans

MARKS_ADVICE = "put {% generation %} around what the assistant writes, or leave these marks out of the template"
PROBE = ({"role": "user", "content": "hello"}, {"role": "assistant", "content": "hello"})


@dataclass(frozen=True)
class TokenRow:
    """One tokenised sequence and which of its tokens are learned or judged."""

    ids: Tensor  # (L,) int64
    targets: Tensor  # (L,) bool; token 0 is never a target, nothing predicts it
    cut: bool  # True where the row was too long and lost its end

    @property
    def size(self) -> int:
        """Tokens."""
        return len(self.ids)


@dataclass(frozen=True)
class PromptRow:
    """A tokenised prompt with what reward functions are told about it."""

    ids: Tensor  # (P,) int64
    text: object  # the prompt as the dataset had it: text, or a list of messages
    end_id: int  # the token that ends a response to it
    columns: dict[str, object]
    where: str


class Text:
    """A tokenizer and what this tool needs to know of it."""

    def __init__(self, tokenizer, stop_ids: tuple[int, ...]):
        self.tokenizer = tokenizer
        self.warnings: tuple[str, ...] = ()  # what the user should know of the tokenizer and its template
        self.opening = opening_tokens(tokenizer)
        self.special = {*tokenizer.all_special_ids, *stop_ids}
        self.has_template = bool(getattr(tokenizer, "chat_template", None))
        self.eos_id: int = tokenizer.eos_token_id
        self.turn_end_id = self._turn_end() if self.has_template else self.eos_id
        self.stop_ids = tuple(sorted({*stop_ids, self.eos_id, self.turn_end_id}))

    def _turn_end(self) -> int:
        """The special token by which the chat template ends an assistant's turn; EOS where it writes none."""
        ids = self.tokenizer(self.render(PROBE), add_special_tokens=False).input_ids
        after = len(ids) - 1
        while after >= 0 and ids[after] not in self.special and not self.tokenizer.decode([ids[after]]).strip():
            after -= 1
        return ids[after] if after >= 0 and ids[after] in self.special else self.eos_id

    # --- rendering and encoding

    def render(self, messages: object, *, generate: bool = False) -> str:
        """A conversation as text; raises DatasetError with the template's own words where it refuses."""
        try:
            return self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generate)
        except Exception as error:  # templates raise whatever their author chose
            raise DatasetError(
                f"the chat template refuses the conversation: {first_line(error)}", fix="fix the row's roles"
            ) from None

    def encode(self, text: str, *, rendered: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokens and their character spans; a rendered template brings its own special tokens.

        Plain text begins with the tokenizer's opening tokens once, also where it spells them out itself, and has no
        special token behind it: EOS is added where a response ends, once.
        """
        coded = self.tokenizer(text, add_special_tokens=not rendered, return_offsets_mapping=True, verbose=False)
        ids, spans = list(coded["input_ids"]), list(coded["offset_mapping"])
        if rendered:
            return ids, spans
        size, opening = len(self.opening), list(self.opening)
        while len(ids) > size and spans[-1][0] == spans[-1][1] and ids[-1] in self.special:
            ids, spans = ids[:-1], spans[:-1]
        if opening and ids[: 2 * size] == opening * 2:
            ids, spans = ids[size:], spans[size:]
        return ids, spans

    def need_template(self, where: str) -> None:
        """Raise DatasetError for a conversation where the tokenizer has no chat template."""
        if not self.has_template:
            raise DatasetError(
                "the row is a conversation, but the tokenizer has no chat template",
                where=where,
                fix="pass --chat-template chatml, plain or a .jinja file; it is saved with the checkpoint",
            )

    # --- prompts and responses

    def prompt(self, row: Prompt, max_tokens: int) -> PromptRow:
        """Tokenise a prompt; raises DatasetError where it is longer than `max_tokens`."""
        messages = row.prompt if not isinstance(row.prompt, str) else (row.messages if self.has_template else ())
        if messages:
            self.need_template(row.where)
            ids, _ = self.encode(self.render(messages, generate=True), rendered=True)
        else:
            ids, _ = self.encode(row.prompt, rendered=False)
        if not ids:
            raise DatasetError("the prompt has no tokens", where=row.where, fix="drop the row, or pass --skip-bad-rows")
        if len(ids) > max_tokens:
            raise DatasetError(
                f"the prompt has {len(ids)} tokens, {max_tokens} fit beside the response",
                where=f"{row.where}: prompt",
                fix="shorten it, raise --max-prompt-tokens or lower --max-response-tokens if the context allows, "
                "or pass --skip-bad-rows",
            )
        shown = list(messages) if messages else row.prompt
        return PromptRow(
            torch.tensor(ids), shown, self.turn_end_id if messages else self.eos_id, row.columns, row.where
        )

    def response_text(self, prompt: Tensor, response: Tensor) -> str:
        """A response as text, spacing kept: what decoding adds to the decoded prompt, special tokens left out.

        So is the stop token at its end, whether or not the tokenizer calls it special.
        """
        if len(response) and int(response[-1]) in self.stop_ids:
            response = response[:-1]
        before = self.tokenizer.decode(prompt, skip_special_tokens=True)
        whole = self.tokenizer.decode(torch.cat([prompt, response]), skip_special_tokens=True)
        if whole.startswith(before):
            return whole[len(before) :]
        return self.tokenizer.decode(response, skip_special_tokens=True)

    # --- demonstrations

    def demonstration(self, row: Demonstration, mask: str, max_tokens: int) -> TokenRow:
        """Tokenise a demonstration; targets per `mask`; cut at `max_tokens` without a false EOS.

        Raises DatasetError where no target is left.
        """
        if row.messages and (self.has_template or not row.completion):
            self.need_template(row.where)
            ids, targets = self._conversation(row, mask)
        else:
            ids, spans = self.encode(row.prompt + row.completion, rendered=False)
            begin = 0 if mask == "all" else len(row.prompt)
            targets = [*(end > begin for _, end in spans), True]
            ids = self._closed(row.prompt + row.completion, ids, spans)
            targets = targets[: len(ids)]
        cut = len(ids) > max_tokens
        ids, targets = ids[:max_tokens], targets[:max_tokens]
        if mask == "all":
            targets = [True] * len(ids)
        targets[0] = False
        if not any(targets):
            raise DatasetError(
                f"nothing is left to learn within {max_tokens} tokens: the prompt fills them",
                where=row.where,
                fix="shorten the prompt, raise --max-tokens if the model's context allows, or pass --skip-bad-rows",
            )
        return TokenRow(torch.tensor(ids), torch.tensor(targets), cut)

    def _conversation(self, row: Demonstration, mask: str) -> tuple[list[int], list[bool]]:
        """Tokens and targets of a conversation; one that the assistant ends without an end token gets EOS."""
        text = self.render(row.messages)
        ids, spans = self.encode(text, rendered=True)
        if mask == "all":
            targets = [True] * len(ids)
            last = _last_visible(text, spans, range(len(ids)))
        else:
            targets, last = self._learned(row, mask, text, ids, spans)
        if row.messages[-1]["role"] == "assistant" and (last < 0 or ids[last] not in self.stop_ids):
            ids, targets = [*ids[: last + 1], self.eos_id], [*targets[: last + 1], True]
        return ids, targets

    def _learned(
        self, row: Demonstration, mask: str, text: str, ids: list[int], spans: list[tuple[int, int]]
    ) -> tuple[list[bool], int]:
        """Which tokens are the assistant's, and the last one of its last turn, the turn's end token if it has one."""
        turns = [i for i, message in enumerate(row.messages) if message["role"] == "assistant"]
        marks = self._marks(row, text, ids, spans)
        if marks is None:
            found = [self._turn(row, i, text, ids, spans) for i in (turns if mask == "assistant" else turns[-1:])]
            learned = {i for first, last in found for i in range(first, last + 1)}
            return [i in learned for i in range(len(ids))], found[-1][1]
        if mask == "assistant" and any(ids[i] in self.stop_ids for i in marks[-1]):
            last = _last_visible(text, spans, marks[-1])
        else:
            first, last = self._turn(row, turns[-1], text, ids, spans)
            marks = marks if mask == "assistant" else [[i for i in part if i >= first] for part in marks]
        learned = {i for part in marks for i in part}
        return [i in learned for i in range(len(ids))], last

    def _marks(
        self, row: Demonstration, text: str, ids: list[int], spans: list[tuple[int, int]]
    ) -> list[list[int]] | None:
        """The tokens that the template marks as generated, part by part; None where it has no such marks.

        A turn's end token belongs to the turn, even if the marks end before it.
        """
        found = marked_spans(self.tokenizer, row.messages, text)
        if found is None:
            return None
        parts = [part for begin, end in found if (part := _inside(spans, begin, end))]
        if not parts:
            raise DatasetError(
                "the chat template marks nothing of the conversation as generated", where=row.where, fix=MARKS_ADVICE
            )
        for part in parts:
            seen, after = _last_visible(text, spans, part), _next_visible(text, spans, part[-1] + 1)
            ended = seen >= 0 and ids[seen] in self.stop_ids
            if not ended and after < len(ids) and ids[after] == self.turn_end_id:
                part += range(part[-1] + 1, after + 1)
        return parts

    def _turn(
        self, row: Demonstration, turn: int, text: str, ids: list[int], spans: list[tuple[int, int]]
    ) -> tuple[int, int]:
        """First and last token of assistant turn `turn`: up to its end token, without one up to its last visible one.

        Raises DatasetError where the template does not let that be told with certainty.
        """
        try:
            span = find_turn(self.render, row.messages, turn, text)
        except DatasetError as error:
            raise DatasetError(error.what, where=row.where, fix=error.fix) from None
        inside = _inside(spans, span.begin, span.end if span.closed is None else span.closed)
        first = inside[0] if inside else sum(stop <= span.begin for _, stop in spans)
        stops = [i for i in inside if ids[i] in self.stop_ids]
        if stops and (last := _last_visible(text, spans, inside)) != stops[0]:  # an end token that the content quotes
            end = content_end(self.render, row.messages, turn, text) if span.end is None else span.end
            stops = [i for i in stops if i == last or not text[spans[i][1] : end or 0].strip()]
        if stops:
            return first, stops[0]
        last = max(first - 1, _last_visible(text, spans, inside))
        after = _next_visible(text, spans, last + 1)
        if turn + 1 == len(row.messages) or after == len(ids):
            return first, last
        if ids[after] == self.turn_end_id or (span.closed is None and ids[after] in self.stop_ids):
            return first, after
        if span.closed is None and ids[after] in self.special:
            raise DatasetError(
                "the chat template ends an earlier assistant turn otherwise than the last one, so where it ends is "
                "not certain",
                where=row.where, fix="pass --mask completion, or use a template with {% generation %} marks",
            )  # fmt: skip
        return first, last

    # --- comparisons

    def comparison(self, row: Comparison, max_tokens: int) -> list[TokenRow]:
        """Tokenise prompt + response for each response; targets mark the response.

        A prompt too long loses its beginning, a response too long its end (and so its EOS).
        """
        return [self._judged(row.where, row.prompt, response, max_tokens) for response in row.responses]

    def judged(self, row: Demonstration, max_tokens: int) -> TokenRow:
        """A demonstration's last response as a reward model reads it: up to its end token, cut as in a comparison."""
        if row.messages and (self.has_template or not row.completion):
            last = max(i for i, message in enumerate(row.messages) if message["role"] == "assistant")
            return self._judged(row.where, row.messages[:last], row.messages[last : last + 1], max_tokens)
        return self._judged(row.where, row.prompt, row.completion, max_tokens)

    def _judged(self, where: str, prompt: Content, response: Content, max_tokens: int) -> TokenRow:
        if isinstance(response, str):
            ids, spans = self.encode(prompt + response, rendered=False)
            begin = sum(1 for _, end in spans if end <= len(prompt))
            ids = self._closed(prompt + response, ids, spans)
        else:
            self.need_template(where)
            whole = Demonstration(where, "", "", (*prompt, *response))
            text = self.render(whole.messages)
            ids, spans = self.encode(text, rendered=True)
            begin, last = self._turn(whole, len(whole.messages) - 1, text, ids, spans)
            ids = ids[: last + 1] if ids[last] in self.stop_ids else [*ids[: last + 1], self.eos_id]
        return _fit(ids, begin, max_tokens, self.opening)

    def _closed(self, text: str, ids: list[int], spans: list[tuple[int, int]]) -> list[int]:
        """Tokens of a plain text with one EOS at the end: its own, or one more."""
        last = _last_visible(text, spans, range(len(ids)))
        return ids[: last + 1] if last >= 0 and ids[last] == self.eos_id else [*ids, self.eos_id]


def _inside(spans: list[tuple[int, int]], begin: int, end: int) -> list[int]:
    """The tokens, without a gap, that hold characters from `begin` to before `end`."""
    return [i for i, (start, stop) in enumerate(spans) if stop > begin and start < end]


def _last_visible(text: str, spans: list[tuple[int, int]], tokens: Sequence[int]) -> int:
    """The last of some tokens that is not whitespace; -1 where there is none."""
    return next((i for i in reversed(tokens) if text[slice(*spans[i])].strip()), -1)


def _next_visible(text: str, spans: list[tuple[int, int]], begin: int) -> int:
    """The first token from `begin` on that is not whitespace; the number of tokens where there is none."""
    return next((i for i in range(begin, len(spans)) if text[slice(*spans[i])].strip()), len(spans))


def _fit(ids: list[int], begin: int, max_tokens: int, opening: tuple[int, ...]) -> TokenRow:
    prompt, response = ids[:begin], ids[begin:]
    kept = min(len(prompt), max(max_tokens // 4, max_tokens - len(response)))
    first = prompt[: len(opening)] if tuple(prompt[: len(opening)]) == opening and len(opening) < kept else []
    prompt = first + prompt[len(prompt) - kept + len(first) :]  # a prompt cut short begins with BOS all the same
    shown = response[: max_tokens - kept]
    targets = torch.zeros(len(prompt) + len(shown), dtype=torch.bool)
    targets[max(1, len(prompt)) :] = True
    return TokenRow(torch.tensor(prompt + shown), targets, len(prompt) + len(shown) < len(ids))


def load_text(folder: Path, *, chat_template: str | None, stop_ids: tuple[int, ...], trust_remote_code: bool) -> Text:
    """Load a tokenizer; raises ModelError where it has no EOS, no offsets, or the chat template cannot be had."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizer files fail in as many ways as there are formats
        raise ModelError(
            f"the tokenizer cannot be loaded: {first_line(error)}", where=str(folder), fix="restore its files"
        ) from None
    if not tokenizer.is_fast:
        raise ModelError(
            "the tokenizer reports no character offsets", where=str(folder), fix="use its fast version (tokenizer.json)"
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(
            "the tokenizer names no end-of-sequence token",
            where=str(folder),
            fix="set eos_token in tokenizer_config.json",
        )
    if chat_template is not None:
        tokenizer.chat_template = choose_template(chat_template, tokenizer)
    try:
        text = Text(tokenizer, stop_ids)
    except DatasetError as error:  # not a row's fault: the template refuses a plain question and answer
        where = str(folder) if chat_template is None else f"--chat-template {chat_template}"
        raise ModelError(error.what, where=where, fix="correct the template") from None

    if chat_template is not None and chat_template not in TEMPLATES:
        text.warnings += _odd_opening(text, chat_template)
    text.warnings += _odd_response(text)
    return text


def _odd_response(text: Text) -> tuple[str, ...]:
    """A warning where the template ends a prompt by text that it does not write before a recorded response."""
    try:
        asked, whole = text.render(PROBE[:1], generate=True), text.render(PROBE)
    except DatasetError:
        return ()
    begin = len(os.path.commonprefix([asked, whole]))
    if not text.has_template or begin == len(asked):
        return ()
    return (
        f"the chat template ends a prompt with {asked[begin:]!r}, which it does not write before a recorded response: "
        "responses are sampled after it, demonstrations and comparisons are learned without it",
    )


def _odd_opening(text: Text, name: str) -> tuple[str, ...]:
    """A warning where a template from a file does not begin as plain text does; raises ModelError for two beginnings.

    The file is used as it is all the same: some models are served without the token.
    """
    opening, where = list(text.opening), f"--chat-template {name}"
    if not opening:
        return ()
    size, words = len(opening), "".join(text.tokenizer.convert_ids_to_tokens(opening))
    ids, _ = text.encode(text.render(PROBE), rendered=True)
    if ids[: 2 * size] == opening * 2:
        raise ModelError(f"the template writes {words} twice", where=where, fix="write it once, as {{ bos_token }}")
    if ids[:size] == opening:
        return ()
    return (
        f"{where} does not write {words}, which the tokenizer puts before plain text; conversations are trained and "
        "sampled without it. Begin the file with {{ bos_token }} unless the model is meant to do without",
    )
