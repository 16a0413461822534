"""Opens what every command needs: the tokenizer, tokenised rows, and the base on its device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from stages.checkpoint.manifest import MANIFEST
from stages.errors import CheckpointError, DatasetError, LongRow, ModelError, counted, verb_for
from stages.models.base import Base, load_base
from stages.models.checks import check_config
from stages.models.coverage import measure_coverage, sample_texts
from stages.models.model_ref import ModelRef, lora_type_of, stop_ids_of
from stages.models.passes import Out, Row
from stages.models.tokens import Text, load_text
from stages.results import Reporter
from stages.training.devices import pick_device, pick_dtype, return_freed_memory
from stages.training.long_rows import encode_within

LARGE_BASE = 200_000_000  # bytes; on a smaller one, fetching memory anew takes 5 to 10 % of the time


def open_text(source: ModelRef, config: Any, reporter: Reporter | None = None) -> Text:
    """The tokenizer of a model with the config's chat template; the reporter gets its warnings.

    Raises CheckpointError if a checkpoint's stop tokens are not in the vocabulary.
    """
    check_config(source, trust_remote_code=config.trust_remote_code)  # loading a tokenizer reads it too
    stop_ids = stop_ids_of(source)
    text = load_text(
        source.tokenizer,
        chat_template=config.chat_template or source.chat_template,
        stop_ids=stop_ids,
        trust_remote_code=config.trust_remote_code,
    )
    stated = source.config.get("vocab_size")
    vocabulary = max(len(text.tokenizer), stated if type(stated) is int else 0)
    if source.manifest is not None and max(stop_ids, default=0) >= vocabulary:
        raise CheckpointError(
            f"`{MANIFEST}` is damaged at `stop_token_ids`: there is no token {max(stop_ids)}",
            where=str(source.folder),
            fix="copy the checkpoint again, or run the command that made it with --overwrite",
        )
    for line in text.warnings if reporter is not None else ():
        reporter.warn(line)
    return text


class Encoded(NamedTuple):
    """Tokenised rows, and how many others there were."""

    rows: list
    bad: int = 0  # rows that cannot be used; dropped
    long: int = 0  # rows that are too long; dropped
    cut: int = 0  # rows among `rows` that lost a part


def encode_all(
    rows: list[Row],
    encode: Callable[[Row], Out],
    *,
    config: Any,
    reporter: Reporter,
    what: str,
    limit: int | None = None,
) -> Encoded:
    """Tokenised rows. A row that cannot be used is an error, or dropped with --skip-bad-rows; --long-rows decides on
    those with more tokens than `limit`. The reporter gets the counts.
    """
    out: list[Out] = []
    problems: list[DatasetError] = []
    long: list[str] = []
    for row in rows:
        try:
            encoded = encode_within(row, encode, config.long_rows, limit)
        except LongRow:
            raise
        except DatasetError as error:
            problems.append(error)
            if not config.skip_bad_rows:
                raise
            continue
        if encoded is None:
            long.append(row.where)
        else:
            out.append(encoded)
    if rows and not out and problems:
        first = problems[0]
        raise DatasetError(
            f"none of the {counted(len(rows), what)} can be used; {first.what}", where=first.where, fix=first.fix
        )
    if rows and not out:
        _raise_too_long(rows[0], encode, len(rows), what, limit)
    if problems:
        first = f"{problems[0].where}: {problems[0].what}"
        were = verb_for(len(problems), "were")
        reporter.warn(f"{len(problems)} of {counted(len(rows), what)} cannot be used and {were} dropped; {first}")
    if long:
        longest = f"longer than {limit} tokens" if limit is not None else "too long"
        are, were = verb_for(len(long), "are"), verb_for(len(long), "were")
        some = f"{len(long)} of {counted(len(rows), what)} {are} {longest} and {were} dropped"
        reporter.warn(f"{some} (--long-rows); the first is {long[0]}")
    cut = sum(getattr(row, "cut", False) for row in out)
    if cut:
        reporter.note(f"{cut} of {counted(len(out), what)} {verb_for(cut, 'were')} cut to {limit} tokens")
    return Encoded(out, len(problems), len(long), cut)


def _raise_too_long(row: Row, encode: Callable[[Row], Out], count: int, what: str, limit: int | None) -> None:
    """Raise LongRow for rows that are all too long, with what is said of the first."""
    try:
        encode_within(row, encode, "stop", limit)
    except LongRow as error:
        found = f"none of the {counted(count, what)} can be used; {error.what}"
        raise LongRow(found, where=error.where, fix=error.fix) from None


def check_coverage(text: Text, rows: list, reporter: Reporter, *, what: str) -> str:
    """Warn of rows in a language that the tokenizer does not cover; returns the cause, empty if it does."""
    cause = measure_coverage(text.tokenizer, sample_texts(rows)).cause
    if cause:
        reporter.warn(
            f"the base can hardly read the {what}: {cause}. Losses, scores and responses on them mean little; choose a "
            "base whose tokenizer was made for this language"
        )
    return cause


def open_base(source: ModelRef, config: Any, text: Text) -> Base:
    """Load the base on the configured device.

    Raises ModelError if the tokenizer has tokens without an embedding in the base.
    """
    device = pick_device(config.device)
    if device.type == "cpu" and sum(file.stat().st_size for file in source.base.glob("*.safetensors")) > LARGE_BASE:
        return_freed_memory()
    base = load_base(
        source,
        device=device,
        dtype=pick_dtype(config.dtype, device),
        four_bit=config.load_in_4bit,
        trust_remote_code=config.trust_remote_code,
    )
    if lora_type_of(config, source) == "dora":
        base.prepare_for_dora()
    if len(text.tokenizer) > base.model.get_input_embeddings().weight.shape[0]:
        raise ModelError(
            f"the tokenizer has {len(text.tokenizer)} tokens, the base has embeddings for "
            f"{base.model.get_input_embeddings().weight.shape[0]}",
            where="--model",
            fix="use the tokenizer that belongs to the base",
        )
    return base
