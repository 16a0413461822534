"""Whole commands around reward functions that do what they please: where results go, how runs end and go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.commands import assert_same_weights, done, refused, write_data
from tests.marks import full

ROOT = Path(__file__).resolve().parents[1]
PPO = ("--dataset", "prompts.jsonl", "--batch-size", 4, "--max-steps", 2, "--lora-rank", 2, "--samples", 0)
PPO += ("--eval-fraction", 0, "--max-response-tokens", 4)
PLAIN = "def score(prompts, responses): return [float(len(r)) for r in responses]\n"


@pytest.fixture
def place(tmp_path, model_folder, monkeypatch):
    """A working directory with data and a base, all named by relative paths."""
    write_data(tmp_path)
    (tmp_path / "base").symlink_to(model_folder())
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "plain.py").write_text(PLAIN)
    monkeypatch.chdir(tmp_path)
    return tmp_path


WANDERS = {
    "in its calls": (
        "import os\ndef score(prompts, responses):\n    os.chdir('elsewhere')\n    return plain(responses)\n"
    ),
    "when imported": "import os\nos.chdir('elsewhere')\ndef score(prompts, responses): return plain(responses)\n",
    "to nowhere": (
        "import os\ndef score(prompts, responses):\n"
        "    os.mkdir('gone'); os.chdir('gone'); os.rmdir('../gone')\n    return plain(responses)\n"
    ),
}


@pytest.mark.full
@pytest.mark.parametrize("when", WANDERS)
def test_results_are_where_they_were_asked_for_whatever_directory_a_function_chooses(when, place):
    (place / "wanders.py").write_text(
        WANDERS[when] + "def plain(responses): return [float(len(r)) for r in responses]\n"
    )
    command = ("ppo", "--model", "base", "--reward", "wanders.py", *PPO, "--output", "out")
    assert "wrote out\n" in done(*command).stdout
    assert (place / "out" / "checkpoint.json").is_file() and not list((place / "elsewhere").iterdir())
    assert "already done: out\n" in done(*command).stdout
    done("ppo", "--model", "base", "--reward", "plain.py", *PPO, "--output", "straight")
    assert_same_weights(place / "out", place / "straight")
    knobs = [json.loads((place / name / "checkpoint.json").read_text())["config"] for name in ("out", "straight")]
    assert knobs[0] == knobs[1] | {"output": "out", "reward": ["wanders.py"]}


@pytest.mark.full
def test_reports_and_pictures_too(place):
    (place / "wanders.py").write_text(
        WANDERS["in its calls"].replace("plain(", "list(map(len, ").replace("s)\n", "s))\n")
    )
    flags = ("--reward", "wanders.py", "--gold", "wanders.py", "--best-of", "1,2", "--limit-rows", 4)
    done(
        "evaluate", "--model", "base", "--dataset", "prompts.jsonl", *flags, "--max-response-tokens", 4,
        "--output", "report.json", "--plot", "curve.svg",
    )  # fmt: skip
    assert (place / "report.json").is_file() and (place / "curve.svg").is_file()
    assert not list((place / "elsewhere").iterdir())


@pytest.mark.full
def test_a_home_in_a_recipe_is_found_again(place, monkeypatch):
    """The base of a checkpoint is kept by its path, and `~` is none."""
    monkeypatch.setenv("HOME", str(place))
    done("ppo", "--model", "~/base", "--reward", "plain.py", *PPO, "--output", "~/out")
    stored = json.loads((place / "out" / "checkpoint.json").read_text())
    assert stored["base"]["path"] == os.path.realpath(place / "base") and stored["config"]["output"] == "~/out"
    done("sample", "--model", "out", "--dataset", "prompts.jsonl", "--output", "s.jsonl", "--max-response-tokens", 2)


@pytest.mark.full
def test_a_function_that_spoils_rows_and_settings_changes_nothing(place):
    (place / "spoils.py").write_text(
        "import torch, os, random\n"
        "torch.set_default_dtype(torch.float64)\n"
        "def score(prompts, responses, **columns):\n"
        "    numbers = [float(len(r)) for r in responses]\n"
        "    torch.set_grad_enabled(False); torch.manual_seed(0); random.seed(0)\n"
        "    torch.set_default_dtype(torch.float64); torch.set_default_device('meta')\n"
        "    os.environ.clear(); prompts.clear(); responses.clear(); columns['answer'].clear()\n"
        "    return torch.tensor(numbers, device='cpu', dtype=torch.bfloat16, requires_grad=True)\n"
    )
    for name in ("spoils", "plain"):
        done("ppo", "--model", "base", "--reward", f"{name}.py", *PPO, "--output", name)
    assert_same_weights(place / "spoils", place / "plain")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("raise asyncio.CancelledError", "it raised CancelledError (odd.py:3) for the response"),
        *full(("raise KeyboardInterrupt", "it raised KeyboardInterrupt (odd.py:3) for the response")),
        ("raise Silent", "it raised Silent: (its text cannot be printed: TypeError) (odd.py:3) for the response"),
        *full(("return [Silent()] * len(responses)", "it returned ")),
    ],
)
def test_what_a_function_raises_is_one_message_and_the_state_stays(line, said, place):
    (place / "odd.py").write_text(
        f"import asyncio\ndef score(prompts, responses):\n    {line}\n"
        "class Silent(BaseException):\n    def __str__(self): return 1\n"
    )
    told = refused("ppo", "--model", "base", "--reward", "odd.py", *PPO, "--output", "out")
    assert f"error: --reward odd.py: {said}" in told


# --- ends of the process


def start(place, function, *more):
    """PPO in a process of its own, with a function that leaves the file `waits` once it waits."""
    (place / "waits.py").write_text(function)
    command = ("ppo", "--model", "base", "--reward", "waits.py", *PPO, "--output", "out", *more)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "rlhf_cli", *map(str, command)], cwd=place, env=environment, stderr=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)


def processes_of(session):
    """Processes of a session that have not ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        found += [stat.parent.name] if int(fields[3]) == session and fields[0] != "Z" else []
    return found


SECOND_UPDATE = (  # and as long as nobody says otherwise
    "import os\n"
    "def later():\n"
    "    if os.path.exists('calm') or not os.path.exists('out/metrics.jsonl'): return False\n"
    "    return len(open('out/metrics.jsonl').readlines()) > 1\n"
)
HANGS = {
    "a pool": (
        "import time, multiprocessing\n"
        "def work(text):\n    open('waits', 'w').close(); time.sleep(1000)\n"
        "def hang(responses):\n"
        "    with multiprocessing.get_context('fork').Pool(2) as pool: return pool.map(work, responses)\n"
    ),
    "a process of a worker": (
        "import subprocess, concurrent.futures, multiprocessing\n"
        "def work(text):\n    subprocess.run('touch waits; sleep 1000', shell=True)\n"
        "def hang(responses):\n"
        "    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context('fork')) as executor:\n"
        "        return list(executor.map(work, responses))\n"
    ),
    "C": (
        "import ctypes\n"
        "def hang(responses):\n"
        "    library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)\n"
        "    library.pthread_mutex_lock(mutex); open('waits', 'w').close(); library.pthread_mutex_lock(mutex)\n"
    ),
}
HANG_LATER = (
    "def score(prompts, responses):\n    if later(): hang(responses)\n    return [float(len(r)) for r in responses]\n"
)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("where", HANGS)
def test_a_signal_ends_the_command_and_all_that_it_started_with_the_state_saved(where, number, place):
    with start(place, SECOND_UPDATE + HANGS[where] + HANG_LATER) as process:
        wait_for(place / "waits", process)
        process.send_signal(number)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 128 + number and "Traceback" not in said
    assert processes_of(process.pid) == []
    assert (place / "out" / "state" / "step-000001").is_dir()
    (place / "calm").touch()
    command = ("ppo", "--model", "base", *PPO)
    assert "resuming after step 1 of 2" in done(*command, "--reward", "waits.py", "--output", "out").stderr
    done(*command, "--reward", "plain.py", "--output", "straight")
    assert_same_weights(place / "out", place / "straight")


@pytest.mark.slow
@pytest.mark.parametrize("where", HANGS)
def test_a_time_limit_ends_the_command_too(where, place):
    with start(place, SECOND_UPDATE + HANGS[where] + HANG_LATER, "--reward-timeout", 1) as process:
        _, said = process.communicate(timeout=60)
    assert process.returncode == 2 and said.count("error: --reward waits.py: it took longer than 1 seconds") == 1
    assert processes_of(process.pid) == []


@pytest.mark.slow
def test_a_killed_run_goes_on_though_its_workers_live(place):
    """A forked worker that held the folder's lock would keep the next command out."""
    function = SECOND_UPDATE + HANGS["a pool"] + HANG_LATER
    with start(place, function) as process:
        wait_for(place / "waits", process)
        process.kill()
        process.wait()
        (place / "calm").touch()
        try:
            done("ppo", "--model", "base", *PPO, "--reward", "waits.py", "--output", "out")
        finally:
            os.killpg(process.pid, signal.SIGKILL)
