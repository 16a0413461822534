"""rlhf_cli/options.py: config fields as options of the command line, and their help page."""

from __future__ import annotations

import dataclasses

import pytest
from typer.testing import CliRunner

from rlhf_cli.main import RUN_OPTIONS, app
from rlhf_cli.options import given, knob_options, metavar, nearest, shown_default
from stages.config import PpoConfig, SftConfig
from stages.knobs import REQUIRED, Knob, default_of, knob, knobs
from stages.measuring_config import STAGES, SampleConfig
from stages.recipe import resolve

RUNNER = CliRunner(env={"COLUMNS": "80"})


def help_of(*command, flag="--help-all"):
    ended = RUNNER.invoke(app, [*command, flag])
    assert ended.exit_code == 0
    return ended.stdout


def headings(page):
    return [line.rstrip(":") for line in page.splitlines() if line.endswith(":") and not line.startswith(" ")]


@pytest.mark.parametrize("stage", STAGES)
def test_every_knob_is_a_flag_with_its_help(stage):
    page = help_of(stage)
    text = "".join(page.split())  # lines may end after any hyphen
    for name, (_, about, kind) in knobs(STAGES[stage]).items():
        flag = name.replace("_", "-")
        assert (f"--[no-]{flag} " if kind is bool else f"--{flag} ") in page
        assert "".join(about.help.split()) in text


@pytest.mark.parametrize("stage", STAGES)
def test_no_knob_is_shadowed_by_an_option_of_the_run(stage):
    assert not set(knobs(STAGES[stage])) & set(RUN_OPTIONS)


def test_panels_come_in_the_order_a_newcomer_reads_them():
    assert headings(help_of("ppo")) == [
        *("Model", "Data", "Output", "Rollout", "Reward", "PPO"),
        *("Training", "Optimiser", "LoRA", "Device", "This run"),
    ]
    assert headings(help_of("export")) == ["Model", "Output", "Training", "Device", "This run"]


def test_help_shows_the_required_and_the_main_knobs_and_counts_the_others():
    page = help_of("ppo", flag="--help")
    assert headings(page) == ["Required", "Main knobs", "This run"]
    flags = [line.split()[0] for line in page.splitlines() if line.startswith("  --")]
    assert flags == [
        *("--model", "--dataset", "--output", "--reward"),
        *("--max-steps", "--batch-size", "--responses-per-prompt", "--max-response-tokens", "--temperature"),
        *("--kl-coef", "--advantage", "--ppo-epochs", "--learning-rate", "--lora-rank"),
        *("--config", "--dry-run", "--overwrite", "--json", "--debug", "--help-all"),
    ]
    assert page.endswith(f"\n\n{len(knobs(PpoConfig)) - 14} more knobs: rlhf ppo --help-all\n")


@pytest.mark.parametrize("stage", STAGES)
def test_main_knobs_are_knobs_that_are_not_required(stage):
    known = knobs(STAGES[stage])
    assert all(default_of(known[name][0]) is not REQUIRED for name in STAGES[stage].main)


def test_a_command_of_few_knobs_shows_all_of_them_by_either_flag():
    assert help_of("export", flag="--help") == help_of("export")


def test_help_all_answers_before_anything_is_read():
    assert help_of("ppo", "--batch-size", "many", "--help-all", flag="--dry-run") == help_of("ppo")


def test_a_removed_flag_says_what_became_of_it():
    ended = RUNNER.invoke(app, ["ppo", "--ratio-limit", "3"])
    assert ended.exit_code == 2
    fix = "leave it out; it was removed: its value is fixed at 10.0"
    assert ended.stderr == f"error: no such option: --ratio-limit\n  -> {fix}\n"


def test_a_help_page_has_one_sentence_and_an_example():
    page = help_of("sft")
    assert "train the base to respond as the demonstrations do." in " ".join(page.split())
    assert "\n    rlhf sft --model " in page


def test_help_fits_into_80_columns_but_for_the_example():
    assert [line for line in help_of("ppo").splitlines() if len(line) > 80 and "rlhf ppo" not in line] == []


@pytest.mark.parametrize(
    ("stage", "text"),
    [
        ("sft", "--model TEXT"),
        ("sft", "[required]"),
        ("sft", "--batch-size INTEGER"),
        ("sft", "[default: 16]"),
        ("sft", "--learning-rate NUMBER"),
        ("sft", "[default: from the width of the base]"),
        ("ppo", "[default: 3 x learning_rate]"),
        ("sft", "--micro-batch-size INTEGER|auto"),
        ("sft", "--lr-schedule linear|cosine|constant"),
        ("sft", "--map NAME=COLUMN,..."),
        ("sft", "names of the linear layers to adapt (repeatable)"),
        ("sft", "[default: from epochs]"),
        ("sft", "[default: all but the output layer]"),
        ("sft", "--[no-]keep-state"),
        ("sft", "finished [default: false]"),
        ("sft", "--overwrite"),
        ("evaluate", "also write the report to this .json file"),
    ],
)
def test_what_a_help_page_shows(stage, text):
    assert text in " ".join(help_of(stage).split())


def test_overwrite_is_for_the_stages_that_train():
    takes = {stage for stage in STAGES if "--overwrite" in help_of(stage)}
    assert {"sft", "reward", "ppo"} <= takes and not takes & {"evaluate", "sample", "export"}


def test_every_stage_can_be_tried_dry():
    assert all("--dry-run" in help_of(stage) for stage in STAGES)


def test_an_option_has_no_default_of_its_own():
    for parameter in knob_options(PpoConfig):
        assert parameter.default.default is None


@pytest.mark.parametrize(
    ("default", "about", "text"),
    [
        (REQUIRED, {}, "[required]"),
        (None, {}, ""),
        (None, {"auto": "from epochs"}, "[default: from epochs]"),
        ([], {"auto": "all"}, "[default: all]"),
        ({}, {}, ""),
        (False, {}, "[default: false]"),
        (True, {}, "[default: true]"),
        (0, {}, "[default: 0]"),
        (0.0, {}, "[default: 0]"),
        (1e-8, {}, "[default: 1e-08]"),
        ("auto", {}, "[default: auto]"),
    ],
)
def test_how_a_default_is_shown(default, about, text):
    assert shown_default(default, Knob(help="h", panel="P", **about)) == text


def test_choices_stand_for_the_value():
    assert metavar(Knob(help="h", panel="P", choices=("a", "b")), str) == "a|b"
    assert metavar(Knob(help="h", panel="P"), int | None) == "INTEGER"


def test_flags_not_given_are_left_out_and_the_rest_is_text_for_resolve():
    values = {"model": "m", "dataset": "d", "output": "o", "seed": "3", "map": [], "keep_state": False, "debug": True}
    flags = given(SftConfig, values | {"limit_rows": None, "lora_targets": ["a", "b"]})
    assert flags == {
        **{"model": "m", "dataset": "d", "output": "o", "seed": "3"},
        **{"keep_state": False, "lora_targets": ["a", "b"]},
    }
    assert resolve(SftConfig, {}, flags).seed == 3


def test_repeated_maps_add_up():
    flags = given(SampleConfig, {"map": ["prompt=question,x=y", "answer=gold"]})
    assert flags == {"map": "prompt=question,x=y,answer=gold"}


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [("--batch_size", "--batch-size"), ("--bacth-size", "--batch-size"), ("--sed", "--seed"), ("--zzz", None)],
)
def test_the_nearest_flag(wrong, meant):
    assert nearest(wrong, ["--batch-size", "--seed", "--micro-batch-size"]) == meant


@dataclasses.dataclass(frozen=True, kw_only=True)
class Another:
    """A stage made up for this test."""

    model: str = knob(REQUIRED, "the model", "Model")
    beta: float = knob(0.1, "a strength", "Own panel", above=0)


def test_panels_that_the_table_does_not_know_come_between():
    assert [p.name for p in knob_options(Another)] == ["model", "beta"]
    names = [p.name for p in knob_options(SftConfig)]
    assert names.index("output") < names.index("batch_size") < names.index("lora_rank") < names.index("device")
