"""The training loop of all stages: resume, step, evaluate, log, save, and save the state at an early end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from stages.checkpoint.run import read_metrics
from stages.checkpoint.states import AHEAD
from stages.errors import (
    Interrupted,
    NotFiniteError,
    OutOfMemory,
    OutputError,
    StopRequested,
    UserError,
)
from stages.training.plan import memory_text
from stages.training.progress import diverged

if TYPE_CHECKING:
    from stages.training.session import Session

Metrics = dict[str, float]

FINITE = ("eval_loss", "eval_log_loss", "eval_kl")  # unless training diverged


def train(session: Session, update: Callable[[int], Metrics], evaluate: Callable[[int], Metrics]) -> None:
    """Run `update(step)` for every step up to `session.total`, from the last saved state if there is one.

    Evaluates before the first step, every `config.eval_every` steps and after the last. Every step has one line in
    metrics.jsonl; line 0 is the evaluation before training. `evaluate` writes its samples at its end, so that an
    interrupted one leaves none. Raises Interrupted (state saved) and TrainingStopped.

    The weights are not copied. If an update ends before its first optimiser step, the state from before it is saved.
    After that step a signal waits for the end of the update, and a failure leaves the last saved state.
    """
    loop = _Loop(session)
    ranks, reporter = session.ranks, session.reporter
    reporter.begin(session.stage, session.total, max(loop.done, 0))
    try:
        with (
            session.signals.listening(loop.may_stop, reporter.note, save=loop.save_now, echo=ranks.size > 1),
            loop.saving_at_the_end(),
        ):
            for step in range(loop.done, session.total):
                loop.step(step, update, evaluate)
    finally:
        reporter.end()


class _Loop:
    """Progress of a run: `done` is the last step that was logged; -1 before the evaluation before training."""

    def __init__(self, session: Session):
        self.session = session
        self.done, self.ahead = _resume(session)  # metrics of an update whose evaluation was interrupted, or None
        self.saved = self.done if self.done >= 0 else None
        self.warned_divisor = 1

    def save_now(self) -> bool:
        """Save the state of the last mark, if the weights have not changed since; returns whether it did."""
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
        """Make step `step`, counted from 0, or for -1 only the evaluation before training; then log and save."""
        session, total = self.session, self.session.total
        session.progress.mark()
        stop_together(session)
        metrics = self.ahead or (_timed(update, step) if step >= 0 else {})
        _stop_if_loss_is_not_finite(metrics, step + 1)
        session.progress.mark()
        self.ahead = dict(metrics)
        every = session.config.eval_every
        if step < 0 or step + 1 == total or (every and (step + 1) % every == 0):
            stop_together(session)
            metrics |= evaluate(step + 1)
            _stop_if_diverged(metrics, step + 1)
        divisor = session.base.passes.divisor
        if divisor > self.warned_divisor:
            self.warned_divisor = divisor
            size = f"micro-batches are now 1/{divisor} of their size, the result stays the same"
            session.reporter.warn(f"step {step + 1}: out of memory; {size}")
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
        # A gradient may be non-finite because the weights are bad already: do not overwrite an earlier state.
        due = step and (step % session.config.save_every == 0 or step == session.total)
        if due and not session.progress.bad_steps:
            self._save()
            self.saved = step

    def _save(self) -> None:
        session, ahead = self.session, {AHEAD: self.ahead} if self.ahead else {}
        session.run.save_state(self.done, session.progress.tensors(), session.progress.stored() | ahead)

    @contextmanager
    def saving_at_the_end(self) -> Iterator[None]:
        """If the block ends early, save the state if possible, and raise the error that explains the end."""
        session = self.session
        try:
            yield
        except StopRequested as stop:
            if not stop.immediate:  # an immediate stop may be in the middle of an optimiser step
                with session.ranks.together():
                    self.saved = self.done if self.save_now() else self.saved
            raise Interrupted(stop.number, step=self.saved, output=str(session.run.folder)) from None
        except NotFiniteError as error:
            if self.done <= 0:  # before any training: the cause is the model
                raise
            raise diverged(error.what, self.done + 1) from None
        except UserError as error:  # such as a failed reward function, or out of memory
            # If a log could not be written, only an earlier state fits it.
            if not isinstance(error, OutputError) and self.save_now():
                session.reporter.note(f"state of step {self.done} saved in {session.run.folder}")
            if isinstance(error, OutOfMemory):
                needed = memory_text(session.stage, session.config, session.model, error.tokens)
                detailed = OutOfMemory(f"{error.what}\n    needed at least: {needed}", where=error.where, fix=error.fix)
                detailed.told_by_first = error.told_by_first
                raise detailed from None
            raise


def _resume(session: Session) -> tuple[int, Metrics | None]:
    """Lock the output folder and restore its state, which the first rank reads for all.

    Returns the last step that was logged (-1: none, not even the evaluation before training), and the metrics of an
    update that was made after it, if its evaluation was interrupted.
    """
    run, ranks, progress, total = session.run, session.ranks, session.progress, session.total
    resumed = None
    with ranks.together():
        run.start()
        state = run.resume() if ranks.first else None
        for warning in run.warnings:
            session.reporter.warn(warning)
        if state is not None:
            resumed = {"step": state.step, "ahead": state.facts.pop(AHEAD, None), "facts": state.facts}
            progress.restore(state.tensors, state.facts)
            if run.standing.extending and 0 < state.step < total:
                _warn_of_schedule(session, state.step)
    resumed = ranks.from_first(resumed)
    if resumed is None:
        return -1, None
    if not ranks.first:
        progress.restore(progress.tensors(), resumed["facts"])
    ranks.copy_from_first(progress.tensors().values())
    session.reporter.note(f"resuming after step {resumed['step']} of {total}")
    return resumed["step"], resumed["ahead"]


def stop_together(session: Session) -> None:
    """Raise StopRequested on every rank if a signal came to one of them; the weights must be intact."""
    number = session.ranks.largest(session.signals.received or 0)
    if number:
        raise StopRequested(number)


def _timed(update: Callable[[int], Metrics], step: int) -> Metrics:
    began = time.perf_counter()
    metrics = update(step)
    seconds = time.perf_counter() - began
    speeds = {f"{name}_per_second": metrics[name] / seconds for name in ("tokens", "samples") if name in metrics}
    return metrics | {"seconds": seconds} | speeds


def _stop_if_loss_is_not_finite(metrics: Metrics, step: int) -> None:
    """Raise TrainingStopped if a loss is not finite although its gradient is; PPO's losses are watched elsewhere."""
    loss = metrics.get("loss", 0.0)
    if "reward_score" not in metrics and not metrics.get("nonfinite_steps") and not math.isfinite(loss):
        raise diverged(f"the training loss is {loss}", step)


def _stop_if_diverged(metrics: Metrics, step: int) -> None:
    """Raise TrainingStopped if a held-out metric is not finite, or NotFiniteError before training."""
    for name in FINITE:
        if not math.isfinite(metrics.get(name, 0.0)):
            if not step:
                raise NotFiniteError(
                    f"{name} is {metrics[name]} before training: the weights are too large or damaged",
                    where="--model",
                    fix="use another base or checkpoint",
                )
            raise diverged(f"{name} is {metrics[name]}", step)


def _warn_of_schedule(session: Session, done: int) -> None:
    """Warn if a larger max_steps makes the learning rate rise: its schedule is stretched over all steps."""
    before = next((line.get("lr") for line in reversed(read_metrics(session.run)) if line["step"] == done), None)
    after = session.learning_rate(done)
    if before is not None and after > before:
        session.reporter.warn(
            f"the learning rate rises from {before:.3g} at step {done} to {after:.3g} at step {done + 1}: lr_schedule "
            f"{session.config.lr_schedule} now ends at step {session.total}; the result is not that of a run of "
            f"{session.total} steps from the start"
        )


def before_and_after(lines: list[Metrics]) -> Metrics:
    """Evaluation numbers of the last line, and those of line 0 as `<name>_before`."""
    first, last = lines[0], lines[-1]
    after = {k: v for k, v in last.items() if k.startswith("eval_")}
    return {**{f"{k}_before": first[k] for k in after if k in first}, **after}
