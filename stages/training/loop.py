"""The loop that every training stage runs in: resume, step, evaluate, log, save, and end in good order."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from stages.config import TrainingKnobs
from stages.errors import Interrupted, OutOfMemory, OutputError, TrainingStopped, UserError
from stages.files.run import Run
from stages.files.states import AHEAD
from stages.results import Report
from stages.training import signals
from stages.training.devices import Ranks
from stages.training.optimizer import AdamW, clip
from stages.training.passes import divisor
from stages.training.plan import memory_text

SMALLER = "forward passes have 1/{} of their size from here on, and the result stays the same"
BAD_STEPS_IN_A_ROW = 5  # non-finite gradients in a row before training stops itself
DIVERGES = ("eval_loss", "eval_log_loss", "eval_kl")  # of a model that works they are finite


@dataclass
class Progress:
    """All that a run is, beside its knobs and inputs: what resume state holds."""

    optimizers: dict[str, AdamW]
    facts: dict[str, float] = field(default_factory=dict)  # counters and controllers, all JSON numbers
    bad_steps: int = 0

    def tensors(self) -> dict[str, Tensor]:
        return {k: v for name, o in self.optimizers.items() for k, v in o.tensors(name).items()}

    def stored(self) -> dict[str, float]:
        updates = {f"updates.{name}": o.updates for name, o in self.optimizers.items()}
        return {**self.facts, **updates, "bad_steps": self.bad_steps}

    def restore(self, tensors: dict[str, Tensor], stored: dict[str, float]) -> None:
        for name, optimizer in self.optimizers.items():
            optimizer.load(name, tensors, int(stored[f"updates.{name}"]))
        self.bad_steps = int(stored["bad_steps"])
        self.facts = {k: v for k, v in stored.items() if not k.startswith("updates.") and k != "bad_steps"}


def train(
    run: Run,
    report: Report,
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
    """
    run.start()
    ranks.wait()  # nobody looks for a state before the first rank has taken the folder
    state = run.resume()
    for warning in run.warnings:
        report.warn(warning)
    done = state.step if state is not None else -1  # -1: not even evaluated
    ahead: dict[str, float] | None = None  # of an update that was made, while its evaluation was interrupted
    if state is not None:
        ahead = state.facts.pop(AHEAD, None)
        progress.restore(state.tensors, state.facts)
        report.note(f"resuming after step {done} of {total}")
    saved: int | None = state.step if state is not None else None
    whole = 1
    report.begin(title, total, max(done, 0))
    try:
        # The first rank stops at once and saves; the others go on until they miss it, so that it never waits for them.
        with signals.listening(raises=ranks.first), _missing_the_first(ranks):
            for step in range(done, total):
                metrics = ahead or (_timed(update, step) if step >= 0 else {})
                ahead = dict(metrics)
                if step < 0 or step + 1 == total or (config.eval_every and (step + 1) % config.eval_every == 0):
                    metrics |= evaluate(step + 1)
                    _stop_if_diverged(metrics, step + 1)
                if divisor() > whole:
                    whole = divisor()
                    report.warn(f"step {step + 1}: memory ran out; {SMALLER.format(whole)}")
                _record(run, report, ranks, step + 1, metrics)
                done, ahead = step + 1, None
                if done == total and progress.bad_steps and not any(o.updates for o in progress.optimizers.values()):
                    raise diverged("no gradient was finite, so nothing was learned", done)
                # A bad step may come of weights that are bad already: the state before them is worth keeping.
                if done and (done % config.save_every == 0 or done == total) and not progress.bad_steps:
                    _save(run, progress, done)
                    ranks.wait()
                    saved = done
    except signals.StopRequested as stop:
        if done >= 0 and not stop.at_once:  # at once may be in the middle of an optimiser step
            _save(run, progress, done, ahead)
            saved = done
        raise Interrupted(stop.number, step=saved, output=str(run.folder)) from None
    except UserError as error:  # a reward function that failed, perhaps only this once, or memory that ran out
        # Other ranks may be waiting elsewhere; and where a log could not be written, only a state from before fits it.
        if done >= 0 and ranks.size == 1 and not isinstance(error, OutputError):
            _save(run, progress, done, ahead)
            report.note(f"state of step {done} saved in {run.folder}")
        if isinstance(error, OutOfMemory):
            plan = memory_text(run.stage, config, error.tokens)
            raise OutOfMemory(f"{error.what}\n    needed at least: {plan}", where=error.where, fix=error.fix) from None
        raise
    finally:
        report.end()


@contextmanager
def _missing_the_first(ranks: Ranks) -> Iterator[None]:
    """A collective that fails because the first rank has stopped at a signal is this rank's stop, and no defect."""
    try:
        yield
    except RuntimeError:
        if ranks.first or signals.heard() is None:
            raise
        raise signals.StopRequested(signals.heard()) from None


def _timed(update: Callable[[int], dict[str, float]], step: int) -> dict[str, float]:
    began = time.perf_counter()
    metrics = update(step)
    seconds = time.perf_counter() - began
    metrics["seconds"] = seconds
    for what in ("tokens", "samples"):
        if what in metrics:
            metrics[f"{what}_per_second"] = metrics[what] / seconds
    return metrics


def _stop_if_diverged(metrics: dict[str, float], step: int) -> None:
    """Raise TrainingStopped where what was measured on held-out rows is not a number any more."""
    for name in DIVERGES:
        if not math.isfinite(metrics.get(name, 0.0)):
            raise diverged(f"{name} is {metrics[name]}", step)


def _record(run: Run, report: Report, ranks: Ranks, step: int, metrics: dict[str, float]) -> None:
    if ranks.first:
        run.log(step, metrics)
    report.log(step, metrics)


def _save(run: Run, progress: Progress, step: int, ahead: dict[str, float] | None = None) -> None:
    run.save_state(step, progress.tensors(), progress.stored() | ({AHEAD: ahead} if ahead else {}))


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
        advice="lower --learning-rate and start again with --overwrite; the last saved state is kept",
    )


def read_metrics(run: Run) -> list[dict[str, float]]:
    """Every line of the run's metrics.jsonl."""
    text = (run.folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def before_and_after(lines: list[dict[str, float]]) -> dict[str, float]:
    """Evaluation numbers of the last line, and those of line 0 as `<name>_before`."""
    first, last = lines[0], lines[-1]
    after = {k: v for k, v in last.items() if k.startswith("eval_")}
    return {**{f"{k}_before": first[k] for k in after if k in first}, **after}
