"""Every knob, once: its name, type, default, bounds and one line of help. Imports no torch.

A knob has one name everywhere: dataclass field `batch_size`, flag `--batch-size`, recipe key `batch_size`,
key in the manifest. Precedence is default < recipe < flag. Configs hold choices; what follows from them is
computed where it is used. A config's `__doc__` is its command's sentence in --help, assigned as -OO drops docstrings.
"""

from __future__ import annotations

import dataclasses
import difflib
import errno
import math
import os
import re
import reprlib
import stat
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path

from stages.errors import ConfigError
from stages.places import absolute

AUTO = "auto"
CRITIC_FREE = ("rloo", "grpo", "reinforce++", "reinforce++-baseline")
CONDITION_NAMES = (  # what PPO is watched for; see stages/rollout/watchdog.py
    "kl", "negative-kl", "ratio", "entropy", "length", "no-eos", "critic", "dead-groups", "nan", "reward-range",
    "repetition",
)  # fmt: skip
NONE = "none"
GROUPED = ("rloo", "grpo", "reinforce++-baseline")
LARGEST = 10**12  # of a whole number whose knob states no bound of its own: floats count so far exactly
MOST_RESPONSES = 10**6  # of one PPO update


@dataclass(frozen=True)
class Knob:
    """What is known of a knob beside its name, type and default."""

    help: str
    panel: str
    low: float | None = None  # smallest value allowed
    above: float | None = None  # value must be strictly greater
    high: float | None = None  # largest value allowed
    choices: tuple[str, ...] = ()
    auto: str = ""  # what `null`/"auto" means, for --help
    may_change_on_resume: bool = False  # True: does not change the result, so it may differ when a run is resumed
    paths: bool = False  # True for a list of files and folders, whose names may hold commas


def knob(default: object, help: str, panel: str, **about: object) -> typing.Any:
    """A dataclass field that carries its `Knob`; `default` may be `dataclasses.MISSING` for a required one."""
    metadata = {"knob": Knob(help=help, panel=panel, **about)}  # type: ignore[arg-type]
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


REQUIRED = dataclasses.MISSING
MODEL, DATA, OUTPUT, TRAINING, OPTIMISER, LORA = "Model", "Data", "Output", "Training", "Optimiser", "LoRA"
ROLLOUT, REWARD, PPO, EVALUATION, DEVICE = "Rollout", "Reward", "PPO", "Evaluation", "Device"
PREFERENCE = "Preference"
LORA_TYPES = ("lora", "rslora", "dora")
KTO = "use --loss kto"
Idle = tuple[tuple[str, ...], str, str]  # knobs without effect, why, and what would give them one


@dataclass(frozen=True, kw_only=True)
class ModelKnobs:
    """What every command that loads a model has."""

    model: str = knob(REQUIRED, "base model (local folder or hub id) or a checkpoint of this tool", MODEL)
    trust_remote_code: bool = knob(False, "run Python code that ships with the base model", MODEL)
    chat_template: str | None = knob(
        None, "chat template: 'chatml', 'plain' or a .jinja file", MODEL, auto="the tokenizer's own"
    )
    device: str = knob(AUTO, "auto, cpu, cuda or cuda:N", DEVICE)
    dtype: str = knob(
        AUTO,
        "precision of the frozen base; auto is bfloat16 on CUDA, float32 on CPU",
        DEVICE,
        choices=(AUTO, "float32", "bfloat16", "float16"),
    )
    seed: int = knob(0, "seed of every random choice", TRAINING, low=0, high=2**31 - 1)


@dataclass(frozen=True, kw_only=True)
class BaseKnobs:
    """How a command that never writes the base's weights may hold them."""

    load_in_4bit: bool = knob(
        False, "hold the frozen base in 4 bits (NF4): a quarter of the memory; pip install 'rlhf[4bit]'", DEVICE
    )


@dataclass(frozen=True, kw_only=True)
class DataKnobs:
    """What every command that reads a dataset has."""

    dataset: str = knob(REQUIRED, ".jsonl, .json, .csv, .parquet, a saved datasets folder, or hub id[:split]", DATA)
    map: dict[str, str] = knob({}, "rename columns: prompt=question,completion=answer", DATA)
    skip_bad_rows: bool = knob(False, "drop and count unusable rows instead of stopping at the first", DATA)
    limit_rows: int | None = knob(None, "use only the first N rows", DATA, low=1, auto="all")


@dataclass(frozen=True, kw_only=True)
class TrainingKnobs(ModelKnobs, BaseKnobs, DataKnobs):
    """What every training stage has."""

    output: str = knob(
        REQUIRED,
        "folder for the checkpoint; the same command again resumes or says it is done",
        OUTPUT,
        may_change_on_resume=True,
    )
    save_every: int = knob(50, "save resume state every N steps", OUTPUT, low=1, may_change_on_resume=True)
    keep_states: int = knob(2, "resume states kept while training", OUTPUT, low=1, may_change_on_resume=True)
    keep_state: bool = knob(
        False, "keep the resume state after the run has finished", OUTPUT, may_change_on_resume=True
    )

    eval_dataset: str | None = knob(None, "held-out rows", DATA, auto="eval_fraction of the dataset")
    eval_fraction: float = knob(0.05, "share of prompts held out when no eval_dataset is given", DATA, low=0, high=0.5)
    eval_limit: int = knob(500, "measure on at most N held-out rows; the others are not trained on", DATA, low=1)
    eval_every: int | None = knob(
        None, "evaluate on held-out rows every N steps", TRAINING, low=1, auto="start and end"
    )
    samples: int = knob(4, "held-out prompts answered in samples.jsonl at each evaluation", TRAINING, low=0)

    epochs: float = knob(1.0, "passes over the dataset", TRAINING, above=0, high=1e6)
    max_steps: int | None = knob(None, "stop after N steps, whatever epochs says", TRAINING, low=1, auto="from epochs")
    batch_size: int = knob(64, "rows per optimiser step, over all ranks", TRAINING, low=1, high=10**6)
    micro_batch_size: int | str = knob(
        AUTO,
        "rows per forward pass; auto is what memory has room for; changes results by rounding alone",
        TRAINING,
        low=1,
        may_change_on_resume=True,
    )

    learning_rate: float = knob(2e-4, "peak learning rate", OPTIMISER, above=0)
    lr_schedule: str = knob("linear", "decay after warm-up", OPTIMISER, choices=("linear", "cosine", "constant"))
    warmup_ratio: float = knob(0.03, "share of the steps spent warming up", OPTIMISER, low=0, high=1)
    weight_decay: float = knob(0.0, "decoupled weight decay", OPTIMISER, low=0)
    adam_beta1: float = knob(0.9, "Adam's beta 1", OPTIMISER, low=0, high=0.9999)
    adam_beta2: float = knob(0.999, "Adam's beta 2", OPTIMISER, low=0, high=0.99999)
    adam_eps: float = knob(1e-8, "Adam's epsilon", OPTIMISER, above=0)
    max_grad_norm: float = knob(1.0, "clip the gradient to this norm; 0 turns it off", OPTIMISER, low=0)
    gradient_checkpointing: bool | str = knob(
        AUTO,
        "compute activations again in the backward pass: less memory, half more time; auto does so on CUDA where "
        "passes do not fit otherwise (changes results by rounding alone)",
        OPTIMISER,
        choices=(AUTO, "true", "false"),
        may_change_on_resume=True,
    )

    lora_rank: int | None = knob(None, "rank of the adapters", LORA, low=1, high=4096, auto="32, or the checkpoint's")
    lora_alpha: float | None = knob(
        None, "scale of the adapters is alpha / rank", LORA, above=0, high=1e6, auto="32, or the checkpoint's"
    )
    lora_targets: list[str] = knob([], "names of the linear layers to adapt", LORA, auto="all but the output layer")
    lora_type: str | None = knob(
        None,
        "lora; rslora divides alpha by the square root of the rank, for large ranks; dora also trains the length of "
        "each row of the weights, which is slower",
        LORA,
        choices=LORA_TYPES,
        auto="lora, or the checkpoint's",
    )

    def check(self) -> None:
        if self.eval_fraction == 0 and self.eval_every and not self.eval_dataset:
            raise ConfigError(
                "eval_every needs held-out rows, but eval_fraction is 0 and there is no eval_dataset",
                where="eval_every",
                fix="give --eval-dataset, or an --eval-fraction above 0",
            )

    def idle(self) -> Iterator[Idle]:
        """Knobs that the others leave without effect."""
        if self.eval_dataset and self.eval_fraction:
            yield ("eval_fraction",), "the held-out rows come from eval_dataset", "leave eval_dataset out"
        if self.warmup_ratio == 1:
            yield ("lr_schedule",), "with warmup_ratio 1 the learning rate never decays", "lower --warmup-ratio"

    @property
    def holds_out(self) -> bool:
        """True where there are rows to evaluate on."""
        return bool(self.eval_dataset or self.eval_fraction)


@dataclass(frozen=True, kw_only=True)
class SftConfig(TrainingKnobs):
    __doc__ = "Supervised fine-tuning: the base learns to answer like the demonstrations."

    max_tokens: int = knob(1024, "longest row in tokens; longer ones are cut, without a false EOS", DATA, low=2)
    mask: str = knob(
        "completion",
        "which tokens are learned: the completion (of messages: the last assistant turn), every assistant turn, or all",
        TRAINING,
        choices=("completion", "assistant", "all"),
    )


@dataclass(frozen=True, kw_only=True)
class RewardConfig(TrainingKnobs):
    __doc__ = "Reward model: learns from comparisons to score a response with one number."

    max_tokens: int = knob(
        1024, "longest prompt+response in tokens; longer prompts lose their beginning, longer responses their end",
        DATA, low=4,
    )  # fmt: skip
    loss_margin: bool = knob(False, "subtract a row's `margin` inside the loss (Llama 2)", REWARD)
    centre_coef: float = knob(0.0, "weight of (r_chosen + r_rejected)^2, which keeps scores near 0", REWARD, low=0)
    label_smoothing: float = knob(0.0, "probability that a comparison is the wrong way round", REWARD, low=0, high=0.49)
    rating_threshold: float = knob(0.0, "rating differences up to this are ties and are dropped", REWARD, low=0)
    normalise_raters: bool = knob(False, "z-score ratings per annotator before comparing", REWARD)
    demonstrations: str | None = knob(
        None, "demonstrations whose mean score becomes 0", REWARD, auto="the chosen responses of the training rows"
    )
    sft_samples: int = knob(
        32, "held-out prompts that the policy answers at the end, to see how its responses score; 0 for none",
        REWARD, low=0,
    )  # fmt: skip

    def idle(self) -> Iterator[Idle]:
        yield from super().idle()
        if not self.holds_out:
            yield ("sft_samples",), "no prompts are held out", "give --eval-dataset, or an --eval-fraction above 0"


@dataclass(frozen=True, kw_only=True)
class DpoConfig(TrainingKnobs):
    __doc__ = "DPO: the policy learns from comparisons directly, without a reward model."

    max_tokens: int = knob(
        1024, "longest prompt+response in tokens; longer prompts lose their beginning, longer responses their end",
        DATA, low=4,
    )  # fmt: skip
    loss: str = knob("sigmoid", "what is learned from a comparison", PREFERENCE, choices=("sigmoid", "ipo", "kto"))
    beta: float = knob(0.1, "weight of the KL to the reference", PREFERENCE, above=0)
    label_smoothing: float = knob(
        0.0, "probability that a comparison is the wrong way round (cDPO)", PREFERENCE, low=0, high=0.49
    )
    desirable_weight: float = knob(1.0, "kto: weight of preferred responses", PREFERENCE, low=0)
    undesirable_weight: float = knob(1.0, "kto: weight of rejected responses", PREFERENCE, low=0)
    rating_threshold: float = knob(0.0, "rating differences up to this are ties and are dropped", DATA, low=0)
    normalise_raters: bool = knob(False, "z-score ratings per annotator before comparing", DATA)
    learning_rate: float = knob(2e-5, "peak learning rate", OPTIMISER, above=0)

    def check(self) -> None:
        super().check()
        if self.label_smoothing and self.loss != "sigmoid":
            raise ConfigError(
                f"label_smoothing belongs to the sigmoid loss, not to {self.loss}",
                where="label_smoothing",
                fix="leave it out, or use --loss sigmoid",
            )
        for name in ("desirable_weight", "undesirable_weight"):
            if getattr(self, name) != 1 and self.loss != "kto":
                raise ConfigError(
                    f"{name} belongs to the kto loss, not to {self.loss}",
                    where=name,
                    fix="leave it out, or use --loss kto",
                )
        if not self.desirable_weight and not self.undesirable_weight:
            raise ConfigError(
                "desirable_weight and undesirable_weight are both 0, so nothing is learned",
                where="undesirable_weight",
                fix="give one of them a number above 0",
            )

    def idle(self) -> Iterator[Idle]:
        yield from super().idle()
        if self.loss != "kto":
            yield ("desirable_weight", "undesirable_weight"), f"it belongs to the kto loss, not to {self.loss}", KTO


@dataclass(frozen=True, kw_only=True)
class RolloutKnobs:
    """How responses are sampled."""

    max_prompt_tokens: int | None = knob(
        None, "longest prompt in tokens", ROLLOUT, low=1, auto="what the context leaves beside the response"
    )
    max_response_tokens: int = knob(128, "longest response in tokens", ROLLOUT, low=1, high=10**6)
    temperature: float = knob(0.7, "sampling temperature; log-probabilities are tempered alike", ROLLOUT, above=0)
    rollout_batch_size: int | str = knob(
        AUTO, "responses sampled side by side", ROLLOUT, low=1, may_change_on_resume=True
    )
    rollout_engine: str = knob(
        AUTO,
        "what samples: our own decoder, or transformers; auto is ours where it gives the base's logits",
        ROLLOUT,
        choices=(AUTO, "native", "transformers"),
        may_change_on_resume=True,
    )


@dataclass(frozen=True, kw_only=True)
class PpoConfig(RolloutKnobs, TrainingKnobs):
    __doc__ = "PPO: the policy learns to write responses that the reward likes, staying close to the reference."

    reward: list[str] = knob(
        REQUIRED,
        "reward checkpoint, or file.py:function, each with an optional =weight; repeat for several",
        REWARD,
        paths=True,
    )
    reward_timeout: float = knob(
        600.0,
        "seconds that a reward function may take for one call; 0 is no limit",
        REWARD,
        low=0,
        high=1e8,
        may_change_on_resume=True,
    )
    missing_eos_penalty: float = knob(1.0, "charge for a response that never ends; 0 turns it off", REWARD, low=0)
    missing_eos: str = knob(
        AUTO,
        "how it is charged: subtract it; replace the score by -penalty; floor, min(score - penalty, -penalty); "
        "auto is floor where most responses end before training, else subtract",
        REWARD,
        choices=(AUTO, "floor", "subtract", "replace"),
    )
    normalise_scores: bool = knob(False, "divide scores by their running spread, after taking off their mean", REWARD)
    score_clip: float | None = knob(None, "clip scores to +- this", REWARD, above=0, auto="off")
    force: bool = knob(
        False,
        "go on with a reward model that is no better than chance on held out pairs",
        REWARD,
        may_change_on_resume=True,
    )
    length_penalty: float = knob(0.0, "charge per token beyond length_limit", REWARD, low=0)
    length_limit: int = knob(0, "response length that costs nothing", REWARD, low=0)
    ptx_dataset: str | None = knob(
        None, "demonstrations or texts mixed in as a language modelling loss", DATA, auto="none"
    )
    ptx_coef: float = knob(1.0, "weight of that loss, as in InstructGPT", PPO, low=0)
    whiten_rewards: bool = knob(False, "scale rewards to unit variance; shortens responses, see README", REWARD)

    kl_coef: float = knob(0.05, "weight of the KL to the reference in the reward", PPO, low=0)
    kl_target: float | None = knob(None, "adapt kl_coef towards this sequence KL", PPO, above=0, auto="fixed kl_coef")
    kl_horizon: int = knob(10_000, "episodes over which the adaptive kl_coef reacts", PPO, low=1)
    gamma: float = knob(1.0, "discount", PPO, low=0, high=1)
    gae_lambda: float = knob(0.95, "lambda of generalised advantage estimation", PPO, low=0, high=1)
    advantage: str = knob(
        "gae",
        "advantage estimator: gae has a critic; the others have none and compare a prompt's responses or the batch's",
        PPO,
        choices=("gae", *CRITIC_FREE),
    )
    whiten_advantages: bool = knob(
        True, "give advantages mean 0 and variance 1 over the batch (rloo and grpo never do)", PPO
    )
    kl_placement: str = knob(
        AUTO,
        "charge the KL in the reward or as a loss; auto is a loss for grpo and reinforce++-baseline",
        PPO,
        choices=(AUTO, "reward", "loss"),
    )
    kl_estimator: str = knob(
        AUTO,
        "estimator of the KL; auto is k1 in the reward, k3 in grpo's loss, k2 in other losses",
        PPO,
        choices=(AUTO, "k1", "k2", "k3"),
    )
    force_biased_kl: bool = knob(False, "allow an estimator whose gradient is not the KL's", PPO)
    clip_range: float = knob(0.2, "clip of the probability ratio", PPO, above=0, high=10)
    clip_range_high: float | None = knob(None, "upper clip, where it is not the lower", PPO, above=0, auto="clip_range")
    dual_clip: float | None = knob(
        None, "cap the loss of a negative advantage at this many times it", PPO, above=1, auto="off"
    )
    loss_aggregation: str = knob(
        "token",
        "every token counts alike, every sequence alike, or every token by a constant length",
        PPO,
        choices=("token", "sequence", "constant"),
    )
    entropy_coef: float = knob(0.0, "weight of an entropy bonus", PPO, low=0)
    value_clip_range: float = knob(0.2, "clip of the value's change", PPO, above=0)
    value_coef: float = knob(0.1, "weight of the value loss", PPO, low=0)
    critic_lambda: float | None = knob(
        None, "lambda of the critic's own targets", PPO, low=0, high=1, auto="gae_lambda"
    )
    critic_warmup: int = knob(0, "first updates that train the critic alone", PPO, low=0)
    ppo_epochs: int = knob(4, "passes over each batch of experience", PPO, low=1)
    minibatches: int = knob(1, "optimiser steps per pass", PPO, low=1)
    target_approx_kl: float | None = knob(
        0.1, "end an update's passes once the policy moved 1.5x this far", PPO, above=0, auto="never"
    )
    ratio_limit: float = knob(10.0, "skip a minibatch whose mean probability ratio exceeds this", PPO, above=1)
    responses_per_prompt: int = knob(1, "responses sampled per prompt", ROLLOUT, low=1, high=10**4)
    critic: str = knob(
        "adapter",
        "an adapter of its own (starts as the reward model), or a value head shared with the policy's trunk",
        PPO,
        choices=("adapter", "shared"),
    )

    stop_on: list[str] = knob(
        ["kl", "nan"],
        "conditions that end the run, or none; a wrong name lists them all",
        PPO,
        choices=CONDITION_NAMES,
        may_change_on_resume=True,
    )

    learning_rate: float = knob(1e-5, "learning rate of the policy at the first update", OPTIMISER, above=0)
    critic_learning_rate: float | None = knob(
        None, "learning rate of the critic", OPTIMISER, above=0, auto="learning_rate"
    )
    adam_eps: float = knob(1e-5, "Adam's epsilon", OPTIMISER, above=0)
    warmup_ratio: float = knob(0.0, "share of the updates spent warming up", OPTIMISER, low=0, high=1)
    eval_limit: int = knob(64, "measure on at most N held-out prompts; the others are not trained on", DATA, low=1)

    def check(self) -> None:
        super().check()
        responses = self.batch_size * self.responses_per_prompt
        if responses % self.minibatches:
            raise ConfigError(
                f"a batch of {responses} responses does not split into {self.minibatches} equal minibatches",
                where="minibatches",
                fix="choose minibatches that divide batch_size * responses_per_prompt",
            )
        if responses > MOST_RESPONSES:
            raise ConfigError(
                f"an update of {responses:,} responses is too large; the most is {MOST_RESPONSES:,}",
                where="responses_per_prompt",
                fix="lower --batch-size or --responses-per-prompt",
            )
        if self.clip_range_high is not None and self.clip_range_high < self.clip_range:
            raise ConfigError(
                f"clip_range_high {self.clip_range_high:g} is below clip_range {self.clip_range:g}",
                where="clip_range_high",
                fix="give at least clip_range, or leave it out",
            )
        if not self.reward:
            raise ConfigError("no reward source", where="reward", fix="give --reward CHECKPOINT or --reward file.py:f")
        if self.advantage in GROUPED and self.responses_per_prompt < 2:
            raise ConfigError(
                f"{self.advantage} compares the responses to one prompt, but responses_per_prompt is 1",
                where="advantage",
                fix="give --responses-per-prompt 4",
            )
        if self.advantage in CRITIC_FREE and (self.critic != "adapter" or self.critic_warmup or self.critic_lambda):
            raise ConfigError(
                f"{self.advantage} has no critic", where="advantage", fix="leave the critic's knobs out, or use gae"
            )
        self._check_idle()
        if self.kl_is_biased and not self.force_biased_kl:
            raise ConfigError(
                f"{self.kl_kind} in the {self.kl_place} does not have the gradient of the KL",
                where="kl_estimator",
                fix="use k1 in the reward, k2 or k3 in the loss; or pass --force-biased-kl",
            )

    def _check_idle(self) -> None:
        """Raise ConfigError for a knob that another one leaves without effect."""
        if self.kl_target is not None and not self.kl_coef:
            raise ConfigError(
                "kl_target multiplies kl_coef, which is 0 and so stays 0",
                where="kl_target",
                fix="give a --kl-coef above 0 to begin with, or leave kl_target out",
            )
        if self.length_limit and not self.length_penalty:
            raise ConfigError(
                "length_limit charges nothing, since length_penalty is 0",
                where="length_limit",
                fix="give a --length-penalty, or leave length_limit out",
            )
        if self.ptx_dataset and not self.ptx_coef:
            raise ConfigError(
                "ptx_dataset is not learned from, since ptx_coef is 0",
                where="ptx_coef",
                fix="give a --ptx-coef above 0, or leave ptx_dataset out",
            )
        if self.critic_learning_rate is not None and self.advantage in CRITIC_FREE:
            raise ConfigError(
                f"{self.advantage} has no critic", where="critic_learning_rate", fix="leave it out, or use gae"
            )

    def idle(self) -> Iterator[Idle]:
        yield from super().idle()
        yield from self._idle_estimator()
        if self.length_penalty and self.length_limit >= self.max_response_tokens:
            names = ("length_limit", "length_penalty")
            yield names, "no response is longer than length_limit", "give a --length-limit below --max-response-tokens"
        if not self.ptx_dataset:
            yield ("ptx_coef",), "there is no ptx_dataset", "give --ptx-dataset"
        if self.kl_target is None:
            yield ("kl_horizon",), "kl_coef is fixed without a kl_target", "give --kl-target"

    def _idle_estimator(self) -> Iterator[Idle]:
        """Knobs without effect under the advantage estimator."""
        if self.advantage in CRITIC_FREE:
            names = ("gae_lambda", "critic_lambda", "critic_learning_rate", "value_clip_range", "value_coef")
            yield names, f"{self.advantage} has no critic", "use --advantage gae"
        elif not self.value_coef:
            names = ("critic_learning_rate", "critic_lambda", "critic_warmup", "value_clip_range")
            yield names, "with value_coef 0 the critic does not learn", "give a --value-coef above 0"
        if self.advantage not in ("gae", "reinforce++"):
            yield ("gamma",), f"{self.advantage} adds up a response's rewards undiscounted", "use --advantage gae"
        if self.advantage in ("rloo", "grpo") and self.whiten_advantages:
            yield ("whiten_advantages",), f"{self.advantage} never whitens advantages", "use another --advantage"

    @property
    def kl_place(self) -> str:
        """Where the KL is charged, `auto` worked out."""
        if self.kl_placement != AUTO:
            return self.kl_placement
        return "loss" if self.advantage in ("grpo", "reinforce++-baseline") else "reward"

    @property
    def kl_kind(self) -> str:
        """The estimator, `auto` worked out."""
        if self.kl_estimator != AUTO:
            return self.kl_estimator
        if self.kl_place == "reward":
            return "k1"
        return "k3" if self.advantage == "grpo" else "k2"

    @property
    def kl_is_biased(self) -> bool:
        """True where the expected gradient is not that of a KL: k2 or k3 in the reward, k1 as a loss."""
        return (self.kl_place == "reward") == (self.kl_kind != "k1")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(RolloutKnobs, ModelKnobs, BaseKnobs, DataKnobs):
    __doc__ = "Measure checkpoints: policies on prompts or demonstrations, reward models and DPO on comparisons."

    output: str | None = knob(None, "also write the report to this .json file", OUTPUT, may_change_on_resume=True)
    reward: list[str] = knob([], "reward source that scores responses", REWARD, paths=True)
    gold: list[str] = knob([], "a second source, reported apart and never trained on", REWARD, paths=True)
    reward_timeout: float = knob(
        600.0,
        "seconds that a reward function may take for one call; 0 is no limit",
        REWARD,
        low=0,
        high=1e8,
        may_change_on_resume=True,
    )
    against: str | None = knob(None, "checkpoint or base to compare with, prompt by prompt", EVALUATION)
    reference: str | None = knob(
        None, "where KL is measured from", EVALUATION, auto="the checkpoint that the policy was trained from"
    )
    max_tokens: int = knob(1024, "longest demonstration or comparison in tokens", DATA, low=2)
    mask: str = knob(
        "completion", "which tokens count in perplexity", EVALUATION, choices=("completion", "assistant", "all")
    )
    best_of: list[int] = knob(
        [],
        "also take the best of this many responses by --reward, for each of these numbers",
        EVALUATION,
        low=1,
        high=10**4,
    )
    also: list[str] = knob(
        [],
        "another checkpoint, base or resume state (RUN/state: all of them) in one table with --model: policies on "
        "prompts; reward models, DPO and PPO policies on comparisons",
        EVALUATION,
        paths=True,
    )
    plot: str | None = knob(
        None,
        "draw scores over KL into this .svg, .png or .pdf file (needs matplotlib)",
        OUTPUT,
        may_change_on_resume=True,
    )
    examples: int = knob(3, "prompts shown with their responses", EVALUATION, low=0)
    temperature: float | None = knob(
        None, "sampling temperature", ROLLOUT, above=0, auto="what the policy was trained at, else 1.0"
    )
    max_response_tokens: int | None = knob(
        None, "longest response in tokens", ROLLOUT, low=1, high=10**6, auto="what the policy was trained at, else 128"
    )

    def check(self) -> None:
        if self.against and not (self.reward or self.gold):
            raise ConfigError(
                "a win rate needs something that scores responses",
                where="against",
                fix="give --reward (a reward checkpoint or file.py:function) or --gold",
            )
        if self.best_of and not self.reward:
            raise ConfigError(
                "the best of several responses needs something that scores them",
                where="best_of",
                fix="give --reward (a reward checkpoint or file.py:function)",
            )
        if self.plot and not (self.also or self.best_of):
            raise ConfigError(
                "one checkpoint alone is no curve", where="plot", fix="give --also CHECKPOINT, or --best-of 1,2,4,8"
            )
        if self.plot and not (self.reward or self.gold):
            raise ConfigError(
                "there is no score to draw", where="plot", fix="give --reward CHECKPOINT or --reward file.py:function"
            )


@dataclass(frozen=True, kw_only=True)
class SampleConfig(RolloutKnobs, ModelKnobs, BaseKnobs, DataKnobs):
    __doc__ = "Write responses to prompts into a .jsonl file."

    output: str = knob(REQUIRED, "file to write, one JSON object per response", OUTPUT)
    responses_per_prompt: int = knob(1, "responses per prompt", ROLLOUT, low=1, high=10**6)
    temperature: float = knob(1.0, "sampling temperature; 0 takes the likeliest token", ROLLOUT, low=0)
    top_p: float = knob(1.0, "sample from the likeliest tokens of this total probability", ROLLOUT, above=0, high=1)

    def idle(self) -> Iterator[Idle]:
        """Knobs that the others leave without effect."""
        if not self.temperature:
            yield ("top_p",), "temperature 0 takes the likeliest token", "give a --temperature above 0"
            if self.responses_per_prompt > 1:
                why = "at temperature 0 all responses to a prompt are the same"
                yield ("responses_per_prompt",), why, "give a --temperature above 0"


@dataclass(frozen=True, kw_only=True)
class ExportConfig(ModelKnobs):
    __doc__ = "Merge a checkpoint's adapter into plain weights that transformers loads by itself."

    output: str = knob(REQUIRED, "folder to write", OUTPUT)
    dtype: str = knob(
        AUTO,
        "precision of the written weights; auto is the base's own",
        OUTPUT,
        choices=(AUTO, "float32", "bfloat16", "float16"),
    )


STAGES: dict[str, type] = {
    "sft": SftConfig,
    "reward": RewardConfig,
    "ppo": PpoConfig,
    "dpo": DpoConfig,
    "evaluate": EvaluateConfig,
    "sample": SampleConfig,
    "export": ExportConfig,
}


# --- resolving: default < recipe < flag ---------------------------------------------------------------------------


def knobs(cls: type) -> dict[str, tuple[dataclasses.Field, Knob, object]]:
    """Field, `Knob` and type of every knob of a config class, in declaration order."""
    hints = typing.get_type_hints(cls)
    return {f.name: (f, f.metadata["knob"], hints[f.name]) for f in fields(cls)}


def default_of(f: dataclasses.Field) -> object:
    """A field's default, or `REQUIRED`."""
    return f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default


def read_recipe(path: str | Path, cls: type) -> dict[str, tuple[object, str]]:
    """Read a YAML recipe with the safe loader: {knob: (value, "file:line")}.

    Raises ConfigError for a missing or malformed file, a tag, a repeated or an unknown key (naming the nearest).
    """
    import yaml

    special = describe_special(path)
    if special:
        raise ConfigError(f"the recipe is {special}", where=str(path), fix="give --config an existing .yaml file")
    try:
        text = absolute(path, "--config").read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(
            f"cannot read the recipe: {error.strerror or error}",
            where=str(path),
            fix="give --config an existing .yaml file",
        ) from None
    except UnicodeDecodeError:
        raise ConfigError("the recipe is not UTF-8 text", where=str(path), fix="save it as UTF-8") from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text) if node is not None else {}
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        # Besides YAML's own errors: what a value that does not fit its tag (`!!bool x`) makes the loader trip over.
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or (str(error).splitlines() or [type(error).__name__])[0]
        problem = problem if isinstance(error, yaml.YAMLError) else f"a value cannot be read ({problem})"
        raise ConfigError(
            f"not valid YAML: {problem}", where=f"{path}{line}", fix="write plain `key: value` lines"
        ) from None
    if node is None:
        return {}
    if not isinstance(node, yaml.MappingNode) or not isinstance(values, dict):
        raise ConfigError("a recipe is a mapping of knobs to values", where=str(path), fix="write `key: value` lines")
    found: dict[str, tuple[object, str]] = {}
    for key_node, _ in node.value:
        name, where = str(key_node.value), f"{path}:{key_node.start_mark.line + 1}"
        if name in found:
            raise ConfigError(f"`{name}` is given twice", where=where, fix="keep one of the two lines")
        if name not in knobs(cls):
            raise ConfigError(f"unknown knob `{name}`", where=where, fix=suggest(name, cls))
        found[name] = (values[name], where)
    return found


def describe_special(path: str | Path) -> str:
    """What stands at a path that is neither a file nor a folder, in words; "" where nothing stands there."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return _describe_link(path)
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return ""
    return "a named pipe" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"


def _describe_link(path: str | Path) -> str:
    """A link that leads nowhere, or in a circle, in words; "" for no link."""
    try:
        if not os.path.islink(path):
            return ""
        target = os.readlink(path)
        os.stat(path)
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "a link that leads in a circle"
        return f"a link to {target}, where nothing is" if error.errno == errno.ENOENT else ""
    except ValueError:
        return ""
    return ""


def suggest(name: str, cls: type) -> str:
    """Advice for an unknown knob: the nearest name there is."""
    near = difflib.get_close_matches(name.replace("-", "_"), knobs(cls), n=1, cutoff=0.5)
    return f"did you mean `{near[0]}`?" if near else "see --help for the knobs of this stage"


def resolve(cls: type, recipe: dict[str, tuple[object, str]], flags: dict[str, object]) -> typing.Any:
    """Build a config of `cls` from defaults, recipe values and flags (a flag that is None was not given).

    Raises ConfigError naming the flag or the recipe line of a value that is missing, of a wrong type or out of bounds.
    """
    values: dict[str, object] = {}
    origin: dict[str, str] = {}
    for name, (f, about, kind) in knobs(cls).items():
        flag = "--" + name.replace("_", "-")
        if flags.get(name) is not None:
            raw, origin[name] = flags[name], flag
        elif name in recipe:
            raw, origin[name] = recipe[name][0], f"{recipe[name][1]}: {name}"
        elif default_of(f) is REQUIRED:
            raise ConfigError(f"{flag} is required", where=flag, fix=about.help)
        else:
            values[name] = default_of(f)
            continue
        if raw == AUTO and about.auto and type(None) in typing.get_args(kind):
            raw = None
        if raw is None and typing.get_origin(kind) in (list, dict):
            raw = default_of(f)
        values[name] = parse(raw, kind, origin[name])
        if kind == list[str]:
            values[name] = split_list(values[name], about)
        check_characters(values[name], origin[name])
        check_bounds(values[name], about, origin[name])
    config = cls(**values)
    if hasattr(config, "check"):
        try:
            config.check()
        except ConfigError as error:
            raise ConfigError(error.what, where=origin.get(error.where or "", error.where), fix=error.fix) from None
    check_idle(config, origin, {name for name in origin if flags.get(name) is not None})
    return config


OFF = {"gamma": 1.0, "top_p": 1.0}  # of knobs that are turned off by another value than 0


def check_idle(config: typing.Any, origin: dict[str, str], flags: set[str]) -> None:
    """Raise ConfigError for a knob that was given and that other knobs leave without effect.

    A recipe may hold the default of any knob, as a checkpoint's config.yaml does, and a knob that only a flag leaves
    without effect: a recipe is shared, and flags win over it. A flag may turn off what is off already.
    """
    if not hasattr(config, "idle"):
        return
    default = {name: default_of(f) for name, (f, _, _) in knobs(type(config)).items()}
    recipe = dataclasses.replace(config, **{n: default[n] for n in flags if default[n] is not REQUIRED})
    idle_in_recipe = {name for names, _, _ in recipe.idle() for name in names}
    for names, why, fix in config.idle():
        for name in names:
            value = getattr(config, name)
            changed = value != default[name]
            off = not value or value == OFF.get(name)
            in_recipe = name in origin and name in idle_in_recipe
            if (changed or not off) if name in flags else (changed and in_recipe):
                raise ConfigError(f"{name} has no effect: {why}", where=origin[name], fix=f"leave it out, or {fix}")


def parse(raw: object, kind: object, where: str) -> object:
    """Turn a recipe or flag value into the knob's type; `3e-4` is a number, `64.0` a whole one, `yes` is not."""
    options = typing.get_args(kind) if typing.get_origin(kind) not in (list, dict) else (kind,)
    options = options or (kind,)
    if raw is None or (isinstance(raw, str) and raw.lower() in ("null", "none") and type(None) in options):
        if type(None) in options:
            return None
        raise ConfigError("a value is missing", where=where, fix=f"expected {describe(kind)}")
    for option in options:
        try:
            return _parse_one(raw, option)
        except (TypeError, ValueError, OverflowError):
            continue
    raise ConfigError(f"{_short(raw)} is not {describe(kind)}", where=where, fix=f"give {describe(kind)}")


def _parse_one(raw: object, kind: object) -> object:
    if kind is bool:
        if isinstance(raw, str) and raw.lower() in ("true", "false"):
            return raw.lower() == "true"
        if isinstance(raw, bool):
            return raw
        raise TypeError
    if isinstance(raw, bool):
        raise TypeError
    if kind is int:
        number = float(raw) if isinstance(raw, str) else raw
        if not isinstance(number, (int, float)) or not math.isfinite(number) or number != int(number):
            raise TypeError
        return int(raw) if not isinstance(raw, float) and str(raw).lstrip("+-").isdigit() else int(number)
    if kind is float:
        if not isinstance(raw, (str, int, float)) or not math.isfinite(float(raw)):
            raise TypeError
        return float(raw)
    if kind is str:
        if not isinstance(raw, (str, int, float)) or not str(raw).strip():
            raise TypeError
        return str(raw)
    if kind == list[int]:
        return _parse_numbers(raw)
    if typing.get_origin(kind) is list:
        items = [raw] if isinstance(raw, str) else raw
        if not isinstance(items, (list, tuple)) or not all(
            isinstance(i, (str, int, float)) and not isinstance(i, bool) for i in items
        ):
            raise TypeError
        return [str(i) for i in items]
    if typing.get_origin(kind) is dict:
        return _parse_pairs(raw)
    raise TypeError


def _parse_numbers(raw: object) -> list[int]:
    """Whole numbers: `1,2,4`, one number, or a list of either."""
    parts = [part for item in (raw if isinstance(raw, (list, tuple)) else [raw]) for part in _split(item)]
    return [_parse_one(part, int) for part in parts]  # type: ignore[misc]


def _split(item: object) -> list[object]:
    return list(item.split(",")) if isinstance(item, str) else [item]


def _parse_pairs(raw: object) -> dict[str, str]:
    if isinstance(raw, dict):
        if not all(isinstance(k, str) and isinstance(v, str) for k, v in raw.items()):
            raise TypeError
        return dict(raw)
    if not isinstance(raw, str):
        raise TypeError
    pairs = [part.split("=") for part in raw.split(",") if part.strip()]
    if any(len(pair) != 2 or not pair[0].strip() or not pair[1].strip() for pair in pairs):
        raise ValueError
    if len({pair[0].strip() for pair in pairs}) < len(pairs):
        raise ValueError  # one name twice: which column is meant?
    return {name.strip(): column.strip() for name, column in pairs}


def split_list(texts: list[str], about: Knob) -> list[str]:
    """The items of a list knob: `a,b` is two of them, and each name stands once.

    A place whose name holds a comma is one item where it exists. `none` alone is no choice at all.
    """
    if about.paths:
        return [item for text in texts for item in split_paths(text)]
    found = list(dict.fromkeys(word.strip() for text in texts for word in text.split(",") if word.strip()))
    return [] if about.choices and found == [NONE] else found


def split_paths(text: str) -> list[str]:
    """Files and folders between commas, with what may follow a name (`=0.5`, `:function`)."""
    parts, found = text.split(","), []
    while parts:
        joined = next((n for n in range(len(parts), 1, -1) if _exists(",".join(parts[:n]))), 1)
        found.append(",".join(parts[:joined]).strip())
        parts = parts[joined:]
    return [item for item in found if item]


def _exists(text: str) -> bool:
    """True where a reward source or a model of this name is on the disk."""
    whole = text.strip()
    name = re.sub(r"=[^=/,]*$", "", whole)  # without a weight
    file = re.sub(r"(?<=\.py):\w*$", "", name)  # and without a function
    return any("\0" not in place and os.path.lexists(os.path.expanduser(place)) for place in (whole, name, file))


def is_function(source: str) -> bool:
    """True for a reward source `file.py` or `file.py:function`, with or without its weight."""
    name = re.sub(r"=[^=/]*$", "", source)
    return name.endswith(".py") or ".py:" in name


def check_characters(value: object, where: str) -> None:
    """Raise ConfigError for a text with a NUL, or that is not UTF-8: no manifest could hold it, no library open it."""
    texts = (*value.keys(), *value.values()) if isinstance(value, dict) else value
    for text in (texts,) if isinstance(texts, (str, int, float, type(None))) else texts:
        try:
            usable = not isinstance(text, str) or b"\0" not in text.encode("utf-8")
        except UnicodeEncodeError:
            usable = False
        if not usable:
            raise ConfigError(
                f"{_short(text)} holds a character that no text may have",
                where=where,
                fix="take it out; files need names in UTF-8",
            )


def check_bounds(value: object, about: Knob, where: str) -> None:
    """Raise ConfigError where a value, or one of a list, lies outside its knob's bounds or choices."""
    if isinstance(value, list):
        named = dataclasses.replace(about, choices=(*about.choices, NONE)) if about.choices else about
        for item in value:
            check_bounds(item, named, where)
        if about.choices and NONE in value:
            raise ConfigError(f"`{NONE}` stands alone", where=where, fix=f"give {NONE}, or the conditions to stop on")
        return
    named_value = str(value).lower() if isinstance(value, bool) else value
    if about.choices and value is not None and named_value not in about.choices:
        near = difflib.get_close_matches(str(value), about.choices, n=1)
        hint = f"; did you mean `{near[0]}`?" if near else ""
        raise ConfigError(
            f"`{value}` is not a choice", where=where, fix=f"choose from {', '.join(about.choices)}{hint}"
        )
    if isinstance(value, str) and (about.low is not None or about.above is not None) and value != AUTO:
        raise ConfigError(f"`{value}` is neither a number nor `auto`", where=where, fix="give a whole number, or auto")
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return
    if about.low is not None and value < about.low:
        raise ConfigError(f"{value} is too small", where=where, fix=f"the smallest value is {_plain(about.low)}")
    if about.above is not None and value <= about.above:
        raise ConfigError(f"{value} is too small", where=where, fix=f"give a number above {_plain(about.above)}")
    high = LARGEST if about.high is None and isinstance(value, int) else about.high
    if high is not None and value > high:
        shown = reprlib.repr(value) if isinstance(value, int) else value
        raise ConfigError(f"{shown} is too large", where=where, fix=f"the largest value is {_plain(high)}")


def describe(kind: object) -> str:
    """A type in words, for messages."""
    names = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "a text that is not empty",
        type(None): "null",
    }
    if kind == list[int]:
        return "a list of whole numbers, such as 1,2,4"
    if typing.get_origin(kind) is list:
        return "a list of texts"
    if typing.get_origin(kind) is dict:
        return "name=column,name=column"
    options = typing.get_args(kind) or (kind,)
    return " or ".join(names.get(o, str(o)) for o in options)


def _short(raw: object) -> str:
    return reprlib.repr(raw)  # bounded, however deep the value nests


def _plain(number: float) -> str:
    return str(int(number)) if number == int(number) else str(number)


def as_dict(config: object) -> dict[str, object]:
    """Every knob of a config by name, ready for YAML or JSON."""
    return dataclasses.asdict(config)  # type: ignore[call-overload]


def damaged_knob(stage: str, stored: dict[str, typing.Any]) -> str:
    """The first knob of a stored config whose value could never have been one; "" where there is none.

    Knobs of other versions are passed over, and so are names of choices, which other versions may have.
    """
    known = knobs(STAGES[stage]) if stage in STAGES else {}
    for name, (_, about, kind) in known.items():
        if name not in stored:
            continue
        try:
            if not _is_stored(stored[name], kind):
                return name
            check_bounds(stored[name], dataclasses.replace(about, choices=()), name)
        except ConfigError:
            return name
    return ""


def _is_stored(value: object, kind: object) -> bool:
    """True for a value of the knob's own type, as JSON gives it back."""
    if typing.get_origin(kind) is list:
        (item,) = typing.get_args(kind)
        return isinstance(value, list) and all(_is_stored(v, item) for v in value)
    if typing.get_origin(kind) is dict:
        return isinstance(value, dict) and all(isinstance(v, str) for v in value.values())
    options = typing.get_args(kind) or (kind,)
    if isinstance(value, float):
        return float in options and math.isfinite(value)
    return type(value) in options or (type(value) is int and float in options and abs(value) <= LARGEST)


def differing(config: object, other: dict[str, object]) -> list[str]:
    """Names of the knobs that change a result and differ between a config and a stored one."""
    mine = as_dict(config)
    inert = {name for name, (_, about, _) in knobs(type(config)).items() if about.may_change_on_resume}
    return sorted(n for n in mine.keys() | other.keys() if n not in inert and mine.get(n) != other.get(n))
