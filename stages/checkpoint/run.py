"""The output folder while a stage trains: its lock, its logs and its resume state."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import secrets
import typing
from dataclasses import dataclass, field
from pathlib import Path

from stages import __version__
from stages.checkpoint import atomic
from stages.checkpoint.lock import check_lock, release_lock, take_lock
from stages.checkpoint.manifest import FORMAT_VERSION, MANIFEST, SPLIT, Manifest, write_manifest
from stages.checkpoint.output_folder import (
    CONFIG,
    LOCK,
    METRICS,
    RUN,
    SAMPLES,
    Standing,
    inspect_folder,
    is_ours,
    read_record,
    refuse_inside_a_run,
)
from stages.checkpoint.states import STATE, ResumeState, owner_of, read_state, states_in, step_of, write_state
from stages.config import as_dict
from stages.errors import CheckpointError, OutputError
from stages.places import absolute, describe_special
from stages.reading import to_json

if typing.TYPE_CHECKING:
    from filelock import BaseFileLock
    from torch import Tensor


@dataclass
class Run:
    """A stage's output folder. Only a `writer` (rank 0) changes anything on disk; elsewhere those calls do nothing."""

    folder: Path
    stage: str
    config: object  # the stage's config dataclass
    inputs: dict[str, str]  # digests of what goes in, by name
    overwrite: bool = False
    writer: bool = True
    standing: Standing = Standing()  # of what the folder holds already
    warnings: list[str] = field(default_factory=list)
    _lock: BaseFileLock | None = None

    @property
    def manifest(self) -> Manifest | None:
        """That of the checkpoint, once there is one."""
        return self.standing.manifest

    @property
    def finished(self) -> bool:
        """True where the same command has been run to its end; `manifest` says what came out."""
        return self.manifest is not None

    @property
    def resuming(self) -> bool:
        """True where an unfinished run of the same command is there, or one that can go on as this command asks."""
        return self.standing.resuming

    def inspect(self) -> None:
        """Set `standing` by what the folder holds. Raises as `open_run` does."""
        self.standing = inspect_folder(self)
        self.warnings += [warning for warning in self.standing.warnings if warning not in self.warnings]

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
            self.inspect()  # again, now that nobody else can change it
            if self.finished:
                raise OutputError(
                    "another process has just finished this run", where=str(self.folder), fix="run the command again"
                )
            self._clear_leftovers()
            if self.resuming:
                self._go_on()
            else:
                self._begin_anew()
        except BaseException:
            self.release()
            raise

    def _begin_anew(self) -> None:
        """Mark the folder as this run's first, so that a kill while clearing never leaves it without an owner."""
        old = read_record(self.folder, MANIFEST) or {}
        self._write_record(secrets.token_hex(8))
        self._clear_old(old.get("files", {}))

    def _go_on(self) -> None:
        """Make the folder's run an unfinished one of this command's choices; its last state is where it goes on."""
        newest = next(map(owner_of, self._states()), None)
        self._write_record(self._id() or newest or secrets.token_hex(8))
        atomic.remove(self.folder / MANIFEST)
        atomic.sync(self.folder)
        if not self._own_states():  # killed before its first state, perhaps while clearing: the same as new
            self._clear_old()

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
            if (name in listed or is_ours(name)) and name not in (RUN, LOCK):
                atomic.remove(self.folder / name)

    def finish(self, manifest: Manifest, files: list[str]) -> Manifest | None:
        """Publish the checkpoint (`config` and `inputs` are the run's own), then remove what only a run needs.

        Returns the manifest as stored; raises what `manifest.write_manifest` raises.
        """
        if not self.writer:
            return None
        made = {"config": as_dict(self.config), "inputs": dict(self.inputs)}
        asked = dataclasses.replace(manifest, **made, versions=manifest.versions | {"split": SPLIT})
        self.standing = Standing(write_manifest(self.folder, asked, files))
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
        self._lock = take_lock(self.folder / LOCK)
        if self._lock is None:
            self.warnings.append(f"{self.folder}: this file system has no locks; never run the command twice at once")

    def release(self) -> None:
        """Let go of the folder, finished or not."""
        if self._lock is not None:
            lock, self._lock = self._lock, None
            release_lock(lock, self.folder / LOCK)

    def _clear_leftovers(self) -> None:
        atomic.clear_leftovers(self.folder)
        for inner in (self.folder / STATE, self.folder / "critic"):
            if not inner.is_symlink():
                atomic.clear_leftovers(inner)

    # --- logs

    def log(self, step: int, metrics: dict[str, object]) -> None:
        """Append one line to metrics.jsonl. Raises OutputError."""
        if self.writer:
            atomic.append_text(self.folder / METRICS, to_json({"step": step} | metrics) + "\n")

    def samples(self, rows: list[dict[str, object]]) -> None:
        """Append a line per row to samples.jsonl. Raises OutputError."""
        if self.writer and rows:
            atomic.append_text(self.folder / SAMPLES, "".join(to_json(row) + "\n" for row in rows))

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
        return (read_record(self.folder, RUN) or {}).get("id")

    def _states(self) -> list[Path]:
        """Folders of states, the newest first."""
        return states_in(self.folder / STATE)[::-1]

    def _own_states(self) -> list[Path]:
        """Those that this run wrote, or that are too damaged to say; not those of a run that was overwritten."""
        mine = self._id()
        return [place for place in self._states() if owner_of(place) in (mine, None)] if mine else []


# --- opening -------------------------------------------------------------------------------------------------------


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
    refuse_inside_a_run(folder)
    run.inspect()
    if writer and not run.finished:
        check_lock(run.folder / LOCK)
    return run


def write_config(run: Run, config: object) -> None:
    """Write config.yaml: every knob as resolved, readable as a recipe."""
    if run.writer:
        import yaml

        text = yaml.safe_dump(as_dict(config), sort_keys=False, allow_unicode=True, width=120)
        atomic.write_text(run.folder / CONFIG, text)
