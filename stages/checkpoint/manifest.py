"""The manifest of a checkpoint: stage, base, parents, config, metrics, and the sha256 of every file. Written last."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import typing
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from stages import __version__
from stages.checkpoint import atomic
from stages.checkpoint.digests import base_digest
from stages.errors import CheckpointError, UserError
from stages.reading import read_json, sha256_of, to_json
from stages.recipe import LARGEST, damaged_knob, is_stored

FORMAT_VERSION = 1
SPLIT = 2  # the rule of data/splits.py; the first one gave rows beyond eval_limit back to training
MANIFEST = "checkpoint.json"
_TRAIN_AGAIN = "copy the checkpoint again, or run the command that made it with --overwrite"


@dataclass(frozen=True)
class BaseRef:
    """The frozen base under a checkpoint."""

    name: str  # hub id, or the folder as it was given
    path: str | None  # absolute folder; None for a hub id
    digest: str  # digests.base_digest
    relative: str | None = None  # the folder relative to the checkpoint; `write_manifest` fills it in


@dataclass(frozen=True)
class Parent:
    """A checkpoint that this one was trained from."""

    role: str  # "policy", "reward", ...
    path: str  # absolute folder
    stage: str
    digest: str  # checkpoint_digest
    relative: str | None = None


@dataclass(frozen=True)
class Manifest:
    """The content of checkpoint.json; `write_manifest` fills in `files` and `created`, `read_manifest` `folder`."""

    stage: str
    base: BaseRef
    parents: tuple[Parent, ...]
    tokenizer_digest: str
    stop_token_ids: tuple[int, ...]
    config: dict[str, object]  # every knob as given
    datasets: dict[str, object]  # digests of the training data
    metrics: dict[str, object]  # the last step's
    throughput: dict[str, object]
    versions: dict[str, object]
    device: str
    dtype: str
    steps: int
    seconds: float
    inputs: dict[str, str] = field(default_factory=dict)  # digests of the inputs, compared if the command runs again
    files: dict[str, str] = field(default_factory=dict)  # relative name -> sha256
    created: str = ""  # UTC, ISO 8601
    folder: Path | None = None  # the folder it was read from; not stored


def versions() -> dict[str, str]:
    """Versions of Python, of this tool and of the libraries that affect its numbers, without importing them."""
    numbers = {"python": platform.python_version(), "rlhf": __version__}
    for name in ("torch", "transformers", "peft", "tokenizers", "safetensors", "bitsandbytes"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            numbers[name] = importlib.metadata.version(name)
    return numbers


def is_checkpoint(folder: str | Path) -> bool:
    """True if a folder holds a manifest, damaged or not."""
    return Path(folder, MANIFEST).is_file()


def checkpoint_digest(folder: str | Path) -> str:
    """sha256 of a checkpoint's manifest, and thereby of all its files. Raises CheckpointError if there is none."""
    try:
        return sha256_of(Path(folder, MANIFEST))
    except OSError as error:
        raise _unreadable(Path(folder), error) from error


# --- writing --------------------------------------------------------------------------------------------------------


def write_manifest(folder: str | Path, manifest: Manifest, files: list[str]) -> Manifest:
    """Make a folder a checkpoint: sync and hash the named files (relative to it), then write the manifest.

    Returns the manifest as `read_manifest` reads it. Raises CheckpointError for a file that is missing or outside the
    folder, OutputError if the system refuses to write.
    """
    folder = Path(folder)
    hashes = {}
    for name in sorted(files):
        path = _inside(folder, name)
        if not path.is_file():
            raise _broken(folder, f"`{name}` is missing")
        atomic.sync(path)
        hashes[name] = sha256_of(path)
    for place in sorted({Path(folder, name).parent for name in files}):
        atomic.sync(place)
    stored = dataclasses.replace(
        manifest,
        base=_with_relative(folder, manifest.base),
        parents=tuple(_with_relative(folder, parent) for parent in manifest.parents),
        files=hashes,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        folder=None,
    )
    content = {"format_version": FORMAT_VERSION} | dataclasses.asdict(stored)
    del content["folder"]
    readable = _parse(json.loads(to_json(content)), folder)
    atomic.write_json(folder / MANIFEST, content)
    return readable


_Ref = typing.TypeVar("_Ref", BaseRef, Parent)


def _with_relative(folder: Path, ref: _Ref) -> _Ref:
    if ref.path is None:
        return ref
    relative = os.path.relpath(os.path.realpath(ref.path), os.path.realpath(folder))
    return dataclasses.replace(ref, path=os.path.abspath(ref.path), relative=relative)


# --- reading --------------------------------------------------------------------------------------------------------


def read_manifest(folder: str | Path) -> Manifest:
    """A checkpoint's manifest; every file that it lists must exist and have its sha256.

    Raises CheckpointError for a file that is missing, damaged or outside the folder, and for a folder that is not a
    checkpoint, an unfinished run, or of a newer version.
    """
    folder = Path(folder)
    try:
        content = read_json(_inside(folder, MANIFEST))
    except OSError as error:
        raise _unreadable(folder, error) from error
    except ValueError as error:
        reason = f": {error}" if type(error) is ValueError else ""
        raise _broken(folder, f"`{MANIFEST}` is not JSON{reason}") from None
    manifest = _parse(content, folder)
    for name, digest in manifest.files.items():
        path = _inside(folder, name)
        try:
            damaged = sha256_of(path) != digest
        except FileNotFoundError:
            raise _broken(folder, f"`{name}` is missing") from None
        except OSError as error:
            raise _broken(folder, f"`{name}` cannot be read: {error.strerror or error}") from error
        if damaged:
            raise _broken(folder, f"`{name}` is damaged: its content is not what was saved")
    return manifest


def _parse(content: object, folder: Path) -> Manifest:
    """The manifest in checked JSON. Raises CheckpointError naming a key that is missing or has a wrong value."""
    if not isinstance(content, dict) or type(content.get("format_version")) is not int or content["format_version"] < 1:
        raise _broken(folder, f"`{MANIFEST}` is not a manifest of rlhf")
    if content["format_version"] > FORMAT_VERSION:
        what = f"written by a newer rlhf (format {content['format_version']}, this one reads up to {FORMAT_VERSION})"
        raise CheckpointError(what, where=str(folder / MANIFEST), fix="upgrade rlhf")
    hints = {name: hint for name, hint in typing.get_type_hints(Manifest).items() if name != "folder"}
    for name, hint in hints.items():
        if not is_stored(content.get(name), hint):
            raise _broken(folder, f"`{MANIFEST}` is damaged at `{name}`")
    values = {name: content[name] for name in hints}
    values["base"] = _reference(content["base"], BaseRef)
    values["parents"] = tuple(_reference(parent, Parent) for parent in content["parents"])
    values["stop_token_ids"] = tuple(content["stop_token_ids"])
    wrong = damaged_knob(values["stage"], values["config"])
    sound = {
        "base": _has_no_nul(values["base"]),
        "parents": all(map(_has_no_nul, values["parents"])),
        "stop_token_ids": all(0 <= number < 2**31 for number in values["stop_token_ids"]),
        "steps": 0 <= values["steps"] <= LARGEST,
        "seconds": values["seconds"] >= 0,
        f"config.{wrong}": not wrong,
    }
    for name, is_sound in sound.items():
        if not is_sound:
            raise _broken(folder, f"`{MANIFEST}` is damaged at `{name}`")
    return Manifest(**values, folder=folder)


def _reference(content: dict, cls: type[_Ref]) -> _Ref:
    return cls(**{f.name: content.get(f.name) for f in dataclasses.fields(cls)})


def _has_no_nul(ref: BaseRef | Parent) -> bool:
    return not any("\0" in text for text in dataclasses.astuple(ref) if text)


def _inside(folder: Path, name: str) -> Path:
    """The path of a listed file. Raises CheckpointError unless it is a plain relative name inside the folder."""
    plain = PurePosixPath(name)
    if not name or "\0" in name or "\\" in name or plain.is_absolute() or ".." in plain.parts or str(plain) != name:
        raise _broken(folder, f"`{name}` is not a plain file name inside the checkpoint")
    path = folder / name
    if name == "." or not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise _broken(folder, f"`{name}` leads outside the checkpoint")
    return path


def _unreadable(folder: Path, error: OSError) -> CheckpointError:
    """The error for a folder whose manifest cannot be read."""
    where, fix = folder, "give the output folder of a finished run"
    if not folder.is_dir():
        what = "no such folder"
    elif is_checkpoint(folder):
        what, where, fix = f"cannot read: {error.strerror or error}", folder / MANIFEST, "check its permissions"
    elif (folder / "run.json").is_file():
        what, fix = "this run has not finished", "run the same command again to resume it"
    else:
        what = f"not a checkpoint (no {MANIFEST})"
    return CheckpointError(what, where=str(where), fix=fix)


def _broken(folder: Path, what: str) -> CheckpointError:
    return CheckpointError(what, where=str(folder), fix=_TRAIN_AGAIN)


# --- finding the base and the parents of a checkpoint ---------------------------------------------------------------


def locate(folder: str | Path, stored: BaseRef | Parent) -> Path | str:
    """The folder of a manifest's base or parent: its old path, else the same path relative to the moved checkpoint.

    If both exist, the one with the right digest. For a base from the hub, its id.
    Raises CheckpointError with both paths if neither exists.
    """
    if stored.path is None:
        return stored.name
    places = [Path(stored.path)]
    if stored.relative is not None:
        places.append(Path(os.path.realpath(Path(os.path.realpath(folder), stored.relative))))
    present = [place for place in places if place.is_dir()]
    if not present:
        kind = "base model" if isinstance(stored, BaseRef) else f"{stored.stage} checkpoint"
        what = f"its {kind} is not at " + " nor at ".join(str(place) for place in dict.fromkeys(places))
        fix = "put it back at one of these places, " + (
            "or name it with --base" if isinstance(stored, BaseRef) else "or give another --model"
        )
        raise CheckpointError(what, where=str(folder), fix=fix)
    for place in present if len(present) > 1 and not present[0].samefile(present[1]) else ():
        if _matches(place, stored):
            return place
    return present[0]


def _matches(place: Path, stored: BaseRef | Parent) -> bool:
    try:
        return stored.digest == (base_digest(place) if isinstance(stored, BaseRef) else checkpoint_digest(place))
    except UserError:
        return False
