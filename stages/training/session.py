"""A session is one run of a training stage: it does what all stages share, so that a stage has only its algorithm.

In this order: encode rows, plan (--dry-run ends here), load the base, open roles, train, publish.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from stages.checkpoint.run import Run, read_metrics
from stages.data.transcripts import form_of
from stages.errors import ModelError, counted
from stages.models.base import DORA_NOTE, Base
from stages.models.model_ref import ModelRef, lora_type_of
from stages.models.passes import Out, Passes, Row
from stages.models.roles import Roles, adapter_of, start_adapter
from stages.models.tokens import Text
from stages.results import Reporter, Result, Table, next_commands
from stages.training import opening
from stages.training.batching import batch_at, epoch_at, steps_in
from stages.training.devices import Ranks, free_memory, peak_memory_gb
from stages.training.language import warn_above_uniform
from stages.training.learning_rates import CRITIC_FACTOR, auto_learning_rate
from stages.training.long_rows import context_limit
from stages.training.loop import before_and_after, train
from stages.training.optimizer import learning_rate_at
from stages.training.plan import Work, bytes_beside, choose_passes, plan_result, source_shapes
from stages.training.preview import build_preview
from stages.training.progress import Progress, add_gradients, apply_gradients, open_progress
from stages.training.reload import check_adaptable
from stages.training.row_tokens import RowEncoder
from stages.training.seeds import derive
from stages.training.served import served_warnings
from stages.training.signals import Signals

Metrics = dict[str, float]


@dataclass
class Session:
    """Config, inputs and reporter of a stage; and, once they are opened, its text, base, roles, ranks and progress."""

    stage: str
    config: Any  # a TrainingKnobs
    inputs: Any  # stages.inputs.Inputs
    reporter: Reporter
    signals: Signals = field(default_factory=Signals)
    text_problem: str = ""  # why the base can hardly read the rows, empty if it can
    row_counts: dict[str, int] = field(default_factory=dict)  # rows used, and others by reason, from `encode_split`
    form: str = ""  # how rows are read: "messages", "text" or "mixed", from `encode_split`
    work: Work = field(init=False)  # from `plan`
    total: int = field(init=False)  # steps of the run, from `plan`
    roles: Roles = field(init=False)  # from `load_base`
    ranks: Ranks = field(init=False)  # from `load_base`
    progress: Progress = field(init=False)  # from `optimise`

    @functools.cached_property
    def text(self) -> Text:
        """The tokenizer with the config's chat template."""
        return opening.open_text(self.inputs.source, self.config, self.reporter)

    @property
    def model(self) -> ModelRef:
        """The model that --model names."""
        return self.inputs.source

    @property
    def run(self) -> Run:
        """The output folder."""
        return self.inputs.run

    @property
    def base(self) -> Base:
        """The frozen base under all roles."""
        return self.roles.base

    # --- before the base is loaded

    @functools.cached_property
    def max_tokens(self) -> int:
        """Longest row in tokens: the config's, or the base's context length if that is less."""
        return context_limit(self.config.max_tokens, self.model, self.reporter)

    def encode(
        self, rows: list[Row], encode: Callable[[Row], Out], what: str, limit: int | None = None
    ) -> opening.Encoded:
        """Tokenise rows, called `what` in messages, of at most `limit` tokens."""
        return opening.encode_all(rows, encode, config=self.config, reporter=self.reporter, what=what, limit=limit)

    def encode_split(
        self, encode: Callable[[Row], Out], what: str, limit: int | None = None
    ) -> tuple[list[Out], list[Out]]:
        """Training rows and held-out rows, tokenised, with a warning if the base can hardly read them."""
        train = self.encode(self.inputs.train, encode, what, limit)
        held_out = self.encode(self.inputs.held_out, encode, f"held-out {what}", limit)
        self.check_coverage(self.inputs.train, what)
        for line in served_warnings(self.row_encoder, self.inputs.train):
            self.reporter.warn(line)
        self.row_counts = self.inputs.count_rows(train, held_out)
        self.form = form_of(self.inputs.train, has_template=self.text.has_template)
        return train.rows, held_out.rows

    def check_coverage(self, rows: list, what: str) -> None:
        """Warn of rows that the base can hardly read."""
        problem = opening.check_coverage(self.text, rows, self.reporter, what=what)
        self.text_problem = self.text_problem or problem

    def plan(self, work: Work, count: Callable[[int, int, float, int | None], int] = steps_in) -> None:
        """Fix what the stage runs through its model, and its steps, as `count` (`steps_in`, `updates_in`) has them."""
        config = self.config
        classifiers = [spec.classifier for spec in self.inputs.rewards if spec.classifier is not None]
        self.work = replace(work, beside=bytes_beside(classifiers, config))
        self.total = count(len(work.sizes), config.batch_size, config.epochs, config.max_steps)

    @property
    def row_encoder(self) -> RowEncoder:
        """How rows are tokenised, as lists."""
        response = getattr(self.config, "max_response_tokens", 0)
        return RowEncoder(self.config, self.model, self.text, response)

    def describe_plan(self) -> Result:
        """The result of --dry-run: the plan, and a preview of the rows."""
        left_out = {name: count for name, count in self.row_counts.items() if name != "used"}
        facts = {**left_out, **self.peak_learning_rates()}
        plan = plan_result(self.config, self.model, self.work, self.total, facts)
        preview = build_preview(self.stage, self.row_encoder, self.inputs.train)
        data, tables = plan.data | {"preview": preview.data}, preview.tables + plan.tables
        return replace(plan, data=data, tables=tables, passages=preview.passages)

    # --- the base and its roles

    def load_base(self) -> None:
        """Load the base, with forward passes of the size that fits into the memory beside it.

        Raises ModelError for a base whose adapters could not be saved and loaded.
        """
        base = opening.open_base(self.model, self.config, self.text)
        self.ranks = Ranks(base.device)
        targets = [] if self.model.folder else self.config.lora_targets
        check_adaptable(base, targets, lora_type_of(self.config, self.model))
        if base.has_dora and not self.work.prompt:  # a stage that samples notes it once all roles are open
            self.reporter.note(DORA_NOTE)
        tokens = self._choose_pass_tokens(base)
        on_cuda = base.device.type == "cuda"
        base.passes = Passes(on_cuda, self.config.micro_batch_size, tokens, check=self.signals.check)
        self.roles = Roles(base)

    def _choose_pass_tokens(self, base: Base) -> int:
        """Tokens of an `auto` pass; turns gradient checkpointing on if the plan needs it."""
        config, reporter = self.config, self.reporter
        shapes, free = source_shapes(self.model, config), free_memory(base.device)
        passes = choose_passes(config, self.work, self.model, shapes, free)
        if not passes.checkpointing:
            return passes.tokens
        try:
            base.checkpoint_activations()
        except ModelError as error:
            if config.gradient_checkpointing is True:
                raise
            reporter.note(f"activations do not fit into the memory, but {error.what}")
            without = replace(config, gradient_checkpointing=False)
            return choose_passes(without, self.work, self.model, shapes, free).tokens
        reporter.note(f"activations are recomputed in the backward pass, in passes of up to {passes.tokens} tokens")
        return passes.tokens

    def start_role(self, role: str, head: nn.Module | None = None) -> None:
        """Add a role that is trained: the checkpoint's adapter, or a fresh one."""
        config, seed = self.config, derive(self.config.seed, self.stage, "adapter")
        adapter = start_adapter(self.base, self.model, config, seed)
        self.roles.add(role, adapter, head)

    def add_reference(self) -> None:
        """Add the frozen reference: the checkpoint's adapter, or the base alone."""
        self.roles.add("reference", adapter_of(self.base, self.model, trainable=False))

    def optimise(self, **trained: list[nn.Parameter]) -> None:
        """Give every named group of parameters an optimiser."""
        self.progress = open_progress(self.config, trained)
        for name, rate in self.peak_learning_rates().items():
            if getattr(self.config, name) is None:
                self.reporter.note(f"{name} auto is {rate:.2g}, for this stage and the width of this base")

    def optimise_role(self, role: str, what: str) -> None:
        """Give the only role that is trained its optimiser; a note counts its weights and the rows, called `what`."""
        self.optimise(**{role: self.roles.parameters(role)})
        rows, size = len(self.work.sizes), self.roles.adapters[role].size
        self.reporter.note(f"{counted(rows, what)}, {counted(self.total, 'steps')}, {size:,} trainable parameters")

    # --- training

    def batch(self, rows: Sequence[Row], step: int) -> list[Row]:
        """The rows of optimiser step `step`, over all ranks."""
        return [rows[i] for i in batch_at(step, len(rows), self.config.batch_size, self.config.seed, self.stage)]

    def add_gradients(self, work: Callable[[], Metrics], *, again: Callable[[], object] | None = None) -> Metrics:
        """`progress.add_gradients` of this session's roles and ranks."""
        return add_gradients(self.roles, self.ranks, work, again=again)

    @functools.cached_property
    def peak_learning_rate(self) -> float:
        """The config's learning rate; for `auto`, the one that fits the stage and the width of the base."""
        if self.config.learning_rate is not None:
            return self.config.learning_rate
        return auto_learning_rate(self.stage, source_shapes(self.model, self.config).hidden)

    @property
    def peak_critic_rate(self) -> float:
        """The critic's learning rate at its peak; for `auto`, a multiple of the policy's."""
        return self.config.critic_learning_rate or CRITIC_FACTOR * self.peak_learning_rate

    def peak_learning_rates(self) -> dict[str, float]:
        """The learning rates of the run at their peak, `auto` replaced, by knob."""
        rates = {"learning_rate": self.peak_learning_rate}
        if getattr(self.config, "advantage", None) == "gae":
            rates["critic_learning_rate"] = self.peak_critic_rate
        return rates

    def learning_rate(self, step: int) -> float:
        """The learning rate of step `step`, counted from 0."""
        config = self.config
        return learning_rate_at(step, self.total, self.peak_learning_rate, config.lr_schedule, config.warmup_ratio)

    def apply_gradients(self, rates: Metrics, step: int, **patience: float) -> Metrics:
        """`progress.apply_gradients` with these learning rates, at step `step`, counted from 0."""
        return apply_gradients(self.progress, rates, self.config.max_grad_norm, self.ranks, step + 1, **patience)

    def finish_step(self, role: str, batch: Sequence[Any], step: int) -> Metrics:
        """Step the optimiser of the only role that is trained; returns what every stage logs of a `batch`."""
        rate = self.learning_rate(step)
        return {
            "lr": rate,
            "epoch": epoch_at(step + 1, len(self.work.sizes), self.config.batch_size),
            "tokens": sum(row.size for row in batch),
            "samples": len(batch),
            "memory_gb": peak_memory_gb(self.base.device),
            **self.apply_gradients({role: rate}, step),
        }

    def train(self, update: Callable[[int], Metrics], evaluate: Callable[[int], Metrics]) -> None:
        """Run `update(step)` and `evaluate(step)` to the end; see `loop.train`."""
        train(self, update, evaluate)

    def warn_above_uniform(self, loss: float, what: str, cause: str = "") -> None:
        """Warn of a loss above that of a uniform guess; its likely cause is `text_problem` if any, else `cause`."""
        warn_above_uniform(loss, self.base.vocabulary, what, self.text_problem or cause, self.reporter)

    # --- the end

    def summarise_metrics(self) -> dict[str, Any]:
        """The last training loss, and evaluation numbers before and after training."""
        lines = read_metrics(self.run)
        return {"train_loss": lines[-1].get("loss"), **before_and_after(lines)}

    def result(self, data: dict[str, Any], tables: tuple[Table, ...] = ()) -> Result:
        """The stage's result, with the commands that usually follow."""
        following = next_commands(self.stage, self.config, data.get("metrics", {}))
        return Result(self.stage, "done", self.config.output, {"rows": self.row_counts, **data}, tables, following)
