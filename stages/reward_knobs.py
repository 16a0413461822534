"""Knobs of responses: how they are sampled, how reward sources score them, and the judge of `rlhf evaluate`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from stages.knobs import knob

AUTO = "auto"
ROLLOUT, REWARD, EVALUATION = "Rollout", "Reward", "Evaluation"  # panels of --help-all
COMBINATIONS = ("sum", "mean", "min", "mean-std")
REWARD_SOURCE = "reward checkpoint, file.py:function or builtin:NAME, optionally =weight"


@dataclass(frozen=True, kw_only=True)
class RolloutKnobs:
    """How responses are sampled."""

    max_prompt_tokens: int | None = knob(None, "longest prompt in tokens", ROLLOUT, low=1, auto="context - response")
    max_response_tokens: int = knob(256, "longest response in tokens", ROLLOUT, low=1, high=10**6)
    temperature: float = knob(0.7, "sampling temperature, used for log-probabilities too", ROLLOUT, above=0)
    rollout_batch_size: int | str = knob(AUTO, "responses decoded together", ROLLOUT, low=1, may_change_on_resume=True)
    rollout_engine: str = knob(
        AUTO, "decoder for sampling; auto is native if it reproduces the outputs of transformers, else transformers",
        ROLLOUT, choices=(AUTO, "native", "transformers"), may_change_on_resume=True,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ScoringKnobs:
    """How reward sources score responses."""

    reward_combine: str = knob(
        "sum", "how the weighted scores of several --reward become one; mean-std: their mean minus reward_std_coef x "
        "their standard deviation", REWARD, choices=COMBINATIONS,
    )  # fmt: skip
    reward_std_coef: float = knob(1.0, "weight of the standard deviation in reward_combine mean-std", REWARD, low=0)
    reward_timeout: float = knob(
        600.0, "seconds per call of a reward function; 0: no limit", REWARD, low=0, high=1e8, may_change_on_resume=True
    )

    @property
    def combination(self) -> tuple[str, float]:
        """How scores are combined, and the weight of their standard deviation."""
        return self.reward_combine, self.reward_std_coef

    def idle(self) -> Iterator[Any]:
        """The knobs of a combination without effect."""
        yield from super().idle()  # type: ignore[misc]  of the classes that this one is mixed with
        if self.reward_combine != "sum" and len(self.reward) < 2:  # type: ignore[attr-defined]
            yield ("reward_combine",), "there are not several reward sources", "repeat --reward"
        if self.reward_combine != "mean-std":
            yield ("reward_std_coef",), f"reward_combine is {self.reward_combine}", "use --reward-combine mean-std"


@dataclass(frozen=True, kw_only=True)
class JudgeKnobs:
    """An outside model that compares responses in `rlhf evaluate`."""

    judge: str | None = knob(
        None, "OpenAI-compatible endpoint that compares the responses of --model and --against, such as "
        "http://localhost:8000/v1", EVALUATION,
    )  # fmt: skip
    judge_model: str | None = knob(None, "the judge's model, as its endpoint calls it", EVALUATION)
    judge_key: str = knob("JUDGE_API_KEY", "environment variable with the endpoint's API key, if any", EVALUATION)
    judge_cache: str | None = knob(
        None, "folder that keeps the judge's replies, so that no request is paid twice", EVALUATION,
        auto="~/.cache/rlhf/judge",
    )  # fmt: skip

    def conflicts(self) -> Iterator[tuple[str, str, str]]:
        """What the judge lacks."""
        yield from super().conflicts()  # type: ignore[misc]
        if not self.judge:
            return
        if not self.against:  # type: ignore[attr-defined]
            yield "judge", "the judge compares two responses to each prompt", "give --against CHECKPOINT"
        if not self.judge_model:
            yield "judge_model", "the judge's endpoint needs the name of a model", "give --judge-model NAME"
        parts = urlsplit(self.judge)
        if parts.scheme not in ("http", "https") or not parts.netloc or "@" in parts.netloc:
            what = "the judge is no http:// or https:// address of a host"
            yield "judge", what, "give one such as http://localhost:8000/v1, and a key by --judge-key VARIABLE"

    def idle(self) -> Iterator[Any]:
        """The knobs of a judge that there is not."""
        yield from super().idle()  # type: ignore[misc]
        if not self.judge:
            yield ("judge_model", "judge_key", "judge_cache"), "there is no judge", "give --judge URL"
