"""Acts on the conditions that hold in a PPO run: a warning when one begins, a stop if --stop-on names it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from stages.diagnostics.conditions import CONDITION_CHECKS, IN_A_ROW, Alarm, Metrics, MetricsHistory, check_conditions
from stages.errors import TrainingStopped
from stages.results import Reporter

FLAG = "alarm_"  # with a condition's name: the metric that is 1 if the condition holds
COUNT = "alarms"  # the metric that counts the conditions that hold


@dataclass
class Watchdog:
    """Watches the updates of one run. Earlier alarms are read from their metrics, so a resumed run warns of the same.

    `earlier()` returns the metrics of the updates in the log.
    """

    stop_on: tuple[str, ...]
    reporter: Reporter
    earlier: Callable[[], list[Metrics]]
    half_precision: bool = False
    eos_expected: bool = True
    lines: list[Metrics] = field(default_factory=list)

    def stop_before_learning(self, step: int, metrics: Metrics) -> None:
        """Raise TrainingStopped if the metrics of update `step` before its optimiser steps are a reason to stop.

        The weights are then still those from before the update.
        """
        alarms = self._alarms(step, metrics)
        if any(self._stops(alarm) for alarm in alarms):
            self._report(step, alarms)

    def check_update(self, step: int, metrics: Metrics) -> dict[str, float]:
        """Watch update `step`, counted from 0; returns the flags that go into its metrics.

        Raises TrainingStopped if a condition holds that stop_on names. The metrics are the same on all ranks, so all
        ranks stop together.
        """
        alarms = self._alarms(step, metrics)
        self._report(step, alarms)
        flags = {COUNT: float(len(alarms)), **{flag(alarm.condition): 1.0 for alarm in alarms}}
        self.lines.append(metrics | flags)
        return flags

    def _alarms(self, step: int, metrics: Metrics) -> list[Alarm]:
        if len(self.lines) != step:  # resumed
            self.lines = self.earlier()
        return check_conditions(MetricsHistory([*self.lines, metrics], self.half_precision, self.eos_expected))

    def _stops(self, alarm: Alarm) -> bool:
        return alarm.may_stop and alarm.condition in self.stop_on

    def _report(self, step: int, alarms: list[Alarm]) -> None:
        """Warn of alarms that begin at this update, and raise TrainingStopped for the first alarm that stops it."""
        before = self.lines[-IN_A_ROW:]
        for alarm in alarms:
            if not self._stops(alarm) and not any(line.get(flag(alarm.condition)) for line in before):
                self.reporter.warn(f"update {step + 1}: {alarm}")
        for alarm in alarms:
            if self._stops(alarm):
                reason = f"{alarm.condition}: {alarm.measurement}; {alarm.cause}"
                raise TrainingStopped(reason, step=step + 1, advice=alarm.advice)


def flag(condition: str) -> str:
    """The metric that is 1 if a condition holds."""
    return FLAG + condition.replace("-", "_")


def add_resume_advice(stop: TrainingStopped, step: int | None, folder: str, stop_on: list[str]) -> TrainingStopped:
    """The same stop, with the saved state and how to resume from it.

    `step` is that of the state from before the update; None if only the last saved state is left.
    """
    others = [name for name in stop_on if not stop.reason.startswith(f"{name}: ")]
    if len(others) == len(stop_on):  # another error stopped the run
        return stop
    state = "the last saved state" if step is None else f"the state before this update (step {step})"
    advice = (
        f"{stop.advice}\n  -> {state} is saved in {folder}; to resume from it, run the same command with "
        f"--stop-on {','.join(others) or 'none'}"
    )
    return TrainingStopped(stop.reason, step=stop.step, advice=advice)


def alarms_in(lines: list[Metrics]) -> dict[str, list[int]]:
    """The steps at which each condition held, by its name; without conditions that never held."""
    steps = {name: [int(line["step"] or 0) for line in lines if line.get(flag(name))] for name in CONDITION_CHECKS}
    return {name: numbers for name, numbers in steps.items() if numbers}
