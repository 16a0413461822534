"""What a run says and does about the conditions it is watched for: a warning when one begins, a stop where asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from stages.diagnostics.conditions import CONDITION_CHECKS, IN_A_ROW, Alarm, Metrics, MetricsHistory, check_conditions
from stages.errors import TrainingStopped
from stages.results import Reporter

FLAG = "alarm_"  # and a condition's name: 1 in the metrics of an update at which it holds
COUNT = "alarms"  # how many hold


@dataclass
class Watchdog:
    """Watches the updates of one run. What was said before is read from their metrics, so a resumed run says the same.

    `earlier()` gives the metrics of the updates that stand in the log.
    """

    stop_on: tuple[str, ...]
    reporter: Reporter
    earlier: Callable[[], list[Metrics]]
    half_precision: bool = False
    eos_expected: bool = True
    lines: list[Metrics] = field(default_factory=list)

    def stop_before_learning(self, step: int, metrics: Metrics) -> None:
        """Raise TrainingStopped if what is known of update `step` before its optimiser steps is a reason to stop.

        So the weights are still those from before the update.
        """
        alarms = self._alarms(step, metrics)
        if any(self._stops(alarm) for alarm in alarms):
            self._tell(step, alarms)

    def check_update(self, step: int, metrics: Metrics) -> dict[str, float]:
        """Watch update `step`, counted from 0; returns the flags that go into its metrics.

        Raises TrainingStopped where a condition holds that stop_on names. Everything watched is the same on all ranks,
        and so is the answer.
        """
        alarms = self._alarms(step, metrics)
        self._tell(step, alarms)
        flags = {COUNT: float(len(alarms)), **{flag(alarm.condition): 1.0 for alarm in alarms}}
        self.lines.append(metrics | flags)
        return flags

    def _alarms(self, step: int, metrics: Metrics) -> list[Alarm]:
        if len(self.lines) != step:  # resumed
            self.lines = self.earlier()
        return check_conditions(MetricsHistory([*self.lines, metrics], self.half_precision, self.eos_expected))

    def _stops(self, alarm: Alarm) -> bool:
        return alarm.may_stop and alarm.condition in self.stop_on

    def _tell(self, step: int, alarms: list[Alarm]) -> None:
        """Warn of what began at this update, and raise TrainingStopped for the first alarm that stops it."""
        before = self.lines[-IN_A_ROW:]
        for alarm in alarms:
            if not self._stops(alarm) and not any(line.get(flag(alarm.condition)) for line in before):
                self.reporter.warn(f"update {step + 1}: {alarm}")
        for alarm in alarms:
            if self._stops(alarm):
                raise stopped(alarm, step)


def flag(condition: str) -> str:
    """The metric that says that a condition holds."""
    return FLAG + condition.replace("-", "_")


def stopped(alarm: Alarm, step: int) -> TrainingStopped:
    """The end of a run at its update `step`, counted from 0."""
    return TrainingStopped(f"{alarm.condition}: {alarm.number}; {alarm.cause}", step=step + 1, advice=alarm.advice)


def add_resume_advice(stop: TrainingStopped, step: int | None, folder: str, stop_on: list[str]) -> TrainingStopped:
    """The same stop, saying which state is kept and how to go on from it.

    `step` is that of the state from before the update; None where the last saved one is left.
    """
    others = [name for name in stop_on if not stop.reason.startswith(f"{name}: ")]
    if len(others) == len(stop_on):  # it was no condition that stopped the run
        return stop
    state = "the last saved state" if step is None else f"the state of step {step}, before this update,"
    advice = (
        f"{stop.advice}\n  -> {state} is kept in {folder}; the same command with "
        f"--stop-on {','.join(others) or 'none'} goes on from it"
    )
    return TrainingStopped(stop.reason, step=stop.step, advice=advice)


def alarms_in(lines: list[Metrics]) -> dict[str, list[int]]:
    """The steps at which each condition held, by its name; conditions that never did are left out."""
    steps = {name: [int(line["step"] or 0) for line in lines if line.get(flag(name))] for name in CONDITION_CHECKS}
    return {name: held for name, held in steps.items() if held}
