"""What a stage returns, and how it reports while it works. No torch, no terminal."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol


@dataclass(frozen=True)
class Table:
    """A small table for a person; every cell is text already."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Piece:
    """A piece of a text, and how it is to stand out."""

    text: str
    marked: bool = False  # what the passage is about, such as learned tokens
    special: bool = False  # a special token
    note: bool = False  # a remark, no part of the text


@dataclass(frozen=True)
class Passage:
    """A text in pieces, for a person."""

    title: str
    pieces: tuple[Piece, ...]


def bracketed(pieces: tuple[Piece, ...]) -> str:
    """Pieces as one text, with the marked ones in double brackets."""
    runs = groupby(pieces, key=lambda piece: piece.marked)
    texts = ((marked, "".join(piece.text for piece in run)) for marked, run in runs)
    return "".join(f"[[{text}]]" if marked else text for marked, text in texts)


@dataclass(frozen=True)
class Result:
    """How a command ended: `data` is the JSON object of --json, tables and `next` are for people."""

    command: str
    status: str  # "done", "already done", "dry run"
    output: str | None  # file or folder written
    data: dict[str, object]
    tables: tuple[Table, ...] = ()
    next: tuple[str, ...] = ()  # commands to run next
    passages: tuple[Passage, ...] = ()  # shown before the tables


class Reporter(Protocol):
    """What a stage reports while it works; the terminal decides how that looks."""

    def note(self, text: str) -> None:
        """Report one line of information."""

    def warn(self, text: str) -> None:
        """Report one line that asks for attention."""

    def begin(self, title: str, total: int, done: int = 0) -> None:
        """Start a phase of `total` steps, of which `done` are made."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Report that the phase is at `step`; `metrics` are this step's numbers (may be empty)."""

    def end(self) -> None:
        """End the phase."""


class Silent:
    """A `Reporter` without output."""

    def note(self, text: str) -> None: ...
    def warn(self, text: str) -> None: ...
    def begin(self, title: str, total: int, done: int = 0) -> None: ...
    def log(self, step: int, metrics: dict[str, float]) -> None: ...
    def end(self) -> None: ...


def reward_flags(sources: list[str], combine: object = "sum", std_coef: object = 1.0) -> str:
    """A --reward for every source, and how they are combined, ready for a shell."""
    flags = [f"--reward {shlex.quote(source)}" for source in sources]
    flags += [f"--reward-combine {combine}"] if combine not in ("sum", None) else []
    flags += [f"--reward-std-coef {std_coef}"] if combine == "mean-std" else []
    return " ".join(flags)


def next_commands(stage: str, config: Any, metrics: dict[str, Any]) -> tuple[str, ...]:
    """Commands that usually follow a training stage, ready for a shell; none after the verdict no-go."""
    output, model = shlex.quote(config.output), shlex.quote(config.model)
    if stage == "sft":
        return (f"rlhf reward --model {output} --dataset COMPARISONS --output DIR",)
    if stage == "reward" and metrics.get("verdict") == "no-go":
        return ()  # `rlhf ppo` would refuse it
    if stage == "reward":
        return (f"rlhf ppo --model {model} --reward {output} --dataset PROMPTS --output DIR",)
    rewards = reward_flags(config.reward, *config.combination) if stage == "ppo" else "--reward RM"
    compare = f"--against {model} {rewards} --dataset PROMPTS"
    return (f"rlhf evaluate --model {output} {compare}", f"rlhf export --model {output} --output DIR")
