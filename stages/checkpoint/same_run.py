"""Whether two runs are the same: differences of knobs and input digests, and which of them a run may have."""

from __future__ import annotations

import json
import math
import os
import re
import typing

from stages.knobs import as_dict
from stages.reading import to_json
from stages.recipe import differing


def differences(
    config: object, inputs: dict[str, str], old_config: dict[str, object], old_inputs: dict[str, object]
) -> list[str]:
    """One line per knob or input in which two runs differ, old value first; empty if they are the same run.

    `output` is the folder itself. A knob that is a path is ignored if both runs have a digest of its content.
    """
    stored = json.loads(to_json(as_dict(config)))
    inputs, old_inputs = ({_resolve_name(n): digest for n, digest in old.items()} for old in (inputs, old_inputs))
    lines = []
    for name in differing(config, old_config):
        old, new = old_config.get(name), stored.get(name, getattr(config, name, None))
        moved = name in inputs and name in old_inputs and isinstance(old, str) and isinstance(new, str)
        moved = moved or (name == "reward" and _resolve_sources(old) == _resolve_sources(new))
        if name != "output" and old != new and not moved:
            lines.append(f"{name}: {_short(old)} -> {_short(new)}")
    for name in sorted(inputs.keys() | old_inputs.keys()):
        old, new = old_inputs.get(name), inputs.get(name)
        if old != new:
            lines.append(f"content of {name}: {_short(old)} -> {_short(new)}")
    return lines


def _resolve_name(name: str) -> str:
    """The name of an input, with the path of a reward source resolved."""
    kind, space, place = name.partition(" ")
    return f"{kind} {os.path.realpath(os.path.expanduser(place))}" if kind == "reward" and space else name


def _resolve_sources(sources: object) -> list[str] | None:
    """Reward sources with their weights and resolved paths; None for something else."""
    if not isinstance(sources, list) or not all(isinstance(source, str) for source in sources):
        return None
    parts = [source.rpartition("=") if re.search(r"=[^=/]*$", source) else (source, "", "") for source in sources]
    return [f"{os.path.realpath(os.path.expanduser(name))}{equals}{weight}" for name, equals, weight in parts]


MOST_AUTO_EPOCHS = 3  # what epochs `auto` may have stood for


def _short(value: object) -> str:
    text = value[:12] if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) else to_json(value)
    return text if len(text) <= 80 else text[:77] + "..."


def ends_of(config: object) -> dict[str, object]:
    """The knobs of a config that set the length of training."""
    return {name: getattr(config, name) for name in ("max_steps", "epochs") if hasattr(config, name)}


def ends_later(config: object, old: dict[str, typing.Any], done: object) -> bool:
    """Whether a config sets more training than a stored one; `done` is the number of steps of a finished run."""
    new = ends_of(config)
    if not {"max_steps", "epochs"} <= new.keys() & old.keys():
        return False
    if new["max_steps"] is not None:
        return new["max_steps"] > (done or old["max_steps"] or math.inf)
    return old["max_steps"] is None and (new["epochs"] or 0) > (old["epochs"] or MOST_AUTO_EPOCHS)


def changed_functions(inputs: dict[str, str], old_inputs: dict[str, object]) -> dict[str, str]:
    """Digests of the Python files with reward functions that both runs have, if their content differs."""
    files = [name for name in inputs.keys() & old_inputs.keys() if name.startswith("reward ") and ".py" in name]
    return {name: inputs[name] for name in sorted(files) if inputs[name] != old_inputs[name]}
