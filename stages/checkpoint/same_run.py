"""Whether two runs are the same: knobs and the digests of inputs compared, and what may change while a run stands."""

from __future__ import annotations

import json
import math
import os
import re
import typing

from stages.config import as_dict
from stages.reading import to_json
from stages.recipe import differing


def differences(
    config: object, inputs: dict[str, str], old_config: dict[str, object], old_inputs: dict[str, object]
) -> list[str]:
    """One line per knob or input in which two runs differ, old value first; empty where they are the same run.

    `output` is the folder itself. A knob that names a place is passed over where both runs know its content.
    """
    mine = json.loads(to_json(as_dict(config)))
    inputs, old_inputs = ({_place_of(n): digest for n, digest in found.items()} for found in (inputs, old_inputs))
    lines = []
    for name in differing(config, old_config):
        old, new = old_config.get(name), mine.get(name, getattr(config, name, None))
        place = name in inputs and name in old_inputs and isinstance(old, str) and isinstance(new, str)
        place = place or (name == "reward" and _places_of(old) == _places_of(new))
        if name != "output" and old != new and not place:
            lines.append(f"{name}: {_short(old)} -> {_short(new)}")
    for name in sorted(inputs.keys() | old_inputs.keys()):
        old, new = old_inputs.get(name), inputs.get(name)
        if old != new:
            lines.append(f"content of {name}: {_short(old)} -> {_short(new)}")
    return lines


def _place_of(name: str) -> str:
    """The name of an input; that of a reward by the place it is at, however that is spelled."""
    kind, space, place = name.partition(" ")
    return f"{kind} {os.path.realpath(os.path.expanduser(place))}" if kind == "reward" and space else name


def _places_of(sources: object) -> list[str] | None:
    """Reward sources with their weights, by the places they are at."""
    if not isinstance(sources, list) or not all(isinstance(source, str) for source in sources):
        return None
    parts = [source.rpartition("=") if re.search(r"=[^=/]*$", source) else (source, "", "") for source in sources]
    return [f"{os.path.realpath(os.path.expanduser(name))}{equals}{weight}" for name, equals, weight in parts]


def _short(value: object) -> str:
    text = value[:12] if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) else to_json(value)
    return text if len(text) <= 80 else text[:77] + "..."


def ends_of(config: object) -> dict[str, object]:
    """The knobs of a config that say how long training lasts."""
    return {name: getattr(config, name) for name in ("max_steps", "epochs") if hasattr(config, name)}


def ends_later(config: object, old: dict[str, typing.Any], done: object) -> bool:
    """Whether a config asks for more training than a stored one; `done` are the steps of a finished run."""
    new = ends_of(config)
    if not {"max_steps", "epochs"} <= new.keys() & old.keys():
        return False
    if new["max_steps"] is not None:
        return new["max_steps"] > (done or old["max_steps"] or math.inf)
    return old["max_steps"] is None and new["epochs"] > old["epochs"]


def changed_functions(inputs: dict[str, str], old_inputs: dict[str, object]) -> dict[str, str]:
    """The inputs that are Python files with reward functions, known to both runs, with another content."""
    files = [name for name in inputs.keys() & old_inputs.keys() if name.startswith("reward ") and ".py" in name]
    return {name: inputs[name] for name in sorted(files) if inputs[name] != old_inputs[name]}
