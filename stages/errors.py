"""Every way a command can end other than well. No torch here: these answer before anything heavy loads."""

from __future__ import annotations

import re

WORDS = 500  # characters of an exception's own text in a message


def escape_lines(text: str) -> str:
    """A message whose names cannot begin lines of their own; lines of ours are indented by four spaces, and stay."""
    return re.sub(r"\r|\n(?!    )", lambda end: repr(end[0])[1:-1], text)


def words_of(error: BaseException) -> str:
    """What an exception says, in one line; nothing that it does when it is printed gets out."""
    try:
        text = " ".join(str(error).split())
    except BaseException as broken:  # noqa: BLE001  its __str__ is not ours
        return f"(its text cannot be printed: {type(broken).__name__})"
    return text if len(text) <= WORDS else text[: WORDS - 3] + "..."


class UserError(Exception):
    """A mistake of the user's: `what` is wrong, `where` (file:line, field, flag), what to do (`fix`)."""

    exit_code = 2
    told_by_first = False  # True where rank 0 says the same

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None):
        self.what, self.fix = escape_lines(what), escape_lines(fix) if fix else fix
        self.where = escape_lines(where) if where else where
        super().__init__(str(self))

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        advice = f"\n  -> {self.fix}" if self.fix else ""
        return f"{place}{self.what}{advice}"


class ConfigError(UserError):
    """A knob that is unknown, of the wrong type, out of bounds, or at odds with another."""


class DatasetError(UserError):
    """A dataset that cannot be found, read, recognised or used; names file, line and field."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, of the wrong stage, or does not fit another one."""


class ModelError(UserError):
    """A base model or tokenizer that cannot be loaded or does not do what a stage needs."""


class NotFiniteError(ModelError):
    """A model that computes numbers that are not finite, though its weights are."""


class OutputError(UserError):
    """An output folder or file that belongs to something else, is in use, or cannot be written."""


class DeviceError(UserError):
    """A device or precision that this machine does not have."""


class RankError(UserError):
    """Another rank of this run ended, or cannot be reached."""


class OutOfMemory(DeviceError):
    """Not even one row, of so many `tokens`, fits into memory."""

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None, tokens: int = 0):
        self.tokens = tokens
        super().__init__(what, where=where, fix=fix)


class RewardError(UserError):
    """A reward source that cannot be loaded, raises, or returns something other than one finite number each."""


class TrainingStopped(Exception):
    """Training stopped itself because going on would be useless; the last good state is kept."""

    exit_code = 3

    def __init__(self, reason: str, *, step: int, advice: str = ""):
        self.reason, self.step, self.advice = reason, step, advice
        super().__init__(f"stopped at step {step}: {reason}" + (f"\n  -> {advice}" if advice else ""))


class Interrupted(Exception):
    """A signal asked the run to end; its state is saved and the same command goes on from it."""

    def __init__(self, signal_number: int, *, step: int | None, output: str):
        self.exit_code = 128 + signal_number
        self.step, self.output = step, output
        saved = f"state of step {step} saved in {output}" if step is not None else f"nothing saved yet in {output}"
        super().__init__(f"interrupted; {saved}; run the same command again to go on")


class StopRequested(BaseException):
    """Raised between forward passes after a signal; not an Exception, so that no user code swallows it."""

    def __init__(self, number: int, *, immediate: bool = False):
        self.number = number
        self.immediate = immediate  # raised anywhere, perhaps in the middle of an optimiser step
        self.exit_code = 128 + number
        super().__init__(f"signal {number}")
