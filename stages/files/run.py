"""The output folder while a stage trains: what it holds already, its lock, its logs and its resume state.

    run.json       stage, knobs and inputs of the run that owns the folder, while it is unfinished
    run.lock       held by the process that writes
    state/step-*   what a resumed run goes on from; the last few

A folder with checkpoint.json is finished, whatever else is in it; one with run.json alone is not; every other
folder with something in it belongs to somebody else and is never touched.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import fnmatch
import json
import math
import os
import re
import secrets
import typing
from dataclasses import dataclass, field
from pathlib import Path

from stages import __version__
from stages.config import as_dict, damaged_knob, describe_special, differing
from stages.errors import CheckpointError, OutputError
from stages.files import atomic
from stages.files.manifest import FORMAT_VERSION, MANIFEST, Manifest, read_manifest, write_manifest
from stages.files.splits import SPLIT
from stages.files.states import STATE, ResumeState, owner_of, read_about, read_state, states_in, step_of, write_state
from stages.places import absolute

if typing.TYPE_CHECKING:
    from torch import Tensor

RUN, LOCK = "run.json", "run.lock"
METRICS, SAMPLES, CONFIG = "metrics.jsonl", "samples.jsonl", "config.yaml"
_OURS = (  # what a stage writes into its folder, and so what --overwrite may remove
    METRICS, SAMPLES, CONFIG, STATE, "critic", "report.json", "adapter_model.safetensors", "adapter_config.json",
    "head.safetensors", "tokenizer*.json", "*.model", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json",
    "special_tokens_map.json", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


@dataclass
class Run:
    """A stage's output folder. Only a `writer` (rank 0) changes anything on disk; elsewhere those calls do nothing."""

    folder: Path
    stage: str
    config: object  # the stage's config dataclass
    inputs: dict[str, str]  # digests of what goes in, by name
    overwrite: bool = False
    writer: bool = True
    manifest: Manifest | None = None  # of the checkpoint that is there already
    resuming: bool = False  # an unfinished run of the same command is there
    amending: bool = False  # so is one with an earlier end, or a since mended reward function, to go on from
    extending: bool = False  # the former
    warnings: list[str] = field(default_factory=list)
    _lock: int | None = None

    @property
    def finished(self) -> bool:
        """True where the same command has been run to its end; `manifest` says what came out."""
        return self.manifest is not None

    # --- beginning and ending

    def start(self) -> None:
        """Take the folder: make it, lock it, write run.json, and clear what a killed or overwritten run left.

        Raises OutputError where another process got there first, or the system refuses to write.
        """
        if not self.writer:
            return
        if self.finished:
            raise OutputError("finished already", where=str(self.folder), fix="there is nothing left to do")
        atomic.make_folder(self.folder)
        self._take_lock()
        try:
            _inspect_folder(self)  # again, now that nobody else can change it
            if self.finished:
                raise OutputError(
                    "another process has just finished this run", where=str(self.folder), fix="run the command again"
                )
            self._clear_leftovers()
            if self.amending:
                self._amend()
            elif not self.resuming:
                self._begin_anew()
            elif not self._own_states():  # killed before its first state, perhaps while clearing: the same as new
                self._clear_old()
        except BaseException:
            self.release()
            raise

    def _begin_anew(self) -> None:
        """Mark the folder as this run's first, so that a kill while clearing never leaves it without an owner."""
        old = _record(self.folder, MANIFEST) or {}
        self._write_record(secrets.token_hex(8))
        self._clear_old(old.get("files", {}))

    def _amend(self) -> None:
        """Make the folder's run an unfinished one of this command's choices; its last state is where it goes on."""
        self._write_record(self._id() or owner_of(self._states()[0]))
        atomic.remove(self.folder / MANIFEST)
        atomic.sync(self.folder)

    def _write_record(self, identity: object) -> None:
        record = {
            "format_version": FORMAT_VERSION,
            "id": identity,
            "stage": self.stage,
            "config": as_dict(self.config),
            "inputs": self.inputs,
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "rlhf": __version__,
            "split": SPLIT,
        }
        atomic.write_json(self.folder / RUN, record)

    def _clear_old(self, listed: typing.Collection[str] = ()) -> None:
        """Remove what a stage wrote, `listed` or known by name; what else a person put here stays."""
        atomic.remove(self.folder / MANIFEST)
        atomic.sync(self.folder)  # from here on it is no checkpoint, even after a power cut
        for name in sorted(os.listdir(self.folder)):
            if (name in listed or _is_ours(name)) and name not in (RUN, LOCK):
                atomic.remove(self.folder / name)

    def finish(self, manifest: Manifest, files: list[str]) -> Manifest | None:
        """Publish the checkpoint (`config` and `inputs` are the run's own), then remove what only a run needs.

        Returns the manifest as stored; raises what `manifest.write_manifest` raises.
        """
        if not self.writer:
            return None
        made = {"config": as_dict(self.config), "inputs": dict(self.inputs)}
        asked = dataclasses.replace(manifest, **made, versions=manifest.versions | {"split": SPLIT})
        self.manifest = write_manifest(self.folder, asked, files)
        self._remove_scaffold()
        self.release()
        return self.manifest

    def tidy(self) -> None:
        """Remove what a kill just after publishing left in a finished folder, if that is possible."""
        names = os.listdir(self.folder) if self.writer and self.finished else []
        scaffold = {RUN, LOCK} | (set() if self._keeps_state() else {STATE})
        if not any(name in scaffold or atomic.is_leftover(name) for name in names):
            return
        with contextlib.suppress(OutputError):
            self._take_lock()
            self._remove_scaffold()
        self.release()

    def _remove_scaffold(self) -> None:
        """Only once the manifest stands. A failure here harms nobody: the checkpoint is complete."""
        if not (self.folder / MANIFEST).is_file():
            return
        with contextlib.suppress(OutputError):
            if not self._keeps_state():
                atomic.remove(self.folder / STATE)
            atomic.remove(self.folder / RUN)
            self._clear_leftovers()

    def _keeps_state(self) -> bool:
        finished_with = self.manifest.config if self.manifest is not None else {}
        return bool(getattr(self.config, "keep_state", False) or finished_with.get("keep_state"))

    def _take_lock(self) -> None:
        self._lock = atomic.lock(self.folder / LOCK)
        if self._lock is None:
            self.warnings.append(f"{self.folder}: this file system has no locks; never run the command twice at once")

    def release(self) -> None:
        """Let go of the folder, finished or not."""
        if self._lock is not None:
            handle, self._lock = self._lock, None
            atomic.unlock(handle, self.folder / LOCK)

    def _clear_leftovers(self) -> None:
        atomic.clear_leftovers(self.folder)
        for inner in (self.folder / STATE, self.folder / "critic"):
            if not inner.is_symlink():
                atomic.clear_leftovers(inner)

    # --- logs

    def log(self, step: int, metrics: dict[str, object]) -> None:
        """Append one line to metrics.jsonl. Raises OutputError."""
        if self.writer:
            atomic.append_text(self.folder / METRICS, atomic.to_json({"step": step} | metrics) + "\n")

    def samples(self, rows: list[dict[str, object]]) -> None:
        """Append a line per row to samples.jsonl. Raises OutputError."""
        if self.writer and rows:
            atomic.append_text(self.folder / SAMPLES, "".join(atomic.to_json(row) + "\n" for row in rows))

    # --- resume state

    def save_state(self, step: int, tensors: dict[str, Tensor], facts: dict[str, object]) -> None:
        """Save what a resumed run needs to go on after `step`; the `keep_states` newest are kept.

        `facts` is JSON with text keys; its numbers come back exactly, infinities included. Raises OutputError.
        """
        if not self.writer:
            return
        sizes = {}
        for path in (self.folder / METRICS, self.folder / SAMPLES):
            if path.exists():
                atomic.sync(path)
            sizes[path.name] = path.stat().st_size if path.exists() else 0
        write_state(self.folder / STATE / f"step-{step:06d}", self._id(), ResumeState(step, tensors, facts, sizes))
        for old in self._states()[getattr(self.config, "keep_states", 2) :]:
            atomic.remove(old)

    def latest_state(self) -> ResumeState | None:
        """The newest sound state of this run, or None; a damaged one is passed over with a line in `warnings`."""
        for place in self._own_states():
            try:
                return read_state(place)
            except CheckpointError as error:
                self.warnings.append(f"{place} is damaged and was passed over ({error.what})")
        return None

    def resume(self) -> ResumeState | None:
        """The state to go on from (None: from the start), with the logs cut back to it so that a step stands once."""
        state = self.latest_state()
        if not self.writer:
            return state
        for name in (METRICS, SAMPLES):
            self._cut(self.folder / name, state.sizes.get(name, 0) if state else 0)
        for place in self._states():
            if state is None or step_of(place) > state.step:
                atomic.remove(place)
        return state

    def _cut(self, log: Path, size: int) -> None:
        found = log.stat().st_size if log.exists() else 0
        if found < size:
            self.warnings.append(f"{log} is shorter than it was; its earlier lines are gone")
        elif size == 0:
            atomic.remove(log)
        elif found > size:
            atomic.truncate(log, size)

    def _id(self) -> object:
        return (_record(self.folder, RUN) or {}).get("id")

    def _states(self) -> list[Path]:
        """Folders of states, the newest first."""
        return states_in(self.folder / STATE)[::-1]

    def _own_states(self) -> list[Path]:
        """Those that this run wrote, or that are too damaged to say; not those of a run that was overwritten."""
        mine = self._id()
        return [place for place in self._states() if owner_of(place) in (mine, None)] if mine else []


# --- what a folder holds already ------------------------------------------------------------------------------------


def open_run(
    output: str | Path,
    stage: str,
    config: object,
    inputs: dict[str, str],
    *,
    overwrite: bool = False,
    writer: bool = True,
) -> Run:
    """See what an output folder holds, and say whether this command starts, goes on, or has been done.

    `config` is the stage's dataclass; `inputs` are digests of what goes in. A knob that is the place of an input
    (`model`, `dataset`, ...) is judged by the digest under the knob's own name, if there is one, so a moved file is
    no other file. With `overwrite` a run of other choices, and a damaged one, begins anew; the same run goes on or is
    done all the same, since training again would give the same. Writes nothing: `Run.start` does.

    Raises OutputError where the folder belongs to something else, to another stage or to a run with other choices, is
    in use, or cannot be written; CheckpointError where it is finished but damaged.
    """
    place = absolute(output, "--output")
    # One folder has one name, however it is spelled; `a/../x` stands before `a` does.
    folder = place if describe_special(place) else Path(os.path.realpath(place))
    run = Run(folder, stage, config, dict(inputs), overwrite=overwrite, writer=writer)
    _refuse_inside_a_run(folder)
    _inspect_folder(run)
    if writer and not run.finished:
        atomic.check_lock(run.folder / LOCK)
    return run


def _refuse_inside_a_run(folder: Path) -> None:
    """Raise OutputError for a folder inside what another run replaces and removes."""
    for place in (folder, *folder.parents):
        if place.name in (STATE, "critic") and any((place.parent / name).is_file() for name in (RUN, MANIFEST)):
            raise OutputError(
                f"lies in `{place.name}` of the run in {place.parent}, which that run removes",
                where=str(folder),
                fix="choose another --output",
            )


def write_config(run: Run, config: object) -> None:
    """Write config.yaml: every knob as resolved, readable as a recipe."""
    if run.writer:
        import yaml

        text = yaml.safe_dump(as_dict(config), sort_keys=False, allow_unicode=True, width=120)
        atomic.write_text(run.folder / CONFIG, text)


def _inspect_folder(run: Run) -> None:
    """Set a run's `manifest` and `resuming` by what its folder holds. Raises as `open_run` does."""
    run.manifest, run.resuming, run.amending, run.extending = None, False, False, False
    if not _entries(run.folder):
        if run.writer:
            _check_writable(run.folder)
            _refuse_links(run.folder)
        return
    finished, begun = _record(run.folder, MANIFEST), _record(run.folder, RUN)
    found = finished or begun
    if found is None:
        raise OutputError(
            "belongs to something else: it is not empty and holds no run of this tool",
            where=str(run.folder),
            fix="choose another --output; nothing in this folder will be touched",
        )
    try:
        _check_record(run.folder, MANIFEST if finished else RUN, found)
        run.extending = _goes_further(run, found)
        if run.extending or (not finished and _changes_reward_code_only(run, found)):
            _same_split(run, found)
            run.resuming = run.amending = True
            if finished:
                read_manifest(run.folder)
            if run.writer:
                _refuse_links(run.folder)
            return
        _compare(run, found)
        if finished:
            run.manifest = read_manifest(run.folder)
        else:
            _same_split(run, found)
            run.resuming = True
    except (OutputError, CheckpointError):
        if not run.overwrite:
            raise
        _spare_inputs(run)
        if run.writer:
            _check_writable(run.folder)
    if run.writer and not run.finished:
        _refuse_links(run.folder)


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


def _record(folder: Path, name: str) -> dict[str, typing.Any] | None:
    """The content of a run.json or checkpoint.json of this tool; None where there is none, or somebody else's."""
    try:
        value = atomic.read_json(folder / name)
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


def _compare(run: Run, found: dict[str, typing.Any]) -> None:
    """Raise OutputError unless a folder's run is of the same stage, with the same choices and inputs."""
    another = "choose another --output, or start again with --overwrite"
    if found["format_version"] > FORMAT_VERSION:
        raise OutputError("written by a newer rlhf", where=str(run.folder), fix=f"upgrade rlhf, or {another}")
    if found["stage"] != run.stage:
        raise OutputError(
            f"holds a run of `{found['stage']}`, not of `{run.stage}`", where=str(run.folder), fix=another
        )
    lines = differences(run.config, run.inputs, found.get("config", {}), found.get("inputs", {}))
    ends = ("max_steps: ", "epochs: ")
    if lines and all(line.startswith(ends) for line in lines) and not run._states():
        another = f"its state was not kept (--keep-state), so it cannot go on from there: {another}"
    if lines:
        raise OutputError(
            "made with other choices:\n" + "\n".join(f"    {line}" for line in lines),
            where=str(run.folder),
            fix=f"repeat the old choices to go on, {another}",
        )


def _same_split(run: Run, found: dict[str, typing.Any]) -> None:
    """Raise OutputError where a run would go on with other rows held out than those it began with."""
    splits = bool(getattr(run.config, "eval_fraction", 0)) and not getattr(run.config, "eval_dataset", None)
    made_by = found if "rlhf" in found else found.get("versions", {})  # run.json or a manifest
    if splits and "rlhf" in made_by and made_by.get("split") != SPLIT:
        raise OutputError(
            "was begun by an earlier rlhf, which held out other rows; going on would mix what is learned and tested",
            where=str(run.folder),
            fix="finish it with the version that began it, or start again with --overwrite",
        )


def _goes_further(run: Run, found: dict[str, typing.Any]) -> bool:
    """True where a folder's run is this one but for an earlier end, and the state to go on from is there."""
    old = found.get("config", {})
    lines = differences(run.config, run.inputs, old | _ends_of(run.config), found.get("inputs", {}))
    same = found["format_version"] <= FORMAT_VERSION and found["stage"] == run.stage and not lines
    return same and _ends_later(_ends_of(run.config), old, found.get("steps")) and _newest_is_sound(run)


def _newest_is_sound(run: Run) -> bool:
    with contextlib.suppress(CheckpointError):
        return any(read_about(place) for place in run._states()[:1])
    return False


def _changes_reward_code_only(run: Run, found: dict[str, typing.Any]) -> bool:
    """True where a folder's run is this one but for the content of Python files that score; says so in `warnings`."""
    old = found.get("inputs", {})
    mended = {n for n in run.inputs if n.startswith("reward ") and ".py" in n and old.get(n, "") != run.inputs[n]}
    mended &= old.keys()
    lines = differences(run.config, run.inputs, found.get("config", {}), old | {n: run.inputs[n] for n in mended})
    same = found["format_version"] <= FORMAT_VERSION and found["stage"] == run.stage and not lines
    if not (same and mended and _newest_is_sound(run)):
        return False
    names = ", ".join(sorted(name.removeprefix("reward ") for name in mended))
    warning = f"{names} changed since this run began; the steps behind it were scored by the old one"
    run.warnings += [warning] if warning not in run.warnings else []
    return True


def _ends_of(config: object) -> dict[str, object]:
    return {name: getattr(config, name) for name in ("max_steps", "epochs") if hasattr(config, name)}


def _ends_later(new: dict[str, typing.Any], old: dict[str, typing.Any], done: object) -> bool:
    """Whether max_steps and epochs ask for more than before; `done` are the steps of a finished run."""
    if not {"max_steps", "epochs"} <= new.keys() & old.keys():
        return False
    if new["max_steps"] is not None:
        return new["max_steps"] > (done or old["max_steps"] or math.inf)
    return old["max_steps"] is None and new["epochs"] > old["epochs"]


def differences(
    config: object, inputs: dict[str, str], old_config: dict[str, object], old_inputs: dict[str, object]
) -> list[str]:
    """One line per knob or input in which two runs differ, old value first; empty where they are the same run.

    `output` is the folder itself. A knob that names a place is passed over where both runs know its content.
    """
    mine = json.loads(atomic.to_json(as_dict(config)))
    inputs, old_inputs = ({_place_of(n): digest for n, digest in found.items()} for found in (inputs, old_inputs))
    lines = []
    for name in differing(config, old_config):
        old, new = old_config.get(name), mine.get(name)
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
    text = value[:12] if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) else atomic.to_json(value)
    return text if len(text) <= 80 else text[:77] + "..."


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
    ours = [
        name for name in _names(folder) if name in (RUN, LOCK, MANIFEST) or _is_ours(name) or atomic.is_leftover(name)
    ]
    places = [folder / name for name in ours]
    for inner in (folder / STATE, folder / "critic"):
        places += [inner / name for name in _names(inner)]
    places += [state / name for state in (folder / STATE).glob("step-*") for name in _names(state)]
    for place in places:
        if place.is_symlink():
            raise OutputError(
                f"`{place.relative_to(folder)}` is a link to {os.readlink(place)}, and nothing is written through it",
                where=str(folder),
                fix="remove the link, or choose another --output",
            )


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def _is_ours(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in _OURS)


def _check_writable(folder: Path) -> None:
    place = Path(os.path.abspath(folder))
    while not os.path.lexists(place):
        place = place.parent
    with atomic.raising_output_errors(folder):
        if not place.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(place))
        if not os.access(place, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(place))
