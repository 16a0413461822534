"""Text to tokens and back: templates, stop tokens, target masks, cutting to length.

Whole texts are tokenised once and masks come from character offsets, because the tokens of pieces need not join up.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stages.data.comparisons import Comparison
from stages.data.raw_rows import Content, Message, first_line
from stages.data.rows import Demonstration, Prompt
from stages.errors import DatasetError, LongRow, ModelError
from stages.models.templates import PROBE_MESSAGES, choose_template, opening_tokens, template_warnings
from stages.models.token_rows import Encoding, PromptRow, TokenRow, Tokens, cut_comparison, cut_prompt
from stages.models.turns import content_end, find_turn, marked_spans

if TYPE_CHECKING:
    from torch import Tensor

GENERIC = ("TokenizersBackend", "PreTrainedTokenizerFast")  # tokenizer classes that add nothing to tokenizer.json
LIGHT_TYPES = ("llama", "smollm3")  # model types for which transformers keeps a generic class
MARKS_ADVICE = "put {% generation %} around what the assistant writes, or leave these marks out of the template"


class Text:
    """A tokenizer with its chat template, and the tokens that begin a text and end a response."""

    def __init__(self, tokenizer, stop_ids: tuple[int, ...]):
        self.tokenizer = tokenizer
        self.warnings: list[str] = []  # of an odd template
        self.opening = opening_tokens(tokenizer)
        self.special = {*tokenizer.all_special_ids, *stop_ids}
        self.has_template = bool(getattr(tokenizer, "chat_template", None))
        self.eos_id: int = tokenizer.eos_token_id
        self.turn_end_id = self._turn_end() if self.has_template else self.eos_id
        self.stop_ids = tuple(sorted({*stop_ids, self.eos_id, self.turn_end_id}))

    def _turn_end(self) -> int:
        """The special token by which the chat template ends an assistant's turn; EOS if it writes none."""
        ids = self.tokenizer(self.render(PROBE_MESSAGES), add_special_tokens=False).input_ids
        after = len(ids) - 1
        while after >= 0 and ids[after] not in self.special and not self.tokenizer.decode([ids[after]]).strip():
            after -= 1
        return ids[after] if after >= 0 and ids[after] in self.special else self.eos_id

    # --- rendering and encoding

    def render(self, messages: object, *, generate: bool = False) -> str:
        """A conversation as text; raises DatasetError with the template's message if it refuses."""
        try:
            return self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generate)
        except Exception as error:  # templates raise whatever their author chose
            raise DatasetError(
                f"the chat template refuses the conversation: {first_line(error)}", fix="fix the row's roles"
            ) from None

    def encode(self, text: str, *, rendered: bool) -> Encoding:
        """Tokens and their character spans; a rendered template brings its own special tokens.

        Plain text begins with the tokenizer's opening tokens once, even if it spells them out itself, and has no
        special token behind it: EOS is added at the end of a response, once.
        """
        coded = self.tokenizer(text, add_special_tokens=not rendered, return_offsets_mapping=True, verbose=False)
        ids, spans = list(coded["input_ids"]), list(coded["offset_mapping"])
        if rendered:
            return Encoding(text, ids, spans)
        size, opening = len(self.opening), list(self.opening)
        while len(ids) > size and spans[-1][0] == spans[-1][1] and ids[-1] in self.special:
            ids, spans = ids[:-1], spans[:-1]
        if opening and ids[: 2 * size] == opening * 2:
            ids, spans = ids[size:], spans[size:]
        return Encoding(text, ids, spans)

    def need_template(self, where: str) -> None:
        """Raise DatasetError, for a conversation, if the tokenizer has no chat template."""
        if not self.has_template:
            raise DatasetError(
                "the row is a conversation, but the tokenizer has no chat template",
                where=where,
                fix="pass --chat-template chatml, plain or a .jinja file; it is saved with the checkpoint",
            )

    # --- prompts and responses

    def prompt(self, row: Prompt, max_tokens: int, *, cut: bool = False) -> PromptRow:
        """Tokenise a prompt; one longer than `max_tokens` loses its beginning with `cut`, else raises LongRow."""
        import torch

        tokens, messages = self.prompt_tokens(row, max_tokens, cut=cut)
        end_id = self.turn_end_id if messages else self.eos_id
        text = list(messages) or row.prompt
        return PromptRow(torch.tensor(tokens.ids), text, end_id, row.columns, row.where, tokens.cut, tokens.whole)

    def prompt_tokens(self, row: Prompt, max_tokens: int, *, cut: bool = False) -> tuple[Tokens, tuple[Message, ...]]:
        """The tokens of a prompt, and its messages if it is read as a conversation; raises as `prompt` does."""
        messages = row.prompt if not isinstance(row.prompt, str) else (row.messages if self.has_template else ())
        if messages:
            self.need_template(row.where)
            ids = self.encode(self.render(messages, generate=True), rendered=True).ids
        else:
            ids = self.encode(row.prompt, rendered=False).ids  # type: ignore[arg-type]
        if not ids:
            raise DatasetError("the prompt has no tokens", where=row.where, fix="drop the row, or pass --skip-bad-rows")
        if len(ids) > max_tokens and not cut:
            raise LongRow(
                f"the prompt has {len(ids)} tokens, {max_tokens} fit beside the response",
                where=f"{row.where}: prompt",
                fix="shorten it, raise --max-prompt-tokens or lower --max-response-tokens if the context allows, "
                "or pass --long-rows drop or cut",
            )
        kept = cut_prompt(ids, max_tokens, self.opening)
        return Tokens(kept, [False] * len(kept), len(ids)), messages

    def response_text(self, prompt: Tensor, response: Tensor) -> str:
        """A response as text with its spacing: what decoding adds to the decoded prompt.

        Without special tokens, and without the stop token at its end, even if the tokenizer does not call it special.
        """
        begun, said = prompt.tolist(), response.tolist()
        if said and said[-1] in self.stop_ids:
            said = said[:-1]
        before = self.tokenizer.decode(begun, skip_special_tokens=True)
        whole = self.tokenizer.decode(begun + said, skip_special_tokens=True)
        if whole.startswith(before):
            return whole[len(before) :]
        return self.tokenizer.decode(said, skip_special_tokens=True)

    # --- demonstrations

    def demonstration(self, row: Demonstration, mask: str, max_tokens: int) -> TokenRow:
        """Tokenise a demonstration; targets per `mask`; cut at `max_tokens` without a false EOS.

        Raises LongRow if no target is left.
        """
        return self.demonstration_tokens(row, mask, max_tokens).as_row()

    def demonstration_tokens(self, row: Demonstration, mask: str, max_tokens: int) -> Tokens:
        """The tokens of `demonstration`, as lists; raises as it does."""
        if row.messages and (self.has_template or not row.completion):
            self.need_template(row.where)
            ids, targets = self._conversation(row, mask)
        else:
            coded = self.encode(row.prompt + row.completion, rendered=False)
            ids, targets = self._closed(coded), [*(end > len(row.prompt) for _, end in coded.spans), True]
        targets = [True] * len(ids) if mask == "all" else targets[: len(ids)]
        targets[0] = False
        if not any(targets[:max_tokens]):
            raise LongRow(
                f"nothing is left to learn within {max_tokens} tokens: the prompt fills them",
                where=row.where,
                fix="shorten the prompt, raise --max-tokens if the model's context allows, or pass --long-rows drop",
            )
        return Tokens(ids[:max_tokens], targets[:max_tokens], len(ids))

    def _conversation(self, row: Demonstration, mask: str) -> tuple[list[int], list[bool]]:
        """Tokens and targets of a conversation; one that the assistant ends without an end token gets EOS."""
        coded = self.encode(self.render(row.messages), rendered=True)
        ids = coded.ids
        if mask == "all":
            targets, last = [True] * len(ids), coded.last_visible(range(len(ids)))
        else:
            targets, last = self._assistant_targets(row, mask, coded)
        if row.messages[-1]["role"] == "assistant" and (last < 0 or ids[last] not in self.stop_ids):
            ids, targets = [*ids[: last + 1], self.eos_id], [*targets[: last + 1], True]
        return ids, targets

    def _assistant_targets(self, row: Demonstration, mask: str, coded: Encoding) -> tuple[list[bool], int]:
        """Which tokens are the assistant's, and the last one of its last turn, the turn's end token if it has one."""
        turns = [i for i, message in enumerate(row.messages) if message["role"] == "assistant"]
        parts: Sequence[Sequence[int]] | None = self._marked_parts(row, coded)
        if parts is None:
            ends = [self._turn(row, i, coded) for i in (turns if mask == "assistant" else turns[-1:])]
            parts, last = [range(first, last + 1) for first, last in ends], ends[-1][1]
        elif mask == "assistant" and any(coded.ids[i] in self.stop_ids for i in parts[-1]):
            last = coded.last_visible(parts[-1])
        else:
            first, last = self._turn(row, turns[-1], coded)
            if mask != "assistant":
                parts = [[i for i in part if i >= first] for part in parts]
        learned = {i for part in parts for i in part}
        return [i in learned for i in range(len(coded.ids))], last

    def _marked_parts(self, row: Demonstration, coded: Encoding) -> list[list[int]] | None:
        """The tokens that the template marks as generated, part by part; None if it has no such marks.

        A turn's end token belongs to the turn, even if the marks end before it.
        """
        spans = marked_spans(self.tokenizer, row.messages, coded.text)
        if spans is None:
            return None
        parts = [part for begin, end in spans if (part := coded.within(begin, end))]
        if not parts:
            raise DatasetError(
                "the chat template marks nothing of the conversation as generated", where=row.where, fix=MARKS_ADVICE
            )
        for part in parts:
            last, after = coded.last_visible(part), coded.next_visible(part[-1] + 1)
            ended = last >= 0 and coded.ids[last] in self.stop_ids
            if not ended and after < len(coded.ids) and coded.ids[after] == self.turn_end_id:
                part += range(part[-1] + 1, after + 1)
        return parts

    def _turn(self, row: Demonstration, turn: int, coded: Encoding) -> tuple[int, int]:
        """First and last token of assistant turn `turn`: up to its end token, without one up to its last visible one.

        Raises DatasetError if the template leaves that uncertain.
        """
        ids, text = coded.ids, coded.text
        try:
            span = find_turn(self.render, row.messages, turn, text)
        except DatasetError as error:
            raise DatasetError(error.what, where=row.where, fix=error.fix) from None
        inside = coded.within(span.begin, span.end if span.closed is None else span.closed)
        first = inside[0] if inside else sum(stop <= span.begin for _, stop in coded.spans)
        stops = [i for i in inside if ids[i] in self.stop_ids]
        if stops and (last := coded.last_visible(inside)) != stops[0]:  # an end token that the content quotes
            end = content_end(self.render, row.messages, turn, text) if span.end is None else span.end
            stops = [i for i in stops if i == last or not text[coded.spans[i][1] : end or 0].strip()]
        if stops:
            return first, stops[0]
        last = max(first - 1, coded.last_visible(inside))
        after = coded.next_visible(last + 1)
        if turn + 1 == len(row.messages) or after == len(ids):
            return first, last
        if ids[after] == self.turn_end_id or (span.closed is None and ids[after] in self.stop_ids):
            return first, after
        if span.closed is None and ids[after] in self.special:
            raise DatasetError(
                "the chat template ends an earlier assistant turn otherwise than the last one, so its end is uncertain",
                where=row.where,
                fix="pass --mask completion, or use a template with {% generation %} marks",
            )
        return first, last

    # --- comparisons

    def comparison(self, row: Comparison, max_tokens: int) -> list[TokenRow]:
        """Tokenise prompt + response for each response; targets mark the response.

        A prompt too long loses its beginning, a response too long its end (and so its EOS).
        """
        return [tokens.as_row() for tokens in self.comparison_tokens(row, max_tokens)]

    def comparison_tokens(self, row: Comparison, max_tokens: int) -> list[Tokens]:
        """The tokens of `comparison`, as lists."""
        return [self._scored(row.where, row.prompt, response, max_tokens) for response in row.responses]

    def judged(self, row: Demonstration, max_tokens: int) -> TokenRow:
        """A demonstration's last response as a reward model reads it: up to its end token, cut as in a comparison."""
        if row.messages and (self.has_template or not row.completion):
            last = max(i for i, message in enumerate(row.messages) if message["role"] == "assistant")
            prompt, response = row.messages[:last], row.messages[last : last + 1]
            return self._scored(row.where, prompt, response, max_tokens).as_row()
        return self._scored(row.where, row.prompt, row.completion, max_tokens).as_row()

    def _scored(self, where: str, prompt: Content, response: Content, max_tokens: int) -> Tokens:
        if isinstance(response, str):
            coded = self.encode(prompt + response, rendered=False)
            begin, ids = sum(1 for _, end in coded.spans if end <= len(prompt)), self._closed(coded)
        else:
            self.need_template(where)
            whole = Demonstration(where, "", "", (*prompt, *response))
            coded = self.encode(self.render(whole.messages), rendered=True)
            begin, last = self._turn(whole, len(whole.messages) - 1, coded)
            ids = coded.ids[: last + 1]
            ids = ids if coded.ids[last] in self.stop_ids else [*ids, self.eos_id]
        return cut_comparison(ids, begin, max_tokens, self.opening)

    def _closed(self, coded: Encoding) -> list[int]:
        """Tokens of a plain text with one EOS at the end, whether it has one or not."""
        ids, last = coded.ids, coded.last_visible(range(len(coded.ids)))
        return ids[: last + 1] if last >= 0 and ids[last] == self.eos_id else [*ids, self.eos_id]


def _load_tokenizer(folder: Path, trust_remote_code: bool, model_type: str):
    """A tokenizer as transformers chooses its class; of some model types in a third of the time, without torch."""
    import transformers

    if model_type in LIGHT_TYPES and (folder / "tokenizer.json").exists():
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        if settings.get("tokenizer_class") in GENERIC and not settings.get("auto_map"):
            return transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)


def load_text(
    folder: Path,
    *,
    chat_template: str | None,
    stop_ids: tuple[int, ...],
    trust_remote_code: bool,
    model_type: str = "",
) -> Text:
    """Load a tokenizer; raises ModelError if it has no EOS or no offsets, or if the chat template cannot be used.

    With the base's `model_type`, it is loaded without torch where that gives the same tokenizer.
    """
    try:
        tokenizer = _load_tokenizer(folder, trust_remote_code, model_type)
    except Exception as error:  # tokenizer files fail in as many ways as there are formats
        problem, fix = f"the tokenizer cannot be loaded: {first_line(error)}", "restore its files"
        raise ModelError(problem, where=str(folder), fix=fix) from None
    if not tokenizer.is_fast:
        problem, fix = "the tokenizer reports no character offsets", "use its fast version (tokenizer.json)"
        raise ModelError(problem, where=str(folder), fix=fix)
    if tokenizer.eos_token_id is None:
        problem, fix = "the tokenizer names no end-of-sequence token", "set eos_token in tokenizer_config.json"
        raise ModelError(problem, where=str(folder), fix=fix)
    if chat_template is not None:
        tokenizer.chat_template = choose_template(chat_template, tokenizer)
    try:
        text = Text(tokenizer, stop_ids)
    except DatasetError as error:  # not a row's fault: the template refuses a plain question and answer
        where = str(folder) if chat_template is None else f"--chat-template {chat_template}"
        raise ModelError(error.what, where=where, fix="correct the template") from None
    text.warnings = template_warnings(text, chat_template)
    return text
