"""The tables of a finished run, and the commands that follow it."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from stages.diagnostics.finished import finished_tables
from stages.results import next_commands
from tests.parts import ppo_config, reward_config

NUMBERS = {"eval_accuracy": 0.75, "verdict": "go"}


def run_of(folder, stage, metrics=NUMBERS):
    return SimpleNamespace(folder=folder, manifest=SimpleNamespace(stage=stage, metrics=metrics, steps=2))


@pytest.mark.parametrize("stage", ["reward", "dpo", "ppo"])
@pytest.mark.parametrize("report", [None, "{", "[]", "3", '{"pairs": 3}', '{"verdict": {"decision": "go", "old": 1}}'])
def test_a_run_of_another_version_shows_its_metrics(tmp_path, stage, report):
    if report is not None:
        (tmp_path / "report.json").write_text(report)
    (table,) = finished_tables(run_of(tmp_path, stage))
    assert (table.title, table.rows) == (stage, (("eval_accuracy", "0.75"),))


def test_ppo_shows_start_end_and_alarms_and_a_dash_for_what_is_no_number(tmp_path):
    lines = [{"step": 0}, {"step": 1, "alarm_kl": 1.0}, {"step": 2}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    metrics = {"eval_score_before": 0.25, "eval_score": None}
    measured, alarms = finished_tables(run_of(tmp_path, "ppo", metrics))
    assert measured.rows == (("score", "0.25", "-"),)
    assert alarms.rows[0][:4] == ("kl", "1 of 2", "1", "1")


def test_the_next_command_names_every_reward_source():
    evaluate, _ = next_commands("ppo", ppo_config(reward=["runs/a b=0.7", "f.py:g=0.3"]), {})
    assert "--reward 'runs/a b=0.7' --reward f.py:g=0.3 --dataset" in evaluate


def test_nothing_follows_a_reward_model_that_ppo_would_refuse():
    assert next_commands("reward", reward_config(), {"verdict": "no-go"}) == ()
    assert len(next_commands("reward", reward_config(), {"verdict": "caution"})) == 1
