"""rlhf_cli/main.py: flags to config to stage, and every way to end as a message and an exit code."""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from rlhf_cli import main
from rlhf_cli.main import app
from rlhf_cli.program import QUIET_PIPED, SETTINGS
from stages import __version__
from stages.config import PpoConfig, SftConfig, TrainingKnobs
from stages.errors import (
    CheckpointError,
    ConfigError,
    DatasetError,
    DeviceError,
    Interrupted,
    ModelError,
    OutputError,
    RewardError,
    TrainingStopped,
    UserError,
)
from stages.knobs import knob
from stages.launch import MASTER, NUMBERS
from stages.results import Result, Table

SFT = ["sft", "--model", "m", "--dataset", "d", "--output", "o"]
PPO = ["ppo", "--model", "m", "--dataset", "d", "--output", "o", "--reward", "r"]


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    """Libraries' quiet settings and ranks must not leak between tests."""
    for name in [*SETTINGS, *QUIET_PIPED, *NUMBERS, *MASTER, "RLHF_DEBUG"]:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def launch(monkeypatch, rank, size):
    """The environment that torchrun gives to a rank."""
    for name, value in {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "localhost", "MASTER_PORT": 29500}.items():
        monkeypatch.setenv(name, str(value))


def done(command="sft", **more):
    return Result(**({"command": command, "status": "done", "output": "o", "data": {"loss": 1.5}} | more))


def invoke(monkeypatch, arguments, ending=None, opening=None):
    """Run a command line with a stage that ends as `ending` says; what it was called with comes back too."""
    calls = []

    def open_inputs(stage, config, *, overwrite):
        calls.append(SimpleNamespace(stage=stage, config=config, overwrite=overwrite))
        if isinstance(opening, BaseException):
            raise opening
        return "inputs"

    def run(config, inputs, report, *, dry_run):
        calls[-1].inputs, calls[-1].report, calls[-1].dry_run = inputs, report, dry_run
        assert config is calls[-1].config
        if isinstance(ending, BaseException):
            raise ending
        return ending(report) if callable(ending) else ending or done(arguments[0])

    monkeypatch.setitem(sys.modules, "stages.inputs", SimpleNamespace(open_inputs=open_inputs))
    for stage in main.STAGES:
        monkeypatch.setitem(sys.modules, f"stages.{stage}", SimpleNamespace(run=run))
    return CliRunner().invoke(app, arguments), calls


# --- from flags to the stage --------------------------------------------------------------------------------------


def test_flags_reach_the_stage_as_a_checked_config(monkeypatch):
    ended, calls = invoke(
        monkeypatch, [*SFT, "--learning-rate", "3e-4", "--keep-state", "--lora-targets", "q", "--lora-targets", "v"]
    )
    assert ended.exit_code == 0 and len(calls) == 1
    wanted = SftConfig(
        model="m", dataset="d", output="o", learning_rate=0.0003, keep_state=True, lora_targets=["q", "v"]
    )
    assert calls[0].config == wanted
    assert (calls[0].stage, calls[0].inputs, calls[0].overwrite, calls[0].dry_run) == ("sft", "inputs", False, False)


def test_a_flag_beats_the_recipe(monkeypatch, tmp_path):
    (tmp_path / "r.yaml").write_text("seed: 1\nkeep_state: true\nbatch_size: 8\nmap: {prompt: q}\n")
    recipe = ["--config", str(tmp_path / "r.yaml")]
    _, calls = invoke(monkeypatch, [*SFT, *recipe, "--seed", "2", "--no-keep-state"])
    config = calls[0].config
    assert (config.seed, config.keep_state, config.batch_size, config.map) == (2, False, 8, {"prompt": "q"})


def test_required_knobs_may_come_from_the_recipe(monkeypatch, tmp_path):
    (tmp_path / "r.yaml").write_text("model: m\ndataset: d\noutput: o\nreward: [a, b]\n")
    _, calls = invoke(monkeypatch, ["ppo", "--config", str(tmp_path / "r.yaml")])
    assert calls[0].config == PpoConfig(model="m", dataset="d", output="o", reward=["a", "b"])


def test_lists_maps_and_auto(monkeypatch):
    flags = ["--reward", "x=0.5", "--map", "prompt=q", "--map", "a=b", "--micro-batch-size", "auto"]
    _, calls = invoke(monkeypatch, [*PPO, *flags])
    config = calls[0].config
    assert config.reward == ["r", "x=0.5"] and config.map == {"prompt": "q", "a": "b"}
    assert config.micro_batch_size == "auto"


def test_overwrite_and_dry_run_are_passed_on(monkeypatch):
    _, calls = invoke(monkeypatch, [*SFT, "--overwrite", "--dry-run"])
    assert (calls[0].overwrite, calls[0].dry_run) == (True, True)
    _, calls = invoke(monkeypatch, ["export", "--model", "m", "--output", "o", "--dry-run"])
    assert (calls[0].stage, calls[0].overwrite, calls[0].dry_run) == ("export", False, True)


def test_a_new_config_class_is_all_that_a_command_needs(monkeypatch):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class ProbeConfig(TrainingKnobs):
        """A stage that there is not."""

        beta: float = knob(0.1, "strength", "Probe", above=0)

    before = list(app.registered_commands)
    monkeypatch.setitem(main.STAGES, "probe", ProbeConfig)
    main.add_stage("probe", ProbeConfig)
    try:
        ended, calls = invoke(monkeypatch, ["probe", *SFT[1:], "--beta", "0.2"])
        page = CliRunner().invoke(app, ["probe", "--help"]).stdout
    finally:
        app.registered_commands[:] = before
    assert ended.exit_code == 0 and calls[0].config.beta == 0.2
    assert "A stage that there is not." in page and "--overwrite" in page and "Example" not in page


# --- mistakes in the command line ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*SFT, "--bacth-size", "8"], "error: no such option: --bacth-size\n  -> did you mean --batch-size?\n"),
        ([*SFT, "--batch_size", "8"], "error: no such option: --batch_size\n  -> did you mean --batch-size?\n"),
        ([*SFT, "--kl-coef", "8"], "error: no such option: --kl-coef\n  -> see rlhf sft --help\n"),
        (["stf"], "error: no such command 'stf'. Did you mean 'sft'?\n  -> see rlhf --help\n"),
        ([*SFT, "more"], "error: got unexpected extra argument"),
        (["sft", "--model", "m"], "error: --dataset is required\n"),
        ([*SFT, "--seed", "x"], "error: --seed: 'x' is not a whole number\n  -> give a whole number\n"),
        ([*SFT, "--seed", "-1"], "error: --seed: -1 is too small\n  -> the smallest value is 0\n"),
        ([*SFT, "--config", "no.yaml"], "error: no.yaml: cannot read the recipe: No such file or directory\n"),
        ([*SFT, "--config", ""], "error: cannot read the recipe: Is a directory\n"),
        (["report"], "error: missing argument 'RUN'\n  -> see rlhf report --help\n"),
    ],
)
def test_mistakes_in_the_command_line(monkeypatch, arguments, message):
    ended, calls = invoke(monkeypatch, arguments)
    assert ended.exit_code == 2 and ended.stdout == "" and calls == []
    assert ended.stderr.startswith(message)


def test_an_unknown_key_of_a_recipe_names_its_line(monkeypatch, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("seed: 1\nbatchsize: 2\n")
    ended, _ = invoke(monkeypatch, [*SFT, "--config", str(recipe)])
    assert ended.exit_code == 2
    assert ended.stderr == f"error: {recipe}:2: unknown knob `batchsize`\n  -> did you mean `batch_size`?\n"


# --- help and version ---------------------------------------------------------------------------------------------


def test_version():
    ended = CliRunner().invoke(app, ["--version"])
    assert (ended.exit_code, ended.stdout) == (0, f"rlhf {__version__}\n")


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_every_command(arguments):
    ended = CliRunner().invoke(app, arguments)
    assert ended.exit_code == 0 and ended.stderr == ""
    listed = ended.stdout.split("Commands:")[1]
    assert all(f"\n  {name} " in listed for name in [*main.STAGES, "report"])


def test_every_example_is_a_command_line_that_resolves():
    for stage, example in main.EXAMPLES.items():
        words = example.split()
        assert words[:2] == ["rlhf", stage]
        flags = dict(zip(words[2::2], words[3::2], strict=True))
        values = {flag[2:].replace("-", "_"): value for flag, value in flags.items()}
        assert main.resolve(main.STAGES[stage], {}, values)


# --- ways to end --------------------------------------------------------------------------------------------------


class StrangeError(DatasetError):
    """A user's mistake that prints itself in another way."""

    def __str__(self):
        return "something else"


@pytest.mark.parametrize(
    "kind",
    [UserError, ConfigError, DatasetError, CheckpointError, ModelError, OutputError, DeviceError, RewardError]
    + [StrangeError],
)
def test_a_mistake_of_the_users_says_where_what_and_what_to_do(monkeypatch, kind):
    ended, _ = invoke(monkeypatch, SFT, kind("has no `prompt`", where="rows.jsonl:3", fix="add one"))
    assert (ended.exit_code, ended.stdout) == (2, "")
    assert ended.stderr == "error: rows.jsonl:3: has no `prompt`\n  -> add one\n"


def test_a_mistake_may_be_found_while_opening_the_inputs(monkeypatch):
    ended, _ = invoke(monkeypatch, SFT, opening=CheckpointError("damaged"))
    assert (ended.exit_code, ended.stderr) == (2, "error: damaged\n")


def test_training_that_stopped_itself(monkeypatch):
    ended, _ = invoke(monkeypatch, SFT, TrainingStopped("loss is not finite", step=7, advice="lower the rate"))
    assert ended.exit_code == 3
    assert ended.stderr == "stopped at step 7: loss is not finite\n  -> lower the rate\n"


@pytest.mark.parametrize(("signal_number", "code"), [(2, 130), (15, 143)])
def test_an_interrupted_run_says_that_it_can_go_on(monkeypatch, signal_number, code):
    ended, _ = invoke(monkeypatch, SFT, Interrupted(signal_number, step=4, output="o"))
    assert ended.exit_code == code
    assert ended.stderr == "interrupted; state of step 4 saved in o; run the same command again to resume\n"


def test_ctrl_c_before_a_stage_listens(monkeypatch):
    ended, _ = invoke(monkeypatch, SFT, KeyboardInterrupt())
    assert (ended.exit_code, ended.stderr) == (130, "interrupted\n")


def broken(report):
    raise ZeroDivisionError("by nothing")


def test_a_defect_names_itself_and_its_place(monkeypatch):
    ended, _ = invoke(monkeypatch, SFT, broken)
    line = inspect.getsourcelines(broken)[1] + 1
    assert ended.exit_code == 1 and ended.stdout == ""
    assert ended.stderr.startswith(f"internal error in rlhf: ZeroDivisionError: by nothing\n  at {__file__}:{line}, ")
    assert "called from " in ended.stderr and "main.py:" in ended.stderr
    assert "--debug" in ended.stderr and "Traceback" not in ended.stderr


@pytest.mark.parametrize(("arguments", "variable"), [([*SFT, "--debug"], None), (SFT, "1")])
def test_a_defect_in_full(monkeypatch, arguments, variable):
    if variable:
        monkeypatch.setenv("RLHF_DEBUG", variable)
    ended, _ = invoke(monkeypatch, arguments, broken)
    assert ended.exit_code == 1 and "Traceback (most recent call last)" in ended.stderr
    assert ended.stderr.endswith("internal error in rlhf: ZeroDivisionError: by nothing\n")


def test_a_broken_pipe_inside_a_stage_is_a_defect_not_a_success(monkeypatch):
    assert invoke(monkeypatch, SFT, BrokenPipeError(32, "Broken pipe"))[0].exit_code == 1


def test_messages_cannot_steer_the_terminal(monkeypatch):
    ended, _ = invoke(monkeypatch, SFT, DatasetError("\x1b[2Jgone [bold]\x07\r\nnext", where="a\x9bb"))
    assert ended.stderr == "error: a\ufffdb: \ufffd[2Jgone [bold]\ufffd\\r\\nnext\n"
    ended, _ = invoke(monkeypatch, SFT, ValueError("\x1b]0;title\x07"))
    assert "\x1b" not in ended.stderr and "\x07" not in ended.stderr
    ended, _ = invoke(monkeypatch, [*SFT, "--\x1b[31m"])
    assert ended.exit_code == 2 and "\x1b" not in ended.stderr


# --- the result ---------------------------------------------------------------------------------------------------


def test_the_result_is_all_there_is_on_stdout(monkeypatch):
    def chatty(report):
        print("a library talks")
        report.note("a note")
        report.warn("a warning")
        return done(tables=(Table("numbers", ("name", "value"), (("loss", "1.5"),)),), next=("rlhf reward",))

    ended, _ = invoke(monkeypatch, SFT, chatty)
    assert ended.exit_code == 0
    assert ended.stdout == "numbers\nname  value\nloss    1.5\n\nwrote o\nnext: rlhf reward\n"
    assert ended.stderr == "a library talks\na note\nwarning: a warning\n"


def test_json_is_one_object_and_nothing_else(monkeypatch):
    def chatty(report):
        print("a library talks")
        return done(data={"loss": float("nan"), "status": "no"}, next=("rlhf reward",))

    ended, _ = invoke(monkeypatch, [*SFT, "--json"], chatty)
    assert json.loads(ended.stdout) == {
        **{"command": "sft", "status": "done", "output": "o", "next": ["rlhf reward"]},
        "loss": None,
    }


def test_an_open_phase_is_closed_before_the_error_is_told(monkeypatch):
    def failing(report):
        report.begin("train", 10)
        report.log(1, {"loss": 2.0})
        raise DatasetError("bad row")

    ended, _ = invoke(monkeypatch, SFT, failing)
    assert ended.stderr.splitlines()[-1] == "error: bad row"
    assert ended.stderr.startswith("train 1/10  loss 2")


def test_a_full_disk_under_stdout_is_told(monkeypatch):
    monkeypatch.setattr("rlhf_cli.main.show", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    ended, _ = invoke(monkeypatch, SFT)
    assert ended.exit_code == 2 and "cannot be printed: No space left on device" in ended.stderr


def test_a_reader_of_stdout_that_has_gone_away_is_no_failure(monkeypatch):
    monkeypatch.setattr("rlhf_cli.main.show", lambda *_: (_ for _ in ()).throw(BrokenPipeError(32, "Broken pipe")))
    ended, _ = invoke(monkeypatch, SFT)
    assert (ended.exit_code, ended.stderr) == (0, "")


# --- ranks --------------------------------------------------------------------------------------------------------


def test_only_rank_0_speaks(monkeypatch):
    launch(monkeypatch, 1, 2)

    def speaking(report):
        report.note("a note")
        report.begin("train", 1)
        report.log(1, {"loss": 1.0})
        report.end()
        return done()

    ended, _ = invoke(monkeypatch, SFT, speaking)
    assert (ended.exit_code, ended.stdout, ended.stderr) == (0, "", "")
    for ending in (Interrupted(15, step=1, output="o"), TrainingStopped("diverged", step=1), ConfigError("wrong")):
        ended, _ = invoke(monkeypatch, SFT, ending)
        assert ended.exit_code == ending.exit_code and ended.stderr == ""
    ended, _ = invoke(monkeypatch, [*SFT, "--sed", "1"])
    assert (ended.exit_code, ended.stderr) == (2, "")


def test_another_rank_tells_what_only_it_can_know(monkeypatch):
    launch(monkeypatch, 3, 4)
    ended, _ = invoke(monkeypatch, SFT, DeviceError("there is no cuda:3"))
    assert (ended.exit_code, ended.stderr) == (2, "[rank 3] error: there is no cuda:3\n")
    ended, _ = invoke(monkeypatch, SFT, broken)
    assert ended.exit_code == 1 and ended.stderr.startswith("[rank 3] internal error in rlhf: ZeroDivisionError")


# --- report -------------------------------------------------------------------------------------------------------


def test_report_reads_a_run(tmp_path):
    (tmp_path / "sft").mkdir()
    manifest = {"stage": "sft", "metrics": {"eval_loss": 1.25}, "steps": 3}
    (tmp_path / "sft" / "checkpoint.json").write_text(json.dumps(manifest))
    ended = CliRunner().invoke(app, ["report", str(tmp_path), "--json"])
    assert ended.exit_code == 0
    assert json.loads(ended.stdout)["runs"][0]["stages"]["sft"]["metrics"] == {"eval_loss": 1.25}
    assert "1.250" in CliRunner().invoke(app, ["report", str(tmp_path)]).stdout


def test_report_of_nothing(tmp_path):
    ended = CliRunner().invoke(app, ["report", str(tmp_path / "absent")])
    assert ended.exit_code == 2 and ended.stderr.startswith(f"error: {tmp_path / 'absent'}: no such folder\n")
