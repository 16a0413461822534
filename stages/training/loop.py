"""The loop that every training stage runs in: resume, step, evaluate, log, save, and end in good order."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from stages.checkpoint.run import Run
from stages.checkpoint.states import AHEAD
from stages.config import TrainingKnobs
from stages.errors import (
    Interrupted,
    NotFiniteError,
    OutOfMemory,
    OutputError,
    StopRequested,
    UserError,
)
from stages.results import Reporter
from stages.training.optimizer import learning_rate_at
from stages.training.plan import memory_text
from stages.training.progress import diverged

if TYPE_CHECKING:
    from stages.training.session import Session

Metrics = dict[str, float]

SMALLER = "forward passes have 1/{} of their size from here on, and the result stays the same"
DIVERGES = ("eval_loss", "eval_log_loss", "eval_kl")  # of a model that works they are finite


def train(session: Session, update: Callable[[int], Metrics], evaluate: Callable[[int], Metrics]) -> None:
    """Run `update(step)` for every step up to `session.total`, from where a state was saved.

    Evaluates before the first step, every `config.eval_every` steps and after the last. Every step has one line in
    metrics.jsonl; line 0 is the evaluation before training. `evaluate` writes its samples last of all, so that one
    that was interrupted leaves none. Raises Interrupted (state saved) and TrainingStopped.

    No copy of the weights is kept. What ends an update before its first optimiser step leaves the state from before it,
    which is saved. After that step a signal waits for the end of the update; a failure leaves the last saved state.
    """
    loop = _Loop(session)
    ranks, reporter = session.ranks, session.reporter
    reporter.begin(session.stage, session.total, max(loop.done, 0))
    try:
        with (
            session.signals.listening(loop.may_stop, reporter.note, save=loop.save_now, echo=ranks.size > 1),
            loop.ending_in_order(),
        ):
            for step in range(loop.done, session.total):
                loop.step(step, update, evaluate)
    finally:
        reporter.end()


class _Loop:
    """Where a run stands: `done` is the last step that was logged, -1 for not even the evaluation before training."""

    def __init__(self, session: Session):
        self.session = session
        self.done, self.ahead = _resume(session)  # metrics of an update whose evaluation was interrupted, or None
        self.saved = self.done if self.done >= 0 else None
        self.told_divisor = 1

    def save_now(self) -> bool:
        """Save the state of the last mark, if the weights are still those."""
        if self.done < 0 or not self.session.progress.intact:
            return False
        self.session.progress.go_back()
        self._save()
        return True

    def may_stop(self) -> bool:
        """True while stopping loses nothing."""
        ranks = self.session.ranks
        return self.session.progress.intact and (ranks.size == 1 or ranks.exchanging)

    def step(self, step: int, update: Callable[[int], Metrics], evaluate: Callable[[int], Metrics]) -> None:
        """Make step `step`, counted from 0, or for -1 the evaluation before training; then log and save."""
        session, total = self.session, self.session.total
        session.progress.mark()
        stop_together(session)
        metrics = self.ahead or (_timed(update, step) if step >= 0 else {})
        _stop_at_no_loss(metrics, step + 1)
        session.progress.mark()
        self.ahead = dict(metrics)
        every = session.config.eval_every
        if step < 0 or step + 1 == total or (every and (step + 1) % every == 0):
            stop_together(session)
            metrics |= evaluate(step + 1)
            _stop_if_diverged(metrics, step + 1)
        self._tell_of_smaller_passes(step + 1)
        with session.ranks.together():
            self._finish(step + 1, metrics)
        if step + 1 == total and session.progress.learned_nothing:
            raise diverged("no gradient was finite, so nothing was learned", total)

    def _finish(self, step: int, metrics: Metrics) -> None:
        session = self.session
        if session.ranks.first:
            session.run.log(step, metrics)
        session.reporter.log(step, metrics)
        self.done, self.ahead = step, None
        # A bad step may come of weights that are bad already: the state before them is worth keeping.
        due = step and (step % session.config.save_every == 0 or step == session.total)
        if due and not session.progress.bad_steps:
            self._save()
            self.saved = step

    def _save(self) -> None:
        session, ahead = self.session, {AHEAD: self.ahead} if self.ahead else {}
        session.run.save_state(self.done, session.progress.tensors(), session.progress.stored() | ahead)

    def _tell_of_smaller_passes(self, step: int) -> None:
        divisor = self.session.base.passes.divisor
        if divisor > self.told_divisor:
            self.told_divisor = divisor
            self.session.reporter.warn(f"step {step}: memory ran out; {SMALLER.format(divisor)}")

    @contextmanager
    def ending_in_order(self) -> Iterator[None]:
        """Whatever ends the block, the state that can be saved is, and the end says what it means."""
        session = self.session
        try:
            yield
        except StopRequested as stop:
            if not stop.immediate:  # an immediate one may be in the middle of an optimiser step
                with session.ranks.together():
                    self.saved = self.done if self.save_now() else self.saved
            raise Interrupted(stop.number, step=self.saved, output=str(session.run.folder)) from None
        except NotFiniteError as error:
            if self.done <= 0:  # nothing was learned: the model is at fault
                raise
            raise diverged(error.what, self.done + 1) from None
        except UserError as error:  # a reward function that failed, perhaps only this once, or memory that ran out
            # If a log could not be written, only a state from before fits it.
            if not isinstance(error, OutputError) and self.save_now():
                session.reporter.note(f"state of step {self.done} saved in {session.run.folder}")
            if isinstance(error, OutOfMemory):
                raise _with_plan(error, session.stage, session.config) from None
            raise


def _resume(session: Session) -> tuple[int, Metrics | None]:
    """Take the folder, and go on from its state, which the first rank reads for all.

    Returns the last step that was logged (-1: not even the evaluation before training), and the metrics of an update
    that was made after it, if its evaluation was interrupted.
    """
    run, ranks, progress, total = session.run, session.ranks, session.progress, session.total
    found = None
    with ranks.together():
        run.start()
        state = run.resume() if ranks.first else None
        for warning in run.warnings:
            session.reporter.warn(warning)
        if state is not None:
            found = {"step": state.step, "ahead": state.facts.pop(AHEAD, None), "facts": state.facts}
            progress.restore(state.tensors, state.facts)
            if run.standing.extending and 0 < state.step < total:
                warn_of_schedule(read_metrics(run), session.config, state.step, total, session.reporter)
    found = ranks.from_first(found)
    if found is None:
        return -1, None
    if not ranks.first:
        progress.restore(progress.tensors(), found["facts"])
    ranks.copy_from_first(progress.tensors().values())
    session.reporter.note(f"resuming after step {found['step']} of {total}")
    return found["step"], found["ahead"]


def stop_together(session: Session) -> None:
    """Raise StopRequested on every rank if a signal came to one of them; the weights must be intact."""
    number = session.ranks.largest(session.signals.received or 0)
    if number:
        raise StopRequested(number)


def _with_plan(error: OutOfMemory, stage: str, config: TrainingKnobs) -> OutOfMemory:
    """The same, with the memory that each part needs."""
    told = OutOfMemory(
        f"{error.what}\n    needed at least: {memory_text(stage, config, error.tokens)}",
        where=error.where,
        fix=error.fix,
    )
    told.told_by_first = error.told_by_first
    return told


def _timed(update: Callable[[int], Metrics], step: int) -> Metrics:
    began = time.perf_counter()
    metrics = update(step)
    seconds = time.perf_counter() - began
    metrics["seconds"] = seconds
    for what in ("tokens", "samples"):
        if what in metrics:
            metrics[f"{what}_per_second"] = metrics[what] / seconds
    return metrics


def _stop_at_no_loss(metrics: Metrics, step: int) -> None:
    """Raise TrainingStopped if a loss is not finite although its gradient is; PPO's losses are watched."""
    loss = metrics.get("loss", 0.0)
    if "reward_score" not in metrics and not metrics.get("nonfinite_steps") and not math.isfinite(loss):
        raise diverged(f"the training loss is {loss}", step)


def _stop_if_diverged(metrics: Metrics, step: int) -> None:
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


def read_metrics(run: Run) -> list[Metrics]:
    """Every line of the run's metrics.jsonl."""
    text = (run.folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def warn_of_schedule(lines: list[Metrics], config: TrainingKnobs, done: int, total: int, reporter: Reporter) -> None:
    """Say where a later end makes the learning rate rise: schedules are stretched over all steps."""
    before = next((line.get("lr") for line in reversed(lines) if line["step"] == done), None)
    after = learning_rate_at(done, total, config.learning_rate, config.lr_schedule, config.warmup_ratio)
    if before is not None and after > before:
        reporter.warn(
            f"the learning rate rises from {before:.3g} at step {done} to {after:.3g} at step {done + 1}: lr_schedule "
            f"{config.lr_schedule} now ends at step {total}; the result is not that of a run of {total} steps from the "
            "start"
        )


def before_and_after(lines: list[Metrics]) -> Metrics:
    """Evaluation numbers of the last line, and those of line 0 as `<name>_before`."""
    first, last = lines[0], lines[-1]
    after = {k: v for k, v in last.items() if k.startswith("eval_")}
    return {**{f"{k}_before": first[k] for k in after if k in first}, **after}
