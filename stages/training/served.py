"""Whether rows are trained on as they are served: warnings of rows and templates where they are not. No torch."""

from __future__ import annotations

import os
from collections.abc import Sequence

from stages.data.comparisons import Comparison
from stages.data.prompts import prompt_of
from stages.data.rows import Demonstration, Prompt, Row
from stages.data.transcripts import uses_template
from stages.errors import DatasetError, counted, verb_for
from stages.models.coverage import contents_of
from stages.models.tokens import Text
from stages.models.turns import content_end
from stages.training.row_tokens import RowEncoder, RowTokens

ROWS_COMPARED = 100  # spread evenly over the dataset
UNLIMITED = 2**30


def served_warnings(encoder: RowEncoder, rows: Sequence[Row]) -> list[str]:
    """Warnings of rows whose tokens are not those of serving, from some of the rows."""
    text = encoder.text
    some = rows[:: max(1, -(-len(rows) // ROWS_COMPARED))]
    torn, rewritten = [], []
    for row in some:
        if isinstance(row, Prompt):
            continue
        try:
            if not _begins_as_served(text, row, encoder.encode(row, UNLIMITED)):
                torn.append(row.where)
            if isinstance(row, Demonstration) and encoder.config.mask == "assistant" and _is_rewritten(text, row):
                rewritten.append(row.where)
        except DatasetError:
            continue
    warnings, rows_read = [], counted(len(some), "rows")
    if torn:
        warnings.append(
            f"{len(torn)} of {rows_read} {verb_for(len(torn), 'do')} not begin with the tokens of the prompt as it is "
            f"served, such as {torn[0]}: the prompt ends in whitespace or within a word, or the template writes "
            "something else before a recorded response"
        )
    if rewritten:
        warnings.append(
            f"the chat template rewrites earlier assistant turns of {len(rewritten)} of {rows_read}, such as "
            f"{rewritten[0]}: --mask assistant learns them as no response is sampled; use --mask completion"
        )
    return warnings + _special_tokens(text, some)


def _begins_as_served(text: Text, row: Demonstration | Comparison, tokens: RowTokens) -> bool:
    """Whether a row begins with the tokens of its prompt, as it is sampled from."""
    prompt = Prompt(row.where, row.prompt) if isinstance(row, Comparison) else prompt_of(row)
    if prompt is None:
        return True
    served = text.prompt_tokens(prompt, UNLIMITED)[0].ids
    return all(sequence.ids[: len(served)] == served for sequence in tokens.sequences)


def _is_rewritten(text: Text, row: Demonstration) -> bool:
    """Whether the template writes an earlier assistant turn otherwise than when it was the last one."""
    if not uses_template(row, has_template=text.has_template):
        return False
    whole = text.render(row.messages)
    turns = [i for i, message in enumerate(row.messages) if message["role"] == "assistant"]
    for turn in turns[:-1]:
        begun = row.messages[: turn + 1]
        then = text.render(begun)
        end = content_end(text.render, begun, turn, then)
        if end is None or len(os.path.commonprefix([then, whole])) < end:
            return True
    return False


def _special_tokens(text: Text, rows: Sequence[Row]) -> list[str]:
    """A warning of rows that spell special tokens out in their text."""
    special = sorted(text.tokenizer.convert_ids_to_tokens(sorted(text.special)))
    found = [(row, t) for row in rows for t in special if any(t in content for content in contents_of(row))]
    if not found:
        return []
    count, (row, token) = len({row.where for row, _ in found}), found[0]
    return [
        f"{count} of {counted(len(rows), 'rows')} {verb_for(count, 'have')} special tokens in the text, such as "
        f"{token} at {row.where}, which are read as these tokens"
    ]
