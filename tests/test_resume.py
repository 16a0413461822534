"""Interrupting, killing, repeating and replacing runs: what comes out is an uninterrupted run's result, to the bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from stages.training.signals import Signals
from tests.commands import (
    assert_same_weights,
    contents,
    done,
    lines_of,
    manifest,
    refused,
    result,
    rlhf,
    weights,
    without_times,
)
from tests.marks import full, full_but

STAGES = ("sft", "reward", "ppo", "dpo")
RUN = (
    "--batch-size", 8, "--max-steps", 5, "--lora-rank", 4, "--samples", 2, "--eval-fraction", 0.2, "--eval-limit", 6,
    "--eval-every", 2, "--save-every", 2, "--micro-batch-size", 3, "--learning-rate", "1e-2", "--warmup-ratio", 0.2,
    "--limit-rows", 40,
)  # fmt: skip
PPO = ("--max-response-tokens", 4, "--ppo-epochs", 2, "--minibatches", 2, "--kl-target", 0.1, "--kl-horizon", 20)
MORE = {
    "sft": (),
    "reward": ("--centre-coef", 0.01),
    "dpo": (),
    "ppo": (*PPO, "--normalise-scores"),
}
ROOT = Path(__file__).resolve().parents[1]

# The real program, which sends itself a signal once the line of a step stands in metrics.jsonl.
INTERRUPTED = """
import os, sys
from stages.checkpoint.run import Run

number, at, log = int(sys.argv[1]), int(sys.argv[2]), Run.log

def log_and_signal(run, step, metrics):
    log(run, step, metrics)
    if step == at:
        os.kill(os.getpid(), number)

Run.log = log_and_signal
sys.argv = ["rlhf", *sys.argv[3:]]
from rlhf_cli.main import app
app()
"""


def command(found, stage: str, output: Path, *more: object) -> tuple:
    """The command line of a stage on the shared chain's data."""
    inputs = {
        "sft": ("--model", found.base, "--dataset", found.demonstrations),
        "reward": ("--model", found.sft, "--dataset", found.comparisons),
        "dpo": ("--model", found.sft, "--dataset", found.comparisons),
        "ppo": ("--model", found.sft, "--reward", found.reward, "--dataset", found.prompts),
    }
    return (stage, *inputs[stage], "--output", output, *RUN, *MORE[stage], *more)


def in_a_process(number: int, at: int, *arguments: object) -> subprocess.CompletedProcess:
    """Run a command line in a process that gets a signal after a step."""
    words = [sys.executable, "-c", INTERRUPTED, str(int(number)), str(at), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, capture_output=True, text=True, env=environment, cwd=ROOT)


@pytest.fixture(scope="module")
def whole(chain, tmp_path_factory):
    """`whole("sft")`: the folder of an uninterrupted run."""
    made: dict[str, Path] = {}

    def get(stage: str) -> Path:
        if stage not in made:
            made[stage] = tmp_path_factory.mktemp("whole") / stage
            done(*command(chain(), stage, made[stage]))
        return made[stage]

    return get


def assert_the_same_run(folder: Path, other: Path) -> None:
    """Weights, metrics and samples of two finished runs are the same, each step stands once, nothing is left over."""
    assert contents(folder).keys() == contents(other).keys()
    assert_same_weights(folder, other)
    assert [line["step"] for line in lines_of(folder / "metrics.jsonl")] == [0, 1, 2, 3, 4, 5]
    assert without_times(folder / "metrics.jsonl") == without_times(other / "metrics.jsonl")
    for name in ("samples.jsonl", "report.json"):
        if (other / name).exists():
            assert (folder / name).read_bytes() == (other / name).read_bytes()
    mine, theirs = manifest(folder), manifest(other)
    assert mine["metrics"] == theirs["metrics"] and mine["steps"] == theirs["steps"] == 5


# --- interrupted -----------------------------------------------------------------------------------------------------


class Checks:
    """Stands in for `Signals.check`: counts its calls and lets SIGTERM come before the `at`-th of them."""

    def __init__(self, at: int):
        self.at, self.calls = at, 0

    def before(self, check):
        """`check`, counted."""

        def counted(signals) -> None:
            self.count()
            check(signals)

        return counted

    def count(self) -> None:
        if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:  # while a run listens
            self.calls += 1
            if self.calls == self.at:
                signal.raise_signal(signal.SIGTERM)


def interrupted(monkeypatch, at: int, *arguments: object):
    """Run a command in this process with a signal before the `at`-th forward pass; how it ended, and the passes."""
    checks = Checks(at)
    with monkeypatch.context() as patch:
        patch.setattr(Signals, "check", checks.before(Signals.check))
        return rlhf(*arguments), checks.calls


def interrupt_and_go_on(monkeypatch, found, stage: str, folder: Path, at: int) -> bool:
    """Interrupt a run before a forward pass and repeat its command; False where it has no such pass."""
    line = command(found, stage, folder)
    ended, _ = interrupted(monkeypatch, at, *line)
    if ended.code == 0:
        return False
    assert ended.code == 143 and ended.stdout == "", ended.stderr
    assert f"in {folder}; run the same command again to resume" in ended.stderr
    states = sorted((folder / "state").glob("step-*"))
    said = f"state of step {int(states[-1].name[5:])} saved" if states else "nothing saved yet"
    assert f"interrupted; {said} in {folder}" in ended.stderr
    assert not (folder / "checkpoint.json").exists() and (folder / "run.json").exists()
    done(*line)
    return True


@pytest.mark.parametrize("stage", full_but(("ppo",), STAGES))
@pytest.mark.parametrize("share", [0.6, *full(0.3, 0.98)])
def test_an_interrupted_run_goes_on_to_the_same_bits(chain, whole, tmp_path, monkeypatch, stage, share):
    """Check 53, with the signal in rollouts, updates and evaluations."""
    _, passes = interrupted(monkeypatch, 10**9, *command(chain(), stage, tmp_path / "counted"))
    assert interrupt_and_go_on(monkeypatch, chain(), stage, tmp_path / "x", max(1, round(share * passes)))
    assert_the_same_run(tmp_path / "x", whole(stage))


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "stride"), [("sft", 7), ("reward", 1), ("ppo", 3)])
def test_wherever_it_is_interrupted_it_goes_on_to_the_same_bits(chain, whole, tmp_path, monkeypatch, stage, stride):
    """Check 53 at every forward pass of a run, or, where most of them sample a token, at every so manieth."""
    at = 1
    while interrupt_and_go_on(monkeypatch, chain(), stage, tmp_path / str(at), at):
        assert_the_same_run(tmp_path / str(at), whole(stage))
        at += stride
    assert at > 25 * stride


@pytest.mark.full
def test_a_run_that_is_interrupted_again_and_again_gets_there(chain, whole, tmp_path, monkeypatch):
    line = command(chain(), "ppo", tmp_path / "x")
    codes = []
    for at in (30, 9, 9, 25):
        ended, _ = interrupted(monkeypatch, at, *line)
        codes.append(ended.code)
    done(*line)
    assert codes == [143] * 4
    assert_the_same_run(tmp_path / "x", whole("ppo"))


@pytest.mark.full
@pytest.mark.parametrize(
    ("stage", "number", "code"),
    [
        ("sft", signal.SIGTERM, 143),
        *full(("ppo", signal.SIGINT, 130)),
        pytest.param("reward", signal.SIGTERM, 143, marks=pytest.mark.slow),
        pytest.param("sft", signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param("ppo", signal.SIGTERM, 143, marks=pytest.mark.slow),
    ],
)
def test_a_signal_from_outside(chain, whole, tmp_path, stage, number, code):
    line = command(chain(), stage, tmp_path / "x")
    ended = in_a_process(number, 3, *line)
    assert (ended.returncode, ended.stdout) == (code, ""), ended.stderr
    last = f"interrupted; state of step 3 saved in {tmp_path / 'x'}; run the same command again to resume"
    assert ended.stderr.splitlines()[-1] == last and "Traceback" not in ended.stderr
    assert sorted(os.listdir(tmp_path / "x" / "state")) == ["step-000002", "step-000003"]
    went_on = done(*line)
    assert "resuming after step 3 of 5" in went_on.stderr
    assert_the_same_run(tmp_path / "x", whole(stage))


@pytest.mark.full
@pytest.mark.parametrize(
    "stage", ["reward", pytest.param("sft", marks=pytest.mark.slow), pytest.param("ppo", marks=pytest.mark.slow)]
)
def test_a_killed_run_goes_on_from_its_last_state(chain, whole, tmp_path, stage):
    line = command(chain(), stage, tmp_path / "x")
    ended = in_a_process(signal.SIGKILL, 3, *line)
    assert ended.returncode == -signal.SIGKILL
    assert [line["step"] for line in lines_of(tmp_path / "x" / "metrics.jsonl")] == [0, 1, 2, 3]
    assert "resuming after step 2 of 5" in done(*line).stderr
    assert_the_same_run(tmp_path / "x", whole(stage))


@pytest.mark.full
def test_a_second_signal_saves_nothing_that_is_half_done(chain, whole, tmp_path, monkeypatch):
    """It comes when the weights are one step ahead of the log: what was saved before is what the run goes on from."""
    from stages.training.optimizer import AdamW

    line, step = command(chain(), "sft", tmp_path / "x"), AdamW.step

    def step_and_signal_twice(optimizer, rate):
        step(optimizer, rate)
        if optimizer.updates == 4:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(AdamW, "step", step_and_signal_twice)
        ended = rlhf(*line)
    assert ended.code == 143 and "state of step 2 saved" in ended.stderr
    assert os.listdir(tmp_path / "x" / "state") == ["step-000002"]
    assert "resuming after step 2 of 5" in done(*line).stderr
    assert_the_same_run(tmp_path / "x", whole("sft"))


@pytest.mark.full
def test_a_reward_function_that_fails_once_costs_nothing(chain, tmp_path):
    """The state before the update is saved, and the same command goes on from it."""
    (tmp_path / "f.py").write_text(
        "from pathlib import Path\n"
        "calls, broken = [], Path(__file__).with_name('broken')\n"
        "def score(prompts, responses, answer):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 7 and broken.exists():\n"
        "        raise ConnectionError('the service is gone')\n"
        "    return [float(len(r)) + len(a) for r, a in zip(responses, answer)]\n"
    )
    base = ["ppo", "--model", chain().sft, "--reward", tmp_path / "f.py", "--dataset", chain().prompts, *RUN]
    line = [*base, *MORE["ppo"], "--output"]
    done(*line, tmp_path / "whole")
    (tmp_path / "broken").touch()
    message = refused(*line, tmp_path / "x")
    assert "it raised ConnectionError: the service is gone" in message and "f.py:6" in message
    assert f"state of step 3 saved in {tmp_path / 'x'}" in message
    (tmp_path / "broken").unlink()
    assert "resuming after step 3 of 5" in done(*line, tmp_path / "x").stderr
    assert_the_same_run(tmp_path / "x", tmp_path / "whole")


@pytest.mark.full
def test_a_reward_function_may_be_mended_while_the_run_stands(chain, tmp_path):
    """What is behind stays as it was scored; a finished run is another matter."""
    path, mended = tmp_path / "f.py", "def score(prompts, responses):\n    return [float(len(r)) for r in responses]\n"
    counting = "calls = []\ndef score(prompts, responses):\n    calls.append(1)\n"
    path.write_text(counting + "    assert len(calls) < 7, 'a bug'\n    return [float(len(r)) for r in responses]\n")
    line = ["ppo", "--model", chain().sft, "--reward", path, "--dataset", chain().prompts, *RUN, *MORE["ppo"]]
    assert "a bug" in refused(*line, "--output", tmp_path / "x")
    path.write_text(mended)
    ended = done(*line, "--output", tmp_path / "x")
    assert ended.stderr.count("changed since this run began") == 1 and "resuming after step 3 of 5" in ended.stderr
    done(*line, "--output", tmp_path / "whole")
    assert_the_same_run(tmp_path / "x", tmp_path / "whole")
    path.write_text(mended + "# another\n")
    assert f"content of reward {path}" in refused(*line, "--output", tmp_path / "x")


# --- again, otherwise, instead ---------------------------------------------------------------------------------------


def stamps(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}


@pytest.mark.parametrize("stage", full_but(("ppo",), STAGES))
@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
def test_a_finished_command_again_is_done(chain, whole, stage, overwrite):
    before = stamps(whole(stage))
    again = done(*command(chain(), stage, whole(stage), *overwrite))
    assert f"already done: {whole(stage)}\nnext: rlhf " in again.stdout
    assert stamps(whole(stage)) == before


@pytest.mark.parametrize(
    ("stage", "knob", "shown"),
    [
        *full(
            ("sft", ("--learning-rate", "2e-2"), "learning_rate: 0.01 -> 0.02"),
            ("sft", ("--seed", 1), "seed: 0 -> 1"),
            ("reward", ("--label-smoothing", 0.1), "label_smoothing: 0.0 -> 0.1"),
        ),
        ("ppo", ("--gamma", 0.9), "gamma: 1.0 -> 0.9"),
        ("ppo", ("--limit-rows", 39), "limit_rows: 40 -> 39"),
    ],
)
def test_another_choice_is_refused_by_name(chain, whole, stage, knob, shown):
    before = contents(whole(stage))
    message = refused(*command(chain(), stage, whole(stage)), *knob)
    assert f"{whole(stage)}: holds a run with different knobs or inputs:\n    {shown}\n" in message
    assert "--overwrite" in message
    assert contents(whole(stage)) == before


@pytest.mark.full
def test_another_dataset_of_the_same_name_is_refused(chain, tmp_path):
    data = tmp_path / "rows.jsonl"
    rows = chain().demonstrations.read_text().splitlines(keepends=True)
    data.write_text("".join(rows[:40]))
    line = ["sft", "--model", chain().base, "--dataset", data, "--output", tmp_path / "x", *RUN]
    done(*line)
    data.write_text("".join(rows[1:41]))
    assert "content of dataset: " in refused(*line)
    data.write_text("".join(rows[:40]))
    data.rename(tmp_path / "moved.jsonl")  # the same rows at another place are the same rows
    line[4] = tmp_path / "moved.jsonl"
    assert result(*line)["status"] == "already done"


@pytest.mark.parametrize("knob", [("--save-every", 1), ("--micro-batch-size", 2), ("--keep-state",)])
def test_a_choice_that_changes_no_result_is_no_other_choice(chain, whole, knob):
    assert result(*command(chain(), "sft", whole("sft"), *knob))["status"] == "already done"


@pytest.mark.full
def test_overwriting_replaces_a_run_of_other_choices(chain, whole, tmp_path):
    done(*command(chain(), "sft", tmp_path / "x", "--seed", 1))
    other = weights(tmp_path / "x")
    done(*command(chain(), "sft", tmp_path / "x", "--overwrite"))
    assert_the_same_run(tmp_path / "x", whole("sft"))
    mine = weights(tmp_path / "x")
    assert any((mine[name] != other[name]).any() for name in mine)
    done(*command(chain(), "reward", tmp_path / "x", "--overwrite"))  # even one of another stage
    assert_the_same_run(tmp_path / "x", whole("reward"))


@pytest.mark.full
def test_overwriting_an_unfinished_run_of_the_same_choices_goes_on(chain, whole, tmp_path, monkeypatch):
    line = command(chain(), "sft", tmp_path / "x", "--overwrite")
    ended, _ = interrupted(monkeypatch, 80, *line)
    assert ended.code == 143
    assert "resuming after step" in done(*line).stderr
    assert_the_same_run(tmp_path / "x", whole("sft"))


@pytest.mark.full
def test_overwriting_a_damaged_checkpoint_makes_it_again(chain, whole, tmp_path):
    line = command(chain(), "sft", tmp_path / "x")
    done(*line)
    (tmp_path / "x" / "adapter_model.safetensors").write_bytes(b"torn")
    assert "`adapter_model.safetensors` is damaged" in refused(*line)
    done(*line, "--overwrite")
    assert_the_same_run(tmp_path / "x", whole("sft"))


@pytest.mark.full
def test_a_run_never_overwrites_what_it_reads(chain, tmp_path):
    line = command(chain(), "sft", tmp_path / "x")
    done(*line)
    before = contents(tmp_path / "x")
    arguments = ["reward", "--model", tmp_path / "x", "--dataset", chain().comparisons, "--output", tmp_path / "x"]
    assert "`model` is inside the folder that --overwrite would clear" in refused(*arguments, *RUN, "--overwrite")
    assert contents(tmp_path / "x") == before


@pytest.mark.full
def test_keep_state_keeps_the_last_two(chain, tmp_path):
    done(*command(chain(), "sft", tmp_path / "x", "--keep-state"))
    assert sorted(os.listdir(tmp_path / "x" / "state")) == ["step-000004", "step-000005"]


def test_a_dry_run_writes_nothing_and_is_no_obstacle(chain, tmp_path):
    for stage in STAGES:
        plan = result(*command(chain(), stage, tmp_path / stage), "--dry-run")
        assert plan["status"] == "dry run" and plan["plan"]["steps"] == 5 and plan["memory_gb"]["total"] > 0
    assert os.listdir(tmp_path) == []


@pytest.mark.full
def test_a_second_process_is_kept_out(chain, tmp_path):
    """The lock of a living process: exit 2 for whoever comes second, and the first one is not disturbed."""
    line = command(chain(), "sft", tmp_path / "x")
    code = (
        "import sys; from stages.checkpoint.lock import take_lock\n"
        "handle = take_lock(sys.argv[1]); print('held', flush=True); sys.stdin.read()"
    )
    (tmp_path / "x").mkdir()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "x" / "run.lock")], **pipes) as child:
        assert child.stdout.readline() == "held\n"
        assert f"in use by process {child.pid} on " in refused(*line)
        child.stdin.close()
    assert json.loads((tmp_path / "x" / "run.lock").read_text())["pid"] == child.pid
    assert os.listdir(tmp_path / "x") == ["run.lock"]
    done(*line)


# --- going further than the run that was finished ---------------------------------------------------------------------

FLAT = ("--lr-schedule", "constant", "--warmup-ratio", 0)  # a learning rate that does not depend on the end


@pytest.mark.parametrize("stage", ["sft", *full("reward", "dpo", "ppo")])
def test_a_finished_run_goes_on_to_a_later_end(chain, tmp_path, stage):
    straight, longer = tmp_path / "straight", tmp_path / "longer"
    done(*command(chain(), stage, straight, *FLAT))
    done(*command(chain(), stage, longer, *FLAT, "--max-steps", 2, "--keep-state"))
    ended = done(*command(chain(), stage, longer, *FLAT))
    assert "resuming after step 2 of 5" in ended.stderr
    assert_the_same_run(longer, straight)


@pytest.mark.full
def test_a_run_that_goes_further_survives_a_kill(chain, tmp_path, monkeypatch):
    straight, longer = tmp_path / "straight", tmp_path / "longer"
    done(*command(chain(), "sft", straight, *FLAT))
    done(*command(chain(), "sft", longer, *FLAT, "--max-steps", 2, "--keep-state"))
    line = command(chain(), "sft", longer, *FLAT)
    ended = in_a_process(signal.SIGKILL, 4, *line)
    assert ended.returncode == -signal.SIGKILL
    assert not (longer / "checkpoint.json").exists()
    done(*line)
    assert_the_same_run(longer, straight)


@pytest.mark.parametrize("change", [("--max-steps", 4), ("--max-steps", 8, "--seed", 1)])
def test_an_earlier_end_or_another_choice_beside_it_is_refused(chain, whole, change):
    before = contents(whole("sft"))
    said = refused(*command(chain(), "sft", whole("sft"), *change))
    assert "max_steps: 5 -> " in said and "--overwrite" in said
    assert contents(whole("sft")) == before


@pytest.mark.full
@pytest.mark.parametrize("how", ["gone", "damaged"])
def test_a_later_end_without_a_sound_state_is_refused(chain, tmp_path, how):
    folder = tmp_path / "sft"
    done(*command(chain(), "sft", folder, "--max-steps", 2, "--keep-state"))
    tensors = folder / "state" / "step-000002" / "state.safetensors"
    if how == "gone":
        shutil.rmtree(folder / "state")
    else:
        tensors.write_bytes(tensors.read_bytes()[:-1] + b"x")
    before = contents(folder)
    said = refused(*command(chain(), "sft", folder))
    assert ("its state was not kept" in said) == (how == "gone") and "max_steps: 2 -> 5" in said
    assert contents(folder) == before


@pytest.mark.full
def test_an_interrupted_run_may_be_given_a_later_end(chain, tmp_path):
    straight, longer = tmp_path / "straight", tmp_path / "longer"
    done(*command(chain(), "sft", straight, *FLAT))
    ended = in_a_process(signal.SIGTERM, 2, *command(chain(), "sft", longer, *FLAT, "--max-steps", 4))
    assert ended.returncode == 143
    done(*command(chain(), "sft", longer, *FLAT))
    assert_the_same_run(longer, straight)


@pytest.mark.full
def test_a_run_whose_folder_was_moved_goes_on_there(chain, whole, tmp_path):
    ended = in_a_process(signal.SIGTERM, 3, *command(chain(), "ppo", tmp_path / "here"))
    assert ended.returncode == 143
    (tmp_path / "here").rename(tmp_path / "there")
    done(*command(chain(), "ppo", tmp_path / "there"))
    assert_the_same_run(tmp_path / "there", whole("ppo"))
