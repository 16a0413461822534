"""Tokenised rows: which of their tokens are learned or scored, and how they are cut to a length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """One tokenised sequence as lists: what a `TokenRow` is made of, without torch."""

    ids: list[int]
    targets: list[bool]  # token 0 is never a target, nothing predicts it
    whole: int  # tokens before the row was cut

    @property
    def cut(self) -> bool:
        """True if the row was too long and lost a part."""
        return len(self.ids) < self.whole

    def as_row(self) -> TokenRow:
        """The same as tensors."""
        import torch

        return TokenRow(torch.tensor(self.ids), torch.tensor(self.targets), self.cut, self.whole)


@dataclass(frozen=True)
class TokenRow:
    """One tokenised sequence, and which of its tokens are learned or scored."""

    ids: Tensor  # (L,) int64
    targets: Tensor  # (L,) bool; token 0 is never a target, nothing predicts it
    cut: bool  # True if the row was too long and lost its end
    whole: int = 0  # tokens before it was cut

    @property
    def size(self) -> int:
        """Tokens."""
        return len(self.ids)


@dataclass(frozen=True)
class PromptRow:
    """A tokenised prompt, and what reward functions receive beside it."""

    ids: Tensor  # (P,) int64
    text: object  # the prompt as in the dataset: text, or a list of messages
    end_id: int  # the token that ends a response to it
    columns: dict[str, object]
    where: str
    cut: bool = False  # True if the prompt was too long and lost its beginning
    whole: int = 0  # tokens before it was cut


@dataclass(frozen=True)
class Encoding:
    """A text, its tokens and the characters (begin, end) of each token."""

    text: str
    ids: list[int]
    spans: list[tuple[int, int]]

    def within(self, begin: int, end: int) -> list[int]:
        """The tokens, without a gap, that hold characters from `begin` to before `end`."""
        return [i for i, (start, stop) in enumerate(self.spans) if stop > begin and start < end]

    def last_visible(self, tokens: Sequence[int]) -> int:
        """The last of some tokens that is not whitespace; -1 if there is none."""
        return next((i for i in reversed(tokens) if self._is_visible(i)), -1)

    def next_visible(self, begin: int) -> int:
        """The first token from `begin` on that is not whitespace; the number of tokens if there is none."""
        return next((i for i in range(begin, len(self.ids)) if self._is_visible(i)), len(self.ids))

    def _is_visible(self, token: int) -> bool:
        return bool(self.text[slice(*self.spans[token])].strip())


def cut_prompt(ids: list[int], room: int, opening: tuple[int, ...]) -> list[int]:
    """The last `room` tokens of a prompt; it still begins with its opening tokens, such as BOS."""
    if len(ids) <= room:
        return ids
    first = ids[: len(opening)] if tuple(ids[: len(opening)]) == opening and len(opening) < room else []
    return first + ids[len(ids) - room + len(first) :]


def cut_comparison(ids: list[int], begin: int, max_tokens: int, opening: tuple[int, ...]) -> Tokens:
    """A prompt (tokens up to `begin`) and a response within `max_tokens`, a quarter of which the prompt may fill."""
    prompt, response = ids[:begin], ids[begin:]
    room = min(len(prompt), max(max_tokens // 4, max_tokens - len(response)))
    prompt, response = cut_prompt(prompt, room, opening), response[: max_tokens - room]
    size, first = len(prompt) + len(response), max(1, len(prompt))
    return Tokens(prompt + response, [i >= first for i in range(size)], len(ids))
