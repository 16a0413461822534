"""Opens what every command needs: the tokenizer, tokenised rows, and the base on its device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stages.checkpoint.manifest import MANIFEST
from stages.errors import CheckpointError, DatasetError, ModelError, counted, verb_for
from stages.models.base import Base, load_base
from stages.models.checks import check_config
from stages.models.coverage import measure_coverage, sample_texts
from stages.models.model_ref import ModelRef, lora_type_of, stop_ids_of
from stages.models.passes import Out, Row
from stages.models.tokens import Text, load_text
from stages.results import Reporter
from stages.training.devices import pick_device, pick_dtype


def open_text(source: ModelRef, config: Any, reporter: Reporter | None = None) -> Text:
    """The tokenizer of a model with the config's chat template; the reporter gets its warnings.

    Raises CheckpointError if a checkpoint's stop tokens are not in the vocabulary.
    """
    check_config(source, trust_remote_code=config.trust_remote_code)  # loading a tokenizer reads it too
    stop_ids = stop_ids_of(source)
    text = load_text(
        source.tokenizer,
        chat_template=config.chat_template,
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


def encode_all(
    rows: list[Row],
    encode: Callable[[Row], Out],
    *,
    skip_bad: bool,
    reporter: Reporter,
    what: str,
    limit: int | None = None,
) -> list[Out]:
    """Tokenised rows; a row that cannot be used is an error, or dropped and counted with --skip-bad-rows.

    With a `limit` in tokens, a note counts the rows that were cut to it.
    """
    out: list[Out] = []
    problems: list[DatasetError] = []
    for row in rows:
        try:
            out.append(encode(row))
        except DatasetError as error:
            problems.append(DatasetError(error.what, where=error.where or row.where, fix=error.fix))
            if not skip_bad:
                raise problems[0] from None
    if rows and not out:
        first = problems[0]
        raise DatasetError(
            f"none of the {counted(len(rows), what)} can be used; {first.what}", where=first.where, fix=first.fix
        )
    if problems:
        first = f"{problems[0].where}: {problems[0].what}"
        were = verb_for(len(problems), "were")
        reporter.warn(f"{len(problems)} of {counted(len(rows), what)} cannot be used and {were} dropped; {first}")
    cut = 0 if limit is None else sum(row.cut for row in out)
    if cut:
        reporter.note(f"{cut} of {counted(len(out), what)} {verb_for(cut, 'were')} cut to {limit} tokens")
    return out


def check_coverage(text: Text, rows: list, reporter: Reporter, *, what: str) -> str:
    """Warn of rows in a language that the tokenizer does not cover; returns the cause, empty if it does."""
    cause = measure_coverage(text.tokenizer, sample_texts(rows)).cause
    if cause:
        reporter.warn(
            f"the base can hardly read the {what}: {cause}. Losses, scores and responses on them mean little; choose a "
            "base whose tokenizer was made for this language"
        )
    return cause


def context_limit(wanted: int, source: ModelRef, reporter: Reporter) -> int:
    """Longest row in tokens: `wanted`, or the base's context length if that is less."""
    if wanted > source.context:
        reporter.note(f"max_tokens reduced to {source.context}, the context length of the base")
    return min(wanted, source.context)


def prompt_limit(config: Any, source: ModelRef, response_tokens: int) -> int:
    """Longest prompt in tokens: max_prompt_tokens, or what the context leaves beside a response if that is less."""
    return min(config.max_prompt_tokens or 2**30, source.context - response_tokens)


def open_base(source: ModelRef, config: Any, text: Text) -> Base:
    """Load the base on the configured device.

    Raises ModelError if the tokenizer has tokens without an embedding in the base.
    """
    device = pick_device(config.device)
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
