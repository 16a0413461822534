"""Every knob, once: its name, type, default, bounds and one line of help. Imports no torch.

A knob has one name everywhere: dataclass field `batch_size`, flag `--batch-size`, recipe key `batch_size`, key in the
manifest. Configs hold choices; what follows from them is computed where it is used. `stages.recipe` makes a config of
recipe and flags. A config's `__doc__` is its command's sentence in --help, assigned because -OO drops docstrings.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from stages.errors import counted
from stages.knobs import REQUIRED, knob
from stages.reward_knobs import AUTO, REWARD, REWARD_SOURCE, ROLLOUT, RolloutKnobs, ScoringKnobs

DTYPES = (AUTO, "float32", "bfloat16", "float16")
MASKS = ("completion", "assistant", "all")
CRITIC_FREE = ("rloo", "grpo", "reinforce++", "reinforce++-baseline")
CONDITION_NAMES = (  # what PPO is watched for; see stages/diagnostics/conditions.py
    "kl", "negative-kl", "ratio", "entropy", "length", "no-eos", "critic", "dead-groups", "nan", "reward-range",
    "repetition",
)  # fmt: skip
GROUPED = ("rloo", "grpo", "reinforce++-baseline")
MOST_RESPONSES = 10**6  # of one PPO update
# Former knobs -> what took their place. Configs have the values that are fixed now, as class attributes.
REMOVED = {
    **dict.fromkeys(("adam_beta1", "adam_eps", "ratio_limit"), "its value is fixed at {}"),
    "force_biased_kl": "use force instead",
}
MODEL, DATA, OUTPUT, TRAINING, OPTIMISER, LORA = "Model", "Data", "Output", "Training", "Optimiser", "LoRA"
PPO, DEVICE, PREFERENCE = "PPO", "Device", "Preference"
Conflict = tuple[str, str, str]  # knob, what is wrong with it, and the fix
Idle = tuple[tuple[str, ...], str, str]  # knobs without effect, why, and what would give them one
HOLD_OUT = "give --eval-dataset, or an --eval-fraction above 0"
LONGEST_ROW = "longest prompt+response in tokens; longer prompts lose their start, longer responses their end"
TIES = "rating differences up to this are ties and are dropped"
BY_WIDTH = "from the width of the base"
Z_SCORES = "convert ratings to z-scores per annotator before comparing"


@dataclass(frozen=True, kw_only=True)
class TokenizerKnobs:
    """Knobs of every command that opens a model's tokenizer."""

    main: ClassVar[tuple[str, ...]] = ()  # knobs that --help shows beside the required ones; all if empty

    model: str = knob(REQUIRED, "base (folder or hub id), checkpoint of this tool, or LoRA adapter of PEFT", MODEL)
    base: str | None = knob(
        None, "base under an adapter or checkpoint", MODEL, auto="the one that it names", may_change_on_resume=True
    )
    trust_remote_code: bool = knob(False, "run Python code that ships with the base model", MODEL)
    chat_template: str | None = knob(None, "'chatml', 'plain' or a .jinja file", MODEL, auto="the tokenizer's template")

    def conflicts(self) -> Iterator[Conflict]:
        """Knobs that contradict others."""
        yield from ()

    def idle(self) -> Iterator[Idle]:
        """Knobs that have no effect because of others."""
        yield from ()


@dataclass(frozen=True, kw_only=True)
class ModelKnobs(TokenizerKnobs):
    """Knobs of every command that loads a model."""

    device: str = knob(AUTO, "auto, cpu, cuda or cuda:N", DEVICE)
    dtype: str = knob(AUTO, "precision of the base; auto: bfloat16 on CUDA, float32 on CPU", DEVICE, choices=DTYPES)
    seed: int = knob(0, "seed of all randomness", TRAINING, low=0, high=2**31 - 1)


@dataclass(frozen=True, kw_only=True)
class BaseKnobs:
    """How the base is held by a command that never writes its weights."""

    load_in_4bit: bool = knob(False, "hold the base in 4 bits (NF4): 1/4 of the memory; needs rlhf[4bit]", DEVICE)


@dataclass(frozen=True, kw_only=True)
class DataKnobs:
    """Knobs of every command that reads a dataset."""

    dataset: str = knob(REQUIRED, ".jsonl, .json, .csv, .parquet, a saved datasets folder, or hub id[:split]", DATA)
    map: dict[str, str] = knob({}, "rename columns: prompt=question,completion=answer", DATA)
    skip_bad_rows: bool = knob(False, "drop and count unusable rows instead of stopping at the first", DATA)
    limit_rows: int | None = knob(None, "use the first N rows that are usable", DATA, low=1, auto="all")
    text_as: str | None = knob(None, "read text rows as messages or as is", DATA, choices=("chat", "raw"), auto="raw")
    long_rows: str | None = knob(None, "long rows", DATA, choices=("cut", "drop", "stop"), auto="cut; prompts: drop")


@dataclass(frozen=True, kw_only=True)
class TrainingKnobs(ModelKnobs, BaseKnobs, DataKnobs):
    """Knobs of every training stage."""

    main: ClassVar = ("eval_dataset", "epochs", "max_steps", "batch_size", "learning_rate", "lora_rank", "device")
    adam_beta1: ClassVar[float] = 0.9
    adam_eps: ClassVar[float] = 1e-8

    output: str = knob(REQUIRED, "checkpoint folder; repeat the command to resume", OUTPUT, may_change_on_resume=True)
    save_every: int = knob(50, "save resume state every N steps", OUTPUT, low=1, may_change_on_resume=True)
    keep_states: int = knob(2, "number of resume states kept while training", OUTPUT, low=1, may_change_on_resume=True)
    keep_state: bool = knob(False, "keep resume state after the run has finished", OUTPUT, may_change_on_resume=True)

    eval_dataset: str | None = knob(None, "held-out rows", DATA, auto="eval_fraction of the dataset")
    eval_fraction: float = knob(0.05, "fraction of prompts held out without eval_dataset", DATA, low=0, high=0.5)
    eval_limit: int = knob(500, "evaluate on at most N held-out rows; the others are not trained on", DATA, low=1)
    eval_every: int | None = knob(None, "evaluate every N steps", TRAINING, low=1, auto="start and end")
    samples: int = knob(4, "held-out prompts whose responses go to samples.jsonl at each evaluation", TRAINING, low=0)

    epochs: float | None = knob(
        None, "passes over the dataset", TRAINING, above=0, high=1e6, auto="1; for fewer than 200 steps, 2 or 3"
    )
    max_steps: int | None = knob(None, "stop after N steps, regardless of epochs", TRAINING, low=1, auto="from epochs")
    batch_size: int = knob(16, "rows per step, over all ranks", TRAINING, low=1, high=10**6)
    micro_batch_size: int | str = knob(
        AUTO, "rows per forward pass; auto fits the available memory; affects results only by rounding", TRAINING,
        low=1, may_change_on_resume=True,
    )  # fmt: skip

    learning_rate: float | None = knob(None, "peak learning rate", OPTIMISER, above=0, auto=BY_WIDTH)
    lr_schedule: str = knob("linear", "decay after warm-up", OPTIMISER, choices=("linear", "cosine", "constant"))
    warmup_ratio: float = knob(0.03, "fraction of steps with a rising learning rate", OPTIMISER, low=0, high=1)
    weight_decay: float = knob(0.0, "decoupled weight decay", OPTIMISER, low=0)
    adam_beta2: float = knob(0.999, "Adam's beta 2", OPTIMISER, low=0, high=0.99999)
    max_grad_norm: float = knob(1.0, "clip the gradient to this norm; 0 turns it off", OPTIMISER, low=0)
    gradient_checkpointing: bool | str = knob(
        AUTO, "recompute activations in the backward pass: less memory, about 50 % more time; auto enables it on CUDA "
        "if passes do not fit otherwise (affects results only by rounding)", OPTIMISER,
        choices=(AUTO, "true", "false"), may_change_on_resume=True,
    )  # fmt: skip
    lora_rank: int | None = knob(None, "rank of the adapters", LORA, low=1, high=4096, auto="32, or the checkpoint's")
    lora_alpha: float | None = knob(
        None, "adapters are scaled by alpha / rank", LORA, above=0, high=1e6, auto="32, or the checkpoint's"
    )
    lora_targets: list[str] = knob([], "names of the linear layers to adapt", LORA, auto="all but the output layer")
    lora_type: str | None = knob(
        None, "lora; rslora divides alpha by the square root of the rank, for large ranks; dora also trains the norms "
        "of weight rows, which is slower", LORA, choices=("lora", "rslora", "dora"), auto="lora, or the checkpoint's",
    )  # fmt: skip

    def conflicts(self) -> Iterator[Conflict]:
        if self.eval_every and not self.holds_out:
            yield "eval_every", "eval_fraction is 0 and there is no eval_dataset", HOLD_OUT

    def idle(self) -> Iterator[Idle]:
        if self.eval_dataset and self.eval_fraction:
            yield ("eval_fraction",), "the held-out rows come from eval_dataset", "leave eval_dataset out"
        if self.warmup_ratio == 1:
            yield ("lr_schedule",), "with warmup_ratio 1 the learning rate never decays", "lower --warmup-ratio"

    @property
    def holds_out(self) -> bool:
        """True if there are rows to evaluate on."""
        return bool(self.eval_dataset or self.eval_fraction)


@dataclass(frozen=True, kw_only=True)
class SftConfig(TrainingKnobs):
    __doc__ = "Supervised fine-tuning: train the base to respond as the demonstrations do."

    main: ClassVar = (*TrainingKnobs.main, "max_tokens", "mask")

    max_tokens: int = knob(2048, "longest row in tokens; longer rows are cut, and no EOS is added to them", DATA, low=2)
    mask: str = knob(
        "completion", "tokens with a loss; completion: the last assistant turn of messages", TRAINING, choices=MASKS
    )


@dataclass(frozen=True, kw_only=True)
class RewardConfig(TrainingKnobs):
    __doc__ = "Reward model: learn from comparisons to score a response with one number."

    main: ClassVar = (*TrainingKnobs.main, "max_tokens")

    max_tokens: int = knob(2048, LONGEST_ROW, DATA, low=4)
    batch_size: int = knob(32, "rows per step, over all ranks", TRAINING, low=1, high=10**6)
    loss_margin: bool = knob(False, "subtract a row's `margin` inside the loss (Llama 2)", REWARD)
    centre_coef: float = knob(0.0, "weight of (r_chosen + r_rejected)^2, which keeps scores near 0", REWARD, low=0)
    label_smoothing: float = knob(0.0, "probability that a label is wrong", REWARD, low=0, high=0.49)
    rating_threshold: float = knob(0.0, TIES, REWARD, low=0)
    normalise_raters: bool = knob(False, Z_SCORES, REWARD)
    demonstrations: str | None = knob(None, "rows whose mean score becomes 0", REWARD, auto="the chosen responses")
    sft_samples: int = knob(32, "score the policy's responses to N held-out prompts at the end", REWARD, low=0)

    def idle(self) -> Iterator[Idle]:
        yield from super().idle()
        if not self.holds_out:
            yield ("sft_samples",), "no prompts are held out", HOLD_OUT


@dataclass(frozen=True, kw_only=True)
class DpoConfig(TrainingKnobs):
    __doc__ = "DPO: train the policy on comparisons directly, without a reward model."

    main: ClassVar = (*TrainingKnobs.main, "max_tokens", "loss", "beta")

    max_tokens: int = knob(2048, LONGEST_ROW, DATA, low=4)
    batch_size: int = knob(32, "rows per step, over all ranks", TRAINING, low=1, high=10**6)
    loss: str = knob("sigmoid", "loss on comparisons", PREFERENCE, choices=("sigmoid", "ipo", "kto"))
    beta: float = knob(0.1, "weight of the KL to the reference", PREFERENCE, above=0)
    label_smoothing: float = knob(0.0, "probability that a label is wrong (cDPO)", PREFERENCE, low=0, high=0.49)
    desirable_weight: float = knob(1.0, "with loss kto: weight of chosen responses", PREFERENCE, low=0)
    undesirable_weight: float = knob(1.0, "with loss kto: weight of rejected responses", PREFERENCE, low=0)
    rating_threshold: float = knob(0.0, TIES, DATA, low=0)
    normalise_raters: bool = knob(False, Z_SCORES, DATA)
    warmup_ratio: float = knob(0.1, "fraction of steps with a rising learning rate", OPTIMISER, low=0, high=1)

    def conflicts(self) -> Iterator[Conflict]:
        yield from super().conflicts()
        if not self.desirable_weight and not self.undesirable_weight:
            what = "desirable_weight and undesirable_weight are both 0, so nothing is learned"
            yield "undesirable_weight", what, "give one of them a number above 0"

    def idle(self) -> Iterator[Idle]:
        yield from super().idle()
        weights = ("desirable_weight", "undesirable_weight")
        for names, loss in ((("label_smoothing",), "sigmoid"), (weights, "kto")):
            if self.loss != loss:
                yield names, f"it belongs to the {loss} loss, not to {self.loss}", f"use --loss {loss}"


@dataclass(frozen=True, kw_only=True)
class PpoConfig(ScoringKnobs, RolloutKnobs, TrainingKnobs):
    __doc__ = "PPO: train the policy to write responses with a high reward, at a low KL to the reference."

    main: ClassVar = (
        "max_steps", "batch_size", "responses_per_prompt", "max_response_tokens", "temperature", "kl_coef",
        "advantage", "ppo_epochs", "learning_rate", "lora_rank",
    )  # fmt: skip
    adam_eps: ClassVar[float] = 1e-5
    ratio_limit: ClassVar[float] = 10.0  # a minibatch with a larger mean probability ratio is skipped
    force_biased_kl: ClassVar[bool] = False

    reward: list[str] = knob(REQUIRED, REWARD_SOURCE, REWARD, paths=True)
    missing_eos_penalty: float = knob(1.0, "penalty for a response without EOS; 0 turns it off", REWARD, low=0)
    missing_eos: str = knob(
        AUTO, "how missing_eos_penalty changes the score: subtract: score - penalty; replace: -penalty; floor: "
        "min(score - penalty, -penalty); auto: floor if most responses of the first rollout end, else subtract",
        REWARD, choices=(AUTO, "floor", "subtract", "replace"),
    )  # fmt: skip
    normalise_scores: bool = knob(False, "normalise scores by their running mean and standard deviation", REWARD)
    score_clip: float | None = knob(None, "clip scores to +- this", REWARD, above=0, auto="off")
    force: bool = knob(
        False, "train even if the reward model's verdict is no-go (no better than chance on held-out pairs), or the "
        "gradient of kl_estimator is not that of the KL", REWARD, may_change_on_resume=True,
    )  # fmt: skip
    length_penalty: float = knob(0.0, "penalty per token beyond length_limit", REWARD, low=0)
    length_limit: int = knob(0, "length up to which a response has no length penalty, in tokens", REWARD, low=0)
    epochs: float = knob(1.0, "passes over the dataset", TRAINING, above=0, high=1e6)
    batch_size: int = knob(64, "prompts per update, over all ranks", TRAINING, low=1, high=10**6)
    ptx_dataset: str | None = knob(None, "demonstrations or texts for a language-modelling loss", DATA, auto="none")
    ptx_coef: float = knob(1.0, "weight of the loss on ptx_dataset (PPO-ptx, InstructGPT)", PPO, low=0)
    whiten_rewards: bool = knob(
        False, "divide token rewards by their standard deviation and keep their mean; shortens responses", REWARD
    )
    kl_coef: float = knob(0.05, "weight of the KL to the reference in the reward", PPO, low=0)
    kl_target: float | None = knob(None, "adapt kl_coef towards this sequence KL", PPO, above=0, auto="fixed kl_coef")
    kl_horizon: int = knob(10_000, "with kl_target: responses over which kl_coef adapts; larger is slower", PPO, low=1)
    gamma: float = knob(1.0, "discount", PPO, low=0, high=1)
    gae_lambda: float = knob(0.95, "lambda of generalised advantage estimation", PPO, low=0, high=1)
    advantage: str = knob(
        "gae", "advantage estimator; gae needs a critic, the others compare with the prompt's other responses or with "
        "the batch", PPO, choices=("gae", *CRITIC_FREE),
    )  # fmt: skip
    whiten_advantages: bool = knob(True, "normalise advantages over the batch (never with rloo and grpo)", PPO)
    kl_placement: str = knob(
        AUTO, "subtract the KL from the reward or add it to the loss; auto is loss for grpo and reinforce++-baseline",
        PPO, choices=(AUTO, "reward", "loss"),
    )  # fmt: skip
    kl_estimator: str = knob(
        AUTO, "KL estimator; auto: k1 in rewards, k3 in grpo's loss, else k2", PPO, choices=(AUTO, "k1", "k2", "k3")
    )
    clip_range: float = knob(0.2, "clip range of the probability ratio", PPO, above=0, high=10)
    clip_range_high: float | None = knob(None, "upper clip range of the ratio", PPO, above=0, auto="clip_range")
    dual_clip: float | None = knob(None, "limit the loss of an advantage A < 0 to this * -A", PPO, above=1, auto="off")
    loss_aggregation: str = knob(
        "token", "mean of token losses; token: over all tokens; sequence: over the tokens of each response, then over "
        "responses; constant: their sum / (responses * max_response_tokens)", PPO,
        choices=("token", "sequence", "constant"),
    )  # fmt: skip
    entropy_coef: float = knob(0.0, "weight of an entropy bonus", PPO, low=0)
    value_clip_range: float = knob(0.2, "clip range of the value's change", PPO, above=0)
    value_coef: float = knob(0.1, "weight of the value loss", PPO, low=0)
    critic_lambda: float | None = knob(  # earlier runs store null, which is gae_lambda
        1.0, "lambda of the critic's targets; 1: whole returns (VC-PPO)", PPO, low=0, high=1
    )
    critic_warmup: int | None = knob(
        None, "number of initial updates that train only the critic", PPO, low=0,
        auto="until explained variance settles, for a tenth of the updates at most",
    )  # fmt: skip
    ppo_epochs: int = knob(4, "passes over each batch of experience", PPO, low=1)
    minibatches: int = knob(1, "optimiser steps per pass", PPO, low=1)
    target_approx_kl: float | None = knob(
        0.1, "end an update if approx_kl exceeds 1.5 x this", PPO, above=0, auto="never"
    )
    responses_per_prompt: int = knob(1, "responses sampled per prompt", ROLLOUT, low=1, high=10**4)
    critic: str = knob(
        "adapter", "adapter: a separate adapter, initialised from the reward model; shared: a value head on the "
        "policy's hidden states", PPO, choices=("adapter", "shared"),
    )  # fmt: skip
    stop_on: list[str] = knob(
        ["kl", "nan"], f"conditions that stop training, comma-separated, or none: {', '.join(CONDITION_NAMES)}", PPO,
        choices=CONDITION_NAMES, may_change_on_resume=True,
    )  # fmt: skip
    learning_rate: float | None = knob(
        None, "learning rate of the policy at the first update", OPTIMISER, above=0, auto=BY_WIDTH
    )
    critic_learning_rate: float | None = knob(
        None, "critic's learning rate", OPTIMISER, above=0, auto="3 x learning_rate"
    )
    warmup_ratio: float = knob(0.0, "fraction of updates with a rising learning rate", OPTIMISER, low=0, high=1)
    eval_limit: int = knob(256, "evaluate on at most N held-out prompts; the others are not trained on", DATA, low=1)

    def conflicts(self) -> Iterator[Conflict]:
        yield from super().conflicts()
        responses = self.batch_size * self.responses_per_prompt
        if responses % self.minibatches:
            batch = f"a batch of {counted(responses, 'responses')}"
            what = f"{batch} does not split into {self.minibatches} equal minibatches"
            yield "minibatches", what, "choose minibatches that divide batch_size * responses_per_prompt"
        if responses > MOST_RESPONSES:
            what = f"an update of {responses:,} responses is too large; the maximum is {MOST_RESPONSES:,}"
            yield "responses_per_prompt", what, "lower --batch-size or --responses-per-prompt"
        if self.clip_range_high is not None and self.clip_range_high < self.clip_range:
            what = f"clip_range_high {self.clip_range_high:g} is below clip_range {self.clip_range:g}"
            yield "clip_range_high", what, "give at least clip_range, or leave it out"
        if not self.reward:
            yield "reward", "no reward source", "give --reward CHECKPOINT or --reward file.py:f"
        if self.advantage in GROUPED and self.responses_per_prompt < 2:
            what = f"{self.advantage} compares the responses to one prompt, but responses_per_prompt is 1"
            yield "advantage", what, "give --responses-per-prompt 4"
        if self.advantage in CRITIC_FREE and (self.critic != "adapter" or self.critic_warmup):
            yield "advantage", f"{self.advantage} has no critic", "leave the critic's knobs out, or use gae"
        if self.kl_is_biased and not self.force:
            what = f"{self.kl_kind} in the {self.kl_place} does not have the gradient of the KL"
            yield "kl_estimator", what, "use k1 in the reward, k2 or k3 in the loss; or pass --force"

    def idle(self) -> Iterator[Idle]:
        yield from super().idle()
        if not self.length_penalty:
            yield ("length_limit",), "length_penalty is 0", "give a --length-penalty"
        elif self.length_limit >= self.max_response_tokens:
            names = ("length_limit", "length_penalty")
            yield names, "no response is longer than length_limit", "give a --length-limit below --max-response-tokens"
        if not self.ptx_dataset:
            yield ("ptx_coef",), "there is no ptx_dataset", "give --ptx-dataset"
        elif not self.ptx_coef:
            yield ("ptx_dataset",), "ptx_coef is 0", "give a --ptx-coef above 0"
        if self.kl_target is None:
            yield ("kl_horizon",), "kl_coef is fixed without a kl_target", "give --kl-target"
        elif not self.kl_coef:
            yield ("kl_target",), "kl_coef is 0 and stays 0", "give a --kl-coef above 0"
        if self.advantage in CRITIC_FREE:
            names = ("gae_lambda", "critic_lambda", "critic_learning_rate", "value_clip_range", "value_coef")
            yield names, f"{self.advantage} has no critic", "use --advantage gae"
        elif not self.value_coef:
            names = ("critic_learning_rate", "critic_lambda", "critic_warmup", "value_clip_range")
            yield names, "with value_coef 0 the critic is not trained", "give a --value-coef above 0"
        if self.advantage not in ("gae", "reinforce++"):
            yield ("gamma",), f"{self.advantage} sums a response's rewards undiscounted", "use --advantage gae"
        if self.advantage in ("rloo", "grpo") and self.whiten_advantages:
            yield ("whiten_advantages",), f"{self.advantage} never whitens advantages", "use another --advantage"

    @property
    def kl_place(self) -> str:
        """Where the KL is charged, with `auto` resolved."""
        if self.kl_placement != AUTO:
            return self.kl_placement
        return "loss" if self.advantage in ("grpo", "reinforce++-baseline") else "reward"

    @property
    def kl_kind(self) -> str:
        """The estimator, with `auto` resolved."""
        if self.kl_estimator != AUTO:
            return self.kl_estimator
        if self.kl_place == "reward":
            return "k1"
        return "k3" if self.advantage == "grpo" else "k2"

    @property
    def kl_is_biased(self) -> bool:
        """True if the expected gradient is not that of a KL: k2 or k3 in the reward, k1 in the loss."""
        return (self.kl_place == "reward") == (self.kl_kind != "k1")
