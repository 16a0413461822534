"""Knobs of the commands that use models without training them, and the config of every command. Imports no torch.

As in `stages.config`, a config's `__doc__` is its command's sentence in --help.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from stages.config import (
    DATA,
    DTYPES,
    MASKS,
    OUTPUT,
    BaseKnobs,
    Conflict,
    DataKnobs,
    DpoConfig,
    Idle,
    ModelKnobs,
    PpoConfig,
    RewardConfig,
    SftConfig,
    TokenizerKnobs,
)  # fmt: skip
from stages.knobs import REQUIRED, knob
from stages.reward_knobs import AUTO, EVALUATION, REWARD, REWARD_SOURCE, ROLLOUT, JudgeKnobs, RolloutKnobs, ScoringKnobs

SCORE = "give --reward (a reward checkpoint, file.py:function or builtin:NAME)"


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(ScoringKnobs, JudgeKnobs, RolloutKnobs, ModelKnobs, BaseKnobs, DataKnobs):
    __doc__ = "Evaluate checkpoints: policies on prompts or demonstrations, reward models and DPO on comparisons."

    main: ClassVar = (
        "limit_rows", "output", "plot", "reward", "gold", "against", "also", "best_of", "max_response_tokens",
        "temperature",
    )  # fmt: skip

    output: str | None = knob(None, "also write the report to this .json file", OUTPUT)
    reward: list[str] = knob([], "reward source that scores responses", REWARD, paths=True)
    gold: list[str] = knob([], "a second reward source, reported separately and never trained on", REWARD, paths=True)
    against: str | None = knob(None, "checkpoint or base to compare with, prompt by prompt", EVALUATION)
    reference: str | None = knob(None, "model that KL is measured from", EVALUATION, auto="what it was trained from")
    max_tokens: int = knob(2048, "longest demonstration or comparison in tokens", DATA, low=2)
    mask: str = knob("completion", "tokens in the perplexity", EVALUATION, choices=MASKS)
    best_of: list[int] = knob([], "also evaluate best-of-n by --reward, n such as 1,4", EVALUATION, low=1, high=10**4)
    also: list[str] = knob(
        [], "further checkpoint, base or resume state to evaluate in the same table (RUN/state: every saved state): "
        "policies on prompts; reward models, DPO and PPO policies on comparisons", EVALUATION, paths=True,
    )  # fmt: skip
    plot: str | None = knob(None, "plot scores over KL into this .svg, .png or .pdf file (needs matplotlib)", OUTPUT)
    examples: int = knob(3, "number of prompts shown with their responses", EVALUATION, low=0)
    temperature: float | None = knob(None, "sampling temperature", ROLLOUT, above=0, auto="as in training, else 1.0")
    max_response_tokens: int | None = knob(
        None, "longest response in tokens", ROLLOUT, low=1, high=10**6, auto="as in training, else 256"
    )

    def conflicts(self) -> Iterator[Conflict]:
        yield from super().conflicts()
        if self.against and not (self.reward or self.gold or self.judge):
            yield "against", "a win rate needs something that scores responses", f"{SCORE}, --gold or --judge"
        if self.best_of and not self.reward:
            yield "best_of", "the best of several responses needs something that scores them", SCORE
        if self.plot and not (self.also or self.best_of):
            yield "plot", "--plot needs at least two points", "give --also CHECKPOINT, or --best-of 1,2,4,8"
        if self.plot and not (self.reward or self.gold):
            yield "plot", "--plot needs scores", SCORE


@dataclass(frozen=True, kw_only=True)
class SampleConfig(ScoringKnobs, RolloutKnobs, ModelKnobs, BaseKnobs, DataKnobs):
    __doc__ = "Sample responses to prompts into a .jsonl file."

    main: ClassVar = (
        "limit_rows", "responses_per_prompt", "best_of", "reward", "max_response_tokens", "temperature", "top_p",
        "device",
    )  # fmt: skip

    output: str = knob(REQUIRED, "file to write, one JSON object per response", OUTPUT)
    responses_per_prompt: int = knob(1, "responses per prompt", ROLLOUT, low=1, high=10**6)
    best_of: int | None = knob(
        None, "write each prompt's best of N responses by --reward for rlhf sft", ROLLOUT, low=1, high=10**6, auto="all"
    )
    reward: list[str] = knob([], f"with best_of: {REWARD_SOURCE}", REWARD, paths=True)
    temperature: float = knob(1.0, "sampling temperature; 0 takes the most probable token", ROLLOUT, low=0)
    top_p: float = knob(1.0, "sample from the most probable tokens of this total probability", ROLLOUT, above=0, high=1)

    @property
    def responses_sampled(self) -> int:
        """Responses to each prompt, whether all of them are written or the best one."""
        return self.best_of or self.responses_per_prompt

    def conflicts(self) -> Iterator[Conflict]:
        yield from super().conflicts()
        if self.best_of and not self.reward:
            yield "best_of", "the best of several responses needs something that scores them", SCORE

    def idle(self) -> Iterator[Idle]:
        yield from super().idle()
        hotter = "give a --temperature above 0"
        if self.best_of:
            yield ("responses_per_prompt",), "best_of is the number of responses to a prompt", "leave --best-of out"
        else:
            yield ("reward", "reward_timeout"), "every response is written, without a score", "give --best-of"
        if not self.temperature:
            yield ("top_p",), "temperature 0 takes the most probable token", hotter
            several = ("responses_per_prompt", self.responses_per_prompt), ("best_of", self.best_of or 1)
            if names := tuple(name for name, number in several if number > 1):
                yield names, "at temperature 0 all responses to a prompt are the same", hotter


@dataclass(frozen=True, kw_only=True)
class ExportConfig(ModelKnobs):
    __doc__ = "Merge a checkpoint's adapter into plain weights that transformers loads without this tool."

    output: str = knob(REQUIRED, "folder to write", OUTPUT)
    dtype: str = knob(
        AUTO, "precision of the written weights; auto: the base's, float32 for reward models", OUTPUT, choices=DTYPES
    )


@dataclass(frozen=True, kw_only=True)
class PreviewConfig(TokenizerKnobs, DataKnobs):
    __doc__ = "Show rows as a stage's model will see them, and how long they are. Loads no weights."

    stage: str | None = knob(
        None, "what reads the rows", DATA, choices=("sft", "reward", "dpo", "ppo"), auto="by the rows"
    )
    mask: str | None = knob(None, "sft: tokens with a loss", DATA, choices=MASKS, auto="the stage's default")
    max_tokens: int | None = knob(None, "longest row in tokens", DATA, low=4, auto="the stage's default")
    max_prompt_tokens: int | None = knob(None, "ppo: longest prompt in tokens", DATA, low=1, auto="context - response")
    max_response_tokens: int | None = knob(None, "ppo: longest response", DATA, low=1, auto="the stage's default")
    show_rows: int = knob(3, "number of rows shown", OUTPUT, low=0, high=1000)


STAGES: dict[str, type] = {
    "sft": SftConfig,
    "reward": RewardConfig,
    "ppo": PpoConfig,
    "dpo": DpoConfig,
    "evaluate": EvaluateConfig,
    "sample": SampleConfig,
    "export": ExportConfig,
    "preview": PreviewConfig,
}
