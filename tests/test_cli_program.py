"""rlhf_cli/program.py: how the process starts, loads and ends. Most of it needs a process of its own."""

from __future__ import annotations

import gc
import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlhf_cli import program
from rlhf_cli.program import QUIET_PIPED, SETTINGS, App, load

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    """Libraries' quiet settings must not leak between tests."""
    for name in [*SETTINGS, *QUIET_PIPED]:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def rlhf(*arguments, code=None, **more):
    """The program in a process of its own; with `code`, Python that may prepare something first."""
    command = [sys.executable, "-c", code] if code else [sys.executable, "-m", "rlhf_cli"]
    return subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, timeout=120, **more)


def test_loading_a_stage_rests_the_garbage_collector_and_quiets_libraries(monkeypatch):
    seen = []

    def import_module(name):
        seen.append((name, gc.isenabled(), os.environ["TOKENIZERS_PARALLELISM"], os.environ["TRANSFORMERS_VERBOSITY"]))
        return SimpleNamespace(name=name)

    monkeypatch.setattr(importlib, "import_module", import_module)
    assert load("sft").name == "stages.sft"
    assert seen == [("stages.sft", False, "false", "error")] and gc.isenabled()
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"


def test_a_setting_of_the_users_own_is_left_alone(monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    monkeypatch.setattr(importlib, "import_module", lambda name: None)
    load("sft")
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"


def test_the_garbage_collector_works_again_after_a_failed_import(monkeypatch):
    def import_module(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", import_module)
    with pytest.raises(ImportError):
        load("sft")
    assert gc.isenabled()


@pytest.mark.parametrize(("terminal", "bars_off"), [(True, False), (False, True)])
def test_download_bars_are_for_terminals(monkeypatch, terminal, bars_off):
    monkeypatch.setattr(importlib, "import_module", lambda name: None)
    monkeypatch.setattr(program, "is_terminal", lambda stream: terminal)
    load("sft")
    assert ("HF_HUB_DISABLE_PROGRESS_BARS" in os.environ) is bars_off


@pytest.mark.parametrize(("code", "expected"), [(0, 0), (3, 3), (None, 0), ("words", 1)])
def test_the_program_leaves_with_the_code_of_its_command(monkeypatch, code, expected):
    left = []
    monkeypatch.setattr(program, "leave", left.append)
    app = App()

    @app.command()
    def only():
        raise SystemExit(code)

    monkeypatch.setattr(sys, "argv", ["only"])
    app()
    assert left == [expected]


def test_called_with_arguments_it_is_any_typer_app():
    app = App()

    @app.command()
    def only():
        raise SystemExit(4)

    with pytest.raises(SystemExit) as ended:
        app([], standalone_mode=False)
    assert ended.value.code == 4


def test_the_program_ends_without_teardown_but_with_its_output():
    code = (
        "import atexit, sys; atexit.register(lambda: print('torn down'))\n"
        "from rlhf_cli.main import app\n"
        "sys.argv = ['rlhf', '--version']\n"
        "app()\n"
    )
    ended = rlhf(code=code)
    assert ended.returncode == 0 and ended.stdout.startswith(b"rlhf ") and b"torn down" not in ended.stdout


def test_exit_codes_reach_the_shell():
    assert rlhf("--help").returncode == 0
    assert rlhf("sft").returncode == 2
    assert rlhf("nonsense").returncode == 2


def test_a_reader_of_stdout_that_has_gone_away_is_quiet(tmp_path):
    (tmp_path / "checkpoint.json").write_text('{"stage": "sft"}', encoding="utf-8")
    command = [sys.executable, "-m", "rlhf_cli", "report", str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 0


def test_a_locale_without_unicode_is_no_defect(tmp_path):
    (tmp_path / "é空.yaml").write_text("nonsense: 1\n", encoding="utf-8")
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    ended = rlhf("sft", "--config", str(tmp_path / "é空.yaml"), env=environment)
    assert ended.returncode == 2 and b"\\xe9\\u7a7a.yaml:1: unknown knob `nonsense`" in ended.stderr
