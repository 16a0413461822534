"""Errors that end a command. No torch, so that they can be raised before heavy imports."""

from __future__ import annotations

import re

WORDS = 500  # characters of an exception's own text in a message


def escape_lines(text: str) -> str:
    """A message with line breaks escaped, except those before the four spaces by which our own lines are indented."""
    return re.sub(r"\r|\n(?!    )", lambda end: repr(end[0])[1:-1], text)


def words_of(error: BaseException) -> str:
    """The text of an exception on one line, at most `WORDS` characters. Never raises."""
    try:
        text = " ".join(str(error).split())
    except BaseException as broken:  # noqa: BLE001  its __str__ may be user code
        return f"(its text cannot be printed: {type(broken).__name__})"
    return text if len(text) <= WORDS else text[: WORDS - 3] + "..."


def counted(number: int, nouns: str) -> str:
    """A number with its nouns: `2 rows`, and `1 row`."""
    return f"{number} {nouns.removesuffix('s') if number == 1 else nouns}"


def verb_for(number: int, verb: str) -> str:
    """A verb that is said of several things, as it is said of so many of them."""
    single = {"are": "is", "were": "was", "have": "has", "do": "does", "lose": "loses", "score": "scores"}
    return single[verb] if number == 1 else verb


class UserError(Exception):
    """A user error: `what` is wrong, `where` (file:line, field, flag), and how to `fix` it."""

    exit_code = 2
    told_by_first = False  # True if rank 0 reports the same error

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None):
        self.what, self.fix = escape_lines(what), escape_lines(fix) if fix else fix
        self.where = escape_lines(where) if where else where
        super().__init__(str(self))

    def __str__(self) -> str:
        subject, _, rest = self.what.partition(" ")
        if self.where and _bare(subject) == _bare(self.where.rpartition(": ")[2]):  # name a knob or flag once
            text = f"{self.where} {rest}"
        else:
            text = f"{self.where}: {self.what}" if self.where else self.what
        return text + (f"\n  -> {self.fix}" if self.fix else "")


def _bare(name: str) -> str:
    """A knob's name as a flag or a recipe may write it."""
    return name.removeprefix("--").replace("-", "_")


class ConfigError(UserError):
    """A knob that is unknown, of the wrong type, out of bounds, or contradicts another."""


class DatasetError(UserError):
    """A dataset that cannot be found, read, recognised or used; names file, line and field."""


class LongRow(DatasetError):
    """A row that is longer than its limit and is not cut; not a bad row."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, of the wrong stage, or does not fit another one."""


class ModelError(UserError):
    """A base model or tokenizer that cannot be loaded or does not do what a stage needs."""


class NotFiniteError(ModelError):
    """A model with finite weights whose outputs are not finite."""


class OutputError(UserError):
    """An output folder or file that this tool did not write, is in use, or cannot be written."""


class DeviceError(UserError):
    """A device or precision that is not available on this machine."""


class RankError(UserError):
    """Another rank of this run that ended, or cannot be reached."""


class OutOfMemory(DeviceError):
    """Too little memory even for one row, which has `tokens` tokens."""

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None, tokens: int = 0):
        self.tokens = tokens
        super().__init__(what, where=where, fix=fix)


class RewardError(UserError):
    """A reward source that cannot be loaded, raises, or returns something other than one finite number each."""


class JudgeError(UserError):
    """A judge that cannot be reached, refuses a request or replies in another format; `status` is its HTTP status."""

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None, status: int | None = None):
        self.status = status
        super().__init__(what, where=where, fix=fix)


class TrainingStopped(Exception):
    """Training stopped by a condition or by non-finite gradients; the last good state is kept."""

    exit_code = 3

    def __init__(self, reason: str, *, step: int, advice: str = ""):
        self.reason, self.step, self.advice = reason, step, advice
        super().__init__(f"stopped at step {step}: {reason}" + (f"\n  -> {advice}" if advice else ""))


class Interrupted(Exception):
    """A run ended by a signal; its state is saved, and the same command resumes from it."""

    def __init__(self, signal_number: int, *, step: int | None, output: str):
        self.exit_code = 128 + signal_number
        self.step, self.output = step, output
        saved = f"state of step {step} saved in {output}" if step is not None else f"nothing saved yet in {output}"
        super().__init__(f"interrupted; {saved}; run the same command again to resume")


class StopRequested(BaseException):
    """A signal, raised between forward passes; not an Exception, so that user code cannot catch it by accident."""

    def __init__(self, number: int, *, immediate: bool = False):
        self.number = number
        self.immediate = immediate  # raised anywhere, perhaps during an optimiser step
        self.exit_code = 128 + number
        super().__init__(f"signal {number}")
