"""GGUF files as bases: dequantised once, to the bit; under checkpoints, and refused in words."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch

from stages.errors import ModelError
from stages.models import gguf
from stages.models.base import load_base
from stages.models.model_ref import open_model
from tests.commands import SHORT, SMALL, assert_same_weights, done, manifest, refused, write_data
from tests.foreign import write_gguf
from tests.tiny import CHAT

pytest.importorskip("gguf")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def open_file(file):
    return open_model(str(file), stages=("sft",), what="--model")


def test_a_gguf_file_is_the_base_that_it_was_written_from(model_folder, cache, tmp_path):
    """To the bit: weights, tokens, template; its special tokens end turns; one file has one folder and digest."""
    base = model_folder("llama", chat=True)
    ref = open_file(write_gguf(base, tmp_path / "m.gguf", template=CHAT))
    assert ref.base.parent == cache / "rlhf/gguf" and ref.base_name == str(tmp_path / "m.gguf")
    one, other = (
        load_base(r, device=torch.device("cpu"), dtype=torch.float32).model.state_dict() for r in (ref, open_file(base))
    )
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    made = (ref.base / "model.safetensors").stat().st_mtime_ns
    assert ref.tokenizer_digest != "" and gguf.missing_template(ref.base_name, ref.tokenizer, None) == ()
    shutil.copy(tmp_path / "m.gguf", tmp_path / "copy.gguf")
    assert (
        open_file(tmp_path / "m.gguf").base_digest == ref.base_digest == open_file(tmp_path / "copy.gguf").base_digest
    )
    assert (ref.base / "model.safetensors").stat().st_mtime_ns == made


def test_without_a_template_it_says_so(model_folder, cache, tmp_path):
    ref = open_file(write_gguf(model_folder("llama"), tmp_path / "q.gguf", quantise=True))
    (said,) = gguf.missing_template(ref.base_name, ref.tokenizer, None)
    assert "q.gguf brings no chat template" in said and "--chat-template" in said
    assert gguf.missing_template(ref.base_name, ref.tokenizer, "chatml") == ()


def test_what_cannot_be_read_is_refused(model_folder, cache, tmp_path, monkeypatch):
    good = write_gguf(model_folder("llama"), tmp_path / "m.gguf")
    write_gguf(model_folder("llama"), tmp_path / "new.gguf", name="quantumformer")
    (tmp_path / "cut.gguf").write_bytes(good.read_bytes()[:4000])
    (tmp_path / "text.gguf").write_text("no model")
    os.mkfifo(tmp_path / "pipe.gguf")
    for name, words in (
        ("new.gguf", "architecture quantumformer"), ("cut.gguf", "cannot be read by transformers"),
        ("text.gguf", "is no GGUF file"), ("pipe.gguf", "a named pipe"),
    ):  # fmt: skip
        with pytest.raises(ModelError, match=words) as caught:
            open_file(tmp_path / name)
        assert caught.value.fix
    monkeypatch.setattr(gguf.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="needs the package gguf") as caught:
        open_file(good)
    assert "rlhf[gguf]" in caught.value.fix and not list(cache.rglob("*.safetensors"))


@pytest.mark.full
def test_stages_run_on_it_as_on_the_plain_base(model_folder, cache, tmp_path):
    """The same adapter to the bit; PEFT finds the base; a lost cache is made again; a lost file is named by --base."""
    from peft import AutoPeftModelForCausalLM

    base = model_folder("llama", chat=True)
    file = write_gguf(base, tmp_path / "m.gguf", template=CHAT)
    write_data(tmp_path, chat=True)
    data = ("--dataset", tmp_path / "demonstrations.jsonl", *SMALL)
    for name, model in (("sft", file), ("plain", base)):
        done("sft", "--model", model, *data, "--output", tmp_path / name)
    assert_same_weights(tmp_path / "sft", tmp_path / "plain")
    assert manifest(tmp_path / "sft")["base"]["name"] == str(file)
    AutoPeftModelForCausalLM.from_pretrained(tmp_path / "sft")
    assert "already done" in done("sft", "--model", file, *data, "--output", tmp_path / "sft").stdout
    shutil.rmtree(cache)
    done("export", "--model", tmp_path / "sft", "--output", tmp_path / "merged")
    assert json.loads((tmp_path / "merged/config.json").read_text()).get("quantization_config") is None
    shutil.rmtree(cache)
    moved = file.rename(tmp_path / "moved.gguf")
    line = ("sample", "--model", tmp_path / "sft", "--dataset", tmp_path / "prompts.jsonl", "--limit-rows", 2, *SHORT)
    assert "name it with --base" in refused(*line, "--output", tmp_path / "s.jsonl")
    done(*line, "--output", tmp_path / "s.jsonl", "--base", moved)
