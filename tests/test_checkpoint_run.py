"""The output folder while a stage trains: who owns it, its logs, its resume state, and kills at every instant."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stages.checkpoint import atomic
from stages.checkpoint.manifest import BaseRef, Manifest, is_checkpoint, read_manifest, write_manifest
from stages.checkpoint.run import open_run, write_config
from stages.checkpoint.same_run import differences
from stages.checkpoint.tensors import load_tensors, save_tensors
from stages.config import RewardConfig, SftConfig
from stages.errors import CheckpointError, OutputError
from stages.recipe import read_recipe, resolve

CONFIG = SftConfig(model="tiny", dataset="rows.jsonl", output="x")
INPUTS = {"dataset": "1" * 64, "base": "2" * 64}
LISTED = ["adapter_model.safetensors", "config.yaml", "metrics.jsonl", "samples.jsonl"]  # in the manifest
FINAL = sorted([*LISTED, "checkpoint.json"])
METRICS = '{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 4.0}\n{"step": 3, "loss": 11.0}\n{"step": 4, "loss": 26.0}\n'
SAMPLES = '{"step": 2, "response": "é"}\n{"step": 4, "response": "é"}\n'

MANIFEST = Manifest(
    stage="sft",
    base=BaseRef("org/tiny", None, "d" * 64),
    parents=(),
    tokenizer_digest="e" * 64,
    stop_token_ids=(2,),
    config={},
    datasets={},
    metrics={},
    throughput={},
    versions={},
    device="cpu",
    dtype="float32",
    steps=4,
    seconds=1.0,
)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """No test here asks what a power cut leaves; test_files_manifest asks what is synced, and when."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def changed(**knobs) -> SftConfig:
    return dataclasses.replace(CONFIG, **knobs)


def opened(folder, config=CONFIG, inputs=INPUTS, **about):
    return open_run(folder, "sft", config, inputs, **about)


def started(folder, config=CONFIG, **about):
    run = opened(folder, config, **about)
    run.start()
    return run


def train(folder, config=CONFIG, steps=4, overwrite=False, seen=None):
    """A stage in small: the weight doubles and grows by step and seed, so after 4 steps it is 26 for seed 0."""
    run = opened(folder, config, overwrite=overwrite)
    if seen is not None:
        seen.append(run)
    if run.finished:
        run.tidy()
        return run
    run.start()
    state = run.resume()
    step, weight = (state.step, state.tensors["weight"]) if state else (0, torch.zeros(1))
    write_config(run, config)
    while step < steps:
        step += 1
        weight = 2 * weight + step + config.seed
        run.log(step, {"loss": float(weight)})
        if step % 2 == 0:
            run.samples([{"step": step, "response": "é"}])
        run.save_state(step, {"weight": weight}, {"step": step})
    if steps < 4:  # interrupted
        run.release()
        return run
    save_tensors(Path(folder) / "adapter_model.safetensors", {"weight": weight})
    run.finish(MANIFEST, LISTED)
    return run


def names(folder) -> list[str]:
    return sorted(os.listdir(folder))


def weight_in(folder) -> float:
    return load_tensors(Path(folder) / "adapter_model.safetensors")["weight"].item()


def assert_finished(folder, weight=26.0):
    assert names(folder) == FINAL
    read_manifest(folder)
    assert weight_in(folder) == weight


# --- what a folder may hold already


def test_a_run_from_nothing_to_finished(tmp_path):
    run = train(tmp_path / "new" / "x")
    assert_finished(tmp_path / "new" / "x")
    assert (tmp_path / "new/x/metrics.jsonl").read_text("utf-8") == METRICS
    assert (tmp_path / "new/x/samples.jsonl").read_text("utf-8") == SAMPLES
    assert run.manifest.config["learning_rate"] is None and run.manifest.inputs == INPUTS
    assert names(tmp_path) == ["new"] and names(tmp_path / "new") == ["x"]


def test_opening_writes_nothing(tmp_path):
    run = opened(tmp_path / "new" / "x")
    assert not run.finished and not run.resuming
    assert names(tmp_path) == []
    opened(tmp_path)
    assert names(tmp_path) == []


def test_the_same_command_again_is_finished(tmp_path):
    first = train(tmp_path)
    again = opened(tmp_path, changed(output="elsewhere", save_every=7, keep_state=True))
    assert again.finished and again.manifest.files == first.manifest.files
    assert_finished(tmp_path)


def test_other_choices_are_named_old_value_first(tmp_path):
    other = changed(learning_rate=1e-4, max_steps=9, output="y")
    for make in (lambda: train(tmp_path / "half", steps=2), lambda: train(tmp_path / "whole")):
        make()
    for folder in (tmp_path / "half", tmp_path / "whole"):
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        with pytest.raises(OutputError) as caught:
            opened(folder, other, INPUTS | {"dataset": "3" * 64})
        assert caught.value.what.splitlines()[1:] == [
            "    learning_rate: null -> 0.0001",
            "    max_steps: null -> 9",
            "    content of dataset: 111111111111 -> 333333333333",
        ]
        assert caught.value.where == str(folder) and "--overwrite" in caught.value.fix
        assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_moved_file_of_the_same_content_is_no_other_choice():
    mine, old = changed(dataset="b.jsonl", model="m2"), dataclasses.asdict(changed(dataset="a.jsonl", model="m1"))
    assert differences(mine, {"dataset": "1"}, old, {"dataset": "1"}) == ['model: "m1" -> "m2"']
    assert differences(mine, {"dataset": "2"}, old, {"dataset": "1"})[1] == 'content of dataset: "1" -> "2"'
    assert differences(mine, {}, old, {"base": "1"})[:1] == ['dataset: "a.jsonl" -> "b.jsonl"']
    assert differences(mine, {}, old, {"base": "1"})[-1] == 'content of base: "1" -> null'
    some = changed(eval_dataset="e.jsonl")
    assert (
        differences(some, {"eval_dataset": "1"}, dataclasses.asdict(CONFIG), {})[0] == 'eval_dataset: null -> "e.jsonl"'
    )


def test_another_stages_folder_is_refused_and_may_be_overwritten(tmp_path):
    train(tmp_path)
    config = RewardConfig(model="tiny", dataset="rows.jsonl", output="x")
    with pytest.raises(OutputError, match="holds a run of `sft`, not of `reward`.*\\n.*--overwrite"):
        open_run(tmp_path, "reward", config, INPUTS)
    open_run(tmp_path, "reward", config, INPUTS, overwrite=True).start()
    assert names(tmp_path) == ["run.json", "run.lock"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "content",
    [
        {"notes.txt": "mine"},
        {"adapter_model.safetensors": "somebody's"},
        {"run.json": '{"name": "another tool"}'},
        {"checkpoint.json": "[]", "run.json": "{"},
        {"checkpoint.json": '{"format_version": 1, "stage": "sft", "files": 3}'},
    ],
)
def test_a_foreign_folder_is_never_touched(tmp_path, overwrite, content):
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(OutputError, match="does not hold an rlhf run"):
        opened(tmp_path, overwrite=overwrite)
    assert {name: (tmp_path / name).read_text() for name in names(tmp_path)} == content


def test_a_file_a_dead_link_and_an_unwritable_place_are_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("file", "file/in", "link"):
        with pytest.raises(OutputError, match="is not a folder|cannot be used as a folder"):
            opened(tmp_path / name)
    monkeypatch.setattr(os, "open", read_only(os.open))
    with pytest.raises(OutputError, match="cannot write: Read-only file system.*\\n.*may write"):
        opened(tmp_path / "new" / "folder")


def test_a_run_is_not_resumed_where_nothing_can_be_written(tmp_path, monkeypatch):
    started(tmp_path).release()
    monkeypatch.setattr(os, "open", read_only(os.open))
    with pytest.raises(OutputError, match="cannot write: Read-only file system"):
        opened(tmp_path)


def read_only(real):
    """os.open on a file system that is mounted read-only."""

    def refuse(path, flags, *mode, **more):
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return real(path, flags, *mode, **more)

    return refuse


def test_a_run_of_a_newer_version_is_refused(tmp_path):
    started(tmp_path).release()
    record = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(record | {"format_version": 2}))
    with pytest.raises(OutputError, match="newer rlhf"):
        opened(tmp_path)


def test_a_finished_but_damaged_checkpoint_is_not_called_done(tmp_path):
    train(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="`adapter_model.safetensors` is damaged.*\\n.*--overwrite"):
        opened(tmp_path)
    train(tmp_path, overwrite=True)
    assert_finished(tmp_path)


def test_starting_clears_what_a_kill_left_and_puts_back_a_state_that_was_put_aside(tmp_path):
    train(tmp_path, steps=2)
    (tmp_path / ".rlhf-tmp-0123abcd-run.json").write_text("{")
    (tmp_path / "state" / ".rlhf-tmp-0123abcd-step-000002").mkdir()
    (tmp_path / "state" / "step-000002").rename(tmp_path / "state" / ".rlhf-old-0123abcd-step-000002")
    run = started(tmp_path)
    assert names(tmp_path) == ["config.yaml", "metrics.jsonl", "run.json", "run.lock", "samples.jsonl", "state"]
    assert names(tmp_path / "state") == ["step-000001", "step-000002"]
    assert run.resume().step == 2
    run.release()


# --- overwriting


def test_overwriting_removes_our_files_and_spares_a_persons(tmp_path):
    train(tmp_path)
    (tmp_path / "spiece.vocab").write_text("listed")
    write_manifest(tmp_path, read_manifest(tmp_path), [*LISTED, "spiece.vocab"])
    (tmp_path / "critic").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "plots").mkdir()
    run = started(tmp_path, changed(seed=1), overwrite=True)
    assert names(tmp_path) == ["notes.txt", "plots", "run.json", "run.lock"]
    run.release()
    train(tmp_path, changed(seed=1))
    assert names(tmp_path) == sorted([*FINAL, "notes.txt", "plots"])
    assert weight_in(tmp_path) == 41.0  # 2, 7, 18, 41


def test_overwriting_the_same_choices_goes_on_or_is_done(tmp_path):
    train(tmp_path, steps=3)
    run = started(tmp_path, overwrite=True)
    assert run.resuming and run.resume().step == 3
    run.release()
    train(tmp_path, overwrite=True)
    assert_finished(tmp_path)
    before = (tmp_path / "checkpoint.json").stat().st_mtime_ns
    assert opened(tmp_path, overwrite=True).finished
    train(tmp_path, overwrite=True)
    assert (tmp_path / "checkpoint.json").stat().st_mtime_ns == before


def test_overwriting_other_choices_starts_from_nothing(tmp_path):
    train(tmp_path, steps=3)
    run = started(tmp_path, changed(seed=1), overwrite=True)
    assert run.resume() is None and run.warnings == []
    assert names(tmp_path) == ["run.json", "run.lock"]
    run.release()


def test_overwriting_never_removes_what_the_command_reads(tmp_path):
    train(tmp_path)
    for knobs in (
        {"model": str(tmp_path)},
        {"dataset": str(tmp_path / "samples.jsonl")},
        {"lora_targets": ["q", f"{tmp_path}=0.5"]},
        {"chat_template": f"{tmp_path}/config.yaml:f"},
    ):
        with pytest.raises(OutputError, match=f"`{next(iter(knobs))}` is inside the folder"):
            opened(tmp_path, changed(**knobs), INPUTS | {"dataset": "3" * 64}, overwrite=True)
    assert_finished(tmp_path)


# --- the lock


def test_a_living_process_keeps_others_out_and_a_dead_one_does_not(tmp_path):
    code = (
        "import sys; from stages.config import SftConfig; from stages.checkpoint.run import open_run\n"
        "run = open_run(sys.argv[1], 'sft', SftConfig(model='tiny', dataset='rows.jsonl', output='x'),\n"
        "               {'dataset': '1' * 64, 'base': '2' * 64})\n"
        "run.start(); run.log(1, {'loss': 1.0}); print('ready', flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], **pipes) as child:
        assert child.stdout.readline() == "ready\n"
        for overwrite in (False, True):
            with pytest.raises(OutputError, match=f"in use by process {child.pid} on "):
                opened(tmp_path, overwrite=overwrite)
        assert opened(tmp_path, writer=False).resuming  # the other ranks of that very run
        child.kill()
        child.wait()
    assert json.loads((tmp_path / "run.lock").read_text())["pid"] == child.pid
    train(tmp_path)
    assert_finished(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == METRICS


def test_of_two_that_looked_at_once_one_starts(tmp_path):
    first, second = opened(tmp_path), opened(tmp_path)
    first.start()
    with pytest.raises(OutputError, match=f"in use by process {os.getpid()}"):
        second.start()
    first.release()
    train(tmp_path)
    with pytest.raises(OutputError, match="another process has just finished"):
        second.start()
    assert_finished(tmp_path)


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch):
    def refuse(handle, kind):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    run = train(tmp_path)
    assert_finished(tmp_path)
    assert len(run.warnings) == 1 and "no locks" in run.warnings[0]


def test_other_ranks_write_nothing(tmp_path):
    run = opened(tmp_path / "x", writer=False)
    run.start()
    run.log(1, {"loss": 1.0})
    run.samples([{"a": 1}])
    run.save_state(1, {"w": torch.ones(1)}, {})
    write_config(run, CONFIG)
    assert run.resume() is None and run.finish(MANIFEST, []) is None
    run.tidy()
    run.release()
    assert names(tmp_path) == []


def test_other_ranks_read_the_state_of_the_run_that_the_first_began(tmp_path):
    train(tmp_path, steps=3)
    other = opened(tmp_path, writer=False)
    first = started(tmp_path)
    assert other.resume().step == first.resume().step == 3
    first.release()


# --- logs and state


def test_a_log_line_is_plain_json(tmp_path):
    run = started(tmp_path)
    run.log(1, {"loss": float("nan"), "lr": 1e-5})
    run.samples([])
    run.samples([{"response": "a\nb"}, {"response": "\ud83d"}])
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": null, "lr": 1e-05}\n'
    lines = (tmp_path / "samples.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["response"] for line in lines] == ["a\nb", "\ud83d"]
    run.release()


def test_a_state_comes_back_exactly_and_two_are_kept(tmp_path):
    run = started(tmp_path)
    facts = {"best": float("-inf"), "mean": 0.1 + 0.2, "seen": [1, None, "é"], "deep": {"on": True}}
    for step in (50, 100, 150):
        run.log(step, {})
        run.save_state(step, {"w": torch.tensor([float(step)]), "m": torch.tensor([1e-45])}, facts)
    assert names(tmp_path / "state") == ["step-000100", "step-000150"]
    state = run.latest_state()
    assert state.step == 150 and state.facts == facts
    assert state.tensors["w"].tolist() == [150.0] and state.tensors["m"].item() == torch.tensor(1e-45).item() > 0
    assert state.sizes == {"metrics.jsonl": 13 + 14 + 14, "samples.jsonl": 0}
    run.release()


def test_facts_are_read_as_json_would_write_them(tmp_path):
    run = started(tmp_path)
    run.save_state(1, {}, {"counts": {2: "b", 10: "a"}, "pair": (1, 2), "nan": float("nan")})
    facts = run.latest_state().facts
    assert facts["counts"] == {"2": "b", "10": "a"} and facts["pair"] == [1, 2] and facts["nan"] != facts["nan"]
    assert run.warnings == []
    run.release()


def test_saving_a_step_twice_keeps_the_second(tmp_path):
    run = started(tmp_path)
    for value in (1.0, 2.0):
        run.save_state(5, {"w": torch.tensor(value)}, {})
    assert names(tmp_path / "state") == ["step-000005"]
    assert run.latest_state().tensors["w"].item() == 2.0
    run.release()


def damage_tensors(place):
    content = bytearray((place / "state.safetensors").read_bytes())
    content[-1] ^= 1
    (place / "state.safetensors").write_bytes(content)


def damage_facts(place):
    text = (place / "state.json").read_text()
    assert '"step": 3' in text
    (place / "state.json").write_text(text.replace('"step": 3', '"step": 4'))


def tear(name):
    return lambda place: (place / name).write_bytes((place / name).read_bytes()[:-9])


def lose(name):
    return lambda place: (place / name).unlink()


@pytest.mark.parametrize(
    "spoil",
    [damage_tensors, damage_facts, tear("state.json"), tear("state.safetensors"), lose("state.json"),
     lose("state.safetensors")],
)  # fmt: skip
def test_a_damaged_newest_state_is_passed_over_with_a_warning(tmp_path, spoil):
    train(tmp_path, steps=3)
    spoil(tmp_path / "state" / "step-000003")
    run = started(tmp_path)
    assert run.resuming
    state = run.resume()
    assert (state.step, state.tensors["weight"].item()) == (2, 4.0)
    assert len(run.warnings) == 1 and "step-000003 is damaged" in run.warnings[0]
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(METRICS.splitlines(True)[:2])
    assert names(tmp_path / "state") == ["step-000002"]
    run.release()
    train(tmp_path)
    assert_finished(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == METRICS


def test_with_every_state_damaged_the_run_starts_again(tmp_path):
    train(tmp_path, steps=3)
    for place in (tmp_path / "state").iterdir():
        damage_tensors(place)
    run = started(tmp_path)
    assert run.resume() is None and len(run.warnings) == 2
    assert names(tmp_path) == ["config.yaml", "run.json", "run.lock", "state"] and names(tmp_path / "state") == []
    run.release()


def test_resuming_cuts_what_was_logged_after_the_state(tmp_path):
    train(tmp_path, steps=2)
    with open(tmp_path / "metrics.jsonl", "a") as log:
        log.write('{"step": 3, "loss": 11.0}\n{"step": 4, "lo')
    with open(tmp_path / "samples.jsonl", "a") as log:
        log.write('{"step": 3')
    train(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text("utf-8") == METRICS
    assert (tmp_path / "samples.jsonl").read_text("utf-8") == SAMPLES


def test_logs_of_a_run_without_state_begin_anew(tmp_path):
    run = started(tmp_path)
    run.log(1, {"loss": 9.0})
    run.samples([{"a": 1}])
    run.release()
    run = started(tmp_path)
    assert run.resuming and run.resume() is None
    assert names(tmp_path) == ["run.json", "run.lock"]
    run.release()


def test_a_log_that_lost_lines_is_a_warning(tmp_path):
    train(tmp_path, steps=3)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    run = started(tmp_path)
    assert run.resume().step == 3
    assert len(run.warnings) == 1 and "earlier lines are lost" in run.warnings[0]
    run.release()


def test_keep_state_keeps_it(tmp_path):
    run = train(tmp_path, changed(keep_state=True))
    assert names(tmp_path) == sorted([*LISTED, "checkpoint.json", "state"])
    assert names(tmp_path / "state") == ["step-000003", "step-000004"]
    opened(tmp_path, changed(keep_state=True)).tidy()
    assert (run.folder / "state").is_dir()
    opened(tmp_path, changed()).tidy()  # the same command without the flag throws nothing away
    assert names(tmp_path / "state") == ["step-000003", "step-000004"] and run.finished


def test_the_written_config_is_a_recipe(tmp_path):
    config = changed(max_steps=7, map={"prompt": "q"}, lora_targets=["q_proj"], learning_rate=1e-5, model="ü: #1")
    run = started(tmp_path, config)
    write_config(run, config)
    run.release()
    assert resolve(SftConfig, read_recipe(tmp_path / "config.yaml", SftConfig), {}) == config


# --- kills and full disks, at every system call that changes the disk


class Killed(BaseException):
    """The process is gone at this very call."""


WRITES = ("open", "write", "fsync", "replace", "rename", "unlink", "mkdir", "makedirs", "ftruncate")


class Disk:
    """Stands in for `os` inside `atomic`: counts what changes the disk and fails at the `at`-th such call.

    A killed process writes half of what it was writing, and nothing after that. A full disk takes nothing new from
    then on, but still renames and removes.
    """

    def __init__(self, at: int, full: bool = False):
        self.at, self.full, self.calls, self.rmtree = at, full, 0, self.wrap("rmtree", atomic.shutil.rmtree)

    def __getattr__(self, name):
        return self.wrap(name, getattr(os, name)) if name in WRITES else getattr(os, name)

    def wrap(self, name, real):
        def call(*args, **kwargs):
            reads = name == "open" and not args[1] & os.O_CREAT
            if reads or (self.full and name not in ("open", "write", "fsync", "mkdir", "makedirs")):
                return real(*args, **kwargs)
            self.calls += 1
            if self.calls < self.at:
                return real(*args, **kwargs)
            if name == "write" and self.calls == self.at:
                os.write(args[0], bytes(args[1])[: len(args[1]) // 2])
            if self.full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if name == "rmtree" and self.calls == self.at:
                for path in sorted(Path(args[0]).rglob("*"))[-1:]:
                    path.unlink()
            raise Killed

        return call


def run_on(disk, monkeypatch, job) -> bool:
    """Run a job on a failing disk; True if the failure came. Its locks go as its process would."""
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "os", disk)
        patch.setattr(atomic, "shutil", disk)
        try:
            job(seen)
        except Killed:
            pass
        except OutputError as error:
            if not disk.full:
                raise
            assert "No space left" in error.what
        finally:
            for run in seen:
                if run._lock is not None:
                    run._lock.release()
                    run._lock = None
    return disk.calls >= disk.at


def quick(monkeypatch, job):
    """A job on a sound disk, without waiting for it."""
    assert not run_on(Disk(10**9), monkeypatch, job)


def every_instant(tmp_path, monkeypatch, prepare, job, full=False):
    """Yield a folder for each call at which the job can fail, after it failed there."""
    for at in range(1, 10_000):
        folder = tmp_path / str(at)
        quick(monkeypatch, lambda seen, folder=folder: prepare(folder))
        if not run_on(Disk(at, full), monkeypatch, lambda seen, folder=folder: job(folder, seen)):
            assert at > 12  # the job is not a trivial one
            return
        yield folder


def assert_never_mistaken(folder, weights):
    """Whatever stands in a folder after a kill: if it looks finished it is."""
    if is_checkpoint(folder):
        read_manifest(folder)
        assert weight_in(folder) in weights


@pytest.mark.full
@pytest.mark.parametrize("full", [False, True], ids=["kill", "full disk"])
def test_whenever_it_fails_the_same_command_ends_in_the_same_checkpoint(tmp_path, monkeypatch, full):
    def job(folder, seen):
        train(folder, seen=seen)

    for folder in every_instant(tmp_path, monkeypatch, lambda folder: None, job, full):
        assert_never_mistaken(folder, [26.0])
        assert not full or not [path for path in folder.rglob("*") if atomic.is_leftover(path.name)]
        quick(monkeypatch, lambda seen, folder=folder: train(folder, seen=seen))
        assert_finished(folder)
        assert (folder / "metrics.jsonl").read_text("utf-8") == METRICS
        assert (folder / "samples.jsonl").read_text("utf-8") == SAMPLES


@pytest.mark.full
def test_a_run_that_is_killed_while_resuming_resumes(tmp_path, monkeypatch):
    def prepare(folder):
        train(folder, steps=2)
        with open(folder / "metrics.jsonl", "a") as log:
            log.write('{"step": 3, "lo')

    def job(folder, seen):
        seen.append(opened(folder))
        seen[0].start()
        seen[0].resume()
        seen[0].save_state(2, {"weight": torch.tensor([4.0])}, {})

    for folder in every_instant(tmp_path, monkeypatch, prepare, job):
        assert_never_mistaken(folder, [26.0])
        quick(monkeypatch, lambda seen, folder=folder: train(folder, seen=seen))
        assert_finished(folder)
        assert (folder / "metrics.jsonl").read_text("utf-8") == METRICS


@pytest.mark.full
@pytest.mark.parametrize("old_steps", [3, 4], ids=["unfinished", "finished"])
def test_a_kill_while_overwriting_leaves_the_old_run_or_the_new_one(tmp_path, monkeypatch, old_steps):
    new = changed(seed=1)

    def prepare(folder):
        train(folder, steps=old_steps)
        (folder / "vocab.txt").write_text("of the old run's tokenizer")

    def job(folder, seen):
        seen.append(opened(folder, new, overwrite=True))
        seen[0].start()
        seen[0].resume()

    for folder in every_instant(tmp_path, monkeypatch, prepare, job):
        assert_never_mistaken(folder, [26.0, 41.0])
        try:
            quick(monkeypatch, lambda seen, folder=folder: train(folder, new, seen=seen))
        except OutputError as error:
            assert "holds a run with different knobs or inputs" in str(error)
            quick(monkeypatch, lambda seen, folder=folder: train(folder, new, overwrite=True, seen=seen))
        assert_finished(folder, weight=41.0)
