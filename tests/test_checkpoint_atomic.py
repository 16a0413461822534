"""Writing whole or not at all, and tensors on disk."""

from __future__ import annotations

import errno
import json
import os

import pytest
import torch

from stages.checkpoint import atomic
from stages.checkpoint.tensors import load_tensors, read_header, save_tensors, tensor_metadata
from stages.errors import CheckpointError, OutputError
from stages.reading import sha256_of, to_json


class Killed(BaseException):
    """The process is gone: nothing it would still do reaches the disk."""


def names(folder) -> list[str]:
    return sorted(os.listdir(folder))


def raise_at(monkeypatch, name: str, error: BaseException) -> None:
    """Have one of atomic's system calls fail from now on; a `Killed` process does not clean up either."""

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(atomic.os, name, fail)
    if isinstance(error, Killed):
        monkeypatch.setattr(atomic, "_discard", lambda path: None)


# --- files


def test_written_bytes_replace_the_old_file(tmp_path):
    path = tmp_path / "new" / "deep" / "a.bin"
    atomic.write_bytes(path, b"old")
    atomic.write_bytes(path, b"\x00new\xff")
    assert path.read_bytes() == b"\x00new\xff"
    assert names(path.parent) == ["a.bin"]


def test_json_has_null_for_what_json_cannot_say_and_keeps_the_order(tmp_path):
    atomic.write_json(tmp_path / "a.json", {"z": float("nan"), "a": [float("inf"), 1.5, (True, None)], "é": "ü"})
    assert (tmp_path / "a.json").read_text("utf-8") == (
        '{\n  "z": null,\n  "a": [\n    null,\n    1.5,\n    [\n      true,\n      null\n    ]\n  ],\n  "é": "ü"\n}\n'
    )


def test_json_of_half_a_surrogate_pair_is_still_utf8():
    text = to_json({"prompt": "\ud83d!"})
    assert text.encode("utf-8") == b'{"prompt": "\\ud83d!"}'
    assert json.loads(text) == {"prompt": "\ud83d!"}


def test_new_files_have_the_permissions_of_any_other(tmp_path):
    (tmp_path / "plain").write_text("x")
    atomic.write_text(tmp_path / "ours", "x")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_link_is_written_through(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    atomic.write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


def test_something_other_than_a_file_is_never_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(OutputError, match="not a plain file"):
            atomic.write_text(tmp_path / name, "x")
    assert names(tmp_path) == ["folder", "pipe"]


@pytest.mark.parametrize("call", ["write", "fsync", "replace", "open"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_refusal_of_the_system_names_file_reason_and_remedy(tmp_path, monkeypatch, call, number):
    path = tmp_path / "a.txt"
    atomic.write_text(path, "old")
    with monkeypatch.context() as patch:
        raise_at(patch, call, OSError(number, os.strerror(number)))
        with pytest.raises(OutputError) as caught:
            atomic.write_text(path, "new")
    assert os.strerror(number) in caught.value.what
    assert caught.value.where == str(path)
    assert ("space" if number == errno.ENOSPC else "may write") in caught.value.fix
    assert names(tmp_path) == ["a.txt"]
    assert path.read_text() == "old"


def test_a_file_in_the_way_of_a_folder(tmp_path):
    (tmp_path / "a").write_text("x")
    for write in (
        lambda: atomic.write_text(tmp_path / "a" / "b" / "c", "x"),
        lambda: atomic.make_folder(tmp_path / "a"),
    ):
        with pytest.raises(OutputError, match="Not a directory"):
            write()


def test_short_writes_are_completed(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(atomic.os, "write", lambda handle, data: write(handle, data[:3]))
    atomic.write_text(tmp_path / "a", "0123456789")
    assert (tmp_path / "a").read_text() == "0123456789"


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_kill_leaves_the_old_file_and_a_leftover_that_is_recognised(tmp_path, monkeypatch, call):
    atomic.write_text(tmp_path / "a.txt", "old")
    with monkeypatch.context() as patch:
        raise_at(patch, call, Killed())
        with pytest.raises(Killed):
            atomic.write_text(tmp_path / "a.txt", "new")
    left = [name for name in names(tmp_path) if name != "a.txt"]
    assert len(left) == 1 and atomic.is_leftover(left[0])
    assert (tmp_path / "a.txt").read_text() == "old"
    atomic.clear_leftovers(tmp_path)
    assert names(tmp_path) == ["a.txt"]


def test_appending_takes_back_what_a_full_disk_took_in_part(tmp_path, monkeypatch):
    log = tmp_path / "log"
    atomic.append_text(log, "one\n")
    write = os.write

    def fill_up(handle, data):
        if len(data) < 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(handle, data[:3])

    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, "write", fill_up)
        with pytest.raises(OutputError, match="No space left"):
            atomic.append_text(log, "two three\n")
    assert log.read_text() == "one\n"
    atomic.append_text(log, "two\n")
    assert log.read_text() == "one\ntwo\n"


def test_truncate_and_remove(tmp_path):
    (tmp_path / "log").write_text("one\ntwo\n")
    atomic.truncate(tmp_path / "log", 4)
    assert (tmp_path / "log").read_text() == "one\n"
    (tmp_path / "folder" / "in").mkdir(parents=True)
    (tmp_path / "kept").mkdir()
    (tmp_path / "link").symlink_to("kept")
    for name in ("log", "folder", "link", "absent"):
        atomic.remove(tmp_path / name)
    assert names(tmp_path) == ["kept"]


def test_sha256_is_the_published_one(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")  # FIPS 180-2, example B.1
    assert sha256_of(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# --- folders


def test_a_folder_appears_whole_and_replaces_the_old_one(tmp_path):
    for content in ("old", "new"):
        with atomic.folder(tmp_path / "runs" / "x") as place:
            assert place.parent == tmp_path / "runs"
            (place / content).write_text(content)
            assert not (tmp_path / "runs" / "x" / content).exists()
    assert names(tmp_path / "runs") == ["x"]
    assert names(tmp_path / "runs" / "x") == ["new"]


def test_a_failing_block_changes_nothing(tmp_path):
    with atomic.folder(tmp_path / "x") as place:
        (place / "old").write_text("old")
    with pytest.raises(ZeroDivisionError), atomic.folder(tmp_path / "x") as place:
        (place / "new").write_text("new")
        raise ZeroDivisionError
    assert names(tmp_path) == ["x"]
    assert names(tmp_path / "x") == ["old"]


def test_writing_into_the_folder_is_explained_and_reading_elsewhere_is_not(tmp_path):
    with pytest.raises(OutputError, match="No space left") as caught, atomic.folder(tmp_path / "x"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert caught.value.where == str(tmp_path / "x")
    with pytest.raises(FileNotFoundError), atomic.folder(tmp_path / "x"):
        (tmp_path / "elsewhere").read_text()
    with pytest.raises(OutputError) as caught, atomic.folder(tmp_path / "x") as place:
        atomic.write_text(place, "a folder")
    assert caught.value.where == str(tmp_path / "x")  # never the temporary name
    assert names(tmp_path) == []


def test_a_full_disk_under_safetensors_is_explained(tmp_path):
    class SafetensorError(Exception):
        """What the library raises, which is no OSError."""

    with pytest.raises(OutputError, match="No space left on device"), atomic.folder(tmp_path / "x"):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(SafetensorError, match="something else"), atomic.raising_output_errors(tmp_path):
        raise SafetensorError("something else")


def test_a_file_is_not_replaced_by_a_folder(tmp_path):
    (tmp_path / "x").write_text("mine")
    with pytest.raises(OutputError, match="is a file, not a folder"), atomic.folder(tmp_path / "x"):
        pass
    assert (tmp_path / "x").read_text() == "mine"


def test_a_kill_between_the_two_renames_brings_the_old_folder_back(tmp_path, monkeypatch):
    with atomic.folder(tmp_path / "x") as place:
        (place / "old").write_text("old")
    rename, calls = os.rename, []

    def die_at_second(source, target):
        calls.append(source)
        if len(calls) > 1:
            raise Killed
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, "rename", die_at_second)
        patch.setattr(atomic, "_discard", lambda path: None)
        with pytest.raises(Killed), atomic.folder(tmp_path / "x") as place:
            (place / "new").write_text("new")
    assert not (tmp_path / "x").exists()
    atomic.clear_leftovers(tmp_path)
    assert names(tmp_path) == ["x"]
    assert names(tmp_path / "x") == ["old"]


def test_a_failed_second_rename_puts_the_old_folder_back_at_once(tmp_path, monkeypatch):
    with atomic.folder(tmp_path / "x") as place:
        (place / "old").write_text("old")
    rename, calls = os.rename, []

    def fail_at_second(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(source, target)

    monkeypatch.setattr(atomic.os, "rename", fail_at_second)
    with pytest.raises(OutputError), atomic.folder(tmp_path / "x") as place:
        (place / "new").write_text("new")
    assert names(tmp_path) == ["x"]
    assert names(tmp_path / "x") == ["old"]


def test_files_of_a_library_move_in_whole_beside_what_is_there(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a").write_text("old")
    (tmp_path / "x" / "other").write_text("other")
    with atomic.filling(tmp_path / "x") as place:
        (place / "a").write_text("new")
        (place / "b").write_text("b")
        assert (tmp_path / "x" / "a").read_text() == "old"
        assert atomic.is_leftover(place.name) and place.parent == tmp_path / "x"
    with pytest.raises(ZeroDivisionError), atomic.filling(tmp_path / "x") as place:
        (place / "b").write_text("never")
        raise ZeroDivisionError
    assert {name: (tmp_path / "x" / name).read_text() for name in names(tmp_path / "x")} == {
        "a": "new",
        "b": "b",
        "other": "other",
    }


def test_leftovers_of_one_name_and_of_all(tmp_path):
    for name in (".rlhf-tmp-0123abcd-x", ".rlhf-old-0123abcd-x", ".rlhf-tmp-0123abcd-y"):
        (tmp_path / name / "in").mkdir(parents=True)
    kept = [".rlhf-tmp-mine", "notes.txt", "x"]
    for name in kept:
        (tmp_path / name).mkdir()
    atomic.clear_leftovers(tmp_path, of="x")
    assert names(tmp_path) == sorted([".rlhf-tmp-0123abcd-y", *kept])
    atomic.clear_leftovers(tmp_path)
    assert names(tmp_path) == kept
    atomic.clear_leftovers(tmp_path / "absent")


# --- tensors


def test_tensors_come_back_bit_by_bit(tmp_path):
    flat = torch.arange(12, dtype=torch.float32)
    tensors = {
        "odd": torch.tensor([float("nan"), -0.0, float("inf"), 1e-45]),
        "half": torch.tensor([[1.5, -2.25]], dtype=torch.bfloat16),
        "whole": torch.tensor(7, dtype=torch.int64),
        "flags": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
        "turned": flat.reshape(3, 4).T,
        "overlapping": flat[2:9],
        "learned": torch.nn.Parameter(torch.ones(2)),
    }
    save_tensors(tmp_path / "a.safetensors", tensors)
    found = load_tensors(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        same = found[name].contiguous().flatten().view(torch.uint8)
        assert same.tolist() == tensor.detach().contiguous().flatten().view(torch.uint8).tolist()
    assert names(tmp_path) == ["a.safetensors"]


def test_metadata_comes_back(tmp_path):
    texts = {"b": "2", "a": "ä", "c": ""}
    save_tensors(tmp_path / "a", {"x": torch.arange(3.0)}, texts)
    assert tensor_metadata(tmp_path / "a") == texts
    assert load_tensors(tmp_path / "a")["x"].tolist() == [0.0, 1.0, 2.0]
    assert read_header(tmp_path / "a")[1] % 8 == 0
    save_tensors(tmp_path / "b", {})
    assert tensor_metadata(tmp_path / "b") == {} and load_tensors(tmp_path / "b") == {}


def test_every_truncation_of_a_tensor_file_is_recognised(tmp_path):
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"x": torch.arange(4.0), "y": torch.ones(2, dtype=torch.int64)})
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="damaged or incomplete"):
            load_tensors(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(CheckpointError, match="damaged or incomplete"):
        load_tensors(path)


@pytest.mark.parametrize(
    "content",
    [
        b"\xff" * 8,
        (2**62).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (8).to_bytes(8, "little") + b"not json",
        (9).to_bytes(8, "little") + b'{"x": {}}',
        (63).to_bytes(8, "little") + b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}'.ljust(63),
        (63).to_bytes(8, "little") + b'{"x":{"dtype":"??","shape":[1],"data_offsets":[0,4]}}'.ljust(63) + b"1234",
        (63).to_bytes(8, "little") + b'{"x":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}'.ljust(63) + b"1234",
    ],
)
def test_a_nonsensical_header_is_recognised(tmp_path, content):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged or incomplete") as caught:
        load_tensors(path)
    assert caught.value.where == str(path) and "--overwrite" in caught.value.fix


def test_a_missing_tensor_file_and_a_git_lfs_pointer(tmp_path):
    with pytest.raises(CheckpointError, match="No such file"):
        load_tensors(tmp_path / "absent")
    (tmp_path / "a").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        load_tensors(tmp_path / "a")


def test_a_full_disk_leaves_no_tensor_file(tmp_path, monkeypatch):
    raise_at(monkeypatch, "write", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with pytest.raises(OutputError, match="No space left"):
        save_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(3)})
    assert names(tmp_path) == []
