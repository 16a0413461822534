"""Text to tokens and back: templates, stop tokens, target masks, cutting to length.

Whole texts are tokenised once and masks come from character offsets, because pieces tokenised apart need not join up.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from stages.errors import DatasetError, ModelError
from stages.files.rows import Comparison, Demonstration, Prompt
from stages.files.sources import first_line
from stages.places import absolute

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ 'Assistant: ' + message['content'] + eos_token + '\n\n' }}"
    "{% else %}{{ ('Human: ' if message['role'] == 'user' else 'System: ') + message['content'] + '\n\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "plain": PLAIN}


@dataclass(frozen=True)
class TokenRow:
    """One tokenised sequence and which of its tokens are learned or judged."""

    ids: Tensor  # (L,) int64
    targets: Tensor  # (L,) bool; token 0 is never a target, nothing predicts it
    cut: bool  # True where the row was too long and lost its end


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
        self.has_template = bool(getattr(tokenizer, "chat_template", None))
        self.eos_id: int = tokenizer.eos_token_id
        self.turn_end_id = self._turn_end(stop_ids) if self.has_template else self.eos_id
        self.stop_ids = tuple(sorted({*stop_ids, self.eos_id, self.turn_end_id}))

    def _turn_end(self, stop_ids: tuple[int, ...]) -> int:
        """The special token by which the chat template ends an assistant's turn; EOS where it writes none."""
        talk = ({"role": "user", "content": "hello"}, {"role": "assistant", "content": "hello"})
        ids = self.tokenizer(self.render(talk), add_special_tokens=False).input_ids
        special = {*self.tokenizer.all_special_ids, *stop_ids}
        after = len(ids) - 1
        while after >= 0 and ids[after] not in special and not self.tokenizer.decode([ids[after]]).strip():
            after -= 1
        return ids[after] if after >= 0 and ids[after] in special else self.eos_id

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
        """Tokens and their character spans; a rendered template brings its own special tokens."""
        coded = self.tokenizer(text, add_special_tokens=not rendered, return_offsets_mapping=True, verbose=False)
        ids, spans = list(coded["input_ids"]), list(coded["offset_mapping"])
        while ids and not rendered and ids[-1] == self.eos_id and spans[-1][0] == spans[-1][1]:
            ids, spans = ids[:-1], spans[:-1]  # some tokenizers append EOS by themselves; we add it ourselves, once
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
            targets = [end > begin and end > start for start, end in spans]
            if ids[-1:] != [self.eos_id]:  # a completion may bring its own
                ids, targets = [*ids, self.eos_id], [*targets, True]
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
        text = self.render(row.messages)
        ids, spans = self.encode(text, rendered=True)
        turns = [i for i, message in enumerate(row.messages) if message["role"] == "assistant"]
        learned = turns if mask == "assistant" else turns[-1:]
        targets = [False] * len(ids)
        for turn in learned:
            begin, end = self._turn_span(row, turn, text)
            self._mark_turn(ids, spans, targets, begin, end)
        last = max((i for i, on in enumerate(targets) if on), default=-1)
        if turns[-1] == len(row.messages) - 1 and (last < 0 or ids[last] not in self.stop_ids):
            ids, targets = [*ids[: last + 1], self.eos_id], [*targets[: last + 1], True]
        return ids, targets

    def _turn_span(self, row: Demonstration, turn: int, text: str) -> tuple[int, int]:
        """Characters of the rendered conversation that assistant turn `turn` wrote, its end-of-turn included."""
        before = self.render(row.messages[:turn], generate=True) if turn else ""
        after = self.render(row.messages[: turn + 1])
        if turn and text.startswith(before) and text.startswith(after) and after.startswith(before):
            return len(before), len(after)
        begin = 0
        for message in row.messages[: turn + 1]:
            content = message["content"].strip()
            found = text.find(content, begin)
            if found < 0:
                break
            begin = found + (len(content) if message is not row.messages[turn] else 0)
        else:
            following = (
                text.find(row.messages[turn + 1]["content"].strip(), begin) if turn + 1 < len(row.messages) else -1
            )
            return begin, following if following > begin else len(text)
        raise DatasetError(
            "the chat template changes the assistant's text, so it cannot be found again",
            where=row.where, fix="use a template that writes contents as they are",
        )  # fmt: skip

    def _mark_turn(
        self, ids: list[int], spans: list[tuple[int, int]], targets: list[bool], begin: int, end: int
    ) -> None:
        """Mark the tokens inside a turn up to its first stop token; without one, up to its last visible token."""
        inside = [i for i, (start, stop) in enumerate(spans) if stop > begin and start < end and stop > start]
        for position in inside:
            targets[position] = True
            if ids[position] in self.stop_ids:
                break
        else:
            while inside and not self.tokenizer.decode([ids[inside[-1]]]).strip():
                targets[inside.pop()] = False
            return

    # --- comparisons

    def comparison(self, row: Comparison, max_tokens: int) -> list[TokenRow]:
        """Tokenise prompt + response for each response; targets mark the response.

        A prompt too long loses its beginning, a response too long its end (and so its EOS).
        """
        return [self._judged(row, response, max_tokens) for response in row.responses]

    def _judged(self, row: Comparison, response: object, max_tokens: int) -> TokenRow:
        if isinstance(response, str):
            ids, spans = self.encode(row.prompt + response, rendered=False)
            begin = sum(1 for _, end in spans if end <= len(row.prompt))
            ids = ids if ids[-1:] == [self.eos_id] else [*ids, self.eos_id]
        else:
            self.need_template(row.where)
            whole = Demonstration(row.where, "", "", (*row.prompt, *response))
            ids, targets = self._conversation(whole, "completion")
            last = max(i for i, on in enumerate(targets) if on)
            ids, begin = ids[: last + 1], targets.index(True)
        return _fit(ids, begin, max_tokens)


def _fit(ids: list[int], begin: int, max_tokens: int) -> TokenRow:
    prompt, response = ids[:begin], ids[begin:]
    kept = min(len(prompt), max(max_tokens // 4, max_tokens - len(response)))
    prompt = prompt[len(prompt) - kept :]
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
        tokenizer.chat_template = TEMPLATES.get(chat_template) or _read_template(chat_template)
    try:
        return Text(tokenizer, stop_ids)
    except DatasetError as error:  # not a row's fault: the template refuses a plain question and answer
        where = str(folder) if chat_template is None else f"--chat-template {chat_template}"
        raise ModelError(error.what, where=where, fix="correct the template") from None


def _read_template(name: str) -> str:
    try:
        return absolute(name, "--chat-template").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(
            f"cannot read the chat template: {error}",
            where="--chat-template",
            fix="give chatml, plain or a .jinja file",
        ) from None
