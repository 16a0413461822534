"""What a model will see of its rows, and how long they are: three rows, lengths, shares, what is odd. No torch."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from stages.data.comparisons import Comparison
from stages.data.rows import Demonstration, Prompt, Row
from stages.data.transcripts import form_of
from stages.errors import DatasetError, LongRow, counted
from stages.models.coverage import contents_of, measure_coverage, sample_texts
from stages.models.token_rows import Tokens
from stages.models.tokens import Text
from stages.results import Passage, Piece, Table, bracketed
from stages.tables import facts_table, histogram_table
from stages.training.row_tokens import RowEncoder, RowTokens
from stages.training.served import UNLIMITED, served_warnings

SHOWN_ROWS = 3
CHARACTERS_READ = 600_000  # of all sequences that are measured, so that the answer takes seconds
COVERAGE_ROWS = 64
SHOWN_BEGINNING, SHOWN_END = 500, 250  # characters of a long piece
MARKED = {  # what the marked tokens of a stage are
    "sft": "learned",
    "dpo": "compared with the reference (their log-probabilities)",
    "reward": "where the score is read",
}


@dataclass(frozen=True)
class Measured:
    """What became of the rows that were measured."""

    lengths: list[int]  # tokens of the longest sequence of each row, before it is cut
    marked: int  # tokens that are learned
    cut: int
    dropped: int  # because they are too long
    problems: list[str]  # of rows that cannot be used


@dataclass(frozen=True)
class Preview:
    """A preview as JSON, as tables and as texts."""

    data: dict[str, Any]
    tables: tuple[Table, ...]
    passages: tuple[Passage, ...]
    warnings: tuple[str, ...]


def build_preview(
    stage: str, encoder: RowEncoder, rows: Sequence[Row], shown: int = SHOWN_ROWS, command: str = ""
) -> Preview:
    """The preview of rows as a stage reads them, for a `command` if that is not the stage.

    Raises DatasetError if none of the rows that are measured can be used.
    """
    read = _spread(rows)
    limit = encoder.limit(rows[0])
    measured = _measure(encoder, read)
    spread = list(read[:: max(1, len(read) // COVERAGE_ROWS)])
    coverage = measure_coverage(encoder.text.tokenizer, sample_texts(spread))
    size = len(measured.lengths)
    facts: dict[str, Any] = {
        "rows": len(rows),
        "measured_rows": len(read),
        "form": form_of(rows, has_template=encoder.text.has_template),
        "limit_tokens": limit if limit < UNLIMITED // 2 else None,
        "mean_tokens": round(statistics.fmean(measured.lengths), 1),
        "median_tokens": int(statistics.median(measured.lengths)),
        "longest_row_tokens": max(measured.lengths),
        "cut_share": round(measured.cut / size, 4),
        "dropped_long_share": round(measured.dropped / size, 4),
        "bad_rows": len(measured.problems),
        **({"learned_share": round(measured.marked / sum(measured.lengths), 4)} if stage == "sft" else {}),
        "tokens_per_character": round(coverage.tokens / max(1, coverage.length), 3),
    }
    bins = _histogram(measured.lengths, limit)
    examples = _examples(stage, encoder, rows, shown)
    warnings = (*encoder.text.warnings, *served_warnings(encoder, rows))
    if measured.problems:
        warnings += (f"{counted(len(measured.problems), 'rows')} cannot be used; {measured.problems[0]}",)
    if coverage.cause:
        warnings += (f"the base can hardly read the rows: {coverage.cause}",)
    passages = tuple(_passage(stage, encoder.text, *example) for example in examples)
    shown_rows = [_as_json(*example, passage) for example, passage in zip(examples, passages, strict=True)]
    data = facts | {"warnings": list(warnings), "histogram": bins, "examples": shown_rows}
    readable = facts | {name: f"{100 * facts[name]:.1f} %" for name in facts if name.endswith("_share")}
    readable["tokens_per_character"] = f"{facts['tokens_per_character']} (English on its own tokenizer: 0.2 to 0.3)"
    if len(read) < len(rows):
        readable["measured_rows"] = f"{len(read):,} (one in {-(-len(rows) // len(read))}, to take seconds)"
    title = f"{command or stage}: the rows"
    tables = (facts_table(title, readable), histogram_table("tokens per row", bins, limit))
    return Preview(data, tables, passages, warnings)


# --- measuring


def _spread(rows: Sequence[Row]) -> Sequence[Row]:
    """The rows, or of a large dataset every n-th, so that about CHARACTERS_READ are read."""
    some = rows[:: max(1, len(rows) // 1000)]
    mean = sum(map(_characters, some)) / len(some)
    return rows[:: max(1, round(mean * len(rows) / CHARACTERS_READ))]


def _characters(row: Row) -> int:
    """Characters of a row's sequences, each with the prompt."""
    size = sum(map(len, contents_of(row)))
    if isinstance(row, Comparison):
        size += (len(row.responses) - 1) * sum(map(len, contents_of(Prompt("", row.prompt))))
    return size


def _measure(encoder: RowEncoder, rows: Sequence[Row]) -> Measured:
    """Lengths of rows, and how many are cut or dropped. Raises the first row's error if none can be used."""
    lengths: list[int] = []
    problems: list[DatasetError] = []
    marked = cut = dropped = 0
    limit, policy = encoder.limit(rows[0]), encoder.config.long_rows
    for row in rows:
        try:
            tokens = encoder.encode(row, UNLIMITED)
        except DatasetError as error:
            problems.append(DatasetError(error.what, where=error.where or row.where, fix=error.fix))
            continue
        lengths.append(tokens.whole)
        marked += sum(sum(sequence.targets) for sequence in tokens.sequences)
        if tokens.whole > limit:
            unlearned = isinstance(row, Demonstration) and not any(tokens.sequences[0].targets[:limit])
            unanswered = isinstance(row, Prompt) and policy is None
            is_dropped = policy == "drop" or unlearned or unanswered
            dropped, cut = dropped + is_dropped, cut + (not is_dropped)
    if not lengths:
        raise problems[0]
    return Measured(lengths, marked, cut, dropped, [f"{error.where}: {error.what}" for error in problems])


def _histogram(lengths: list[int], limit: int) -> list[dict[str, int]]:
    """Rows by length, in at most 12 bins of equal width, the last open; `limit` is the end of a bin."""
    longest = max(lengths)
    if limit <= longest:
        width = -(-limit // max(1, min(10, round(10 * limit / longest))))
        edges = [*range(0, limit, width), limit]
        edges += range(limit + width, longest + width, width)
    else:
        unit = 10 ** max(0, len(str(longest // 10)) - 1)
        width = max(1, -(-longest // (10 * unit)) * unit)
        edges = list(range(0, longest + width, width))
    if len(edges) > 13:
        edges = [*edges[:12], longest]
    bins = zip(edges, edges[1:], strict=False)
    return [{"above": low, "up_to": high, "rows": sum(low < n <= high for n in lengths)} for low, high in bins]


# --- showing


Example = tuple[Row, RowTokens]


def _examples(stage: str, encoder: RowEncoder, rows: Sequence[Row], shown: int) -> list[Example]:
    """The first rows that are used, with the tokens that are marked for the stage as targets."""
    examples: list[Example] = []
    for row in rows:
        if len(examples) == shown:
            break
        try:
            tokens = encoder.within(row)
        except LongRow:
            raise
        except DatasetError:
            continue
        if tokens is not None:
            examples.append((row, _scored(tokens) if stage == "reward" else tokens))
    return examples


def _scored(tokens: RowTokens) -> RowTokens:
    """The sequences with only their last token marked."""
    marked = [Tokens(row.ids, [False] * (len(row.ids) - 1) + [True], row.whole) for row in tokens.sequences]
    return RowTokens(marked)


def _as_json(row: Row, tokens: RowTokens, passage: Passage) -> dict[str, Any]:
    sequences = [{"ids": s.ids, "marked": s.targets, "whole_tokens": s.whole} for s in tokens.sequences]
    return {"where": row.where, "text": bracketed(passage.pieces), "sequences": sequences}


def _passage(stage: str, text: Text, row: Row, tokens: RowTokens) -> Passage:
    """A row as a text for people, with its special tokens and line breaks visible."""
    pieces: list[Piece] = []
    shared = _shared(tokens)
    if shared:
        pieces += _pieces(text, Tokens(tokens.sequences[0].ids[:shared], [False] * shared, shared))
    for number, sequence in enumerate(tokens.sequences, 1):
        if len(tokens.sequences) > 1:
            pieces.append(Piece(f"\n(response {number}) ", note=True))
        pieces += _pieces(text, sequence, shared)
        if sequence.cut:
            pieces.append(Piece(f" ({sequence.whole} tokens, cut to {len(sequence.ids)})", note=True))
    if stage == "ppo":
        pieces.append(Piece(" (the response is sampled here)", note=True))
    size = ", ".join(str(len(sequence.ids)) for sequence in tokens.sequences)
    mark = f"; [[...]] is {MARKED[stage]}" if stage in MARKED else ""
    return Passage(f"{row.where}: {size} tokens{mark}", tuple(pieces))


def _shared(tokens: RowTokens) -> int:
    """The number of tokens with which all sequences of a row begin, before any is marked; 0 for a single one."""
    first, *others = tokens.sequences
    ends = [next((i for i, (a, b) in enumerate(zip(first.ids, o.ids, strict=False)) if a != b), 0) for o in others]
    return min([*ends, *(s.targets.index(True) for s in tokens.sequences if any(s.targets))]) if others else 0


def _pieces(text: Text, tokens: Tokens, begin: int = 0) -> list[Piece]:
    """A sequence from token `begin` in pieces: runs of tokens that are all marked or not, and all special or not."""
    kinds = [(mark, token in text.special) for token, mark in zip(tokens.ids, tokens.targets, strict=True)][begin:]
    pieces, end, before = [], begin, text.tokenizer.decode(tokens.ids[:begin], skip_special_tokens=False)
    for (marked, special), run in groupby(kinds):
        begin, end = end, end + len(list(run))
        decoded = text.tokenizer.decode(tokens.ids[:end], skip_special_tokens=False)
        piece = decoded[len(before) :] if decoded.startswith(before) else text.tokenizer.decode(tokens.ids[begin:end])
        before = decoded
        pieces.append(Piece(_visible(piece), marked=marked, special=special))
    return pieces


def _visible(piece: str) -> str:
    r"""A text with its line breaks and tabs written out (\n, \t); of a long one, its beginning and end."""
    if len(piece) > SHOWN_BEGINNING + SHOWN_END + 50:
        left_out = len(piece) - SHOWN_BEGINNING - SHOWN_END
        piece = f"{piece[:SHOWN_BEGINNING]} ...({left_out:,} characters)... {piece[-SHOWN_END:]}"
    return piece.replace("\r", "\\r").replace("\t", "\\t").replace("\n", "\\n\n")
