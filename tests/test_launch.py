"""stages/launch.py and stages/places.py: what the environment says of this process, and where paths lead."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stages.errors import ConfigError, DeviceError, UserError
from stages.launch import MASTER, NUMBERS, Launch, check_launch, read_launch
from stages.measuring_config import STAGES
from stages.places import absolute
from stages.training.devices import pick_device
from tests.marks import full

MASTERED = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in (*NUMBERS, *MASTER):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def launched(monkeypatch, **variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, Launch(0, 1, 0)),
        ({"RANK": "", "WORLD_SIZE": "", "LOCAL_RANK": ""}, Launch(0, 1, 0)),
        ({"RANK": "0"}, Launch(0, 1, 0)),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, Launch(0, 1, 0)),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", **MASTERED}, Launch(3, 8, 1)),
        ({"RANK": "1", "WORLD_SIZE": "2", **MASTERED}, Launch(1, 2, 0)),  # a scheduler with a process per machine
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "4"}, Launch(0, 1, 0)),  # runs of their own, side by side
    ],
)
def test_ranks_are_those_of_the_environment(variables, expected, monkeypatch):
    launched(monkeypatch, **variables)
    assert read_launch() == expected
    check_launch()


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"RANK": "1"}, "RANK=1 in the environment, but WORLD_SIZE is not set"),
        ({"RANK": "abc"}, "RANK='abc' in the environment is not a whole number"),
        ({"RANK": "-1"}, "RANK='-1' in the environment is not a whole number"),
        ({"RANK": "1.0", "WORLD_SIZE": "2"}, "RANK='1.0' in the environment is not a whole number"),
        ({"RANK": "²", "WORLD_SIZE": "4"}, "RANK='²' in the environment is not a whole number"),
        ({"RANK": "2", "WORLD_SIZE": "2", **MASTERED}, "RANK=2 in the environment, but WORLD_SIZE=2"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two' in the environment is not a whole number"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0 in the environment"),
        ({"WORLD_SIZE": "2", **MASTERED}, "WORLD_SIZE=2 in the environment, but RANK is not set"),
        ({"LOCAL_RANK": "3"}, "LOCAL_RANK=3 in the environment, but WORLD_SIZE is not set"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "2"}, "LOCAL_RANK=2 in the environment, but WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "RANK=0, WORLD_SIZE=2 in the environment, but not MASTER_ADDR and"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "h"}, "but not MASTER_PORT"),
        ({"RANK": "0", "WORLD_SIZE": "2", **MASTERED, "MASTER_PORT": "x"}, "MASTER_PORT='x' in the environment"),
        ({"RANK": "0", "WORLD_SIZE": "2", **MASTERED, "MASTER_PORT": "70000"}, "MASTER_PORT='70000'"),
    ],
)
def test_an_environment_that_contradicts_itself_is_refused_by_name(variables, said, monkeypatch):
    launched(monkeypatch, **variables)
    with pytest.raises(ConfigError) as caught:
        check_launch()
    assert said in caught.value.what
    assert "unset RANK WORLD_SIZE LOCAL_RANK" in caught.value.fix


def test_a_rank_beyond_the_devices_of_its_machine_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    launched(monkeypatch, RANK="2", WORLD_SIZE="4", LOCAL_RANK="2", **MASTERED)
    for name in ("auto", "cuda"):
        with pytest.raises(DeviceError, match="LOCAL_RANK=2 in the environment, but the machine has 2 CUDA devices"):
            pick_device(name)
    assert pick_device("cpu").type == "cpu"


@pytest.mark.parametrize(
    "arguments", [("report", "x"), *full((("sft", "--model", "m", "--dataset", "d", "--output", "o"),))]
)
def test_a_lonely_rank_is_told_so_before_torch_loads(arguments):
    line = (
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, *_):\n"
        "        assert name not in ('torch', 'transformers'), name\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "from rlhf_cli.main import app\n"
        "app()\n"
    )
    environment = {**os.environ, "RANK": "1"}
    ended = subprocess.run([sys.executable, "-c", line, *arguments], env=environment, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: RANK=1 in the environment, but WORLD_SIZE is not set\n  -> unset RANK")


# --- places


def test_a_path_is_absolute_and_its_home_known(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert absolute("a/b", "--x") == tmp_path / "a" / "b"
    assert absolute("~/a", "--x") == Path("/home/me/a")
    assert absolute("/a", "--x") == Path("/a")
    assert absolute("./~b", "--x") == tmp_path / "~b"


def test_the_home_of_an_unknown_user_is_refused():
    with pytest.raises(ConfigError, match="there is no user whose home is ~nobody-here") as caught:
        absolute("~nobody-here/x", "--output")
    assert caught.value.where == "--output"


PLACES = ("model", "dataset", "output", "reward", "gold", "against", "reference", "also", "plot", "chat_template")
PLACES += ("eval_dataset", "demonstrations", "ptx_dataset", "config")


@pytest.mark.parametrize(
    ("stage", "name"),
    [
        (stage, name) if stage in ("sft", "evaluate") else full((stage, name))[0]
        for stage, cls in STAGES.items()
        for name in PLACES
        if name == "config" or name in cls.__dataclass_fields__
    ],
)
def test_the_home_of_an_unknown_user_is_one_message_in_every_flag(stage, name, model_folder, tmp_path, monkeypatch):
    from tests.commands import refused, write_data

    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "score.py").write_text("def score(prompts, responses): return [0.0] * len(responses)\n")
    rows = {"sft": "demonstrations", "reward": "comparisons", "dpo": "comparisons"}.get(stage, "prompts")
    flags = {"model": model_folder(), "dataset": f"{rows}.jsonl", "output": "o", "reward": "score.py"}
    flags |= {"output": "o.jsonl"} if stage == "sample" else {"output": "o.json"} if stage == "evaluate" else {}
    flags |= {"best_of": "2"} if name == "plot" or stage == "sample" else {}
    flags |= {"max_response_tokens": 4}
    knobs = STAGES[stage].__dataclass_fields__
    flags = {k: v for k, v in flags.items() if k in knobs} | {name: "~nobody-here/x.json"}
    flags |= {"plot": "~nobody-here/x.svg"} if name == "plot" else {}
    line = [part for k, v in flags.items() for part in (f"--{k.replace('_', '-')}", v)]
    if (stage, name) == ("export", "chat_template") or (stage, name) == ("export", "output"):
        line[line.index("--model") + 1] = model_folder()  # a base, which is refused first
        assert "base model" in refused(stage, *line)
        return
    assert "~nobody-here" in refused(stage, *line)
    assert not any("nobody-here" in str(path) for path in tmp_path.rglob("*"))


def test_a_working_directory_that_is_gone_is_one_message(tmp_path):
    (tmp_path / "gone").mkdir()
    line = "cd gone && rmdir ../gone && exec {} -P -c 'from rlhf_cli.main import app; app()' report /"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    ended = subprocess.run(
        ["sh", "-c", line.format(sys.executable)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr == "error: the working directory does not exist any more\n  -> change to a folder that exists\n"


# --- names in messages


def test_names_begin_no_lines_of_their_own():
    error = UserError("a\nb\r\nc\n    ours", where="d\ne", fix="f\rg")
    assert str(error) == "d\\ne: a\\nb\\r\\nc\n    ours\n  -> f\\rg"
    assert str(UserError(error.what, where=error.where, fix=error.fix)) == str(error)


@pytest.mark.parametrize(
    "arguments",
    [
        ("sft", "--model", "a\nb", "--dataset", "d\ne", "--output", "o"),
        ("sft", "--model", "m", "--dataset", "d", "--output", "o", "--a\nb", "1"),
        ("sft\nx",),
        ("sft", "--model", "m", "--dataset", "d", "--output", "o", "more\nnames"),
        ("report", "a\nb"),
        ("sft", "--config", "a\nb"),
        ("ppo", "--model", "m", "--dataset", "d", "--output", "o", "--reward", "a\nb=nan"),
        ("sft", "--model", "m", "--dataset", "d", "--output", "o", "--device", "a\nb", "--mask", "c\nd"),
        ("sft", "--model", "m", "--dataset", "d", "--output", "o", "--map", "a\nb=c,a\nb=d"),
    ],
)
def test_a_line_end_in_an_argument_is_no_line_end_in_the_message(arguments):
    from tests.commands import refused

    lines = refused(*arguments).splitlines()
    assert lines[0].startswith("error: ") and all(line.startswith("  -> ") for line in lines[1:])


# --- without docstrings


@pytest.mark.full
def test_help_is_whole_and_stages_are_refused_without_docstrings():
    run = [sys.executable, "-OO", "-m", "rlhf_cli"]
    page = subprocess.run([*run, "sft", "--help"], capture_output=True, text=True)
    assert "Supervised fine-tuning: train the base to respond as the demonstrations" in page.stdout
    assert "SftConfig(" not in page.stdout
    ended = subprocess.run(
        [*run, "sft", "--model", "m", "--dataset", "d", "--output", "o"], capture_output=True, text=True
    )
    assert ended.returncode == 2 and "PYTHONOPTIMIZE" in ended.stderr and ended.stderr.count("error: ") == 1
