"""Resume state: tensors and facts of a run after a step, each with the digest that shows damage.

state/step-000200/state.safetensors   weights and moments of every optimiser
state/step-000200/state.json          id of its run, step, facts, sizes of the logs, sha256 of both

The folder also caches results that a resumed stage would recompute, such as the reference log-probabilities of
`rlhf dpo`.
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
AHEAD = "ahead"  # the fact with metrics of an update that is in the weights but not yet in the logs


@dataclass(frozen=True)
class ResumeState:
    """The state of a run after a step, from which it resumes."""

    step: int
    tensors: dict[str, Tensor]  # on the CPU, as they were saved
    facts: dict[str, object]
    sizes: dict[str, int]  # bytes of each log at that moment


def states_in(folder: Path) -> list[Path]:
    """Folders of resume states in a folder, the oldest first."""
    return sorted((place for place in folder.glob("step-*") if step_of(place) >= 0), key=step_of)


def step_of(place: Path) -> int:
    """The step in the name of a state's folder; -1 for another name."""
    match = re.fullmatch(r"step-(\d+)", place.name)
    return int(match[1]) if match else -1


def owner_of(place: Path) -> object:
    """The id of the run that saved a state; None if it is too damaged to be read."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        return json.loads(read_text(place / ABOUT))["content"]["run"]
    return None


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
    """The `run`, `step`, `facts` and `sizes` of a state whose files are undamaged; no torch. Raises CheckpointError."""
    try:
        stored = json.loads(read_text(place / ABOUT))
        content = stored["content"]
        about = {name: content[name] for name in ("run", "step", "facts", "sizes")}
        sizes = about["sizes"].values() if isinstance(about["sizes"], dict) else (-1,)
        sound = stored["sha256"] == _digest(content) and type(about["step"]) is int
        sound = sound and about["step"] == step_of(place) and isinstance(about["facts"], dict)
        if not sound or not all(type(size) is int and size >= 0 for size in sizes):
            raise ValueError
        if sha256_of(place / TENSORS) != content["tensors"]:
            raise CheckpointError(f"{TENSORS} is not what was saved", where=str(place))
        return about
    except OSError as error:
        raise CheckpointError(f"{error.strerror or error}", where=str(place)) from error
    except (ValueError, TypeError, KeyError, RecursionError):
        raise CheckpointError(f"{ABOUT} is not what was saved", where=str(place)) from None


def read_state(place: Path) -> ResumeState:
    """A resume state, each byte checked by its digest. Raises CheckpointError."""
    about = read_about(place)
    return ResumeState(about["step"], load_tensors(place / TENSORS), about["facts"], about["sizes"])


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
