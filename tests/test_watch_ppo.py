"""Every condition that PPO is watched for, brought about by a run of the command; a run that is well says nothing."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch

from stages import ppo
from stages.models.outputs import TargetOutputs
from stages.rollout import clipped, experience
from tests.commands import (
    WORDS,
    Ended,
    assert_same_weights,
    done,
    lines_of,
    manifest,
    refused,
    rlhf,
    without_times,
)
from tests.tiny import write_jsonl

PLAIN = (
    "--batch-size", 8, "--eval-fraction", 0, "--samples", 0, "--max-response-tokens", 4, "--temperature", 0.3,
    "--missing-eos-penalty", 0, "--kl-coef", 0, "--target-approx-kl", "null", "--lr-schedule", "constant",
    "--max-steps", 4,
)  # fmt: skip
WILD = ("--learning-rate", 0.05, "--clip-range", 1)
COLLAPSE = ("--learning-rate", 0.03, "--clip-range", 1)  # of every seed tried, within 14 updates
FAR = (*WILD, "--max-response-tokens", 12)  # so that the KL is beyond 50 nats after one update
GROUPS = ("--advantage", "rloo", "--responses-per-prompt", 2)
SCORES = {
    "vowels": "[sum(letter in 'aeiou' for letter in r) for r in responses]",
    "flat": "[1.0] * len(responses)",
    "length": "[float(len(r)) for r in responses]",
    "same": "[-len(set(r)) for r in responses]",
    "lottery": "[sum(map(ord, r)) % 7 for r in responses]",
    "drift": "[sum(map(ord, r)) % 7 + 4 * len(calls) for r in responses]",
}


@pytest.fixture
def run(chain, tmp_path):
    """`run("vowels", "--knob", 1)`: PPO on the tiny base with one of the rewards above, and its metrics' lines."""

    def go(name: str, *more: object, model: object = None, folder: str = "x") -> tuple[Ended, list[dict]]:
        code = f"calls = []\ndef score(prompts, responses):\n    calls.append(1)\n    return {SCORES[name]}\n"
        (tmp_path / f"{name}.py").write_text(code)
        data = ("--reward", tmp_path / f"{name}.py", "--dataset", chain().prompts, "--output", tmp_path / folder)
        ended = rlhf("ppo", "--model", model or chain().base, *data, *PLAIN, *more)
        return ended, lines_of(tmp_path / folder / "metrics.jsonl")[1:]

    return go


def stopped(ended: Ended, condition: str, step: int) -> str:
    """What a run says that stopped itself because of a condition."""
    assert (ended.code, ended.stdout) == (3, ""), ended.stderr
    assert f"stopped at step {step}: {condition}: " in ended.stderr and "Traceback" not in ended.stderr
    return ended.stderr[ended.stderr.index("stopped at step") :]


def warned(ended: Ended, condition: str) -> str:
    """The one warning of a condition, of a run that went on to its end."""
    assert ended.code == 0, ended.stderr
    lines = [line for line in ended.stderr.splitlines() if f": {condition}: " in line]
    assert len(lines) == 1 and lines[0].startswith("warning: update "), ended.stderr
    assert any(line.split()[:1] == [condition] for line in ended.stdout.splitlines())  # in the table of alarms
    return lines[0]


# --- each condition


def test_kl_of_a_policy_that_runs_away(run, tmp_path):
    """The default stops: the learning rate is a thousand times too high."""
    ended, lines = run("vowels", *FAR)
    said = stopped(ended, "kl", 2)
    assert "nats" in said and "raise --kl-coef or lower --learning-rate" in said
    assert len(lines) == 1 and os.listdir(tmp_path / "x" / "state") == ["step-000001"]


@pytest.mark.full
def test_kl_of_short_responses_is_warned_of_before_it_stops(run):
    ended, lines = run("vowels", *WILD)
    assert "warning: update 2: kl: " in ended.stderr and warned(ended, "kl")
    assert all(20 < line["reward_kl"] < 50 for line in lines[1:])


@pytest.mark.full
def test_negative_kl_where_another_policy_is_sampled_from(run, monkeypatch):
    """A planted defect: responses come from the reference, so that the k1 estimate is -KL(reference, policy)."""
    real = ppo.sample_rollout
    monkeypatch.setattr(ppo, "sample_rollout", lambda roles, role, *rest, **how: real(roles, "reference", *rest, **how))
    ended, lines = run("vowels", *WILD, "--max-steps", 8)
    assert "negative 5 times in a row" in warned(ended, "negative-kl")
    assert lines[-1]["alarm_negative_kl"] == 1.0 and lines[-1]["reward_kl"] < 0


@pytest.mark.full
def test_ratio_where_training_reads_other_log_probabilities(run, monkeypatch):
    """A planted defect: noise of 0.01 nats in the forward pass of training alone."""
    real = clipped.read_targets

    def noisy(*arguments, **more):
        found = real(*arguments, **more)
        noise = 0.01 * torch.randn(found.logprobs.shape, generator=torch.Generator().manual_seed(0))
        return TargetOutputs(found.logprobs + noise, found.entropy, found.hidden)

    assert experience.read_targets is real
    monkeypatch.setattr(clipped, "read_targets", noisy)
    ended, lines = run("vowels", "--max-steps", 2)
    assert "a probability ratio differs from 1 by 0.0" in warned(ended, "ratio")
    assert 0.003 < lines[0]["ratio_first_std"] < 0.03 < 10 * lines[0]["ratio_first_error"]
    assert [line["alarm_ratio"] for line in lines] == [1.0, 1.0]


@pytest.mark.full
def test_entropy_of_a_policy_that_is_paid_to_repeat_itself(run):
    ended, lines = run("same", *COLLAPSE, *GROUPS, "--max-steps", 16, "--batch-size", 16, "--stop-on", "none")
    assert "the entropy fell from" in warned(ended, "entropy")
    assert lines[-1]["entropy"] < 0.1 * lines[0]["entropy"] and lines[-1]["alarm_entropy"] == 1.0


@pytest.mark.full
def test_repetition_of_a_policy_that_is_paid_for_it(run):
    more = ("--max-response-tokens", 12, "--max-steps", 12, "--batch-size", 16, "--stop-on", "none")
    ended, lines = run("same", *COLLAPSE, *GROUPS, *more)
    assert "repetition_rate" in warned(ended, "repetition")
    assert lines[-1]["repetition_rate"] > lines[0]["repetition_rate"] + 0.1 and lines[-1]["alarm_repetition"] == 1.0


@pytest.fixture(scope="module")
def babble(chain, tmp_path_factory):
    """A policy that has learned to say one to five words and to end."""
    place, draw = tmp_path_factory.mktemp("babble"), random.Random(0)
    rows = [
        {"prompt": f"{a} {b}", "completion": "".join(f" {draw.choice(WORDS[:4])}" for _ in range(draw.randint(1, 5)))}
        for a in WORDS
        for b in WORDS
    ]
    data = write_jsonl(place / "rows.jsonl", rows)
    flags = ("--max-steps", 30, "--batch-size", 16, "--lora-rank", 8, "--learning-rate", "2e-2", "--eval-fraction", 0)
    done("sft", "--model", chain().base, "--dataset", data, "--output", place / "sft", *flags)
    return place / "sft"


@pytest.mark.full
def test_length_that_a_reward_pays_for(run, babble):
    flags = ("--max-response-tokens", 32, "--learning-rate", "1e-2", "--ppo-epochs", 2, "--temperature", 1)
    ended, lines = run("length", *flags, *GROUPS, "--batch-size", 16, "--max-steps", 6, model=babble)
    assert "scores follow length" in warned(ended, "length")
    assert lines[-1]["response_length"] > 1.3 * lines[0]["response_length"] and lines[-1]["score_length_corr"] > 0.5


@pytest.mark.full
def test_missing_ends_where_they_are_charged_for(run):
    """The tiny base never ends within four tokens."""
    ended, _ = run("vowels", "--missing-eos-penalty", 1)
    assert "100% of the responses never ended" in warned(ended, "no-eos")
    ended, lines = run("vowels", folder="y")  # a penalty of 0 says that ends do not matter
    assert lines[-1]["truncated_rate"] == 1.0 and "no-eos" not in ended.stderr


@pytest.mark.full
def test_a_critic_that_learns_far_too_fast(run):
    wild = ("--critic-learning-rate", 1, "--value-clip-range", 100, "--learning-rate", "1e-5", "--ppo-epochs", 1)
    ended, lines = run("lottery", *wild, "--critic-warmup", 0, "--max-steps", 11, "--batch-size", 4)
    assert "the critic predicts returns worse than their mean" in warned(ended, "critic")
    assert "alarm_critic" not in lines[8] and lines[9]["explained_variance"] < 0 and lines[9]["alarm_critic"] == 1.0


@pytest.mark.full
def test_groups_whose_responses_all_score_the_same(run):
    ended, lines = run("flat", *GROUPS)
    assert "for 100% of the prompts every response had the same score" in warned(ended, "dead-groups")
    assert [line["alarms"] for line in lines] == [0.0, 0.0, 1.0, 1.0]


def plant_inf(monkeypatch, from_step: int) -> None:
    """A planted defect: every gradient from an optimiser step on is infinite."""
    real, steps = clipped.backward_minibatch, []

    def infinite(session, minibatch):
        found = real(session, minibatch)
        steps.append(1)
        if len(steps) > from_step:
            session.roles.parameters("policy")[0].grad.fill_(float("inf"))
        return found

    monkeypatch.setattr(clipped, "backward_minibatch", infinite)


def test_gradients_that_are_not_finite(run, monkeypatch, tmp_path):
    """Four steps an update: the second has one bad step, which is said; the third makes it five in a row and stops."""
    plant_inf(monkeypatch, 7)
    ended, lines = run("vowels")
    stopped(ended, "nan", 3)
    assert "warning: update 2: nan: non-finite gradients skipped: 1 in this update, 1 in a row" in ended.stderr
    assert lines[1]["nonfinite_steps"] == 1.0 and lines[1]["alarm_nan"] == 1.0
    assert "step-000002" in os.listdir(tmp_path / "x" / "state")


@pytest.mark.full
def test_gradients_that_are_not_finite_can_be_put_up_with(run, monkeypatch):
    plant_inf(monkeypatch, 7)
    ended, lines = run("vowels", "--stop-on", "kl")
    assert "5 in a row" not in warned(ended, "nan")  # it is said when it begins
    assert [line["nonfinite_in_a_row"] for line in lines] == [0, 1, 5, 9]


@pytest.mark.full
def test_a_reward_whose_scale_drifts_away(run):
    ended, _ = run("drift", "--max-steps", 9)
    assert "the mean score moved from" in warned(ended, "reward-range")


@pytest.mark.full
@pytest.mark.parametrize(
    "more",
    [(), ("--dtype", "bfloat16"), GROUPS],
)
def test_a_run_that_is_well_says_nothing(run, tmp_path, more):
    ended, lines = run("vowels", *more, "--temperature", 1, "--max-steps", 12, "--learning-rate", "1e-3")
    assert ended.code == 0 and "warning" not in ended.stderr and "alarms" not in ended.stdout
    assert all(line["alarms"] == 0 and not any(k.startswith("alarm_") for k in line) for line in lines)
    assert manifest(tmp_path / "x")["metrics"]["alarms"] == []


# --- stopping, and going on


@pytest.mark.full
def test_a_run_that_stopped_goes_on_to_the_same_bits(run, tmp_path):
    """It stops at its second update, and again when repeated as it was; told not to, it ends as if it never had."""
    whole, expected = run("vowels", *FAR, "--stop-on", "none", folder="whole")
    assert whole.code == 0 and "warning: update 2: kl: " in whole.stderr
    said = stopped(run("vowels", *FAR)[0], "kl", 2)
    assert f"the state before this update (step 1) is saved in {tmp_path / 'x'}" in said
    assert said.rstrip().endswith("with --stop-on nan")
    again = run("vowels", *FAR)[0]
    assert stopped(again, "kl", 2) == said and "resuming after step 1 of 4" in again.stderr
    ended, lines = run("vowels", *FAR, "--stop-on", "nan")
    assert ended.code == 0 and "resuming after step 1 of 4" in ended.stderr, ended.stderr
    assert_same_weights(tmp_path / "x", tmp_path / "whole")
    assert without_times(tmp_path / "x" / "metrics.jsonl") == without_times(tmp_path / "whole" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and len(lines) == len(expected)
    assert manifest(tmp_path / "x")["metrics"] == manifest(tmp_path / "whole")["metrics"]


@pytest.mark.full
def test_a_run_that_stops_in_its_first_update_goes_on_from_the_start(run, monkeypatch, tmp_path):
    """Eight steps an update, all of them bad; once the fault is mended the run is the one that never had it."""
    run("vowels", "--minibatches", 2, folder="whole")
    with monkeypatch.context() as patch:
        plant_inf(patch, 0)
        said = stopped(run("vowels", "--minibatches", 2)[0], "nan", 1)
    assert "the state before this update (step 0) is saved in" in said
    assert os.listdir(tmp_path / "x" / "state") == ["step-000000"]
    ended, _ = run("vowels", "--minibatches", 2)
    assert ended.code == 0 and "resuming after step 0 of 4" in ended.stderr
    assert_same_weights(tmp_path / "x", tmp_path / "whole")
    assert without_times(tmp_path / "x" / "metrics.jsonl") == without_times(tmp_path / "whole" / "metrics.jsonl")


@pytest.mark.full
def test_a_resumed_run_does_not_repeat_what_was_said(run):
    """The KL is warned of at update 2; the groups die later and stop the run; once resumed the KL is old news."""
    more = (*COLLAPSE, *GROUPS, "--batch-size", 16, "--max-steps", 16)
    ended, lines = run("same", *more, "--stop-on", "entropy")
    assert "warning: update 2: kl: " in ended.stderr and lines[-1]["alarm_kl"] == 1.0
    stopped(ended, "entropy", len(lines) + 1)
    again, lines = run("same", *more, "--stop-on", "none")
    assert again.code == 0 and ": kl: " not in again.stderr and "entropy: the entropy fell" in again.stderr
    assert len(lines) == 16


def test_alarms_are_part_of_the_result(run, tmp_path):
    ended, _ = run("flat", *GROUPS, "--json")
    assert ended.json["alarms"] == {"dead-groups": [3, 4]}
    assert ended.json["metrics"]["alarms"] == ["dead-groups"] == manifest(tmp_path / "x")["metrics"]["alarms"]


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ("nan,ratios", "--stop-on: `ratios` is not a choice\n  -> choose from kl, negative-kl"),
        ("entropi", "did you mean `entropy`?"),
        ("kl,none", "`none` cannot be combined with other conditions"),
    ],
)
def test_a_condition_that_is_none_is_refused(chain, tmp_path, value, what):
    line = ("ppo", "--model", chain().sft, "--reward", chain().reward, "--dataset", chain().prompts)
    assert what in refused(*line, "--output", Path(tmp_path / "x"), "--stop-on", value)
