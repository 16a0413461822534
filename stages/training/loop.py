"""The loop that every training stage runs in: resume, step, evaluate, log, save, and end in good order."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor

from stages.config import TrainingKnobs
from stages.errors import (
    CheckpointError,
    Interrupted,
    NotFiniteError,
    OutOfMemory,
    OutputError,
    TrainingStopped,
    UserError,
)
from stages.files.run import Run
from stages.files.states import AHEAD
from stages.models.roles import Roles
from stages.results import Reporter
from stages.training import signals
from stages.training.devices import Ranks
from stages.training.optimizer import AdamW, clip, learning_rate_at
from stages.training.passes import PassesShrank, pass_divisor
from stages.training.plan import memory_text

Out = TypeVar("Out")

SMALLER = "forward passes have 1/{} of their size from here on, and the result stays the same"
BAD_STEPS_IN_A_ROW = 5  # non-finite gradients in a row before training stops itself
DIVERGES = ("eval_loss", "eval_log_loss", "eval_kl")  # of a model that works they are finite


@dataclass
class Progress:
    """All that a run is, beside its knobs and inputs: what resume state holds."""

    optimizers: dict[str, AdamW]
    facts: dict[str, float] = field(default_factory=dict)  # counters and controllers, all JSON numbers
    bad_steps: int = 0
    marked: dict[str, float] = field(default_factory=dict)  # `stored` at the last mark

    def tensors(self) -> dict[str, Tensor]:
        return {k: v for name, o in self.optimizers.items() for k, v in o.tensors(name).items()}

    def stored(self) -> dict[str, float]:
        return {**self.facts, **self._updates(), "bad_steps": self.bad_steps}

    def restore(self, tensors: dict[str, Tensor], stored: dict[str, float]) -> None:
        """Take up what `tensors` and `stored` gave. Raises CheckpointError where they are of another run."""
        try:
            for name, optimizer in self.optimizers.items():
                optimizer.load(name, tensors, int(stored[f"updates.{name}"]))
            self._take_up(stored)
        except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:  # missing, or of another shape
            raise CheckpointError(
                f"the saved state does not fit this run: {type(error).__name__}: {str(error).splitlines()[0]}",
                where="state",
                fix="start again with --overwrite",
            ) from None

    def mark(self) -> None:
        """Remember this as a state that a run can go on from."""
        self.marked = self.stored()

    @property
    def intact(self) -> bool:
        """True while the weights are those of the last mark: no optimiser has stepped since."""
        return self._updates().items() <= self.marked.items()

    def go_back(self) -> None:
        """Make counters and controllers those of the last mark; the weights must be intact."""
        assert self.intact
        self._take_up(self.marked)

    def _updates(self) -> dict[str, int]:
        return {f"updates.{name}": o.updates for name, o in self.optimizers.items()}

    def _take_up(self, stored: dict[str, float]) -> None:
        self.bad_steps = int(stored["bad_steps"])
        self.facts = {k: v for k, v in stored.items() if not k.startswith("updates.") and k != "bad_steps"}


def train(
    run: Run,
    reporter: Reporter,
    ranks: Ranks,
    progress: Progress,
    config: TrainingKnobs,
    *,
    title: str,
    total: int,
    update: Callable[[int], dict[str, float]],
    evaluate: Callable[[int], dict[str, float]],
) -> None:
    """Run `update(step)` for every step up to `total`, from where a state was saved.

    Evaluates before the first step, every `config.eval_every` steps and after the last. Every step has one line in
    metrics.jsonl; line 0 is the evaluation before training. `evaluate` writes its samples last of all, so that one
    that was interrupted leaves none. Raises Interrupted (state saved) and TrainingStopped.

    No copy of the weights is kept. What ends an update before its first optimiser step leaves the state from before it,
    which is saved. After that step a signal waits for the end of the update; a failure leaves the last saved state.
    """
    done, ahead = _resume(run, reporter, ranks, progress, config, total)
    saved = done if done >= 0 else None
    whole = 1

    def save_now() -> bool:
        """Save the state of the last mark, if the weights are still those."""
        if done < 0 or not progress.intact:
            return False
        progress.go_back()
        _save(run, progress, done, ahead)
        return True

    def may_stop() -> bool:
        return progress.intact and (ranks.size == 1 or ranks.exchanging)

    reporter.begin(title, total, max(done, 0))
    try:
        with signals.listening(may_stop, reporter.note, save=save_now, echo=ranks.size > 1):
            try:
                for step in range(done, total):
                    progress.mark()
                    stop_together(ranks)
                    metrics = ahead or (_timed(update, step) if step >= 0 else {})
                    _stop_at_no_loss(metrics, step + 1)
                    progress.mark()
                    ahead = dict(metrics)
                    if step < 0 or step + 1 == total or (config.eval_every and (step + 1) % config.eval_every == 0):
                        stop_together(ranks)
                        metrics |= evaluate(step + 1)
                        _stop_if_diverged(metrics, step + 1)
                    if pass_divisor() > whole:
                        whole = pass_divisor()
                        reporter.warn(f"step {step + 1}: memory ran out; {SMALLER.format(whole)}")
                    with ranks.together():
                        _record(run, reporter, ranks, step + 1, metrics)
                        done, ahead = step + 1, None
                        # A bad step may come of weights that are bad already: the state before them is worth keeping.
                        if done and (done % config.save_every == 0 or done == total) and not progress.bad_steps:
                            _save(run, progress, done)
                            saved = done
                    if (
                        done == total
                        and progress.bad_steps
                        and not any(o.updates for o in progress.optimizers.values())
                    ):
                        raise diverged("no gradient was finite, so nothing was learned", done)
            except signals.StopRequested as stop:
                if not stop.immediate:  # at once may be in the middle of an optimiser step
                    with ranks.together():
                        saved = done if save_now() else saved
                raise Interrupted(stop.number, step=saved, output=str(run.folder)) from None
            except NotFiniteError as error:
                if done <= 0:  # nothing was learned: the model is at fault
                    raise
                raise diverged(error.what, done + 1) from None
            except UserError as error:  # a reward function that failed, perhaps only this once, or memory that ran out
                # Where a log could not be written, only a state from before fits it.
                if not isinstance(error, OutputError) and save_now():
                    reporter.note(f"state of step {done} saved in {run.folder}")
                if isinstance(error, OutOfMemory):
                    raise _with_plan(error, run.stage, config) from None
                raise
    finally:
        reporter.end()


def _resume(
    run: Run, reporter: Reporter, ranks: Ranks, progress: Progress, config: TrainingKnobs, total: int
) -> tuple[int, dict[str, float] | None]:
    """Take the folder, and go on from its state, which the first rank reads for all.

    Returns the last step that was logged (-1: not even the evaluation before training), and the metrics of an update
    that was made after it, if its evaluation was interrupted.
    """
    found = None
    with ranks.together():
        run.start()
        state = run.resume() if ranks.first else None
        for warning in run.warnings:
            reporter.warn(warning)
        if state is not None:
            found = {"step": state.step, "ahead": state.facts.pop(AHEAD, None), "facts": state.facts}
            progress.restore(state.tensors, state.facts)
            if run.standing.extending and 0 < state.step < total:
                warn_of_schedule(read_metrics(run), config, state.step, total, reporter)
    found = ranks.from_first(found)
    if found is None:
        return -1, None
    if not ranks.first:
        progress.restore(progress.tensors(), found["facts"])
    ranks.copy_from_first(progress.tensors().values())
    reporter.note(f"resuming after step {found['step']} of {total}")
    return found["step"], found["ahead"]


def stop_together(ranks: Ranks) -> None:
    """Raise StopRequested on every rank if a signal came to one of them; the weights must be intact."""
    number = ranks.largest(signals.received_signal() or 0)
    if number:
        raise signals.StopRequested(number)


def _with_plan(error: OutOfMemory, stage: str, config: TrainingKnobs) -> OutOfMemory:
    """The same, with the memory that each part needs."""
    told = OutOfMemory(
        f"{error.what}\n    needed at least: {memory_text(stage, config, error.tokens)}",
        where=error.where,
        fix=error.fix,
    )
    told.told_by_first = error.told_by_first
    return told


def _timed(update: Callable[[int], dict[str, float]], step: int) -> dict[str, float]:
    began = time.perf_counter()
    metrics = update(step)
    seconds = time.perf_counter() - began
    metrics["seconds"] = seconds
    for what in ("tokens", "samples"):
        if what in metrics:
            metrics[f"{what}_per_second"] = metrics[what] / seconds
    return metrics


def _stop_at_no_loss(metrics: dict[str, float], step: int) -> None:
    """Raise TrainingStopped if a loss is not finite although its gradient is; PPO's losses are watched."""
    loss = metrics.get("loss", 0.0)
    if "reward_score" not in metrics and not metrics.get("nonfinite_steps") and not math.isfinite(loss):
        raise diverged(f"the training loss is {loss}", step)


def _stop_if_diverged(metrics: dict[str, float], step: int) -> None:
    """Raise TrainingStopped if what was measured on held-out rows is not a number any more.

    Raises NotFiniteError if it was none before training.
    """
    for name in DIVERGES:
        if not math.isfinite(metrics.get(name, 0.0)):
            if not step:
                raise NotFiniteError(
                    f"before any training {name} is {metrics[name]}: its weights are too large or damaged",
                    where="--model",
                    fix="use another base or checkpoint",
                )
            raise diverged(f"{name} is {metrics[name]}", step)


def _record(run: Run, reporter: Reporter, ranks: Ranks, step: int, metrics: dict[str, float]) -> None:
    if ranks.first:
        run.log(step, metrics)
    reporter.log(step, metrics)


def _save(run: Run, progress: Progress, step: int, ahead: dict[str, float] | None = None) -> None:
    run.save_state(step, progress.tensors(), progress.stored() | ({AHEAD: ahead} if ahead else {}))


def add_gradients(
    roles: Roles, ranks: Ranks, work: Callable[[], Out], *, again: Callable[[], object] = lambda: None
) -> Out:
    """Run `work`, which adds to the gradients of what is trained; what fails on one rank ends all.

    If a pass runs out of memory, the optimiser step begins again with smaller passes: gradients become zero, `again`
    adds what they held before, and then `work` runs once more. Neither may exchange anything between ranks.
    """
    with ranks.together():
        shrank = False
        while True:
            try:
                if shrank:
                    again()
                return work()
            except PassesShrank:
                shrank = True
                for gradient in roles.gradients():
                    gradient.zero_()


def apply_gradients(
    progress: Progress,
    learning_rates: dict[str, float],
    max_norm: float,
    ranks: Ranks,
    step: int,
    *,
    patience: float = BAD_STEPS_IN_A_ROW,
) -> dict[str, float]:
    """Sum gradients over ranks, clip their joint norm, and step; a non-finite gradient is dropped and counted.

    Only the optimisers that `learning_rates` names step; every gradient is forgotten.

    Raises TrainingStopped after `patience` dropped in a row.
    """
    optimizers = list(progress.optimizers.values())
    for optimizer in optimizers:
        ranks.sum(optimizer.gradient)
    norm = clip(optimizers, max_norm)
    finite = math.isfinite(norm)
    if finite:
        progress.bad_steps = 0
        for name, learning_rate in learning_rates.items():
            progress.optimizers[name].step(learning_rate)
            weights = progress.optimizers[name].weights
            if not math.isfinite(float(weights.dot(weights))):
                raise diverged(f"the weights of the {name} have left the range of numbers", step)
    else:
        progress.bad_steps += 1
    for optimizer in optimizers:
        optimizer.zero()
    if progress.bad_steps >= patience:
        raise TrainingStopped(
            f"the gradient was not finite {progress.bad_steps} times in a row",
            step=step,
            advice="lower --learning-rate, or look for broken rows or an unstable base; the last saved state is kept",
        )
    return {
        "grad_norm": norm if finite else float("nan"),
        **dict.fromkeys(("skipped_steps", "nonfinite_steps"), float(not finite)),
    }


def diverged(how: str, step: int) -> TrainingStopped:
    """The end of a run whose model is no longer worth anything."""
    return TrainingStopped(
        f"training diverged: {how}",
        step=step,
        advice="lower --learning-rate (of a critic: --critic-learning-rate), or any other knob far from its default, "
        "and start again with --overwrite; the last saved state is kept",
    )


def read_metrics(run: Run) -> list[dict[str, float]]:
    """Every line of the run's metrics.jsonl."""
    text = (run.folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def warn_of_schedule(
    lines: list[dict[str, float]], config: TrainingKnobs, done: int, total: int, reporter: Reporter
) -> None:
    """Say where a later end makes the learning rate rise: schedules are stretched over all steps."""
    before = next((line.get("lr") for line in reversed(lines) if line["step"] == done), None)
    after = learning_rate_at(done, total, config.learning_rate, config.lr_schedule, config.warmup_ratio)
    if before is not None and after > before:
        reporter.warn(
            f"the learning rate rises from {before:.3g} at step {done} to {after:.3g} at step {done + 1}: lr_schedule "
            f"{config.lr_schedule} now ends at step {total}; the result is not that of a run of {total} steps from the "
            "start"
        )


def before_and_after(lines: list[dict[str, float]]) -> dict[str, float]:
    """Evaluation numbers of the last line, and those of line 0 as `<name>_before`."""
    first, last = lines[0], lines[-1]
    after = {k: v for k, v in last.items() if k.startswith("eval_")}
    return {**{f"{k}_before": first[k] for k in after if k in first}, **after}
