"""The program's standard streams: stdout has the result alone, and no stream that is closed or full is a defect."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.marks import full

ROOT = Path(__file__).resolve().parents[1]
# The program with a stage that does what `work` does, and no torch.
STAGE = """
import sys, types
from stages.results import Result, Table
def run(config, inputs, report, *, dry_run):
    report.note("a note")
    work()
    return Result("sft", "done", "o", {{"loss": 1.5}}, (Table("held out", ("measure", "value"), (("loss", "1.5"),)),))
def work():
    import ctypes, os, subprocess, sys, threading
{work}
sys.modules["stages.inputs"] = types.SimpleNamespace(open_inputs=lambda *_, **__: "inputs")
sys.modules["stages.sft"] = types.SimpleNamespace(run=run)
sys.argv = ["rlhf", "sft", "--model", "m", "--dataset", "d", "--output", "o", *sys.argv[1:]]
from tests.marks import full
from rlhf_cli.main import app
app()
"""


def program(work, *arguments, streams=""):
    code = STAGE.format(work="\n".join(f"    {line}" for line in work.splitlines()))
    line = f'exec "$@" {streams}'
    return subprocess.run(
        ["sh", "-c", line, "sh", sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip


NOISE = {
    "print": "print('noise')",
    "original stdout": "sys.__stdout__.write('noise\\n')",
    "descriptor": "os.write(1, b'noise\\n')",
    "child": "subprocess.run(['echo', 'noise'])",
    "shell": "os.system('echo noise')",
    "C": "ctypes.CDLL(None).puts(b'noise')",
    "a new stream": "open(1, 'w', closefd=False).write('noise\\n')",
    "a fork": "pid = os.fork()\nif not pid: print('noise'); os.write(1, b'noise\\n'); os._exit(0)\nos.waitpid(pid, 0)",
    "a thread": (
        "def chatter():\n    print('noise', flush=True)\n    while True: print('noise'); os.write(1, b'noise\\n')\n"
        "threading.Thread(target=chatter, daemon=True).start()"
    ),
}


@pytest.mark.parametrize("noise", ["child", *full(*(name for name in NOISE if name != "child"))])
def test_stdout_has_the_result_alone(noise):
    ended = program(NOISE[noise], "--json")
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["loss"] == 1.5 and "noise" in ended.stderr and "a note" in ended.stderr
    table = program(NOISE[noise]).stdout
    assert table == "held out\nmeasure  value\nloss       1.5\n\nwrote o\n"


@pytest.mark.full
def test_a_function_may_close_stdout_and_stderr():
    ended = program("os.close(1)\nsys.stdout.close()", "--json")
    assert ended.returncode == 0 and json.loads(ended.stdout)["loss"] == 1.5


@pytest.mark.full
@pytest.mark.parametrize("how", ["2>/dev/full", *full("2>&-", "0<&-")])
def test_messages_that_cannot_be_written_stop_nothing(how):
    ended = program("print('noise'); print('noise', file=sys.stderr); sys.stderr.flush()", "--json", streams=how)
    assert ended.returncode == 0 and json.loads(ended.stdout)["loss"] == 1.5


@pytest.mark.parametrize("how", [">/dev/full", *full(">&-")])
def test_a_result_that_cannot_be_written_is_told(how):
    ended = program("print('noise')", streams=how)
    assert ended.returncode == 2 and ended.stdout == ""
    assert "error: the work is done, but its result cannot be printed: " in ended.stderr and "Trace" not in ended.stderr


@pytest.mark.parametrize("how", [">/dev/full 2>/dev/full", *full(">&- 2>&-", "0<&- >&- 2>&-")])
def test_nowhere_to_write_is_no_defect(how):
    assert program("print('noise')", streams=how).returncode == 2


@pytest.mark.full
def test_files_never_take_the_number_of_a_closed_stream(tmp_path):
    """What libraries write to stderr would else end up in them."""
    path = tmp_path / "weights"
    work = (
        f"file = open({str(path)!r}, 'wb', buffering=0); file.write(b'mine')\nos.system('echo noise; echo noise >&2')"
    )
    program(work, streams="0<&- >&- 2>&-")
    assert path.read_bytes() == b"mine"


@pytest.mark.full
@pytest.mark.parametrize("arguments", [("--help",), ("--version",), ("sft", "--help"), ("sft", "--help-all"), ()])
def test_answers_that_cannot_be_printed(arguments):
    def rlhf(streams):
        line = [sys.executable, "-m", "rlhf_cli", *arguments]
        return subprocess.run(["sh", "-c", f'"$@" {streams}', "sh", *line], cwd=ROOT, capture_output=True, text=True)

    full = rlhf(">/dev/full")
    assert full.returncode == 2 and full.stderr.startswith("error: the answer cannot be printed: No space left")
    assert "Traceback" not in full.stderr and "Traceback" not in rlhf(">&-").stderr
    assert rlhf("2>&-").returncode == 0


@pytest.mark.full
def test_an_answer_that_nobody_reads_is_no_failure():
    command = [sys.executable, "-m", "rlhf_cli", "sft", "--help"]
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (0, b"")


def test_workers_that_are_left_do_not_keep_a_reader_waiting():
    work = (
        "import multiprocessing, time\n"
        "worker = multiprocessing.get_context('fork').Process(target=time.sleep, args=(1000,))\n"
        "worker.start()\n"
        "import stages.training.children"
    )
    ended = program(work, "--json")
    assert ended.returncode == 0 and json.loads(ended.stdout)["loss"] == 1.5
