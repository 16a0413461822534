"""The inputs of a command, and checks that several commands share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from stages.checkpoint.run import Run
from stages.data.rows import Dataset, Demonstration, Row, read_demonstrations
from stages.data.transcripts import as_messages, as_text, is_transcript
from stages.errors import ConfigError, ModelError, counted, verb_for
from stages.knobs import default_of, knobs
from stages.models.candidates import Candidate
from stages.models.model_ref import ModelRef, lora_type_of, open_model
from stages.rollout.reward_specs import RewardSpec

Reader = Callable[..., Dataset]  # one of stages.data.rows
Fits = Callable[[Row], bool]  # whether a row is used; raises DatasetError for a bad one
FORMS: dict[str | None, Callable[[Row], Row]] = {None: lambda row: row, "chat": as_messages, "raw": as_text}


@dataclass(frozen=True)
class Inputs:
    """Everything a command reads from disk; unused fields are empty."""

    source: ModelRef
    data: Dataset | None = None
    train: list = field(default_factory=list)
    held_out: list = field(default_factory=list)  # at most eval_limit
    run: Run | None = None  # the output folder of a training stage
    rewards: list[RewardSpec] = field(default_factory=list)
    gold: list[RewardSpec] = field(default_factory=list)
    demonstrations: Dataset | None = None
    against: ModelRef | None = None
    reference: ModelRef | None = None
    also: list[Candidate] = field(default_factory=list)  # measured beside `source`
    ptx: list = field(default_factory=list)  # demonstrations whose language-modelling loss PPO mixes in
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()  # information for the user
    unmeasured: int = 0  # rows held out beyond eval_limit: not trained on either
    eval_is_apart: bool = False  # True if the held-out rows are of another dataset

    def count_rows(self, train: Any, held_out: Any) -> dict[str, int]:
        """Rows of the dataset that are trained on, and the others by reason; `train` and `held_out` are `Encoded`."""
        parts = [train] if self.eval_is_apart else [train, held_out]
        counts = {"used": len(train.rows), "held_out_rows": len(held_out.rows) + self.unmeasured}
        return counts | self.count_left_out(*parts)

    def count_left_out(self, *parts: Any) -> dict[str, int]:
        """Rows of the dataset that are not used as they are, by reason; `parts` are its rows as `Encoded`."""
        skipped, long = (self.data.skipped, self.data.long) if self.data else (0, 0)
        return {
            "skipped_rows": skipped + sum(part.bad for part in parts),
            "dropped_long_rows": long + sum(part.long for part in parts),
            "cut_rows": sum(part.cut for part in parts),
        }

    @property
    def done(self) -> bool:
        """True if the output is a finished run with the same knobs and inputs."""
        return self.run is not None and self.run.finished


def open_first(config: Any, stages: tuple[str, ...]) -> ModelRef:
    """The model of --model: a base, or a checkpoint of one of `stages`."""
    trust = config.trust_remote_code
    return open_model(config.model, stages=stages, what="--model", trust_remote_code=trust, base=config.base)


def read_rows(read: Reader, config: Any, name: str, fits: Fits | None = None) -> Dataset:
    """The rows of a dataset, by the config's knobs for datasets; `limit_rows` counts those that `fits` is True of."""
    turned = 0

    def refine(row: Row) -> Row | None:
        nonlocal turned
        formed = FORMS[config.text_as](row)
        turned += config.text_as == "chat" and formed != row
        return formed if fits is None or fits(formed) else None

    refined = refine if config.text_as or fits else None
    data = read(name, map=config.map, skip_bad_rows=config.skip_bad_rows, limit_rows=config.limit_rows, refine=refined)
    return replace(data, turned=turned)


def read_beside(config: Any, name: str) -> Dataset:
    """The demonstrations of a second dataset, all of them; texts without a prompt stay texts."""

    def refine(row: Demonstration) -> Row:
        is_plain = not row.prompt and not row.messages and not is_transcript(row.completion)
        return row if is_plain else FORMS[config.text_as](row)

    return read_demonstrations(name, skip_bad_rows=config.skip_bad_rows, refine=refine)


def describe_left_out(data: Dataset) -> tuple[str, ...]:
    """Warnings if rows of a dataset were dropped."""
    warnings, were = (), verb_for(data.skipped, "were")
    if data.skipped:
        rows = counted(data.skipped, "rows")
        warnings += (f"{rows} of {data.source} cannot be used and {were} dropped; {data.problems[0]}",)
    if data.long:
        are, were = verb_for(data.long, "are"), verb_for(data.long, "were")
        rows = counted(data.long, "rows")
        warnings += (f"{rows} of {data.source} {are} too long and {were} dropped (--long-rows)",)
    return warnings


def check_response_fits(config: Any, source: ModelRef, others: Iterable[ModelRef | None] = ()) -> None:
    """Raise ModelError if a response leaves no room for a prompt, or if the native decoder cannot run an adapter.

    `others` are further models on the same base: with a DoRA adapter among them, the native decoder runs none of them.
    """
    types = {lora_type_of(config, source), *(lora_type_of(None, other) for other in others if other is not None)}
    if config.rollout_engine == "native" and "dora" in types:
        what = "the native decoder does not support DoRA adapters"
        raise ModelError(what, where="rollout_engine", fix="leave --rollout-engine out")
    if (config.max_response_tokens or 0) >= source.context:
        raise ModelError(
            f"responses of {config.max_response_tokens} tokens leave no room for a prompt in a context of "
            f"{source.context}",
            where="--max-response-tokens",
            fix=f"give fewer than {source.context}",
        )


def refuse_idle(config: Any, names: tuple[str, ...], why: str, fix: str) -> None:
    """Raise ConfigError for a knob that was changed and has no effect on these rows."""
    for name in names:
        if getattr(config, name) != default_of(knobs(type(config))[name][0]):
            what = f"{name} has no effect because {why}"
            raise ConfigError(what, where=f"--{name.replace('_', '-')}", fix=f"leave it out, or {fix}")
