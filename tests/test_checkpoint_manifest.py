"""Identities of bases and tokenizers, and the manifest of a checkpoint."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stages.checkpoint import atomic
from stages.checkpoint.digests import base_digest, file_digest, tokenizer_digest
from stages.checkpoint.manifest import (
    BaseRef,
    Manifest,
    Parent,
    checkpoint_digest,
    is_checkpoint,
    locate,
    read_manifest,
    versions,
    write_manifest,
)
from stages.checkpoint.tensors import save_tensors
from stages.errors import CheckpointError, ModelError, OutputError, UserError

WEIGHTS = {"a": torch.arange(6000.0), "b": torch.ones(2, 3), "c": torch.zeros(0)}


def base(folder: Path, tensors=None, **config) -> Path:
    """A base model's folder, in one file."""
    folder.mkdir(parents=True)
    save_tensors(folder / "model.safetensors", WEIGHTS if tensors is None else tensors)
    (folder / "config.json").write_text(json.dumps({"hidden_size": 8} | config))
    return folder


# --- identity of a base


def test_the_digest_of_a_base_does_not_depend_on_how_it_is_split(tmp_path):
    whole = base(tmp_path / "whole")
    split = base(tmp_path / "split")
    (split / "model.safetensors").unlink()
    save_tensors(split / "model-00001-of-00002.safetensors", {"b": WEIGHTS["b"]}, {"format": "pt"})
    save_tensors(split / "model-00002-of-00002.safetensors", {"c": WEIGHTS["c"], "a": WEIGHTS["a"]})
    assert base_digest(split) == base_digest(whole)
    shards = {"b": "model-00001-of-00002.safetensors", "a": "model-00002-of-00002.safetensors"}
    (split / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    save_tensors(split / "consolidated.safetensors", {"other names": WEIGHTS["a"]})
    assert base_digest(split) == base_digest(whole)


def test_the_digest_of_a_base_ignores_what_saving_changes(tmp_path):
    one = base(tmp_path / "one", _name_or_path="x", dtype="float32", text_config={"torch_dtype": "float32", "n": 1})
    two = base(tmp_path / "two", transformers_version="5", text_config={"n": 1})
    assert base_digest(one) == base_digest(two)
    assert len(base_digest(one)) == 64


def test_the_digest_of_a_base_sees_names_dtypes_shapes_config_and_both_ends_of_every_tensor(tmp_path):
    first, last = WEIGHTS["a"].clone(), WEIGHTS["a"].clone()
    first[0], last[-1] = 9.0, 9.0
    folders = [
        base(tmp_path / "same"),
        base(tmp_path / "name", {"A" if name == "a" else name: tensor for name, tensor in WEIGHTS.items()}),
        base(tmp_path / "dtype", WEIGHTS | {"c": torch.zeros(0, dtype=torch.int32)}),
        base(tmp_path / "shape", WEIGHTS | {"b": torch.ones(3, 2)}),
        base(tmp_path / "first", WEIGHTS | {"a": first}),
        base(tmp_path / "last", WEIGHTS | {"a": last}),
        base(tmp_path / "config", hidden_size=9),
    ]
    assert len({base_digest(folder) for folder in folders}) == 7


def test_pickled_weights_are_refused_with_the_reason(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="holds no weights"):
        base_digest(tmp_path)
    for name in ("pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "weights.pt", "weights.pth"):
        (tmp_path / name).write_bytes(b"\x80\x04")
        with pytest.raises(ModelError, match=f"only pickled weights .{name}.*\\n.*convert them to safetensors"):
            base_digest(tmp_path)
        (tmp_path / name).unlink()


def test_folders_that_are_no_base(tmp_path):
    with pytest.raises(ModelError, match="no such folder"):
        base_digest(tmp_path / "absent")
    save_tensors(tmp_path / "adapter_model.safetensors", {"x": torch.ones(1)})
    with pytest.raises(ModelError, match="an adapter, not a base"):
        base_digest(tmp_path)
    folder = base(tmp_path / "base")
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match="config.json: cannot read: No such file"):
        base_digest(folder)


def test_a_damaged_base_is_named(tmp_path):
    folder = base(tmp_path / "base")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelError, match="model.safetensors: damaged or incomplete"):
        base_digest(folder)
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ModelError, match="git lfs pull"):
        base_digest(folder)
    path.unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    with pytest.raises(ModelError, match="gone.safetensors: cannot read: No such file"):
        base_digest(folder)


def test_identities_and_manifests_need_no_torch():
    code = (
        "import sys; from stages.checkpoint import digests, manifest, run; manifest.versions()\n"
        "assert not {'torch', 'safetensors', 'transformers', 'peft', 'yaml'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- identity of a tokenizer


def trained_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["</s>"], show_progress=False)
    tokenizer.train_from_iterator(["hello world, hello there"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def test_saving_a_tokenizer_again_keeps_its_digest(tmp_path):
    from transformers import AutoTokenizer

    trained_tokenizer().save_pretrained(tmp_path / "one")
    again = AutoTokenizer.from_pretrained(tmp_path / "one")
    again.pad_token = again.eos_token
    again.chat_template = "{{ messages }}"
    again(["hello", "world world"], padding=True, truncation=True, max_length=4)  # leaves its mark in tokenizer.json
    again.save_pretrained(tmp_path / "two")
    assert (tmp_path / "one" / "tokenizer.json").read_text() != (tmp_path / "two" / "tokenizer.json").read_text()
    assert (tmp_path / "two" / "chat_template.jinja").exists()
    assert tokenizer_digest(tmp_path / "one") == tokenizer_digest(tmp_path / "two")


def test_another_vocabulary_or_another_normalisation_is_another_tokenizer(tmp_path):
    trained_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    digests = {tokenizer_digest(tmp_path)}
    for part, value in (
        ("normalizer", {"type": "Lowercase"}),
        ("model", content["model"] | {"merges": content["model"]["merges"][:-1]}),
        ("model", content["model"] | {"vocab": content["model"]["vocab"] | {"new": 999}}),
        ("added_tokens", content["added_tokens"] + [{"id": 999, "content": "<|new|>"}]),
        ("pre_tokenizer", None),
        ("decoder", None),
        ("post_processor", {"type": "ByteLevel"}),
    ):
        path.write_text(json.dumps(content | {part: value}))
        digests.add(tokenizer_digest(tmp_path))
    assert len(digests) == 8


def test_the_older_spelling_of_merges_is_the_same_tokenizer(tmp_path):
    trained_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    new = tokenizer_digest(tmp_path)
    content = json.loads(path.read_text())
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    del content["model"]["ignore_merges"]
    path.write_text(json.dumps(content))
    assert tokenizer_digest(tmp_path) == new


def test_a_tokenizer_without_tokenizer_json_is_its_vocabulary_and_settings(tmp_path):
    with pytest.raises(ModelError, match="holds no tokenizer"):
        tokenizer_digest(tmp_path)
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    (tmp_path / "tokenizer_config.json").write_text(
        '{"do_lower_case": true, "name_or_path": "x", "chat_template": "y"}'
    )
    first = tokenizer_digest(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": true, "vocab_file": "/z"}')
    (tmp_path / "chat_template.jinja").write_text("y")
    assert tokenizer_digest(tmp_path) == first
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert tokenizer_digest(tmp_path) != first
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    assert tokenizer_digest(tmp_path) == first
    (tmp_path / "vocab.txt").write_text("b\na\n")
    assert tokenizer_digest(tmp_path) != first


def test_a_damaged_tokenizer_is_named(tmp_path):
    for content in ('{"model": ', "[]", "{}"):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(ModelError, match="tokenizer.json"):
            tokenizer_digest(tmp_path)


def test_digests_of_files_and_folders(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert file_digest(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    for name in ("one", "two"):
        (tmp_path / name / "in").mkdir(parents=True)
        (tmp_path / name / "in" / "x").write_bytes(b"abc")
    assert file_digest(tmp_path / "one") == file_digest(tmp_path / "two") != file_digest(tmp_path / "a")
    (tmp_path / "two" / "in" / "x").rename(tmp_path / "two" / "in" / "y")
    assert file_digest(tmp_path / "one") != file_digest(tmp_path / "two")
    with pytest.raises(UserError, match="No such file"):
        file_digest(tmp_path / "absent")


# --- the manifest


def manifest(**about) -> Manifest:
    values = {
        "stage": "sft",
        "base": BaseRef("org/tiny", None, "d" * 64),
        "parents": (),
        "tokenizer_digest": "e" * 64,
        "stop_token_ids": (2, 7),
        "config": {"learning_rate": 2e-4, "map": {}, "max_steps": None, "lora_targets": ["q", "v"]},
        "datasets": {"dataset": "f" * 64},
        "metrics": {"loss": 1.25},
        "throughput": {"tokens_per_second": 12.5},
        "versions": {"python": "3.11"},
        "device": "cpu",
        "dtype": "float32",
        "steps": 4,
        "seconds": 1.5,
    }
    return Manifest(**(values | about))


def checkpoint(folder: Path, **about) -> Path:
    (folder / "critic").mkdir(parents=True)
    (folder / "adapter.bin").write_bytes(b"abc")
    (folder / "critic" / "head.bin").write_bytes(b"")
    write_manifest(folder, manifest(**about), ["adapter.bin", "critic/head.bin"])
    return folder


def rewrite(folder: Path, **about) -> None:
    path = folder / "checkpoint.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | about))


def test_a_manifest_comes_back_as_it_was_published(tmp_path):
    folder = checkpoint(tmp_path / "x", inputs={"dataset": "1"})
    found = read_manifest(folder)
    assert found.files == {
        "adapter.bin": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
        "critic/head.bin": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    }
    assert found.folder == folder and found.created.endswith("+00:00")
    expected = manifest(inputs={"dataset": "1"}, files=found.files, created=found.created, folder=folder)
    assert found == expected
    assert is_checkpoint(folder) and not is_checkpoint(tmp_path)
    assert checkpoint_digest(folder) == hashlib.sha256((folder / "checkpoint.json").read_bytes()).hexdigest()


def test_any_json_passes_through_and_nan_becomes_null(tmp_path):
    about = {"a": float("nan"), "b": [1, {"c": float("-inf")}], "d": None, "e": True, "f": "ü"}
    folder = checkpoint(tmp_path / "x", metrics=about, versions=about, config=about)
    found = read_manifest(folder)
    plain = {"a": None, "b": [1, {"c": None}], "d": None, "e": True, "f": "ü"}
    assert found.metrics == found.versions == found.config == plain


@pytest.mark.parametrize("name", ["adapter.bin", "critic/head.bin"])
def test_damaged_and_missing_files_are_named(tmp_path, name):
    folder = checkpoint(tmp_path / "x")
    (folder / name).write_bytes(b"abd")
    with pytest.raises(CheckpointError, match=f"`{name}` is damaged.*\\n.*--overwrite"):
        read_manifest(folder)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"`{name}` is missing"):
        read_manifest(folder)


@pytest.mark.parametrize(
    "name",
    ["../secret", "/etc/passwd", "critic/../../secret", "", ".", "./adapter.bin", "critic//head.bin", "..\\secret"],
)
def test_a_file_outside_the_checkpoint_is_refused(tmp_path, name):
    folder = checkpoint(tmp_path / "x")
    (tmp_path / "secret").write_bytes(b"abc")
    with pytest.raises(CheckpointError, match="is not a plain file name|leads outside"):
        write_manifest(folder, manifest(), [name])
    rewrite(folder, files={name: "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"})
    with pytest.raises(CheckpointError, match="is not a plain file name|leads outside"):
        read_manifest(folder)


def test_a_link_may_lead_within_the_checkpoint_and_not_outside(tmp_path):
    folder = checkpoint(tmp_path / "x")
    (tmp_path / "secret").write_bytes(b"abc")
    (folder / "adapter.bin").rename(folder / "weights.bin")
    (folder / "adapter.bin").symlink_to("weights.bin")
    assert read_manifest(folder).steps == 4
    (tmp_path / "link").symlink_to("x")
    assert read_manifest(tmp_path / "link").steps == 4
    (folder / "adapter.bin").unlink()
    (folder / "adapter.bin").symlink_to("../secret")
    with pytest.raises(CheckpointError, match="`adapter.bin` leads outside"):
        read_manifest(folder)


def test_a_newer_format_asks_for_an_upgrade(tmp_path):
    folder = checkpoint(tmp_path / "x")
    rewrite(folder, format_version=2)
    with pytest.raises(CheckpointError, match="written by a newer rlhf .format 2.*\\n.*upgrade"):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("stage", 3),
        ("base", None),
        ("base", {"name": "x", "path": 3, "digest": "y"}),
        ("parents", [{"role": "policy", "path": None, "stage": "sft", "digest": "y"}]),
        ("parents", {}),
        ("stop_token_ids", ["2"]),
        ("stop_token_ids", [True]),
        ("config", []),
        ("steps", 1.5),
        ("steps", True),
        ("seconds", None),
        ("files", {"adapter.bin": 3}),
        ("files", None),
        ("created", 0),
    ],
)
def test_a_key_of_the_wrong_shape_is_named(tmp_path, key, value):
    folder = checkpoint(tmp_path / "x")
    rewrite(folder, **{key: value})
    with pytest.raises(CheckpointError, match=f"damaged at `{key}`"):
        read_manifest(folder)


def test_every_truncation_of_a_manifest_is_recognised(tmp_path):
    path = checkpoint(tmp_path / "x") / "checkpoint.json"
    whole = path.read_bytes()
    for size in range(0, len(whole) - 1, 17):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="not JSON"):
            read_manifest(path.parent)
    for content in (b"[" * 100_000, b"[]", b'{"format_version": true}', b"\xff\xfe"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError):
            read_manifest(path.parent)


def test_what_is_not_a_finished_checkpoint_says_why(tmp_path):
    for read in (read_manifest, checkpoint_digest):
        with pytest.raises(CheckpointError, match="no such folder"):
            read(tmp_path / "absent")
        with pytest.raises(CheckpointError, match="not a checkpoint"):
            read(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(CheckpointError, match="has not finished.*\\n.*same command again"):
        read_manifest(tmp_path)


def test_publishing_a_missing_file_or_an_unreadable_manifest_writes_nothing(tmp_path):
    with pytest.raises(CheckpointError, match="`gone` is missing"):
        write_manifest(tmp_path, manifest(), ["gone"])
    with pytest.raises(CheckpointError, match="`seconds`"):
        write_manifest(tmp_path, manifest(seconds=float("nan")), [])
    assert os.listdir(tmp_path) == []


def test_a_failed_publication_leaves_no_checkpoint(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("x")

    def refuse(source, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(atomic.os, "replace", refuse)
    with pytest.raises(OutputError, match="No space left"):
        write_manifest(tmp_path, manifest(), ["a"])
    assert os.listdir(tmp_path) == ["a"]


def test_listed_files_reach_the_disk_before_the_manifest(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("x")
    synced, fsync = [], os.fsync

    def note(handle):
        synced.append(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    if not Path("/proc/self/fd").exists():
        pytest.skip("no /proc to ask which file was synced")
    monkeypatch.setattr(atomic.os, "fsync", note)
    write_manifest(tmp_path, manifest(), ["a"])
    assert synced[:2] == [str(tmp_path / "a"), str(tmp_path)]
    assert "checkpoint.json" in synced[2] and synced[3:] == [str(tmp_path)]


# --- finding base and parents again


def lineage(top: Path) -> tuple[Path, Manifest]:
    """A base, a parent and a checkpoint in one tree, published with absolute and relative places."""
    model = base(top / "models" / "tiny")
    parent = checkpoint(top / "runs" / "sft")
    folder = checkpoint(
        top / "runs" / "ppo",
        base=BaseRef("models/tiny", str(model), base_digest(model)),
        parents=(Parent("policy", str(parent), "sft", checkpoint_digest(parent)),),
    )
    return folder, read_manifest(folder)


def test_places_are_stored_absolute_and_relative(tmp_path, monkeypatch):
    folder, found = lineage(tmp_path)
    assert (found.base.path, found.base.relative) == (str(tmp_path / "models/tiny"), "../../models/tiny")
    assert (found.parents[0].path, found.parents[0].relative) == (str(tmp_path / "runs/sft"), "../sft")
    monkeypatch.chdir(tmp_path)
    write_manifest("runs/ppo", manifest(base=BaseRef("models/tiny", "models/tiny", "d")), [])
    assert read_manifest(folder).base == BaseRef("models/tiny", str(tmp_path / "models/tiny"), "d", "../../models/tiny")


def test_a_moved_tree_finds_its_own(tmp_path):
    lineage(tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "new")
    folder = tmp_path / "new" / "runs" / "ppo"
    found = read_manifest(folder)
    assert locate(folder, found.base) == tmp_path / "new" / "models" / "tiny"
    assert locate(folder, found.parents[0]) == tmp_path / "new" / "runs" / "sft"


def test_a_moved_checkpoint_finds_what_stayed(tmp_path):
    folder, _ = lineage(tmp_path)
    moved = tmp_path / "elsewhere" / "deep" / "ppo"
    moved.parent.mkdir(parents=True)
    folder.rename(moved)
    assert locate(moved, read_manifest(moved).base) == tmp_path / "models" / "tiny"


def test_of_two_places_the_one_with_the_right_digest_is_taken(tmp_path):
    lineage(tmp_path / "old")
    shutil.copytree(tmp_path / "old", tmp_path / "copy")
    folder = tmp_path / "copy" / "runs" / "ppo"
    found = read_manifest(folder)
    assert locate(folder, found.base) == tmp_path / "old" / "models" / "tiny"
    (tmp_path / "old/models/tiny/config.json").write_text('{"hidden_size": 9}')  # the old tree goes on living
    rewrite(tmp_path / "old/runs/sft", created="later")
    assert locate(folder, found.base) == tmp_path / "copy" / "models" / "tiny"
    assert locate(folder, found.parents[0]) == tmp_path / "copy" / "runs" / "sft"
    neither = dataclasses.replace(found.base, digest="0" * 64)
    assert locate(folder, neither) == tmp_path / "old" / "models" / "tiny"


def test_a_base_from_the_hub_is_its_id(tmp_path):
    assert locate(tmp_path, BaseRef("org/tiny", None, "d")) == "org/tiny"


def test_what_is_gone_says_where_it_was_looked_for(tmp_path):
    folder, found = lineage(tmp_path)
    shutil.rmtree(tmp_path / "models")
    with pytest.raises(CheckpointError, match=f"base model is not at {tmp_path}/models/tiny\\n.*--base"):
        locate(folder, found.base)
    shutil.rmtree(tmp_path / "runs" / "sft")
    moved = tmp_path / "a" / "b" / "ppo"
    with pytest.raises(
        CheckpointError, match=f"sft checkpoint is not at {tmp_path}/runs/sft nor at {tmp_path}/a/b/sft"
    ):
        locate(moved, found.parents[0])


def test_versions_name_what_decides_the_numbers():
    found = versions()
    assert found["python"] == ".".join(str(part) for part in sys.version_info[:3])
    assert found["torch"] == torch.__version__
    assert {"rlhf", "transformers", "safetensors"} <= found.keys()
