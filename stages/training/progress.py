"""The trained state of a run, and the optimiser steps that change it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from stages.errors import CheckpointError, TrainingStopped
from stages.models.passes import PassesShrank
from stages.models.roles import Roles
from stages.training.devices import Ranks
from stages.training.optimizer import AdamW, clip

BAD_STEPS_IN_A_ROW = 5  # non-finite gradients in a row before training stops itself


@dataclass
class Progress:
    """What resume state holds: optimisers with their weights, and counters."""

    optimizers: dict[str, AdamW]
    facts: dict[str, float] = field(default_factory=dict)  # counters, controllers and running moments, as JSON
    bad_steps: int = 0
    marked: dict[str, float] = field(default_factory=dict)  # `stored` at the last mark

    def tensors(self) -> dict[str, Tensor]:
        """Weights and moments of every optimiser, to save."""
        return {k: v for name, o in self.optimizers.items() for k, v in o.tensors(name).items()}

    def stored(self) -> dict[str, float]:
        """Counters, controllers and running moments, to save."""
        return {**self.facts, **self._updates(), "bad_steps": self.bad_steps}

    def restore(self, tensors: dict[str, Tensor], stored: dict[str, float]) -> None:
        """Restore what `tensors` and `stored` returned. Raises CheckpointError if it does not fit this run."""
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

    def zero_gradients(self) -> None:
        """Set every gradient to zero."""
        for optimizer in self.optimizers.values():
            optimizer.zero()

    def mark(self) -> None:
        """Mark the current state as one that a run can resume from."""
        self.marked = self.stored()

    @property
    def intact(self) -> bool:
        """True while the weights are those of the last mark: no optimiser has stepped since."""
        return self._updates().items() <= self.marked.items()

    @property
    def learned_nothing(self) -> bool:
        """True if no optimiser has stepped because no gradient was finite."""
        return bool(self.bad_steps) and not any(o.updates for o in self.optimizers.values())

    def go_back(self) -> None:
        """Reset counters and controllers to the last mark; the weights must be intact."""
        assert self.intact
        self._take_up(self.marked)

    def _updates(self) -> dict[str, int]:
        return {f"updates.{name}": o.updates for name, o in self.optimizers.items()}

    def _take_up(self, stored: dict[str, float]) -> None:
        self.bad_steps = int(stored["bad_steps"])
        self.facts = {k: v for k, v in stored.items() if not k.startswith("updates.") and k != "bad_steps"}


def open_progress(config: Any, trained: dict[str, list[nn.Parameter]]) -> Progress:
    """One optimiser per named group of parameters."""
    adam = {"beta1": config.adam_beta1, "beta2": config.adam_beta2, "eps": config.adam_eps}
    return Progress({n: AdamW(p, **adam, weight_decay=config.weight_decay) for n, p in trained.items()})


def add_gradients(
    roles: Roles, ranks: Ranks, work: Callable[[], dict[str, float]], *, again: Callable[[], object] | None = None
) -> dict[str, float]:
    """Run `work`, which adds to the gradients of what is trained; returns its named values, combined over ranks.

    A failure on one rank ends all. If a pass runs out of memory, the optimiser step begins again with smaller passes:
    gradients become zero, `again` adds those from before, and `work` runs once more. Neither may exchange anything
    between ranks.
    """
    with ranks.together():
        values = _work_in_smaller_passes(roles, work, again)
    return ranks.combine(values, roles.base.device)


def _work_in_smaller_passes(
    roles: Roles, work: Callable[[], dict[str, float]], again: Callable[[], object] | None
) -> dict[str, float]:
    redo = False
    while True:
        try:
            if redo:
                roles.zero_gradients()
            if redo and again is not None:
                again()
            return work()
        except PassesShrank:
            redo = True


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

    Only the optimisers that `learning_rates` names step; every gradient becomes zero.

    Raises TrainingStopped after `patience` dropped gradients in a row.
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
                raise diverged(f"the weights of the {name} are not finite", step)
    else:
        progress.bad_steps += 1
    progress.zero_gradients()
    if progress.bad_steps >= patience:
        raise TrainingStopped(
            f"the gradient was not finite {progress.bad_steps} times in a row",
            step=step,
            advice="lower --learning-rate, or check the rows and the base; the last saved state is kept",
        )
    return {
        "grad_norm": norm if finite else float("nan"),
        **dict.fromkeys(("skipped_steps", "nonfinite_steps"), float(not finite)),
    }


def diverged(how: str, step: int) -> TrainingStopped:
    """The error that ends a run whose model is no longer usable."""
    return TrainingStopped(
        f"training diverged: {how}",
        step=step,
        advice="lower --learning-rate (of a critic: --critic-learning-rate), or any other knob far from its default, "
        "and start again with --overwrite; the last saved state is kept",
    )
