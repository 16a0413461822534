"""What a command says of the form of its rows: text or messages, and knobs that have no effect on them."""

from __future__ import annotations

from typing import Any

from stages.data.rows import Dataset
from stages.data.transcripts import as_text, count_turns, is_transcript, text_of, uses_template
from stages.errors import ConfigError, counted, verb_for
from stages.knobs import default_of, knobs
from stages.models.model_ref import ModelRef
from stages.models.templates import stored_template
from stages.rollout.reward_specs import RewardSpec

AS_CHAT = "--text-as chat reads them as messages"
SPEAKERS = "`Human: ... Assistant: ...`"


def finds_template(config: Any, source: ModelRef) -> bool:
    """Whether the command has a chat template."""
    return bool(config.chat_template or source.chat_template or stored_template(source.tokenizer))


def check_text_as(config: Any, source: ModelRef) -> None:
    """Raise ConfigError if text is to be read as messages without a template for them; a classifier needs none."""
    if config.text_as == "chat" and not source.is_classifier and not finds_template(config, source):
        raise ConfigError(
            "text is to be read as messages, but the tokenizer has no chat template",
            where="--text-as",
            fix="pass --chat-template chatml, plain or a .jinja file, or leave --text-as out",
        )


def describe_form(
    config: Any, source: ModelRef, data: Dataset, rewards: list[RewardSpec] | tuple = ()
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Warnings and notes on how rows are read, and on models that were trained on another form of rows.

    Of a classifier, only the rows that were turned into messages: it says itself how it reads.
    """
    turned = f"{counted(data.turned, 'text rows')} {verb_for(data.turned, 'are')} read as messages"
    if source.is_classifier:
        return (), (turned,) if data.turned else ()
    has_template = finds_template(config, source)
    texts = [row for row in data.rows if not uses_template(row, has_template=has_template)]
    count, size = len(texts), len(data.rows)
    warnings = _idle_knobs(config, data, count, has_template)
    for model in (source, *(spec.checkpoint for spec in rewards)):
        warnings += _other_form(model, count, size)
    if config.text_as == "chat":
        return warnings, (turned,) if data.turned else ()
    transcripts = sum(is_transcript(text) for text in map(text_of, texts) if text is not None)
    notes: tuple[str, ...] = ()
    if transcripts:
        more = "" if has_template else ", with a --chat-template"
        some = f"{transcripts} of {counted(size, 'rows')} {verb_for(transcripts, 'are')} written as {SPEAKERS}"
        notes += (f"{some}, and read as plain text; {AS_CHAT}{more}",)
    elif texts and has_template and config.text_as is None:
        some = f"{count} of {counted(size, 'rows')} {verb_for(count, 'are')} plain text"
        notes += (f"{some}, read as it is, without the chat template; {AS_CHAT}",)
    if has_template and config.text_as is None and any(as_text(row) is not row for row in data.rows):
        notes += ("instruction rows are read as messages under the chat template; --text-as raw reads them as text",)
    return warnings, notes


def _idle_knobs(config: Any, data: Dataset, texts: int, has_template: bool) -> tuple[str, ...]:
    """A warning for each knob that has no effect on the rows, of which `texts` are read as plain text."""
    size, idle = len(data.rows), []
    if config.chat_template is not None and texts == size:
        why = f"on these rows, which are plain text (it is saved with the checkpoint); {AS_CHAT}"
        idle.append((f"--chat-template {config.chat_template}", why))
    if (
        config.text_as is not None
        and not texts
        and not data.turned
        and data.rows == [as_text(row) for row in data.rows]
    ):
        idle.append((f"--text-as {config.text_as}", "because all rows are messages already"))
    if _is_changed(config, "mask") and data.kind == "demonstration":
        several = any(count_turns(r) > 1 and uses_template(r, has_template=has_template) for r in data.rows)
        prompted = any(row.prompt or row.messages for row in data.rows)
        if config.mask != "all" and not several:
            idle.append((f"--mask {config.mask}", "because no row has more than one response"))
        if config.mask == "all" and not prompted:
            idle.append(("--mask all", "because the rows are texts without prompts, which are learned whole"))
    return tuple(f"{flag} has no effect {why}" for flag, why in idle)


def _is_changed(config: Any, name: str) -> bool:
    found = knobs(type(config)).get(name)
    return found is not None and getattr(config, name) != default_of(found[0])


def _other_form(model: ModelRef | None, texts: int, size: int) -> tuple[str, ...]:
    """A warning if a checkpoint was trained on messages and rows are plain text, or the reverse."""
    if model is None or model.manifest is None:
        return ()
    trained = model.manifest.datasets.get("train")
    form = trained.get("form") if isinstance(trained, dict) else None
    if form == "messages" and texts:
        some = f"{texts} of {counted(size, 'rows')} {verb_for(texts, 'are')} plain text"
        what = f"conversations in its chat template, but {some}"
        return (f"{model.name} was trained on {what}, which it sees without the template; {AS_CHAT}",)
    if form == "text" and texts < size:
        some = f"{size - texts} of {counted(size, 'rows')} {verb_for(size - texts, 'are')} conversations"
        return (f"{model.name} was trained on plain text, but {some}",)
    return ()
