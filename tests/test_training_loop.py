"""The loop of every training stage: what it calls, writes and survives."""

from __future__ import annotations

import json
import math
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from stages.checkpoint.run import Run, open_run, read_metrics
from stages.errors import Interrupted, NotFiniteError, OutputError, RewardError, TrainingStopped
from stages.models.passes import Passes
from stages.results import Silent
from stages.training import signals
from stages.training.devices import Ranks
from stages.training.loop import before_and_after, train
from stages.training.optimizer import AdamW
from stages.training.progress import Progress, apply_gradients
from stages.training.session import Session
from tests.parts import sft_config

RANKS = Ranks(torch.device("cpu"))


def progress_of(start=1.0):
    weight = nn.Parameter(torch.tensor([start, -2.0]))
    return weight, Progress({"policy": AdamW([weight], beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.0)})


class Notes(Silent):
    def __init__(self):
        self.notes, self.steps, self.phases = [], [], []

    def note(self, text):
        self.notes.append(text)

    def begin(self, title, total, done=0):
        self.phases.append((title, total, done))

    def log(self, step, metrics):
        self.steps.append(step)


def session_on(run, config, progress, total, reporter):
    """A session without roles, whose passes never ran out of memory."""
    session = Session("sft", config, SimpleNamespace(run=run), reporter)
    session.roles = SimpleNamespace(base=SimpleNamespace(passes=Passes(False)))
    session.ranks, session.progress, session.total = RANKS, progress, total
    return session


def run_it(folder, *, total=6, at=None, evaluated_at=None, reporter=None, **knobs):
    """Train a weight on a gradient that depends on the step; `at[step]()` runs inside that update."""
    config = sft_config(output=str(folder), **{"save_every": 2, "eval_every": 3, **knobs})
    run = open_run(folder, "sft", config, {})
    weight, progress = progress_of()
    updated, evaluated = [], []

    def update(step):
        updated.append(step)
        (weight * torch.tensor([1.0 + step, math.sin(step)])).sum().backward()
        (at or {}).get(step, lambda: None)()
        session.signals.check()
        return {"loss": float(step), "tokens": 10} | apply_gradients(progress, {"policy": 0.1}, 1.0, RANKS, step + 1)

    def evaluate(step):
        evaluated.append(step)
        (evaluated_at or {}).get(step, lambda: None)()
        session.signals.check()
        return {"eval_loss": 100.0 - step}

    try:
        session = session_on(run, config, progress, total, reporter or Notes())
        train(session, update, evaluate)
    finally:
        run.release()
    return weight.detach().clone(), updated, evaluated, run


def steps_of(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def stop():
    os.kill(os.getpid(), signal.SIGTERM)


# --- an undisturbed run


def test_every_step_is_made_logged_and_evaluated_when_it_is_due(tmp_path):
    report = Notes()
    _, updated, evaluated, run = run_it(tmp_path / "out", reporter=report)
    assert updated == [0, 1, 2, 3, 4, 5]
    assert evaluated == [0, 3, 6]
    lines = read_metrics(run)
    assert [line["step"] for line in lines] == report.steps == [0, 1, 2, 3, 4, 5, 6]
    assert lines[0] == {"step": 0, "eval_loss": 100.0}
    assert lines[1]["loss"] == 0.0 and "eval_loss" not in lines[1]
    assert lines[3]["loss"] == 2.0 and lines[3]["eval_loss"] == 97.0
    assert all(line["seconds"] > 0 and line["tokens_per_second"] > 0 for line in lines[1:])
    assert report.phases == [("sft", 6, 0)]
    assert sorted(p.name for p in (run.folder / "state").iterdir()) == ["step-000004", "step-000006"]


def test_without_eval_every_only_start_and_end_are_evaluated(tmp_path):
    assert run_it(tmp_path / "out", eval_every=None)[2] == [0, 6]


def test_numbers_before_and_after_stand_side_by_side(tmp_path):
    _, _, _, run = run_it(tmp_path / "out")
    assert before_and_after(read_metrics(run)) == {"eval_loss_before": 100.0, "eval_loss": 94.0}
    assert before_and_after([{"step": 0}, {"step": 1, "loss": 2.0, "eval_new": 1.0}]) == {"eval_new": 1.0}


# --- runs that are cut off


@pytest.mark.parametrize("step", [1, 2, 3, 5])
def test_a_run_stopped_in_an_update_ends_as_if_it_had_not_been(tmp_path, step):
    expected = run_it(tmp_path / "whole")[0]
    folder = tmp_path / "out"
    with pytest.raises(Interrupted) as caught:
        run_it(folder, at={step: stop})
    assert caught.value.exit_code == 143 and str(folder) in str(caught.value)
    assert steps_of(folder) == list(range(step + 1))  # the step that was cut off is no step
    report = Notes()
    weight, updated, _, _ = run_it(folder, reporter=report)
    assert torch.equal(weight, expected)
    assert updated == list(range(step, 6)) and steps_of(folder) == list(range(7))
    assert report.notes == [f"resuming after step {step} of 6"] and report.phases == [("sft", 6, step)]


def test_a_run_stopped_in_an_evaluation_keeps_the_update_before_it(tmp_path):
    expected = run_it(tmp_path / "whole")[0]
    folder = tmp_path / "out"
    with pytest.raises(Interrupted):
        run_it(folder, evaluated_at={3: stop})
    assert steps_of(folder) == [0, 1, 2]
    weight, updated, evaluated, run = run_it(folder)
    assert updated == [3, 4, 5] and evaluated == [3, 6]  # the third update is not made again, its evaluation is
    assert torch.equal(weight, expected) and steps_of(folder) == list(range(7))
    line = read_metrics(run)[3]
    assert line["loss"] == 2.0 and line["eval_loss"] == 97.0


def test_a_run_stopped_before_its_first_step_starts_again(tmp_path):
    folder = tmp_path / "out"
    with pytest.raises(Interrupted):
        run_it(folder, evaluated_at={0: stop})
    assert not (folder / "metrics.jsonl").exists()
    assert torch.equal(run_it(folder)[0], run_it(tmp_path / "whole")[0])


def test_a_killed_run_goes_on_from_its_last_state(tmp_path):
    """A kill saves nothing: steps after the last state are made again, and stand once in the log."""
    folder = tmp_path / "out"

    def kill():
        raise SystemExit(9)

    with pytest.raises(SystemExit):
        run_it(folder, at={5: kill}, save_every=4)
    assert steps_of(folder) == [0, 1, 2, 3, 4, 5]
    weight, updated, _, _ = run_it(folder, save_every=4)
    assert updated == [4, 5] and steps_of(folder) == list(range(7))
    assert torch.equal(weight, run_it(tmp_path / "whole")[0])


def test_a_users_mistake_in_the_middle_saves_what_there_is(tmp_path):
    folder = tmp_path / "out"

    def fail():
        raise RewardError("it raised", where="--reward f.py")

    report = Notes()
    with pytest.raises(RewardError):
        run_it(folder, at={3: fail}, save_every=100, reporter=report)
    assert report.notes == [f"state of step 3 saved in {folder}"]
    weight, updated, _, _ = run_it(folder, save_every=100)
    assert updated == [3, 4, 5] and torch.equal(weight, run_it(tmp_path / "whole")[0])


def test_state_is_weights_moments_counts_and_facts():
    weight, progress = progress_of()
    progress.facts["kl_coef"] = 0.07
    for step in range(3):
        (weight * (step + 1.0)).sum().backward()
        apply_gradients(progress, {"policy": 0.1}, 0.0, RANKS, step + 1)
    progress.bad_steps = 2
    tensors, stored = {k: v.clone() for k, v in progress.tensors().items()}, json.loads(json.dumps(progress.stored()))
    assert stored == {"kl_coef": 0.07, "updates.policy": 3, "bad_steps": 2}
    other, again = progress_of(start=5.0)
    again.restore(tensors, stored)
    assert torch.equal(other, weight) and again.facts == {"kl_coef": 0.07}
    assert (again.bad_steps, again.optimizers["policy"].updates) == (2, 3)
    assert all(torch.equal(again.tensors()[name], tensors[name]) for name in tensors)


def run_of_two_steps(folder, *, between=lambda: None, reporter=None, total=4):
    """Train with two optimiser steps an update; `between()` runs in update 2, after the first of them."""
    config = sft_config(output=str(folder), save_every=2, eval_every=None)
    run = open_run(folder, "sft", config, {})
    weight, progress = progress_of()

    def update(step):
        for part in range(2):
            (weight * torch.tensor([1.0 + step, math.cos(part)])).sum().backward()
            session.signals.check()  # as before a forward pass
            apply_gradients(progress, {"policy": 0.1}, 1.0, RANKS, step + 1)
            if (step, part) == (2, 0):
                between()
        return {"loss": float(step)}

    try:
        session = session_on(run, config, progress, total, reporter or Notes())
        train(session, update, lambda step: {})
    finally:
        run.release()
    return weight.detach().clone()


def test_a_signal_after_the_first_optimiser_step_waits_for_the_end_of_the_update(tmp_path):
    """Half an update is no state to go on from: the rest is made, the third step saved, and nothing is lost."""
    report = Notes()
    with pytest.raises(Interrupted, match="state of step 3 saved"):
        run_of_two_steps(tmp_path / "out", between=stop, reporter=report)
    assert report.notes == [signals.FINISHING]
    assert torch.equal(run_of_two_steps(tmp_path / "out"), run_of_two_steps(tmp_path / "whole"))
    assert steps_of(tmp_path / "out") == list(range(5))


def test_a_failure_after_the_first_optimiser_step_leaves_the_last_saved_state(tmp_path):
    def fail():
        raise RewardError("it raised")

    report = Notes()
    with pytest.raises(RewardError):
        run_of_two_steps(tmp_path / "out", between=fail, reporter=report)
    assert report.notes == [] and sorted(p.name for p in (tmp_path / "out" / "state").iterdir()) == ["step-000002"]
    assert torch.equal(run_of_two_steps(tmp_path / "out"), run_of_two_steps(tmp_path / "whole"))


def test_a_second_signal_after_the_first_optimiser_step_ends_it_at_once(tmp_path):
    with pytest.raises(Interrupted, match="state of step 2 saved"):
        run_of_two_steps(tmp_path / "out", between=lambda: [stop(), stop()])
    assert torch.equal(run_of_two_steps(tmp_path / "out"), run_of_two_steps(tmp_path / "whole"))


@pytest.mark.parametrize(("at", "kind"), [(0, NotFiniteError), (3, TrainingStopped)])
def test_a_model_that_gives_no_numbers_is_at_fault_before_training_and_diverged_after(tmp_path, at, kind):
    def fail():
        raise NotFiniteError("sampling gives log-probabilities that are not finite")

    with pytest.raises(kind, match="not finite"):
        run_it(tmp_path / "out", at={at: fail})


def test_a_loss_that_is_no_number_stops_training_though_its_gradient_is_one(tmp_path):
    config = sft_config(output=str(tmp_path / "out"), save_every=1, eval_every=None)
    run = open_run(tmp_path / "out", "sft", config, {})
    _, progress = progress_of()

    def update(step):
        return {"loss": 1.0 if step < 2 else math.nan, "nonfinite_steps": 0.0}

    with pytest.raises(TrainingStopped, match="training diverged: the training loss is nan") as stop:
        train(session_on(run, config, progress, 4, Notes()), update, lambda step: {})
    run.release()
    assert stop.value.step == 3 and steps_of(tmp_path / "out") == [0, 1, 2]


def test_counters_and_controllers_go_back_with_what_is_saved(tmp_path):
    """A reward function that fails after the running statistics were updated: the state is that from before."""
    weight, progress = progress_of()
    progress.facts["scores_count"] = 8.0
    progress.mark()
    progress.facts["scores_count"], progress.bad_steps = 16.0, 2
    assert progress.intact
    progress.go_back()
    assert progress.stored() == {"scores_count": 8.0, "updates.policy": 0, "bad_steps": 0}
    weight.sum().backward()
    apply_gradients(progress, {"policy": 0.1}, 1.0, RANKS, 1)
    assert not progress.intact


# --- gradients


def step_with(progress, weight, value, max_norm=1.0):
    weight.grad.fill_(value)
    return apply_gradients(progress, {"policy": 0.1}, max_norm, RANKS, 7)


def test_gradients_are_clipped_together_and_then_forgotten():
    first, second = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    make = {"beta1": 0.0, "beta2": 0.0, "eps": 1.0, "weight_decay": 0.0}
    progress = Progress({"policy": AdamW([first], **make), "critic": AdamW([second], **make)})
    first.grad.fill_(3.0)
    second.grad.fill_(4.0)
    found = apply_gradients(progress, {"policy": 1.0, "critic": 10.0}, 1.0, RANKS, 1)
    assert found == {"grad_norm": 5.0, "skipped_steps": 0.0, "nonfinite_steps": 0.0}
    # Without memory Adam moves by rate * g / (|g| + eps): 0.6 / 1.6, and 10 * 0.8 / 1.8.
    assert first.item() == pytest.approx(-0.375, abs=1e-5) and second.item() == pytest.approx(-4.4444, abs=1e-4)
    assert first.grad.item() == second.grad.item() == 0.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_dropped_and_counted(bad):
    weight, progress = progress_of()
    before = weight.detach().clone()
    found = step_with(progress, weight, bad)
    assert math.isnan(found["grad_norm"]) and found["skipped_steps"] == 1.0
    assert torch.equal(weight, before) and progress.bad_steps == 1 and progress.optimizers["policy"].updates == 0
    step_with(progress, weight, 1.0)
    assert progress.bad_steps == 0 and torch.isfinite(weight).all() and not torch.equal(weight, before)


def test_training_stops_itself_after_five_bad_gradients_in_a_row():
    weight, progress = progress_of()
    for bad in (True, True, True, True, False, True, True, True, True):
        step_with(progress, weight, float("nan") if bad else 1.0)
    with pytest.raises(TrainingStopped, match="not finite 5 times in a row") as caught:
        step_with(progress, weight, float("nan"))
    assert caught.value.exit_code == 3 and caught.value.step == 7
    assert torch.isfinite(weight).all()


@pytest.mark.parametrize("at", [2, 3, 6])
def test_a_log_that_cannot_be_written_costs_no_step(tmp_path, monkeypatch, at):
    """Found by the campaign of faults: the state saved after such a failure stood one line ahead of the log."""
    whole, *_ = run_it(tmp_path / "whole")
    real = Run.log

    def full(run, step, metrics):
        if step == at:
            raise OutputError("cannot write: No space left on device", where="metrics.jsonl")
        real(run, step, metrics)

    with monkeypatch.context() as patch, pytest.raises(OutputError):
        patch.setattr(Run, "log", full)
        run_it(tmp_path / "x")
    again, updated, *_ = run_it(tmp_path / "x")
    assert torch.equal(again, whole)
    assert steps_of(tmp_path / "x") == list(range(7))
    assert updated[0] == (at - 1) // 2 * 2  # from the last state that was saved
