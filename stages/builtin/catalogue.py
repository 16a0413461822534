"""The built-in reward functions by name: `builtin:NAME` or `builtin:NAME:ARGUMENT`, and the columns that they need."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from stages.builtin import overlap, texts
from stages.builtin.answers import maths_score, reference_answer
from stages.errors import DatasetError, RewardError
from stages.places import BUILTIN

VERSION = 1  # part of the digests of built-in functions: raise it if any of them scores a response differently
REFERENCES = ("answer", "reference")
THINK = "<think>...</think>..."
ROUGES = ("rouge1", "rouge2", "rougeL", "rougeLsum")
PACKAGES = {"rouge": ("rouge_score", "rouge-score"), **dict.fromkeys(("bleu", "chrf"), ("sacrebleu", "sacrebleu"))}
SYNTAX = {
    "exact": "builtin:exact",
    "regex": "builtin:regex:PATTERN, or builtin:regex with a column `pattern`",
    "maths": "builtin:maths",
    "format": "builtin:format, or builtin:format:TEMPLATE such as <think>...</think><answer>...</answer>",
    "length": "builtin:length:TOKENS, builtin:length:WORDS:words, or builtin:length with a column `target_length`",
    "rouge": "builtin:rouge, or builtin:rouge:KIND with KIND among " + ", ".join(ROUGES),
    "bleu": "builtin:bleu",
    "chrf": "builtin:chrf",
}


@dataclass(frozen=True)
class Builtin:
    """A built-in reward function."""

    name: str  # as --reward has it
    score: Callable[[str, int, Any], float]  # of a response's text, its length in tokens, and the row's target
    columns: tuple[str, ...] = ()  # the first that a row has is its target; none if the name says everything
    read: Callable[[object], Any] = lambda cell: cell  # a cell as a target; raises ValueError with a reason

    def __call__(self, rows: list[Mapping[str, object]], responses: list[str], tokens: list[int]) -> list[float]:
        """The score of each response, for the columns of its row and its length in tokens."""
        targets = [self.read(self.cell(row)[1]) if self.columns else None for row in rows]
        return [self.score(*each) for each in zip(responses, tokens, targets, strict=True)]

    def cell(self, row: Mapping[str, object]) -> tuple[str, object]:
        """Name and content of the column that has the row's target; the first column and None if none has."""
        return next(((n, row[n]) for n in self.columns if row.get(n) is not None), (self.columns[0], None))

    def check(self, row: Mapping[str, object], where: str, flag: str) -> None:
        """Raise DatasetError, with the field, unless a row has what the function needs."""
        if not self.columns:
            return
        name, value = self.cell(row)
        wanted = " or ".join(f"`{column}`" for column in self.columns)
        try:
            if value is None:
                raise ValueError("is missing")
            self.read(value)
        except ValueError as error:
            raise DatasetError(
                f"`{name}` {error}; {flag} {self.name} needs the column {wanted}",
                where=f"{where}: {name}",
                fix=f"correct the row, rename a column with --map {name}=COLUMN, or pass --skip-bad-rows",
            ) from None


def open_builtin(name: str, flag: str) -> Builtin:
    """The function that `builtin:...` names. Raises RewardError for an unknown one, a bad argument, or a package."""
    kind, _, argument = name.removeprefix(BUILTIN).partition(":")
    if kind not in SYNTAX:
        known = ", ".join(BUILTIN + each for each in SYNTAX)
        raise RewardError(f"there is no `{name}`", where=flag, fix=f"choose from {known}")
    module, package = PACKAGES.get(kind, ("sys", ""))
    if importlib.util.find_spec(module) is None:
        what = f"{name} needs {package}, which is not installed"
        raise RewardError(what, where=flag, fix="run pip install 'rlhf[text]'")
    try:
        return OPENERS[kind](name, argument)
    except ValueError as error:
        raise RewardError(f"`{name}` {error}", where=flag, fix=f"write {SYNTAX[kind]}") from None


# --- cells


def read_references(cell: object) -> tuple[str, ...]:
    """A text, a number, or a list of either, as texts. Raises ValueError."""
    cells = cell if isinstance(cell, list) else [cell]
    if not cells:
        raise ValueError("is an empty list")
    return tuple(_as_text(each) for each in cells)


def _as_text(cell: object) -> str:
    if isinstance(cell, bool) or not isinstance(cell, (str, int, float)):
        raise ValueError("is no text or number")
    if not str(cell).strip():
        raise ValueError("is empty")
    return str(int(cell) if isinstance(cell, float) and cell.is_integer() else cell)


def read_answers(cell: object) -> tuple[str, ...]:
    """The reference answers of a maths problem. Raises ValueError."""
    return tuple(reference_answer(text) for text in read_references(cell))


def read_pattern(cell: object) -> str:
    """A regular expression. Raises ValueError."""
    if not isinstance(cell, str) or not cell:
        raise ValueError("is no text")
    texts.compiled(cell)
    return cell


def read_length(cell: object) -> float:
    """A target length. Raises ValueError."""
    try:
        length = 0.0 if isinstance(cell, bool) else float(cell)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        length = 0.0
    if not 1 <= length <= 10**9:
        raise ValueError("is no length: a number of at least 1 is needed")
    return length


# --- functions


def _without_argument(function: Builtin, argument: str) -> Builtin:
    if argument:
        raise ValueError(f"takes no argument `{argument}`")
    return function


def _referenced(name: str, argument: str, score: Callable, read: Callable = read_references) -> Builtin:
    function = Builtin(name, lambda text, _, target: score(text, target), (*REFERENCES, "completion"), read)
    return _without_argument(function, argument)


def _regex(name: str, argument: str) -> Builtin:
    if not argument:
        return Builtin(name, lambda text, _, pattern: texts.regex_score(text, pattern), ("pattern",), read_pattern)
    pattern = read_pattern(argument)
    return Builtin(name, lambda text, *_: texts.regex_score(text, pattern))


def _format(name: str, argument: str) -> Builtin:
    template = texts.read_template(argument or THINK)
    return Builtin(name, lambda text, *_: texts.format_score(text, template))


def _length(name: str, argument: str) -> Builtin:
    number, _, unit = argument.partition(":")
    if unit not in ("", "words", "tokens"):
        raise ValueError(f"has the unit `{unit}`: words or tokens")
    in_words = unit == "words"

    def score(text: str, tokens: int, target: float) -> float:
        return texts.length_score(len(text.split()) if in_words else tokens, target)

    if not number:
        return Builtin(name, score, ("target_length",), read_length)
    target = read_length(number)
    return Builtin(name, lambda text, tokens, _: score(text, tokens, target))


def _rouge(name: str, argument: str) -> Builtin:
    kind = argument or "rougeL"
    if kind not in ROUGES:
        raise ValueError(f"has no kind `{kind}`")
    return _referenced(name, "", partial(overlap.rouge_score, kind=kind))


OPENERS: dict[str, Callable[[str, str], Builtin]] = {
    "exact": partial(_referenced, score=texts.exact_score),
    "regex": _regex,
    "maths": partial(_referenced, score=maths_score, read=read_answers),
    "format": _format,
    "length": _length,
    "rouge": _rouge,
    "bleu": partial(_referenced, score=overlap.bleu_score),
    "chrf": partial(_referenced, score=overlap.chrf_score),
}


def short_name(name: str) -> str:
    """The name of a source in metrics: its kind, a file's function, or a folder's name, in letters, digits and _."""
    name = name.removeprefix(BUILTIN).partition(":")[0] if name.startswith(BUILTIN) else name
    stem = re.sub(r"\.py$", "", re.sub(r".*\.py:(?=\w)", "", name).rstrip("/:").rpartition("/")[2])
    return re.sub(r"\W+", "_", stem).strip("_") or "source"
