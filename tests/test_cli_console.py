"""rlhf_cli/console.py: progress as lines and as a live line, and text that cannot steer a terminal."""

from __future__ import annotations

import io

import pytest

from rlhf_cli import console
from rlhf_cli.console import Console, duration, is_terminal, live_metrics, number, plain, rank, reporting, say
from stages.results import Silent


class Clock:
    """A clock that stands still until told."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def piped():
    clock, stream = Clock(), io.StringIO()
    return Console(stream, live=False, clock=clock), clock, stream


def run_phase(total, seconds_per_step, metrics=None):
    """Lines printed by a phase of `total` equally long steps."""
    said, clock, stream = piped()
    said.begin("train", total)
    for step in range(1, total + 1):
        clock.now += seconds_per_step
        said.log(step, metrics or {"loss": 1.0})
    said.end()
    return stream.getvalue().splitlines()


# --- lines --------------------------------------------------------------------------------------------------------


def test_fast_steps_are_a_line_every_two_seconds():
    # 0.125 s a step: two seconds are 16 steps, which is more than 5 % of 100.
    shown = [int(line.split()[1].split("/")[0]) for line in run_phase(100, 0.125)]
    assert shown == [16, 32, 48, 64, 80, 96, 100]


def test_slow_steps_are_a_line_every_twentieth():
    # 5 s a step, 200 steps: 5 % are 10 steps, that is every 50 s.
    shown = [int(line.split()[1].split("/")[0]) for line in run_phase(200, 5.0)]
    assert shown == list(range(10, 201, 10))


def test_very_slow_steps_are_a_line_a_minute():
    # 30 s a step, 1000 steps: 5 % would be a line every 25 minutes.
    shown = [int(line.split()[1].split("/")[0]) for line in run_phase(1000, 30.0)]
    assert shown == list(range(2, 1001, 2))


def test_a_phase_too_short_for_a_line_has_its_last_one():
    assert run_phase(3, 0.0) == ["train 3/3  loss 1"]


def test_a_phase_that_ends_early_still_shows_where_it_stood():
    said, clock, stream = piped()
    said.begin("train", 100)
    said.log(7, {"loss": 0.5})
    said.end()
    assert stream.getvalue() == "train 7/100  loss 0.5\n"


def test_a_phase_without_a_step_says_nothing():
    said, _, stream = piped()
    said.begin("train", 10)
    said.end()
    said.begin("nothing to do", 0)
    said.end()
    assert stream.getvalue() == ""


def test_a_line_tells_how_long_it_will_take():
    said, clock, stream = piped()
    said.begin("train", 10)
    clock.now += 40.0
    said.log(4, {"loss": 1.25, "lr": 2e-4, "grad_norm": 0.5})
    assert stream.getvalue() == "train 4/10  loss 1.25  lr 0.0002  (1m00s left)\n"


def test_steps_of_an_earlier_run_do_not_count_as_speed():
    said, clock, stream = piped()
    said.begin("train", 100, done=90)
    clock.now += 10.0
    said.log(95, {})
    assert stream.getvalue() == "train 95/100  (10s left)\n"


def test_the_last_numbers_stay_when_a_step_has_none():
    said, clock, stream = piped()
    said.begin("train", 2)
    said.log(1, {"loss": 3.0})
    said.log(2, {})
    assert stream.getvalue() == "train 2/2  loss 3\n"


def test_phases_may_nest():
    said, clock, stream = piped()
    said.begin("train", 2)
    said.log(1, {"loss": 2.0})
    said.begin("evaluate", 1)
    said.log(1, {"eval_loss": 1.5})
    said.end()
    said.log(2, {"loss": 1.0})
    said.end()
    assert stream.getvalue().splitlines() == ["evaluate 1/1  eval_loss 1.5", "train 2/2  loss 1"]


def test_close_ends_every_open_phase():
    said, _, stream = piped()
    said.begin("train", 9)
    said.log(1, {})
    said.begin("evaluate", 9)
    said.log(2, {})
    said.close()
    assert stream.getvalue().splitlines() == ["evaluate 2/9", "train 1/9"] and said.phases == []


def test_log_and_end_outside_a_phase_are_harmless():
    said, _, stream = piped()
    said.log(1, {"loss": 1.0})
    said.end()
    assert stream.getvalue() == ""


def test_notes_and_warnings_are_lines():
    said, _, stream = piped()
    said.note("resumed at step 4")
    said.warn("12 rows dropped")
    assert stream.getvalue() == "resumed at step 4\nwarning: 12 rows dropped\n"


def test_a_reader_that_has_gone_away_does_not_end_the_training():
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

    said = Console(Gone(), live=False, clock=Clock())
    said.note("nobody hears this")
    said.begin("train", 1)
    said.log(1, {"loss": 1.0})
    said.end()


# --- numbers ------------------------------------------------------------------------------------------------------


def test_which_numbers_are_watched():
    sft = {"step": 3, "lr": 2e-4, "grad_norm": 1.0, "loss": 1.23456, "accuracy": 0.5, "tokens_per_second": 900}
    assert live_metrics(sft) == "loss 1.235  accuracy 0.5  lr 0.0002"
    ppo = {"loss": 1.0, "reward_score": 0.25, "reward_kl": 3.0, "entropy": 1.5, "response_length": 41.5}
    assert live_metrics(ppo | {"tokens_per_second": 12345.6, "policy_loss": 0.1}) == (
        "reward_score 0.25  reward_kl 3  entropy 1.5  response_length 41.5  tokens_per_second 12,346"
    )
    assert live_metrics({"score": 1.0, "length": 2.0}) == "score 1  length 2"
    assert live_metrics({}) == ""


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1e-5, "1e-05"), (-0.123456, "-0.1235"), (999.96, "1000"), (1234.5, "1,234"), (float("nan"), "nan")],
)
def test_numbers(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.4, "59s"), (59.6, "1m00s"), (192, "3m12s"), (3599.7, "1h00m"), (90_000, "25h00m")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


# --- text ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("naïve 空 🙂\tand\nmore", "naïve 空 🙂\tand\nmore"),
        ("\x1b[31mred\x1b[0m", "\ufffd[31mred\ufffd[0m"),
        ("a\rb\r\nc", "a\ufffdb\nc"),
        ("\x00\x07\x7f\x9b", "\ufffd" * 4),
        ("\u202eevil\u2066", "\ufffdevil\ufffd"),
        ("path\udcff", "path\ufffd"),
        ("[bold]stays[/bold]", "[bold]stays[/bold]"),
        (5, "5"),
    ],
)
def test_text_that_cannot_steer_a_terminal(text, safe):
    assert plain(text) == safe


def test_what_a_stage_says_is_made_plain():
    said, _, stream = piped()
    said.note("\x1b[2J")
    said.begin("tr\x1bain", 1)
    said.log(1, {"sc\x07ore": 1.0})
    assert stream.getvalue() == "\ufffd[2J\ntr\ufffdain 1/1  sc\ufffdore 1\n"


def test_say_goes_to_stderr(capsys):
    say("hello \x1b")
    assert capsys.readouterr() == ("", "hello \ufffd\n")


# --- on a terminal ------------------------------------------------------------------------------------------------


class Screen(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self):
        return True


def live(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    clock, screen = Clock(), Screen()
    return Console(screen, live=True, clock=clock), clock, screen


def test_the_live_line_shows_steps_numbers_and_time_left(monkeypatch):
    said, clock, screen = live(monkeypatch)
    said.begin("train", 10)
    clock.now += 40.0
    said.log(4, {"loss": 1.25})
    said.end()
    last = screen.getvalue()
    assert "train" in last and "4/10" in last and "loss 1.25" in last and "1m00s left" in last
    assert said.progress is None


def test_notes_appear_above_the_live_line_as_they_are(monkeypatch):
    said, _, screen = live(monkeypatch)
    said.begin("tr[bold]ain", 10)
    said.note("a [red]note[/red] \x1b[31m")
    said.warn("careful")
    said.log(10, {"sc[blink]ore": 1.0})
    said.close()
    shown = screen.getvalue()
    assert "a [red]note[/red] \ufffd[31m" in shown and "warning: careful" in shown
    assert "tr[bold]ain" in shown and "sc[blink]ore 1" in shown


def test_a_phase_within_a_phase_has_a_line_of_its_own(monkeypatch):
    said, _, screen = live(monkeypatch)
    said.begin("train", 10)
    said.begin("evaluate", 3)
    said.log(3, {})
    said.end()
    assert said.progress is not None and len(said.progress.tasks) == 1
    said.log(5, {"loss": 1.0})
    said.end()
    assert said.progress is None and "5/10" in screen.getvalue()


def test_before_a_phase_notes_are_plain_lines_on_a_terminal_too(monkeypatch):
    said, _, screen = live(monkeypatch)
    said.note("reading rows")
    assert screen.getvalue() == "reading rows\n"


@pytest.mark.parametrize(("term", "terminal"), [("xterm", True), ("dumb", False)])
def test_a_terminal_that_cannot_redraw_is_none(monkeypatch, term, terminal):
    monkeypatch.setenv("TERM", term)
    assert is_terminal(Screen()) is terminal and not is_terminal(io.StringIO())


# --- ranks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "expected"), [("0", 0), ("3", 3), ("", 0), ("many", 0), ("4", 0)])
def test_rank(monkeypatch, text, expected):
    monkeypatch.setenv("WORLD_SIZE", "4" if text else "")
    monkeypatch.setenv("RANK", text)
    assert rank() == expected


def test_only_rank_0_reports(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with reporting() as said:
        assert isinstance(said, Silent)
    monkeypatch.setenv("RANK", "0")
    with reporting() as said:
        assert isinstance(said, console.Console) and said.live is False
