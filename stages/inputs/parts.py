"""The inputs of a command, and checks that several commands share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from stages.checkpoint.run import Run
from stages.data.rows import Dataset
from stages.errors import ConfigError, ModelError, counted, verb_for
from stages.knobs import default_of, knobs
from stages.models.candidates import Candidate
from stages.models.model_ref import ModelRef, lora_type_of, open_model
from stages.rollout.reward_specs import RewardSpec

Reader = Callable[..., Dataset]  # one of stages.data.rows


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

    @property
    def rows_left_out(self) -> dict[str, int]:
        """Rows of the dataset that are not trained on, by reason."""
        held_out = len(self.held_out) + self.unmeasured
        return {"held_out_rows": held_out, "skipped_rows": self.data.skipped if self.data else 0}

    @property
    def done(self) -> bool:
        """True if the output is a finished run with the same knobs and inputs."""
        return self.run is not None and self.run.finished


def open_first(config: Any, stages: tuple[str, ...]) -> ModelRef:
    """The model of --model: a base, or a checkpoint of one of `stages`."""
    return open_model(config.model, stages=stages, what="--model", trust_remote_code=config.trust_remote_code)


def read_rows(read: Reader, config: Any, name: str) -> Dataset:
    """The rows of a dataset, by the config's knobs for datasets."""
    return read(name, map=config.map, skip_bad_rows=config.skip_bad_rows, limit_rows=config.limit_rows)


def describe_left_out(data: Dataset) -> tuple[str, ...]:
    """A warning if rows of a dataset were dropped."""
    if not data.skipped:
        return ()
    rows, were = counted(data.skipped, "rows"), verb_for(data.skipped, "were")
    return (f"{rows} of {data.source} cannot be used and {were} dropped; {data.problems[0]}",)


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
