"""One folder has one name, however it is spelled; an output never lies where it would be read or removed."""

from __future__ import annotations

import os

import pytest

from stages.checkpoint.atomic import make_folder
from stages.checkpoint.lock import release_lock, take_lock
from tests.commands import SHORT, prompts, refused, result, rlhf
from tests.tiny import write_jsonl

SPELLINGS = ("o", "./o", "o/", "a/../o", "./a//..//o", "o/.", "link/o", "HERE/o", "there/../o")
STEP = ("--max-steps", 1, "--batch-size", 4, "--lora-rank", 2, "--limit-rows", 12, "--samples", 0)


def sft(found, output, *more):
    return ("sft", "--model", found.base, "--dataset", found.demonstrations, "--output", output, *STEP, *more)


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.full
def test_a_run_is_known_again_by_every_spelling(chain, here):
    found = chain()
    assert result(*sft(found, "a/../o"))["status"] == "done"
    assert sorted(os.listdir(here)) == ["link", "o", "there"] and (here / "o" / "checkpoint.json").is_file()
    sampled = ("--dataset", found.prompts, "--output", "x.jsonl", "--dry-run", *SHORT)
    for spelling in SPELLINGS:
        assert result("sample", "--model", spelling.replace("HERE", str(here)), *sampled)["status"] == "dry run"
        assert result(*sft(found, spelling.replace("HERE", str(here))))["status"] == "already done"


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_lock_holds_under_every_spelling(chain, here, spelling):
    make_folder(here / "o")
    held = take_lock(here / "o" / "run.lock")
    try:
        said = refused(*sft(chain(), spelling.replace("HERE", str(here))))
    finally:
        release_lock(held, here / "o" / "run.lock")
    assert f"{here / 'o'}: in use by process {os.getpid()}" in said


@pytest.mark.full
def test_a_reward_is_known_again_by_every_spelling(chain, here):
    found = chain()
    (here / "r").symlink_to(found.reward)
    (here / "f.py").write_text("def score(prompts, responses):\n    return [1.0] * len(responses)\n")
    line = ("ppo", "--model", found.sft, "--dataset", found.prompts, "--output", "o", *STEP, *SHORT, "--lora-rank", 4)
    rewards = [("r", "f.py:score=0.5"), ("./r/", "there/../f.py:score=0.5"), (found.reward, here / "f.py:score=0.5")]
    ended = [result(*line, "--reward", one, "--reward", other)["status"] for one, other in rewards]
    assert ended == ["done", "already done", "already done"]
    assert "holds a run with different knobs or inputs" in refused(*line, "--reward", "r", "--reward", "f.py:score=0.6")


@pytest.mark.parametrize(
    ("command", "name"), [("sample", "out.jsonl"), ("sample", "rows.jsonl"), ("evaluate", "x.json")]
)
@pytest.mark.parametrize("folder", ["data", "data/", "link/data"])
def test_no_result_is_written_among_the_rows(chain, here, command, name, folder):
    found = chain()
    (here / "data").mkdir()
    rows = [row | {"response": "", "index": 0, "ended": True, "tokens": 1} for row in prompts()]
    data = write_jsonl(here / "data" / "rows.jsonl", rows)
    before = data.read_bytes()
    line = (command, "--model", found.sft, "--dataset", folder, "--output", here / "data" / name, *SHORT)
    assert "is inside the dataset's folder" in refused(
        *line, *(("--reward", found.reward) if command == "evaluate" else ())
    )
    assert data.read_bytes() == before and os.listdir(here / "data") == ["rows.jsonl"]


def test_a_result_may_lie_beside_the_rows(chain, here):
    found = chain()
    write_jsonl(here / "rows.jsonl", prompts()[:2])
    assert result("sample", "--model", found.sft, "--dataset", "rows.jsonl", "--output", "a/../x.jsonl", *SHORT)
    assert (here / "x.jsonl").is_file() and not (here / "a").exists()


@pytest.mark.parametrize("inner", ["state/x", "critic", "critic/x/y", "state/step-000001/x"])
def test_no_run_lies_in_what_another_removes(chain, tmp_path, inner):
    found = chain()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    said = refused(*sft(found, tmp_path / "run" / inner))
    assert "of the run in" in said and "which that run removes" in said
    assert os.listdir(tmp_path / "run") == ["run.json"]


def test_a_run_may_lie_in_a_folder_of_that_name(chain, tmp_path):
    assert rlhf(*sft(chain(), tmp_path / "state" / "critic", "--dry-run")).code == 0
