"""stages/models/candidates.py: checkpoints and resume states by name, checked without a model."""

from __future__ import annotations

import json
import shutil

import pytest

from stages.checkpoint.states import ResumeState, states_in, write_state
from stages.errors import CheckpointError
from stages.models.candidates import labels_of, open_candidates
from tests.commands import SMALL, rlhf

POLICIES = ("sft", "ppo", "dpo")


@pytest.fixture(scope="module")
def stopped(chain, tmp_path_factory):
    """An SFT run stopped by a signal after its second step of three."""
    import signal

    from stages.checkpoint.run import Run

    place, found, log = tmp_path_factory.mktemp("stopped") / "x", chain(), Run.log

    def log_and_signal(run, step, metrics):
        log(run, step, metrics)
        if step == 2:
            signal.raise_signal(signal.SIGTERM)

    line = ("sft", "--model", found.base, "--dataset", found.demonstrations, "--output", place, *SMALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "log", log_and_signal)
        assert rlhf(*line, "--save-every", 1, "--lora-targets", "q_proj").code == 143
    return place


@pytest.fixture
def mine(stopped, tmp_path):
    """A copy of it to spoil."""
    return shutil.copytree(stopped, tmp_path / "x")


def opened(place, stages=POLICIES):
    return open_candidates(str(place), stages, "--also")


def said(place, stages=POLICIES) -> str:
    with pytest.raises(CheckpointError) as caught:
        opened(place, stages)
    assert caught.value.fix
    return str(caught.value)


def test_a_state_knows_its_run(stopped, chain):
    (one,) = opened(stopped / "state" / "step-000001")
    assert (one.stage, one.step, one.label, one.is_unfinished) == ("sft", 1, "x step 1", True)
    assert one.ref.base == chain().base and one.knobs["lora_targets"] == ["q_proj"] and one.knobs["lora_rank"] == 4
    assert [c.step for c in opened(stopped / "state")] == [1, 2]


def test_its_policy_has_the_runs_shape(stopped, open_tiny):
    """Fresh adapters of rank 4 on the two layers' q_proj: B was zero before the first step."""
    import torch

    from stages.checkpoint.states import read_state
    from stages.models.roles import candidate_adapter

    adapters = [candidate_adapter(open_tiny(), one) for one in opened(stopped / "state")]
    for adapter, place in zip(adapters, states_in(stopped / "state"), strict=True):
        assert adapter.config.r == 4 and [path.rpartition(".")[2] for path in adapter.paths] == ["q_proj"] * 2
        flat = torch.cat([p.flatten() for p in adapter.parameters()])
        assert torch.equal(flat, read_state(place).tensors["policy.weights"])
        assert all(float(p.abs().max()) > 0 for p in adapter.parameters())


def test_a_state_of_another_shape_is_refused(mine, open_tiny):
    from stages.models.roles import candidate_adapter

    record = json.loads((mine / "run.json").read_text())
    record["config"]["lora_rank"] = 5
    (mine / "run.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="no policy of this run's shape"):
        candidate_adapter(open_tiny(), opened(mine / "state" / "step-000001")[0])


def test_weights_that_are_ahead_of_their_logs_are_a_step_later(mine):
    run = json.loads((mine / "run.json").read_text())["id"]
    write_state(mine / "state" / "step-000005", run, ResumeState(5, {}, {"ahead": {"loss": 1.0}}, {}))
    assert opened(mine / "state")[-1].step == 6


def test_what_is_wrong_with_a_state_is_said(mine):
    assert "`sft` run" in said(mine / "state", ("reward",))
    record = (mine / "run.json").read_text()
    write_state(mine / "state" / "step-000003", "somebody", ResumeState(3, {}, {}, {}))
    assert "saved by an earlier run" in said(mine / "state" / "step-000003")
    (mine / "run.json").write_text(record.replace('"model": "', '"model": "x', 1))
    with pytest.raises(Exception, match="does not exist"):
        opened(mine / "state" / "step-000001")
    changed = json.loads(record)
    changed["inputs"]["model"] = "0" * 64
    (mine / "run.json").write_text(json.dumps(changed))
    assert "has changed since" in said(mine / "state" / "step-000001")
    (mine / "run.json").write_text("{}")
    assert "neither checkpoint.json nor a sound run.json" in said(mine / "state" / "step-000001")
    (mine / "state" / "step-000001" / "state.json").write_text("[]")
    assert "state.json is not what was saved" in said(mine / "state" / "step-000001")


def test_a_folder_without_states_and_a_run_that_is_not_done(mine, tmp_path):
    (tmp_path / "state").mkdir()
    assert "holds no state" in said(tmp_path / "state") and "--keep-states" in said(tmp_path / "state")
    assert "is an unfinished run" in said(mine) and f"{mine}/state" in said(mine)


def test_labels_are_short_where_they_may_be(chain, stopped, mine):
    found = chain()
    both = [*opened(found.sft), *opened(found.ppo), *opened(stopped / "state" / "step-000001")]
    assert labels_of(both) == ["sft", "ppo", "x step 1"]
    twice = [*both, *opened(mine / "state" / "step-000001")]
    names = [str(place / "state" / "step-000001") for place in (stopped, mine)]
    assert labels_of(twice) == ["sft", "ppo", *names]
