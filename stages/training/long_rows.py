"""The longest row and prompt that a command takes, and what becomes of longer ones. No torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from stages.data.rows import Prompt
from stages.errors import DatasetError, LongRow
from stages.models.model_ref import ModelRef
from stages.models.tokens import PromptRow, Text
from stages.results import Reporter

FIX = "shorten it, raise --max-tokens if the model's context allows, or pass --long-rows drop or cut"


def context_limit(wanted: int, source: ModelRef, reporter: Reporter) -> int:
    """Longest row in tokens: `wanted`, or the base's context length if that is less."""
    if wanted > source.context:
        reporter.note(f"max_tokens reduced to {source.context}, the context length of the base")
    return min(wanted, source.context)


def prompt_limit(config: Any, source: ModelRef, response_tokens: int) -> int:
    """Longest prompt in tokens: max_prompt_tokens, or what the context leaves beside a response if that is less."""
    return min(config.max_prompt_tokens or 2**30, source.context - response_tokens)


def prompt_encoder(text: Text, config: Any, limit: int) -> Callable[[Prompt], PromptRow]:
    """`Text.prompt` with this limit; longer prompts are cut only if --long-rows says so."""
    return partial(text.prompt, max_tokens=limit, cut=config.long_rows == "cut")


def encode_within(row: Any, encode: Callable[[Any], Any], long_rows: str | None, limit: int | None) -> Any | None:
    """The tokenised row; None for one that is too long and is dropped.

    By `long_rows`: None and "cut" keep a row that `encode` has cut. A row that it cannot cut (LongRow) is dropped, but
    for "stop". Raises LongRow for "stop", and DatasetError for a bad row, with its place.
    """
    try:
        out = encode(row)
        if long_rows in (None, "cut") or not getattr(out, "cut", False):
            return out
        if long_rows == "drop":
            return None
        what = f"the row has {out.whole} tokens; the longest may have {limit}"
        raise LongRow(what, where=row.where, fix=FIX)
    except LongRow as error:
        if long_rows != "stop":
            return None
        raise LongRow(error.what, where=error.where or row.where, fix=error.fix) from None
    except DatasetError as error:
        raise DatasetError(error.what, where=error.where or row.where, fix=error.fix) from None
