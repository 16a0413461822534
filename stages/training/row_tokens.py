"""A row's tokens as its stage will see them, as lists: for counting and for showing. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from stages.data.comparisons import Comparison
from stages.data.rows import Demonstration, Prompt, Row
from stages.models.model_ref import ModelRef, stop_ids_of
from stages.models.token_rows import Tokens
from stages.models.tokens import Text, load_text
from stages.training.long_rows import encode_within, prompt_limit


@dataclass(frozen=True)
class RowTokens:
    """The sequences of one row: its text, its prompt, or its responses, each with the prompt."""

    sequences: list[Tokens]

    @property
    def cut(self) -> bool:
        """True if a sequence lost a part."""
        return any(tokens.cut for tokens in self.sequences)

    @property
    def whole(self) -> int:
        """Tokens of the longest sequence before it was cut."""
        return max(tokens.whole for tokens in self.sequences)


@dataclass(frozen=True)
class RowEncoder:
    """How a stage tokenises its rows: with the knobs of `config`, and responses of up to `response_tokens`."""

    config: Any
    source: ModelRef
    text: Text
    response_tokens: int = 0

    def limit(self, row: Row) -> int:
        """The longest sequence of such a row, in tokens."""
        if isinstance(row, Prompt):
            return prompt_limit(self.config, self.source, self.response_tokens)
        return min(self.config.max_tokens, self.source.context)

    def encode(self, row: Row, limit: int) -> RowTokens:
        """A row's tokens, cut to `limit`; raises LongRow for one that cannot be cut, DatasetError for a bad one."""
        if isinstance(row, Prompt):
            cut = self.config.long_rows == "cut"
            return RowTokens([self.text.prompt_tokens(row, limit, cut=cut)[0]])
        if isinstance(row, Comparison):
            return RowTokens(self.text.comparison_tokens(row, limit))
        assert isinstance(row, Demonstration)
        return RowTokens([self.text.demonstration_tokens(row, self.config.mask, limit)])

    def within(self, row: Row) -> RowTokens | None:
        """A row's tokens by --long-rows: None for one that is dropped; raises as `encode_within` does."""
        limit = self.limit(row)
        return encode_within(row, partial(self.encode, limit=limit), self.config.long_rows, limit)


def open_encoder(config: Any, source: ModelRef, response_tokens: int | None = None) -> RowEncoder:
    """The encoder of a stage with these knobs, with the model's tokenizer; the longest response is the config's."""
    text = load_text(
        source.tokenizer,
        chat_template=config.chat_template or source.chat_template,
        stop_ids=stop_ids_of(source),
        trust_remote_code=config.trust_remote_code,
        model_type=source.config["model_type"],
    )
    given = getattr(config, "max_response_tokens", 0) if response_tokens is None else response_tokens
    return RowEncoder(config, source, text, given)
