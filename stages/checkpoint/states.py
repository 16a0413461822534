"""Resume state: what a run was after a step, as tensors and facts, each with the digest by which it is known sound.

state/step-000200/state.safetensors   weights and moments of every optimiser
state/step-000200/state.json          the run it belongs to, step, facts, sizes of the logs, sha256 of both

Beside the steps lies what a stage need not compute again, such as what the reference of `rlhf dpo` says of its rows.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import typing
from dataclasses import dataclass
from pathlib import Path

from stages.checkpoint import atomic
from stages.checkpoint.tensors import load_tensors, save_tensors
from stages.errors import CheckpointError
from stages.reading import read_text, sha256_of

if typing.TYPE_CHECKING:
    from torch import Tensor

STATE, ABOUT, TENSORS = "state", "state.json", "state.safetensors"
AHEAD = "ahead"  # among the facts: numbers of an update that the weights have behind them, and the logs not yet


@dataclass(frozen=True)
class ResumeState:
    """What a resumed run goes on from."""

    step: int
    tensors: dict[str, Tensor]  # on the CPU, as they were saved
    facts: dict[str, object]
    sizes: dict[str, int]  # bytes of each log at that moment


def states_in(folder: Path) -> list[Path]:
    """Folders of states in a folder, the oldest first."""
    return sorted((place for place in folder.glob("step-*") if step_of(place) >= 0), key=step_of)


def step_of(place: Path) -> int:
    """The step that a state's folder is named after; -1 for another name."""
    match = re.fullmatch(r"step-(\d+)", place.name)
    return int(match[1]) if match else -1


def owner_of(place: Path) -> object:
    """The id of the run that saved a state; None where it is too damaged to say."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        return _read(place / ABOUT)["content"]["run"]
    return None


def _read(path: Path) -> typing.Any:
    """JSON of a state, infinities included. Raises OSError, ValueError and RecursionError."""
    return json.loads(read_text(path))


def write_state(place: Path, run: object, state: ResumeState) -> None:
    """Write a state of the run with this id, whole or not at all. Raises OutputError."""
    with atomic.folder(place) as temporary:
        save_tensors(temporary / TENSORS, state.tensors)
        digest = sha256_of(temporary / TENSORS)
        content = {"run": run, "step": state.step, "sizes": state.sizes, "tensors": digest, "facts": state.facts}
        content = json.loads(json.dumps(content))  # as it will be read, or the digest would not agree
        text = json.dumps({"sha256": _digest(content), "content": content}, indent=2)
        atomic.write_text(temporary / ABOUT, text + "\n")


def read_about(place: Path) -> dict[str, typing.Any]:
    """What state.json says, once every byte of the state has been checked; no torch. Raises CheckpointError."""
    try:
        stored = _read(place / ABOUT)
        content = stored["content"]
        if stored["sha256"] != _digest(content):
            raise CheckpointError(f"{ABOUT} is not what was saved", where=str(place))
        if sha256_of(place / TENSORS) != content["tensors"]:
            raise CheckpointError(f"{TENSORS} is not what was saved", where=str(place))
        about = {name: content[name] for name in ("run", "step", "facts", "sizes")}
        if (
            about["step"] != step_of(place)
            or type(about["step"]) is not int
            or not isinstance(about["facts"], dict)
            or not _are_sizes(about["sizes"])
        ):
            raise ValueError
        return about
    except OSError as error:
        raise CheckpointError(f"{error.strerror or error}", where=str(place)) from error
    except (ValueError, TypeError, KeyError, RecursionError):
        raise CheckpointError(f"{ABOUT} is not what was saved", where=str(place)) from None


def read_state(place: Path) -> ResumeState:
    """Read a state and check every byte of it. Raises CheckpointError."""
    about = read_about(place)
    return ResumeState(about["step"], load_tensors(place / TENSORS), about["facts"], about["sizes"])


def _are_sizes(value: object) -> bool:
    """True for numbers of bytes by the names of the logs."""
    return isinstance(value, dict) and all(type(size) is int and size >= 0 for size in value.values())


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
