"""Two ranks under torchrun (gloo, CPU) give what one gives, and stop in good order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import assert_same_weights, contents, done, lines_of, manifest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
RUN = (
    "--batch-size", 8, "--max-steps", 4, "--lora-rank", 4, "--learning-rate", "3e-3", "--eval-fraction", 0.2,
    "--eval-limit", 7, "--samples", 2, "--save-every", 2,
)  # fmt: skip
PPO = ("--max-response-tokens", 5, "--ppo-epochs", 2, "--minibatches", 2, "--target-approx-kl", "null")
LAUNCH = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def command(found, stage: str, output: Path) -> list[str]:
    inputs = {
        "sft": ("--model", found.base, "--dataset", found.demonstrations),
        "reward": ("--model", found.sft, "--dataset", found.comparisons),
        "ppo": ("--model", found.sft, "--reward", found.reward, "--dataset", found.prompts, *PPO),
    }
    return [str(word) for word in (stage, *inputs[stage], "--output", output, *RUN)]


def torchrun(program: list[str], line: list[str], **more: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}
    words = [sys.executable, *LAUNCH, *program, *line]
    return subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment)


@pytest.mark.parametrize(("stage", "within"), [("sft", 1e-5), ("reward", 1e-5), ("ppo", 1e-4)])
def test_two_ranks_end_with_the_weights_of_one(chain, tmp_path, stage, within):
    """Check 26 over whole runs, of PPO with two minibatches."""
    found = chain()
    done(*command(found, stage, tmp_path / "one"))
    ended = torchrun(["-m", "rlhf_cli"], command(found, stage, tmp_path / "two"))
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count(f"wrote {tmp_path / 'two'}") == 1  # one rank speaks
    assert contents(tmp_path / "one").keys() == contents(tmp_path / "two").keys()
    assert_same_weights(tmp_path / "one", tmp_path / "two", within=within)
    one, two = (lines_of(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for name in ("loss", "grad_norm", "tokens", "lr"):
        assert two[1][name] == pytest.approx(one[1][name], rel=1e-4, abs=1e-6)
    for name, value in manifest(tmp_path / "one")["metrics"].items():
        expected = pytest.approx(value, rel=1e-2, abs=1e-3) if isinstance(value, (int, float)) else value
        assert manifest(tmp_path / "two")["metrics"][name] == expected


def test_ppo_on_two_ranks_finishes_and_every_rank_samples_its_share(chain, tmp_path):
    ended = torchrun(["-m", "rlhf_cli"], command(chain(), "ppo", tmp_path / "x"))
    assert ended.returncode == 0, ended.stderr
    lines = lines_of(tmp_path / "x" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert all(line["samples"] == 8 and line["duplicate_rate"] < 0.5 for line in lines[1:])
    assert all(abs(line["ratio_first"] - 1) < 1e-5 for line in lines[1:])


SIGNALLED = """
import os, sys
from stages.checkpoint.run import Run
from stages.training import loop

number, at = int(sys.argv[1]), int(sys.argv[2])
record = loop._record

def record_and_signal(run, report, ranks, step, metrics):
    record(run, report, ranks, step, metrics)
    if step == at and os.environ.get("ONLY", str(ranks.rank)) == str(ranks.rank):
        os.kill(os.getpid(), number)

loop._record = record_and_signal
sys.argv = ["rlhf", *sys.argv[3:]]
from rlhf_cli.main import app
app()
"""


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_both_ranks_stop_at_a_signal_and_go_on_to_the_same_bits(chain, tmp_path, stage):
    """As torchrun passes a SIGTERM on: the first rank saves its state, and none calls the other's leaving a defect."""
    line, whole = command(chain(), stage, tmp_path / "x"), command(chain(), stage, tmp_path / "whole")
    assert torchrun(["-m", "rlhf_cli"], whole).returncode == 0
    program = tmp_path / "signalled.py"
    program.write_text(SIGNALLED)
    ended = torchrun([str(program)], [str(int(signal.SIGTERM)), "3", *line])
    assert ended.returncode != 0 and ended.stdout == ""
    assert f"interrupted; state of step 3 saved in {tmp_path / 'x'}" in ended.stderr and "defect" not in ended.stderr
    again = torchrun(["-m", "rlhf_cli"], line)
    assert again.returncode == 0 and "resuming after step 3 of 4" in again.stderr, again.stderr
    assert_same_weights(tmp_path / "x", tmp_path / "whole")
    assert [line["step"] for line in lines_of(tmp_path / "x" / "metrics.jsonl")] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("only", ["0", "1"])
def test_a_signal_to_one_rank_stops_both(chain, tmp_path, only):
    line, whole = command(chain(), "ppo", tmp_path / "x"), command(chain(), "ppo", tmp_path / "whole")
    assert torchrun(["-m", "rlhf_cli"], whole).returncode == 0
    program = tmp_path / "signalled.py"
    program.write_text(SIGNALLED)
    ended = torchrun([str(program)], [str(int(signal.SIGTERM)), "3", *line], ONLY=only)
    assert ended.returncode != 0 and ended.stderr.count("interrupted; state of step 3 saved") == 1, ended.stderr
    assert "defect" not in ended.stderr
    again = torchrun(["-m", "rlhf_cli"], line)
    assert again.returncode == 0 and "resuming after step 3 of 4" in again.stderr, again.stderr
    assert_same_weights(tmp_path / "x", tmp_path / "whole")


FAILING = """
import os
calls = []
def score(prompts, responses):
    calls.append(1)
    assert os.environ["RANK"] != "1" or len(calls) < 5, "the judge is away"
    return [float(len(r)) for r in responses]
"""


def test_a_reward_function_that_fails_on_one_rank_ends_both_with_its_message(chain, tmp_path):
    """The fifth call is that of the third update: its state is saved, and the function may be changed meanwhile."""
    path = tmp_path / "judge.py"
    path.write_text(FAILING)
    line = ["ppo", "--model", str(chain().sft), "--reward", str(path), "--dataset", str(chain().prompts)]
    line += ["--output", str(tmp_path / "x"), *map(str, (*RUN, *PPO))]
    ended = torchrun(["-m", "rlhf_cli"], line)
    assert ended.returncode != 0 and "defect" not in ended.stderr
    assert ended.stderr.count("the judge is away") == 1, ended.stderr
    assert f"error: rank 1: --reward {path}: it raised AssertionError: the judge is away" in ended.stderr
    assert f"state of step 2 saved in {tmp_path / 'x'}" in ended.stderr
    path.write_text(FAILING.replace("assert", "calls or"))
    again = torchrun(["-m", "rlhf_cli"], line)
    assert again.returncode == 0 and "resuming after step 2 of 4" in again.stderr, again.stderr


def test_a_rank_that_dies_ends_the_other_in_words(chain, tmp_path):
    """Killed at step 3: the first saves what it has, and the same command goes on to the same bits."""
    line, whole = command(chain(), "ppo", tmp_path / "x"), command(chain(), "ppo", tmp_path / "whole")
    assert torchrun(["-m", "rlhf_cli"], whole).returncode == 0
    program = tmp_path / "killed.py"
    program.write_text(SIGNALLED)
    ended = torchrun([str(program)], [str(int(signal.SIGKILL)), "3", *line], ONLY="1")
    assert ended.returncode != 0 and "defect" not in ended.stderr, ended.stderr
    again = torchrun(["-m", "rlhf_cli"], line)
    assert again.returncode == 0 and "resuming after step " in again.stderr, again.stderr
    assert_same_weights(tmp_path / "x", tmp_path / "whole")


def test_a_disk_that_is_full_for_the_first_rank_ends_both(chain, tmp_path):
    program = tmp_path / "full.py"
    program.write_text(
        "import sys\nfrom stages.errors import OutputError\nfrom stages.checkpoint.run import Run\n"
        "def log(run, step, metrics):\n    if run.writer: raise OutputError('no space', where='x')\n"
        "Run.log = log\nfrom rlhf_cli.main import app\napp()\n"
    )
    ended = torchrun([str(program)], command(chain(), "sft", tmp_path / "x"))
    assert ended.returncode != 0 and ended.stderr.count("error: x: no space") == 1, ended.stderr
    assert "defect" not in ended.stderr


def test_both_ranks_stop_at_an_alarm_and_go_on_to_the_same_bits(chain, tmp_path):
    """The KL of all ranks together trips at the second update: one state is kept, and neither rank waits for ever."""
    (tmp_path / "vowels.py").write_text(
        "def score(prompts, responses):\n    return [r.count('a') for r in responses]\n"
    )
    line = ["ppo", "--model", chain().base, "--reward", tmp_path / "vowels.py", "--dataset", chain().prompts]
    line += ["--batch-size", 8, "--max-steps", 3, "--max-response-tokens", 12, "--temperature", 0.3, "--clip-range", 1]
    line += ["--learning-rate", 0.05, "--target-approx-kl", "null", "--eval-fraction", 0, "--missing-eos-penalty", 0]
    line = [*map(str, line), "--output"]
    whole = torchrun(["-m", "rlhf_cli"], [*line, str(tmp_path / "whole"), "--stop-on", "none"])
    assert whole.returncode == 0 and whole.stderr.count(": kl: ") == 1, whole.stderr
    ended = torchrun(["-m", "rlhf_cli"], [*line, str(tmp_path / "x")])
    assert ended.returncode != 0 and ended.stdout == "" and "defect" not in ended.stderr
    assert ended.stderr.count("stopped at step 2: kl: ") == 1
    assert os.listdir(tmp_path / "x" / "state") == ["step-000001"]
    again = torchrun(["-m", "rlhf_cli"], [*line, str(tmp_path / "x"), "--stop-on", "none"])
    assert again.returncode == 0 and "resuming after step 1 of 3" in again.stderr, again.stderr
    assert_same_weights(tmp_path / "x", tmp_path / "whole")


def test_fewer_prompts_than_ranks_are_refused(chain, tmp_path):
    ended = torchrun(
        ["-m", "rlhf_cli"], [*command(chain(), "ppo", tmp_path / "x"), "--batch-size", "1", "--minibatches", "1"]
    )
    assert ended.returncode != 0
    assert "batch_size: 1 prompt per update is too few for 2 ranks" in ended.stderr
    assert not (tmp_path / "x").exists()
