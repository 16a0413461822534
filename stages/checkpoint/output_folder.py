"""What an output folder holds already, and what a command may do there.

    run.json       stage, knobs and inputs of the run that owns the folder, while it is unfinished
    run.lock       held by the process that writes
    state/step-*   resume states; the last few

A folder with checkpoint.json is a finished run, whatever else is in it; one with run.json alone is an unfinished run.
Every other folder that is not empty is never changed.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import typing
from dataclasses import dataclass
from pathlib import Path

from stages.checkpoint import atomic
from stages.checkpoint.manifest import FORMAT_VERSION, MANIFEST, SPLIT, Manifest, read_manifest
from stages.checkpoint.same_run import changed_functions, differences, ends_later, ends_of
from stages.checkpoint.states import STATE, read_about, states_in
from stages.config import REMOVED
from stages.errors import CheckpointError, OutputError
from stages.knobs import as_dict
from stages.places import describe_special
from stages.reading import read_json
from stages.recipe import damaged_knob

if typing.TYPE_CHECKING:
    from stages.checkpoint.run import Run

RUN, LOCK = "run.json", "run.lock"
METRICS, SAMPLES, CONFIG, REPORT = "metrics.jsonl", "samples.jsonl", "config.yaml", "report.json"
START_AGAIN = "choose another --output, or start again with --overwrite"
_OURS = (  # what a stage writes into its folder, and so what --overwrite may remove
    METRICS, SAMPLES, CONFIG, REPORT, STATE, "critic", "adapter_model.safetensors", "adapter_config.json",
    "head.safetensors", "tokenizer*.json", "*.model", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json",
    "special_tokens_map.json", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


@dataclass(frozen=True)
class Standing:
    """How the content of an output folder relates to a command. With no field set, the command starts a new run."""

    manifest: Manifest | None = None  # of the finished run, if the same command made it
    resuming: bool = False  # the folder holds the same run unfinished, or one that this command may continue
    extending: bool = False  # that run has fewer max_steps or epochs
    warnings: tuple[str, ...] = ()


def inspect_folder(run: Run) -> Standing:
    """How the content of a run's folder relates to its command; raises as `open_run` does, and changes nothing."""
    standing = Standing()
    if _entries(run.folder):
        finished, begun = read_record(run.folder, MANIFEST), read_record(run.folder, RUN)
        if not (finished or begun):
            fix = "choose another --output; nothing in this folder will be changed"
            raise OutputError("is not empty and does not hold an rlhf run", where=str(run.folder), fix=fix)
        try:
            standing = _compare(run, finished or begun, finished is not None)
        except (OutputError, CheckpointError):
            if not run.overwrite:
                raise
            _spare_inputs(run)
    if run.writer and standing.manifest is None:
        atomic.check_place(run.folder, RUN)
        _refuse_links(run.folder)
    return standing


def _compare(run: Run, record: dict[str, typing.Any], finished: bool) -> Standing:
    """How the run that a record describes relates to a command. Raises OutputError and CheckpointError."""
    _check_record(run, MANIFEST if finished else RUN, record)
    config, inputs = record.get("config", {}), record.get("inputs", {})
    lines = differences(run.config, run.inputs, config, inputs)
    extending = bool(lines) and ends_later(run.config, config, record.get("steps"))
    changed = {} if finished else changed_functions(run.inputs, inputs)
    if lines:
        config = config | (ends_of(run.config) if extending else {})
        states = states_in(run.folder / STATE)
        if differences(run.config, run.inputs, config, inputs | changed) or not any(map(_is_sound, states[-1:])):
            raise _different_run(run, lines, states)
    manifest = read_manifest(run.folder) if finished else None
    if manifest is not None and not lines:
        return Standing(manifest)
    _check_split(run, record)
    names = ", ".join(name.removeprefix("reward ") for name in changed)
    warning = f"{names} changed since this run began; earlier steps were scored by the old version"
    return Standing(resuming=True, extending=extending, warnings=(warning,) if changed else ())


def is_ours(name: str) -> bool:
    """True for the name of something that a stage writes into its folder."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in _OURS)


def _entries(folder: Path) -> list[str]:
    """Names in an output folder, without the lock and leftovers; none if it does not exist."""
    if not os.path.lexists(folder):
        return []
    try:
        names = os.listdir(folder)
    except OSError as error:
        special = describe_special(folder)
        what = f"cannot be used as a folder: {f'it is {special}' if special else error.strerror or error}"
        raise OutputError(what, where=str(folder), fix="choose another --output") from error
    return [name for name in names if name != LOCK and not atomic.is_leftover(name)]


def read_record(folder: Path, name: str) -> dict[str, typing.Any] | None:
    """The content of a run.json or checkpoint.json; None if it is missing or not of this tool."""
    try:
        value = read_json(folder / name)
    except (OSError, ValueError):
        return None
    ours = isinstance(value, dict) and type(value.get("format_version")) is int and isinstance(value.get("stage"), str)
    ours = ours and all(isinstance(value.get(key, {}), dict) for key in ("config", "inputs", "files"))
    return value if ours else None


def _check_record(run: Run, name: str, record: dict[str, typing.Any]) -> None:
    """Raise CheckpointError for impossible values, OutputError for a newer version or another stage."""
    folder, steps = str(run.folder), record.get("steps", 0)
    wrong = damaged_knob(record["stage"], record.get("config", {}))
    if wrong or type(steps) is not int or steps < 0:
        key = f"config.{wrong}" if wrong else "steps"
        raise CheckpointError(f"`{name}` is damaged at `{key}`", where=folder, fix=f"restore the file, {START_AGAIN}")
    if record["format_version"] > FORMAT_VERSION:
        raise OutputError("written by a newer rlhf", where=folder, fix=f"upgrade rlhf, or {START_AGAIN}")
    if record["stage"] != run.stage:
        raise OutputError(f"holds a run of `{record['stage']}`, not of `{run.stage}`", where=folder, fix=START_AGAIN)


def _different_run(run: Run, lines: list[str], states: list[Path]) -> OutputError:
    """The error for a folder with a run of other knobs or inputs, which `lines` name."""
    what = "holds a run with different knobs or inputs:\n" + "\n".join(f"    {line}" for line in lines)
    if all(line.startswith(("max_steps: ", "epochs: ")) for line in lines) and not states:
        what += "\n    that run cannot be extended: its state was not kept (--keep-state)"
    if any(line.partition(":")[0] in REMOVED for line in lines):
        fix = f"its value can no longer be set: finish the run with the rlhf that started it, or {START_AGAIN}"
        return OutputError(what, where=str(run.folder), fix=fix)
    return OutputError(what, where=str(run.folder), fix=f"use the old values to resume, or {START_AGAIN}")


def _check_split(run: Run, record: dict[str, typing.Any]) -> None:
    """Raise OutputError if a resumed run would hold out other rows than before."""
    splits = bool(getattr(run.config, "eval_fraction", 0)) and not getattr(run.config, "eval_dataset", None)
    made_by = record if "rlhf" in record else record.get("versions", {})  # run.json or a manifest
    if splits and "rlhf" in made_by and made_by.get("split") != SPLIT:
        what = "was started by an earlier rlhf, which held out other rows; a resumed run would train on evaluation rows"
        fix = "finish it with the version that started it, or start again with --overwrite"
        raise OutputError(what, where=str(run.folder), fix=fix)


def _is_sound(state: Path) -> bool:
    with contextlib.suppress(CheckpointError):
        return bool(read_about(state))
    return False


def refuse_inside_a_run(folder: Path) -> None:
    """Raise OutputError for a folder inside what another run replaces and removes."""
    for place in (folder, *folder.parents):
        if place.name in (STATE, "critic") and any((place.parent / name).is_file() for name in (RUN, MANIFEST)):
            what = f"is inside `{place.name}` of the run in {place.parent}, which that run removes"
            raise OutputError(what, where=str(folder), fix="choose another --output")


def _spare_inputs(run: Run) -> None:
    """Raise OutputError if --overwrite would remove an input of this command."""
    folder = Path(os.path.realpath(run.folder))
    for name, value in as_dict(run.config).items():
        texts = value if isinstance(value, list) else [value]
        for text in (text for text in texts if isinstance(text, str) and name != "output"):
            for place in map(os.path.expanduser, (text, text.rpartition("=")[0], text.rpartition(":")[0])):
                if place and os.path.lexists(place) and Path(os.path.realpath(place)).is_relative_to(folder):
                    what = f"`{name}` is inside the folder that --overwrite would clear"
                    raise OutputError(what, where=str(run.folder), fix="choose another --output")


def _refuse_links(folder: Path) -> None:
    """Raise OutputError if a file or folder to be written or removed is a link, whose target is not ours."""
    for where, folders, files in os.walk(folder):
        for name in (*folders, *files):
            place = Path(where, name).relative_to(folder)
            top = place.parts[0]
            ours = top in (RUN, LOCK, MANIFEST) or is_ours(top) or atomic.is_leftover(top)
            if ours and (folder / place).is_symlink():
                what = f"`{place}` is a link to {os.readlink(folder / place)}, and links are not written through"
                raise OutputError(what, where=str(folder), fix="remove the link, or choose another --output")
