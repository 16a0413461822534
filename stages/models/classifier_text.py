"""How a sequence classifier reads a prompt and a response: in its own tokens and its own chat template, if any."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stages.data.comparisons import Comparison
from stages.data.raw_rows import Content, Message, first_line
from stages.errors import DatasetError, ModelError
from stages.models.classifier_ref import SCORE_BIAS
from stages.models.model_ref import ModelRef, stop_ids_of
from stages.models.templates import choose_template
from stages.models.tokens import Text, TokenRow, load_text

SPEAKERS = {"user": "Human", "assistant": "Assistant", "system": "System"}
# RoBERTa and its descendants number positions from behind the padding token's id.
AFTER_PADDING = ("roberta", "camembert", "data2vec-text", "mpnet", "longformer", "ibert", "xmod", "luke")


@dataclass(frozen=True)
class ClassifierRow(TokenRow):
    """One text as a classifier reads it; `targets` marks as many tokens, at the end, as the response alone has."""

    segments: Tensor | None = None  # (L,) int64: which of a pair's two texts each token is of, if the tokenizer says


class ClassifierText:
    """A classifier's tokenizer, and the way in which it reads prompts and responses.

    Ways: "ours": as the reward model that was exported; "chat": its chat template; "pair": an encoder's pair of texts;
    "text": prompt and response joined, as TRL trains decoders without a template.
    """

    def __init__(self, ref: ModelRef):
        from transformers import AutoTokenizer

        self.ref = ref
        self.ours: Text | None = None
        if ref.config.get(SCORE_BIAS) is not None:
            about = {"chat_template": None, "stop_ids": stop_ids_of(ref), "trust_remote_code": False}
            self.ours = load_text(ref.tokenizer, **about)
            self.tokenizer, self.way = self.ours.tokenizer, "ours"
        else:
            try:
                self.tokenizer = AutoTokenizer.from_pretrained(ref.tokenizer, trust_remote_code=False)
            except Exception as error:  # tokenizer files fail in as many ways as there are formats
                problem = f"the tokenizer cannot be loaded: {first_line(error)}"
                raise ModelError(problem, where=str(ref.tokenizer), fix="restore its files") from None
            if ref.chat_template is not None:
                self.tokenizer.chat_template = choose_template(ref.chat_template, self.tokenizer)
            chat = bool(getattr(self.tokenizer, "chat_template", None))
            self.way = "chat" if chat else "pair" if _is_encoder(ref.config) else "text"
        self.context = self._context()

    def _context(self) -> int:
        """The longest text that the classifier reads, in tokens."""
        config, limit = self.ref.config, self.ref.context
        if str(config.get("model_type")).removeprefix("xlm-").removesuffix("-xl").startswith(AFTER_PADDING):
            padding = config.get("pad_token_id")
            limit -= (padding if type(padding) is int else 1) + 1
        stated = self.tokenizer.model_max_length
        return min(limit, stated) if self.ours is None and isinstance(stated, int) and stated > 0 else limit

    @property
    def description(self) -> str:
        """How it reads, in a few words."""
        return {
            "ours": "as the reward model that it was exported from",
            "chat": "prompt and response as a conversation, in its own chat template",
            "pair": "prompt and response as a pair of texts, since it is an encoder without a chat template",
            "text": "prompt and response joined as one text, since it has no chat template",
        }[self.way]

    def comparison(self, row: Comparison, max_tokens: int) -> list[ClassifierRow]:
        """Tokenise prompt + response for each response of a comparison, as `Text.comparison` does."""
        return [self.read(row.where, row.prompt, response, max_tokens) for response in row.responses]

    def read(
        self, where: str, prompt: Content, response: Content, max_tokens: int | None = None, *, ended: bool = True
    ) -> ClassifierRow:
        """Tokenise a prompt and a response, cut to the context, or to `max_tokens` if that is less.

        `ended`: False for a response that was cut off, which gets no end token if the classifier is ours.
        """
        limit = min(max_tokens or self.context, self.context)
        if self.ours is not None:
            (row,) = self.ours.comparison(Comparison(where, prompt, (response,), ()), limit)
            keep = len(row.ids) - (not ended and int(row.ids[-1]) in self.ours.stop_ids)
            return ClassifierRow(row.ids[:keep], row.targets[:keep], row.cut, row.whole)
        parts = self._parts(where, prompt, response)
        coded = self._encode(parts)
        whole = len(coded["input_ids"])
        cut = whole > limit
        if cut:
            coded = self._encode(parts, truncation=True, max_length=limit)
        ids = torch.tensor(coded["input_ids"])
        if not len(ids):
            raise DatasetError("the text has no tokens", where=where, fix="drop the row, or pass --skip-bad-rows")
        answer = self.tokenizer(_words(response), add_special_tokens=False, verbose=False)["input_ids"]
        targets = torch.arange(len(ids)) >= max(1, len(ids) - len(answer))
        segments = torch.tensor(coded["token_type_ids"]) if "token_type_ids" in coded else None
        return ClassifierRow(ids, targets, cut, whole, segments)

    def _encode(self, parts: tuple[str, ...], **limit: Any) -> Any:
        return self.tokenizer(*parts, add_special_tokens=self.way != "chat", verbose=False, **limit)

    def _parts(self, where: str, prompt: Content, response: Content) -> tuple[str, ...]:
        """The text, or the pair of texts, that the tokenizer gets."""
        if self.way == "chat":
            try:
                whole = [*_messages(prompt, "user"), *_messages(response, "assistant")]
                return (self.tokenizer.apply_chat_template(whole, tokenize=False),)
            except Exception as error:  # templates raise whatever their author chose
                reason = f"the chat template of {self.ref.name} refuses the conversation: {first_line(error)}"
                raise DatasetError(reason, where=where, fix="fix the row's roles") from None
        if self.way == "pair":
            return _words(prompt), _words(response)
        if isinstance(prompt, str) and isinstance(response, str):
            return (prompt + response,)
        whole = [*_messages(prompt, "user"), *_messages(response, "assistant")]
        return ("\n\n".join(_labelled(message) for message in whole),)


def _messages(content: Content, role: str) -> list[Message]:
    return [{"role": role, "content": content}] if isinstance(content, str) else [dict(m) for m in content]


def _labelled(message: Message) -> str:
    return f"{SPEAKERS.get(message['role'], message['role'])}: {message['content']}"


def _words(content: Content) -> str:
    """A text, or a conversation as text: its only message alone, several with their speakers."""
    if isinstance(content, str):
        return content
    return content[0]["content"] if len(content) == 1 else "\n\n".join(map(_labelled, content))


def _is_encoder(config: dict) -> bool:
    """True for an architecture that reads in both directions, such as BERT, unless it is used as a decoder."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    return config.get("model_type") in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not config.get("is_decoder")
