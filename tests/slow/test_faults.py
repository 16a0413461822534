"""Kills, full disks and signals over every stage: a sample of what `benchmarks/faults.py` does at length."""

from __future__ import annotations

import pytest

from benchmarks import faults

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_nothing_is_lost_whatever_happens_to_a_run():
    said = []
    records = faults.campaign(faults.STAGES, 2 * len(faults.KINDS), seed=1, say=said.append)
    assert len(records) == 8 * len(faults.KINDS)
    assert not [record for record in records if record["lost"]], "\n".join(said)
    kills = [record for record in records if record["kind"] == "killed before a write"]
    assert {record["code"] for record in kills} == {-9}  # the fault did come


def test_a_loss_would_be_seen(tmp_path):
    """The comparison itself: a run whose metrics lack a step is not the undisturbed one."""
    from tests.commands import lines_of

    data = tmp_path
    faults.prepare(data)
    assert faults.run(faults.command(data, "sft", data / "a")) == 0
    assert faults.run(faults.command(data, "sft", data / "b")) == 0
    assert faults.lost(data / "b", data / "a") == ""
    metrics = data / "b" / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(lines[:-1]))
    assert len(lines_of(metrics)) == 5
    assert faults.lost(data / "b", data / "a") == "a step is missing or stands twice"
