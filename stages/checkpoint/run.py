"""The output folder while a stage trains: its lock, its logs and its resume state."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
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
from stages.errors import CheckpointError, OutputError, counted
from stages.knobs import as_dict
from stages.places import absolute, describe_special
from stages.reading import to_json

if typing.TYPE_CHECKING:
    from filelock import BaseFileLock
    from torch import Tensor


@dataclass
class Run:
    """A stage's output folder. Only the `writer` (rank 0) changes files; on other ranks those calls do nothing."""

    folder: Path
    stage: str
    config: object  # the stage's config dataclass
    inputs: dict[str, str]  # digests of the inputs, by name
    overwrite: bool = False
    writer: bool = True
    standing: Standing = Standing()  # how the folder's content relates to the command
    warnings: list[str] = field(default_factory=list)
    _lock: BaseFileLock | None = None

    @property
    def manifest(self) -> Manifest | None:
        """The checkpoint's manifest, once there is one."""
        return self.standing.manifest

    @property
    def finished(self) -> bool:
        """True if the same command has been run to its end; `manifest` holds its result."""
        return self.manifest is not None

    @property
    def resuming(self) -> bool:
        """True if the folder holds an unfinished run of the same command, or one that this command may continue."""
        return self.standing.resuming

    def inspect(self) -> None:
        """Set `standing` from the folder's content. Raises as `open_run` does."""
        self.standing = inspect_folder(self)
        self.warnings += [warning for warning in self.standing.warnings if warning not in self.warnings]

    # --- beginning and ending

    def start(self) -> None:
        """Make and lock the folder, write run.json, and remove what a killed or overwritten run left.

        Raises OutputError if another process has the folder, or the system refuses to write.
        """
        if not self.writer:
            return
        atomic.make_folder(self.folder)
        self._take_lock()
        try:
            self.inspect()  # again, now that no other process can change it
            if self.finished:
                what, fix = "another process has just finished this run", "run the command again"
                raise OutputError(what, where=str(self.folder), fix=fix)
            self._clear_leftovers()
            listed = (read_record(self.folder, MANIFEST) or {}).get("files", {})
            owner = (self._id() or next(map(owner_of, self._states()), None)) if self.resuming else None
            self._write_record(owner or secrets.token_hex(8))  # first: a kill below leaves a folder with an owner
            atomic.remove(self.folder / MANIFEST)
            atomic.sync(self.folder)  # from here on it is not a checkpoint, even after a power cut
            if not (self.resuming and self._own_states()):  # a new run, or one killed before its first state
                self._clear_files_of_ours(listed)
        except BaseException:
            self.release()
            raise

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

    def _clear_files_of_ours(self, listed: typing.Collection[str]) -> None:
        """Remove the files of a stage, by the names in `listed` and those of `is_ours`; other files stay."""
        for name in sorted(os.listdir(self.folder)):
            if (name in listed or is_ours(name)) and name not in (RUN, LOCK):
                atomic.remove(self.folder / name)

    def finish(self, manifest: Manifest, files: list[str]) -> Manifest | None:
        """Publish the checkpoint with the run's `config` and `inputs`, then remove the files of an unfinished run.

        Returns the manifest as stored; raises what `manifest.write_manifest` raises.
        """
        if not self.writer:
            return None
        versions = manifest.versions | {"split": SPLIT}
        complete = dataclasses.replace(
            manifest, config=as_dict(self.config), inputs=dict(self.inputs), versions=versions
        )
        self.standing = Standing(write_manifest(self.folder, complete, files))
        self._remove_run_files()
        self.release()
        return self.manifest

    def tidy(self) -> None:
        """Remove what a kill just after publishing left in a finished folder, if possible."""
        names = os.listdir(self.folder) if self.writer and self.finished else []
        run_files = (RUN, LOCK) if self._keeps_state() else (RUN, LOCK, STATE)
        if not any(name in run_files or atomic.is_leftover(name) for name in names):
            return
        with contextlib.suppress(OutputError):
            self._take_lock()
            self._remove_run_files()
        self.release()

    def _remove_run_files(self) -> None:
        """Remove what only an unfinished run needs. A failure is ignored: the checkpoint is complete."""
        if not (self.folder / MANIFEST).is_file():  # another process has replaced the run meanwhile
            return
        with contextlib.suppress(OutputError):
            if not self._keeps_state():
                atomic.remove(self.folder / STATE)
            atomic.remove(self.folder / RUN)
            self._clear_leftovers()

    def _keeps_state(self) -> bool:
        stored = self.manifest.config if self.manifest is not None else {}
        return bool(getattr(self.config, "keep_state", False) or stored.get("keep_state"))

    def _take_lock(self) -> None:
        self._lock = take_lock(self.folder / LOCK)
        if self._lock is None:
            self.warnings.append(f"{self.folder}: this file system has no locks; do not run the command twice at once")

    def release(self) -> None:
        """Unlock the folder."""
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
        """Save the resume state after `step`, and remove all but the newest `keep_states`.

        `facts` is JSON with text keys; its numbers are read back exactly, infinities included. Raises OutputError.
        """
        if not self.writer:
            return
        sizes = {METRICS: 0, SAMPLES: 0}
        for name in sizes:
            if (self.folder / name).exists():
                atomic.sync(self.folder / name)
                sizes[name] = (self.folder / name).stat().st_size
        write_state(self.folder / STATE / f"step-{step:06d}", self._id(), ResumeState(step, tensors, facts, sizes))
        for old in self._states()[getattr(self.config, "keep_states", 2) :]:
            atomic.remove(old)

    def latest_state(self) -> ResumeState | None:
        """The newest sound state of this run, or None; a damaged one is skipped, with a line in `warnings`."""
        for place in self._own_states():
            try:
                return read_state(place)
            except CheckpointError as error:
                self.warnings.append(f"{place} is damaged and was skipped ({error.what})")
        return None

    def resume(self) -> ResumeState | None:
        """The state to resume from (None: from the start); log lines and states of later steps are removed."""
        state = self.latest_state()
        if not self.writer:
            return state
        for name in (METRICS, SAMPLES):
            log, size = self.folder / name, state.sizes.get(name, 0) if state else 0
            present = log.stat().st_size if log.exists() else 0
            if present < size:
                has = f"{log} has {counted(present, 'bytes')}"
                self.warnings.append(f"{has}, {size} at the saved state; earlier lines are lost")
            elif size == 0:
                atomic.remove(log)
            elif present > size:
                atomic.truncate(log, size)
        for place in self._states():
            if state is None or step_of(place) > state.step:
                atomic.remove(place)
        return state

    def _id(self) -> object:
        return (read_record(self.folder, RUN) or {}).get("id")

    def _states(self) -> list[Path]:
        return states_in(self.folder / STATE)[::-1]

    def _own_states(self) -> list[Path]:
        """States of this run and of an unknown owner (damaged); not those of a run that was overwritten."""
        identity = self._id()
        return [place for place in self._states() if owner_of(place) in (identity, None)] if identity else []


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
    """A run in an output folder: a new one, one to resume, or a finished one (`Run.standing`).

    `config` is the stage's dataclass; `inputs` are digests of the inputs. For a knob that is the path of an input
    (`model`, `dataset`, ...) the digest of that name is compared, if there is one, so that a file may be moved.
    With `overwrite`, a damaged run or one with other knobs is replaced; the same run is still resumed or finished,
    since training again would give the same result. Writes nothing: `Run.start` does.

    Raises OutputError if the folder holds something else, another stage's run or a run with other knobs, is in use, or
    cannot be written; CheckpointError if its run is finished but damaged.
    """
    place = absolute(output, "--output")
    # One name per folder, however the path is spelled; `a/../x` may be given before `a` exists.
    folder = place if describe_special(place) else Path(os.path.realpath(place))
    run = Run(folder, stage, config, dict(inputs), overwrite=overwrite, writer=writer)
    refuse_inside_a_run(folder)
    run.inspect()
    if writer and not run.finished:
        check_lock(run.folder / LOCK)
    return run


def read_metrics(run: Run) -> list[dict[str, float]]:
    """Every line of the run's metrics.jsonl."""
    text = (run.folder / METRICS).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def write_config(run: Run, config: object) -> None:
    """Write config.yaml: every knob as resolved, readable as a recipe."""
    if run.writer:
        import yaml

        text = yaml.safe_dump(as_dict(config), sort_keys=False, allow_unicode=True, width=120)
        atomic.write_text(run.folder / CONFIG, text)
