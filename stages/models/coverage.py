"""How well a tokenizer covers a dataset: text that it spells in bytes or loses was hardly in the base's training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from stages.data.comparisons import Comparison
from stages.data.raw_rows import Content
from stages.data.rows import Demonstration, Prompt

ROWS_READ = 256  # spread evenly over the dataset
LETTERS_READ = 4000  # of each text
MOST_IN_BYTES = 0.3  # of the characters; an accent or an emoji here and there stays far below
MOST_UNKNOWN = 0.05
PREFIXES = ("▁", "Ġ")  # the space that some tokenizers put before a text, with the offsets of its first letter


@dataclass(frozen=True)
class Coverage:
    """Counts over texts; characters are those other than whitespace."""

    characters: int
    in_bytes: int  # characters that no token holds whole
    unknown: int  # characters within an unknown token, or in no token
    length: int  # all characters
    tokens: int
    unknown_tokens: int

    @property
    def cause(self) -> str:
        """Why these texts are unsuitable for the tokenizer; empty if they are not."""
        if self.unknown > MOST_UNKNOWN * self.characters:
            return (
                f"{self.unknown / self.characters:.0%} of the characters are unknown to the tokenizer and lost; "
                f"{self.unknown_tokens / max(1, self.tokens):.0%} of the tokens are its unknown token"
            )
        if self.in_bytes > MOST_IN_BYTES * self.characters:
            return (
                f"{self.in_bytes / self.characters:.0%} of the characters are not in the tokenizer's vocabulary and "
                f"are spelled byte by byte, {self.tokens / self.length:.2f} tokens per character"
            )
        return ""


def measure_coverage(tokenizer, texts: Iterable[str]) -> Coverage:
    """Counts of characters and tokens over texts. The tokenizer has to report character offsets."""
    counts = [0] * 6
    for text in texts:
        counts = [a + b for a, b in zip(counts, _count(tokenizer, text[:LETTERS_READ]), strict=True)]
    return Coverage(*counts)


def _count(tokenizer, text: str) -> tuple[int, ...]:
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    counts, lost = [0] * len(text), 0  # the number of tokens with each character; unknown tokens
    for token, piece, (start, stop) in zip(coded["input_ids"], coded.tokens(), coded["offset_mapping"], strict=True):
        if piece in PREFIXES:
            continue
        if token == tokenizer.unk_token_id and text[start:stop].strip() != tokenizer.unk_token:
            lost += 1
            continue
        for position in range(start, stop):
            counts[position] += 1
    visible = [count for count, letter in zip(counts, text, strict=True) if not letter.isspace()]
    in_bytes, unknown = sum(count > 1 for count in visible), visible.count(0)
    return len(visible), in_bytes, unknown, len(text), len(coded["input_ids"]), lost


def sample_texts(rows: list[Demonstration | Comparison | Prompt]) -> Iterator[str]:
    """The texts of up to ROWS_READ rows: prompts, responses and messages, without a template's markup."""
    for row in rows[:: max(1, -(-len(rows) // ROWS_READ))]:
        yield from contents_of(row)


def contents_of(row: Demonstration | Comparison | Prompt) -> Iterator[str]:
    """The texts of a row: prompt, responses, and messages without a template's markup."""
    if isinstance(row, Prompt):
        contents: tuple[Content, ...] = (row.prompt,)
    elif isinstance(row, Comparison):
        contents = (row.prompt, *row.responses)
    else:
        contents = (row.messages,) if row.messages else (row.prompt, row.completion)
    for content in contents:
        yield from [content] if isinstance(content, str) else [message["content"] for message in content]
