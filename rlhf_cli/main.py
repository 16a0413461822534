"""The app: one command per stage, made from its config class. Only here an error becomes an exit code."""

from __future__ import annotations

import errno
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from typer.core import TyperGroup

from rlhf_cli.console import plain, rank, reporting, say, show
from rlhf_cli.options import PanelCommand, given, help_all_option, knob_options, nearest, option, write_panels
from rlhf_cli.program import App, load, stdout_for_results, unprintable
from stages import __version__
from stages.config import TrainingKnobs
from stages.errors import ConfigError, Interrupted, StopRequested, TrainingStopped, UserError, escape_lines, words_of
from stages.launch import check_docstrings, check_launch
from stages.measuring_config import STAGES
from stages.recipe import advice_on, read_recipe, resolve
from stages.results import Result

# An example of each command for its help page.
EXAMPLES = {
    "sft": "rlhf sft --model Qwen/Qwen2.5-0.5B --dataset demonstrations.jsonl --output runs/x/sft",
    "reward": "rlhf reward --model runs/x/sft --dataset comparisons.jsonl --output runs/x/reward",
    "ppo": "rlhf ppo --model runs/x/sft --reward runs/x/reward --dataset prompts.jsonl --output runs/x/ppo",
    "dpo": "rlhf dpo --model runs/x/sft --dataset comparisons.jsonl --output runs/x/dpo",
    "evaluate": "rlhf evaluate --model runs/x/ppo --against runs/x/sft --reward runs/x/reward --dataset prompts.jsonl",
    "sample": "rlhf sample --model runs/x/ppo --dataset prompts.jsonl --output responses.jsonl",
    "export": "rlhf export --model runs/x/ppo --output exported",
    "preview": "rlhf preview --model runs/x/sft --dataset comparisons.jsonl --stage dpo",
}
RUN_OPTIONS = {
    "config": ("--config", "YAML recipe with knobs of this stage; flags win over it", str | None, "FILE"),
    "dry_run": ("--dry-run", "check everything, print the plan, and stop before the work", bool | None, None),
    "overwrite": (
        "--overwrite",
        "replace a run that has different knobs or inputs; an identical run is resumed, not restarted",
        bool | None,
        None,
    ),
    "json": ("--json", "print the result as one JSON object", bool | None, None),
    "debug": ("--debug", "show the traceback of an internal error", bool | None, None),
}
HELP = """Reinforcement learning from human feedback, from a base model to a PPO policy.

\b
sft -> reward -> ppo -> evaluate -> report, each reading the folder of the one before:
  rlhf sft --model BASE --dataset demonstrations.jsonl --output runs/x/sft
"""
# Errors of the system that are never internal errors, wherever they occur.
SYSTEM_ERRORS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOSPC, errno.EDQUOT)
PACKAGES = tuple(str(Path(__file__).resolve().parents[1] / name) + os.sep for name in ("rlhf_cli", "stages"))


class Group(TyperGroup):
    """The commands; an error in the command line is reported like every other error."""

    def format_options(self, ctx: typer.Context, formatter: Any) -> None:
        """Write the options and the commands of the help page."""
        write_panels(self.get_params(ctx), formatter, "Options")
        self.format_commands(ctx, formatter)

    def main(self, *args: object, standalone_mode: bool = True, **kwargs: object) -> object:
        """Run a command line and exit with its code, or return the code if `standalone_mode` is off."""
        try:
            code = super().main(*args, standalone_mode=False, **kwargs)  # type: ignore[misc]
        except SystemExit as end:
            if not isinstance(end.__context__, BrokenPipeError):
                raise
            code = 0  # the reader of the help page has closed the pipe
        except Exception as error:
            if not hasattr(error, "format_message"):  # all usage errors of Typer have it, in all its versions
                raise
            code = usage_error(error)
        if standalone_mode:
            sys.exit(code)
        return code


def usage_error(error: Exception) -> int:
    """Print what is wrong with a command line and the option that was likely meant; returns exit code 2."""
    wrong, ctx = getattr(error, "option_name", None), getattr(error, "ctx", None)
    message = error.format_message().rstrip(".")  # type: ignore[attr-defined]
    what, fix = message[:1].lower() + message[1:], f"see {ctx.command_path if ctx else 'rlhf'} --help"
    if type(error).__name__ == "NoSuchOption" and ctx:
        near = nearest(wrong, [flag for p in ctx.command.params for flag in (*p.opts, *p.secondary_opts)])
        advice = advice_on(wrong.removeprefix("--"), STAGES.get(ctx.command.name))
        what, fix = f"no such option: {wrong}", advice or (f"did you mean {near}?" if near else fix)
    if rank() == 0:
        say(f"error: {escape_lines(what)}\n  -> {fix}")
    return 2


app = App(
    name="rlhf",
    cls=Group,
    help=HELP,
    add_completion=False,
    rich_markup_mode=None,  # plain help answers in half the time of rich panels
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def show_version(show: bool) -> None:
    """Print the version for `rlhf --version`, before any other option is read."""
    if show:
        print(f"rlhf {__version__}")
        raise typer.Exit(0)


VERSION = typer.Option("--version", callback=show_version, is_eager=True, help="show the version and exit")


@app.callback(invoke_without_command=True)
def root(ctx: typer.Context, version: Annotated[bool, VERSION] = False) -> None:
    """Print the help page for `rlhf` alone."""
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())


def add_stage(name: str, cls: type) -> None:
    """Add the command of a stage, with the knobs of its config class and the options of a run."""
    extras = [extra for extra in RUN_OPTIONS if extra != "overwrite" or issubclass(cls, TrainingKnobs)]
    parameters = [*knob_options(cls), *(option(extra, *RUN_OPTIONS[extra]) for extra in extras), help_all_option()]

    def command(**values: object) -> int:
        return run_stage(name, cls, values)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    sentence = inspect.getdoc(cls) or name
    example = f"\n\n\b\nExample:\n  {EXAMPLES[name]}" if name in EXAMPLES else ""
    app.command(name, cls=PanelCommand, help=sentence + example, short_help=sentence)(command)


for stage_name, config_class in STAGES.items():
    add_stage(stage_name, config_class)


REPORT = "Show the results of a run: held-out metrics of every stage, and SFT compared with PPO."


@app.command("report", cls=PanelCommand, help=f"{REPORT}\n\n\b\nExample:\n  rlhf report runs/x", short_help=REPORT)
def report(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN", help="folder with sft, reward, ppo, dpo and evaluate.json")
    ],
    as_json: Annotated[bool, typer.Option("--json", help=RUN_OPTIONS["json"][1])] = False,
    debug: Annotated[bool, typer.Option("--debug", help=RUN_OPTIONS["debug"][1])] = False,
    help_all: bool = help_all_option().default,
) -> int:
    """Read the results that the stages of runs have written."""

    def work() -> Result:
        with reporting() as reporter:
            return load("report").run(runs, reporter)

    return guarded(work, as_json, debug)


def run_stage(name: str, cls: type, values: dict[str, object]) -> int:
    """Run one stage from its flags: recipe, config, inputs, the stage itself; returns the exit code."""

    def work() -> Result:
        recipe = read_recipe(str(values["config"]), cls) if values["config"] is not None else {}
        config = resolve(cls, recipe, given(cls, values))
        check_docstrings()
        with reporting() as reporter:
            # Errors in the inputs are found before torch is imported.
            inputs = load("inputs").open_inputs(name, config, overwrite=bool(values.get("overwrite")))
            for line in getattr(inputs, "warnings", ()):
                reporter.warn(line)
            if getattr(inputs, "done", False):
                return load("inputs").already_done(name, config, inputs)
            for line in getattr(inputs, "notes", ()):
                reporter.note(line)
            try:
                return load(name).run(config, inputs, reporter, dry_run=bool(values["dry_run"]))
            finally:
                if getattr(inputs, "run", None) is not None:
                    inputs.run.release()

    return guarded(work, bool(values["json"]), bool(values["debug"]))


def guarded(work: Callable[[], Result], as_json: bool, debug: bool) -> int:
    """Do a command's work and print its result; every error becomes a message and an exit code."""
    label = "" if rank() == 0 else f"[rank {rank()}] "
    with stdout_for_results() as stdout:
        try:
            check_launch()
            result = work()
            return 0 if label else deliver(result, as_json, stdout)
        except ConfigError as error:
            if not label:  # every rank reads the same flags, so one message is enough
                say(f"error: {UserError.__str__(error)}")
            return error.exit_code
        except UserError as error:
            if not error.told_by_first:
                say(f"{label}error: {UserError.__str__(error)}")
            return error.exit_code
        except (TrainingStopped, Interrupted) as error:
            if not label:
                say(str(error))
            return error.exit_code
        except (KeyboardInterrupt, StopRequested) as error:
            if not label:
                say("interrupted")
            return getattr(error, "exit_code", 130)
        except Exception as error:
            if isinstance(error, OSError) and error.errno in SYSTEM_ERRORS and error.filename is not None:
                what = escape_lines(f"{error.filename}: {error.strerror}")
                say(f"{label}error: {what}\n  -> check the path, and that you may use it")
                return 2
            say(label + describe_internal_error(error, debug or os.environ.get("RLHF_DEBUG") == "1"))
            return 1


def deliver(result: Result, as_json: bool, stdout: TextIO) -> int:
    """Print a result; a closed pipe (`| head`) is not a failure, a full disk is."""
    try:
        show(result, as_json, stdout)
    except OSError as error:
        return unprintable(error, "the work is done, but its result")
    return 0


def describe_internal_error(error: Exception, debug: bool) -> str:
    """An unforeseen exception as a message with its line, or with `debug` with the whole traceback."""
    what = f"internal error in rlhf: {type(error).__name__}: {plain(words_of(error))}"
    if debug:
        return "".join(traceback.format_exception(error)) + what
    stack = traceback.extract_tb(error.__traceback__)
    frames = [f"{frame.filename}:{frame.lineno}" for frame in stack if not frame.filename.startswith("<frozen")]
    own_frames = [frame for frame in frames if frame.startswith(PACKAGES)]
    called = f", called from {own_frames[-1]}" if own_frames and own_frames[-1] != frames[-1] else ""
    return f"{what}\n  at {frames[-1]}{called}\n  -> run it again with --debug for the whole traceback"
