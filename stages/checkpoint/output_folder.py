"""What an output folder holds already, and what a command may do there.

    run.json       stage, knobs and inputs of the run that owns the folder, while it is unfinished
    run.lock       held by the process that writes
    state/step-*   what a resumed run goes on from; the last few

A folder with checkpoint.json is finished, whatever else is in it; one with run.json alone is not; every other
folder with something in it belongs to somebody else and is never touched.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import os
import typing
from dataclasses import dataclass
from pathlib import Path

from stages.checkpoint import atomic
from stages.checkpoint.manifest import FORMAT_VERSION, MANIFEST, SPLIT, Manifest, read_manifest
from stages.checkpoint.same_run import changed_functions, differences, ends_later, ends_of
from stages.checkpoint.states import STATE, read_about, states_in
from stages.config import as_dict
from stages.errors import CheckpointError, OutputError
from stages.places import describe_special
from stages.reading import read_json
from stages.recipe import damaged_knob

if typing.TYPE_CHECKING:
    from stages.checkpoint.run import Run

RUN, LOCK = "run.json", "run.lock"
METRICS, SAMPLES, CONFIG = "metrics.jsonl", "samples.jsonl", "config.yaml"
_OURS = (  # what a stage writes into its folder, and so what --overwrite may remove
    METRICS, SAMPLES, CONFIG, STATE, "critic", "report.json", "adapter_model.safetensors", "adapter_config.json",
    "head.safetensors", "tokenizer*.json", "*.model", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json",
    "special_tokens_map.json", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


@dataclass(frozen=True)
class Standing:
    """How what an output folder holds stands to a command. Nothing set: the command begins anew."""

    manifest: Manifest | None = None  # the same command has been run to its end
    resuming: bool = False  # the same run is there unfinished, or with changes with which it can go on
    extending: bool = False  # it has an earlier end
    warnings: tuple[str, ...] = ()


def inspect_folder(run: Run) -> Standing:
    """See what a run's folder holds; raises as `open_run` does, and changes nothing."""
    standing = Standing()
    if _entries(run.folder):
        finished, begun = read_record(run.folder, MANIFEST), read_record(run.folder, RUN)
        if not (finished or begun):
            raise OutputError(
                "belongs to something else: it is not empty and holds no run of this tool",
                where=str(run.folder),
                fix="choose another --output; nothing in this folder will be touched",
            )
        try:
            standing = _compare(run, finished, begun)
        except (OutputError, CheckpointError):
            if not run.overwrite:
                raise
            _spare_inputs(run)
    if run.writer and standing == Standing():
        _check_writable(run.folder)
    if run.writer and standing.manifest is None:
        _refuse_links(run.folder)
    return standing


def _compare(run: Run, finished: dict[str, typing.Any] | None, begun: dict[str, typing.Any] | None) -> Standing:
    """How a folder's run, by its records, stands to a command. Raises OutputError and CheckpointError."""
    found = finished or begun
    _check_record(run.folder, MANIFEST if finished else RUN, found)
    _check_stage(run, found)
    config, inputs = found.get("config", {}), found.get("inputs", {})
    lines = differences(run.config, run.inputs, config, inputs)
    extending = bool(lines) and ends_later(run.config, config, found.get("steps"))
    changed = {} if finished else changed_functions(run.inputs, inputs)
    if lines:
        config = config | (ends_of(run.config) if extending else {})
        if differences(run.config, run.inputs, config, inputs | changed) or not _newest_is_sound(run.folder):
            raise _made_otherwise(run.folder, lines)
    manifest = read_manifest(run.folder) if finished else None
    if manifest is not None and not lines:
        return Standing(manifest)
    _check_split(run, found)
    names = ", ".join(name.removeprefix("reward ") for name in changed)
    warning = f"{names} changed since this run began; the steps behind it were scored by the old one"
    return Standing(resuming=True, extending=extending, warnings=(warning,) if changed else ())


def is_ours(name: str) -> bool:
    """True for the name of something that a stage writes into its folder."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in _OURS)


def _entries(folder: Path) -> list[str]:
    """Names in an output folder that mean something; none if it is not there."""
    if not os.path.lexists(folder):
        return []
    try:
        names = os.listdir(folder)
    except OSError as error:
        special = describe_special(folder)
        raise OutputError(
            f"cannot be used as a folder: {f'it is {special}' if special else error.strerror or error}",
            where=str(folder),
            fix="choose another --output",
        ) from error
    return [name for name in names if name != LOCK and not atomic.is_leftover(name)]


def read_record(folder: Path, name: str) -> dict[str, typing.Any] | None:
    """The content of a run.json or checkpoint.json of this tool; None where there is none, or somebody else's."""
    try:
        value = read_json(folder / name)
    except (OSError, ValueError):
        return None
    ours = isinstance(value, dict) and type(value.get("format_version")) is int and isinstance(value.get("stage"), str)
    ours = ours and all(isinstance(value.get(key, {}), dict) for key in ("config", "inputs", "files"))
    return value if ours else None


def _check_record(folder: Path, name: str, found: dict[str, typing.Any]) -> None:
    """Raise CheckpointError for numbers that no run ever had."""
    wrong = damaged_knob(found["stage"], found.get("config", {}))
    steps = found.get("steps", 0)
    if wrong or type(steps) is not int or steps < 0:
        raise CheckpointError(
            f"`{name}` is damaged at `{f'config.{wrong}' if wrong else 'steps'}`",
            where=str(folder),
            fix="restore the file, choose another --output, or start again with --overwrite",
        )


def _check_stage(run: Run, found: dict[str, typing.Any]) -> None:
    """Raise OutputError unless a folder's run is of the same stage, and of a version that can be read."""
    another = "choose another --output, or start again with --overwrite"
    if found["format_version"] > FORMAT_VERSION:
        raise OutputError("written by a newer rlhf", where=str(run.folder), fix=f"upgrade rlhf, or {another}")
    if found["stage"] != run.stage:
        raise OutputError(
            f"holds a run of `{found['stage']}`, not of `{run.stage}`", where=str(run.folder), fix=another
        )


def _made_otherwise(folder: Path, lines: list[str]) -> OutputError:
    """The error of a folder with a run of other choices, which `lines` name."""
    another = "choose another --output, or start again with --overwrite"
    if all(line.startswith(("max_steps: ", "epochs: ")) for line in lines) and not states_in(folder / STATE):
        another = f"its state was not kept (--keep-state), so it cannot go on from there: {another}"
    return OutputError(
        "made with other choices:\n" + "\n".join(f"    {line}" for line in lines),
        where=str(folder),
        fix=f"repeat the old choices to go on, {another}",
    )


def _check_split(run: Run, found: dict[str, typing.Any]) -> None:
    """Raise OutputError where a run would go on with other rows held out than those it began with."""
    splits = bool(getattr(run.config, "eval_fraction", 0)) and not getattr(run.config, "eval_dataset", None)
    made_by = found if "rlhf" in found else found.get("versions", {})  # run.json or a manifest
    if splits and "rlhf" in made_by and made_by.get("split") != SPLIT:
        raise OutputError(
            "was begun by an earlier rlhf, which held out other rows; going on would mix what is learned and tested",
            where=str(run.folder),
            fix="finish it with the version that began it, or start again with --overwrite",
        )


def _newest_is_sound(folder: Path) -> bool:
    with contextlib.suppress(CheckpointError):
        return any(read_about(place) for place in states_in(folder / STATE)[-1:])
    return False


def refuse_inside_a_run(folder: Path) -> None:
    """Raise OutputError for a folder inside what another run replaces and removes."""
    for place in (folder, *folder.parents):
        if place.name in (STATE, "critic") and any((place.parent / name).is_file() for name in (RUN, MANIFEST)):
            raise OutputError(
                f"lies in `{place.name}` of the run in {place.parent}, which that run removes",
                where=str(folder),
                fix="choose another --output",
            )


def _spare_inputs(run: Run) -> None:
    """Raise OutputError where --overwrite would remove what this very command reads."""
    folder = Path(os.path.realpath(run.folder))
    for name, value in as_dict(run.config).items():
        texts = value if isinstance(value, list) else [value]
        for text in (text for text in texts if isinstance(text, str) and name != "output"):
            for place in map(os.path.expanduser, (text, text.rpartition("=")[0], text.rpartition(":")[0])):
                if place and os.path.lexists(place) and Path(os.path.realpath(place)).is_relative_to(folder):
                    raise OutputError(
                        f"`{name}` lies in the folder that --overwrite would clear",
                        where=str(run.folder),
                        fix="choose another --output",
                    )


def _refuse_links(folder: Path) -> None:
    """Raise OutputError where something we would write or remove is a link: what it leads to is not ours."""
    for where, folders, files in os.walk(folder):
        for name in (*folders, *files):
            place = Path(where, name).relative_to(folder)
            top = place.parts[0]
            ours = top in (RUN, LOCK, MANIFEST) or is_ours(top) or atomic.is_leftover(top)
            if ours and (folder / place).is_symlink():
                raise OutputError(
                    f"`{place}` is a link to {os.readlink(folder / place)}, and nothing is written through it",
                    where=str(folder),
                    fix="remove the link, or choose another --output",
                )


def _check_writable(folder: Path) -> None:
    place = Path(os.path.abspath(folder))
    while not os.path.lexists(place):
        place = place.parent
    with atomic.raising_output_errors(folder):
        if not place.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(place))
        if not os.access(place, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(place))
