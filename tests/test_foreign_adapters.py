"""LoRA adapters of other tools as --model: what they compute, where training goes on, and what is refused."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from stages.checkpoint.manifest import read_manifest
from stages.errors import CheckpointError, ModelError
from stages.models.adapter_files import ADAPTER, ADAPTER_CONFIG
from stages.models.candidates import POLICIES, parent_of
from stages.models.model_ref import FOREIGN, open_model
from stages.models.roles import Roles, adapter_of
from tests.commands import SHORT, SMALL, assert_same_weights, done, manifest, refused, result, write_data
from tests.foreign import TARGETS, edit_json, peft_model
from tests.tiny import CHAT, build_tokenizer

IDS = torch.tensor([5, 9, 8, 7, 30, 20, 11])
PATTERNS = {"rank_pattern": {"layers.0.mlp.down_proj": 7, "^model.layers.1.self_attn.q_proj": 2},
            "alpha_pattern": {"down_proj": 3, "layers.1.self_attn.q_proj": 16}}  # fmt: skip


def open_adapter(folder, **about):
    return open_model(str(folder), stages=POLICIES, what="--model", **about)


@pytest.fixture(scope="module")
def stored(model_folder, tmp_path_factory):
    """An adapter with patterns, and one that is plain, on the same base."""
    folder = tmp_path_factory.mktemp("foreign")
    peft_model(model_folder("llama")).save_pretrained(folder / "plain")
    peft_model(model_folder("llama"), seed=1, **PATTERNS).save_pretrained(folder / "patterns")
    return folder


@pytest.fixture
def adapter(stored, tmp_path):
    """A plain adapter of one's own to spoil."""
    return shutil.copytree(stored / "plain", tmp_path / "adapter")


@pytest.mark.parametrize("settings", [{}, PATTERNS, PATTERNS | {"use_rslora": True}, {"use_dora": True}])
def test_an_adapter_computes_what_peft_computes(model_folder, open_tiny, tmp_path, settings):
    model = peft_model(model_folder("llama"), **settings)
    model.save_pretrained(tmp_path)
    base, ref = open_tiny("llama"), open_adapter(tmp_path)
    roles = Roles(base)
    roles.add("policy", adapter_of(base, ref, trainable=True))
    with torch.no_grad(), roles.use("policy"):
        logits = base.logits(base.hidden([IDS]))
        assert torch.allclose(logits, model(input_ids=IDS[None]).logits[0], atol=2e-5)
    assert all(weight.requires_grad for weight in roles.parameters("policy"))
    if "rank_pattern" in settings:  # every row of every A can learn, though new columns of B are zero
        assert all(w.abs().sum(1).all() for n, w in roles.adapters["policy"].weights.items() if "lora_A" in n)


def test_its_base_is_the_one_it_names_or_that_of_the_flag(model_folder, adapter, tmp_path):
    ref = open_adapter(adapter)
    assert ref.manifest.stage == FOREIGN and ref.folder == adapter and ref.base == model_folder("llama")
    moved = shutil.copytree(model_folder("llama"), tmp_path / "moved")
    edit_json(adapter / ADAPTER_CONFIG, base_model_name_or_path="/gone/away")
    with pytest.raises(ModelError, match="the base of .* cannot be had: /gone/away does not exist") as caught:
        open_adapter(adapter)
    assert "--base" in caught.value.fix
    again = open_adapter(adapter, base=str(moved))
    assert again.base == moved and again.base_digest == ref.base_digest and again.digest != ref.digest  # its config
    with pytest.raises(ModelError, match="is a base itself"):
        open_adapter(moved, base=str(moved))


def test_one_weight_changes_its_digest(adapter):
    before = open_adapter(adapter).digest
    tensors = load_file(adapter / ADAPTER)
    next(iter(tensors.values()))[0, 0] += 1e-3
    save_file(tensors, adapter / ADAPTER)
    assert open_adapter(adapter).digest != before


def test_its_tokenizer_and_template_precede_those_of_the_base(adapter, model_folder):
    assert open_adapter(adapter).tokenizer == model_folder("llama")
    (adapter / "chat_template.jinja").write_text(CHAT)
    assert open_adapter(adapter).chat_template == str(adapter / "chat_template.jinja")
    build_tokenizer(adapter, chat=True)
    ref = open_adapter(adapter)
    assert ref.tokenizer == adapter and ref.chat_template is None
    shutil.copy(model_folder("llama") / "config.json", adapter)  # some tools copy it beside the adapter
    assert open_adapter(adapter).manifest.stage == FOREIGN


def broken(**changes):
    return lambda folder: edit_json(folder / ADAPTER_CONFIG, **changes)


def rewritten(text):
    return lambda folder: (folder / ADAPTER_CONFIG).write_text(text)


def with_tensor(name, shape):
    def spoil(folder):
        save_file(load_file(folder / ADAPTER) | {name: torch.zeros(shape)}, folder / ADAPTER)

    return spoil


def pickled(folder):
    (folder / ADAPTER).rename(folder / "adapter_model.bin")


def a_pipe(name):
    def spoil(folder):
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return spoil


REFUSED = {
    "bad JSON": (rewritten('{"r": 4'), "cannot be read"),
    "deep JSON": (rewritten("[" * 5000), "cannot be read"),
    "no object": (rewritten("[]"), "not a JSON object"),
    "no rank": (rewritten("{}"), "it has no 'r'"),
    "an absurd rank": (broken(r=10**9), "r is 1000000000"),
    "another rank": (broken(r=8), "have rank 4, adapter_config.json says 8"),
    "another pattern": (broken(rank_pattern={"q_proj": 5}), "have rank 4, adapter_config.json says 5"),
    "a regular expression": (broken(rank_pattern={"(a|a)*$": 4}), "only layers' names"),
    "modules to save": (broken(modules_to_save=["lm_head"]), "replaces parts of the base"),
    "a classifier": (broken(modules_to_save=["score"], task_type="SEQ_CLS"), "task_type 'SEQ_CLS'"),
    "no LoRA": (broken(peft_type="IA3"), "only LORA"),
    "no base": (broken(base_model_name_or_path=None), "names no base"),
    "a number as base": (broken(base_model_name_or_path=7), "names no base"),
    "half a character as base": (broken(base_model_name_or_path="\ud800"), "names no base"),
    "a long name as base": (broken(base_model_name_or_path="/" + "x" * 5000), "cannot be had"),
    "nobody's home as base": (broken(base_model_name_or_path="~nobody-here/x"), "cannot be had"),
    "a file as base": (broken(base_model_name_or_path="/etc/hostname"), "cannot be had"),
    "missing weights": (lambda folder: (folder / ADAPTER).unlink(), "cannot read"),
    "pickled weights": (pickled, "pickled"),
    "cut weights": (lambda folder: (folder / ADAPTER).write_bytes((folder / ADAPTER).read_bytes()[:-9]), "damaged"),
    "trained embeddings": (with_tensor("base_model.model.model.embed_tokens.weight", (300, 32)), "no matrix of LoRA"),
    "half a layer": (with_tensor("base_model.model.model.layers.0.mlp.up_proj.lora_A.weight", (4, 32)), "lack"),
    "a pipe as config": (a_pipe(ADAPTER_CONFIG), "a named pipe"),
    "a pipe as weights": (a_pipe(ADAPTER), "a named pipe"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_broken_adapter_is_refused_before_anything_is_loaded(adapter, name):
    spoil, words = REFUSED[name]
    spoil(adapter)
    with pytest.raises((CheckpointError, ModelError)) as caught:
        open_adapter(adapter)
    assert words in caught.value.what and caught.value.fix, caught.value


def test_an_adapter_on_an_adapter_is_refused(adapter, stored):
    edit_json(adapter / ADAPTER_CONFIG, base_model_name_or_path=str(stored / "patterns"))
    with pytest.raises(ModelError, match="is an adapter itself"):
        open_adapter(adapter)
    edit_json(adapter / ADAPTER_CONFIG, base_model_name_or_path=str(adapter))
    with pytest.raises(ModelError, match="is an adapter itself"):
        open_adapter(adapter)


def test_code_of_a_base_runs_only_if_the_user_names_the_base(adapter, model_folder, tmp_path):
    base = shutil.copytree(model_folder("llama"), tmp_path / "base")
    edit_json(base / "config.json", auto_map={"AutoModelForCausalLM": "evil.Model"})
    edit_json(adapter / ADAPTER_CONFIG, base_model_name_or_path=str(base))
    with pytest.raises(ModelError, match="brings Python code of its own"):
        open_adapter(adapter, trust_remote_code=True)
    assert open_adapter(adapter, trust_remote_code=True, base=str(base)).base == base


def test_layers_of_another_base_and_the_output_layer_are_refused(adapter, open_tiny):
    base, tensors = open_tiny("llama"), load_file(adapter / ADAPTER)
    cases = (("lm_head", 300, "the output layer, which all roles share"), ("model.layers.9.q", 9, "the base lacks"))
    for layer, out, words in cases:
        pair = {f"base_model.model.{layer}.lora_A.weight": (4, 32), f"base_model.model.{layer}.lora_B.weight": (out, 4)}
        save_file(tensors | {name: torch.zeros(shape) for name, shape in pair.items()}, adapter / ADAPTER)
        with pytest.raises(CheckpointError, match=words):
            adapter_of(base, open_adapter(adapter), trainable=False)


@pytest.mark.full
def test_training_goes_on_from_it_through_every_stage(stored, model_folder, tmp_path):
    """sft, reward and ppo from an adapter with patterns on a base that only --base names; export; PEFT's logits."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = shutil.copytree(model_folder("llama"), tmp_path / "base")
    adapter = shutil.copytree(stored / "patterns", tmp_path / "adapter")
    edit_json(adapter / ADAPTER_CONFIG, base_model_name_or_path="/gone/away")
    write_data(tmp_path)
    small = [*SMALL[:2], "--eval-fraction", "0.2", "--max-steps"]
    train = ("sft", "--model", adapter, "--base", base, "--dataset", tmp_path / "demonstrations.jsonl", *small[:-1],
             "--lora-rank", 8, "--lr-schedule", "constant", "--warmup-ratio", 0, "--keep-state", small[-1])  # fmt: skip
    sft, whole, reward, ppo = (tmp_path / name for name in ("sft", "whole", "reward", "ppo"))
    done(*train, 3, "--output", whole)
    done(*train, 2, "--output", sft)
    done(*train, 3, "--output", sft)
    assert_same_weights(sft, whole)
    (parent,) = read_manifest(sft).parents
    assert parent.stage == FOREIGN and parent.digest == open_adapter(adapter, base=str(base)).digest
    assert parent_of(open_adapter(sft)).folder == adapter  # with the base that the child knows
    comparisons, prompts = tmp_path / "comparisons.jsonl", tmp_path / "prompts.jsonl"
    done("reward", "--model", sft, "--dataset", comparisons, "--output", reward, *small, 3, "--eval-limit", 16)
    done("ppo", "--model", sft, "--reward", reward, "--dataset", prompts, "--output", ppo, *small, 2, *SHORT)
    done("export", "--model", ppo, "--output", tmp_path / "merged")
    done("export", "--model", adapter, "--base", base, "--output", tmp_path / "merged adapter")
    kl = result("evaluate", "--model", ppo, "--also", adapter, "--base", base, "--reference", adapter, "--reward",
                reward, "--dataset", prompts, "--limit-rows", 4, *SHORT)  # fmt: skip
    assert {row["label"]: row["kl"] for row in kl["frontier"]}["adapter"] == pytest.approx(0, abs=1e-5)
    for checkpoint, merged in ((ppo, "merged"), (adapter, "merged adapter")):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), checkpoint).eval()
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / merged).eval()
        with torch.no_grad():
            assert torch.allclose(model(IDS[None]).logits, plain(IDS[None]).logits, atol=2e-5)
    assert manifest(ppo)["base"]["path"] == str(base) and set(TARGETS) <= set(
        json.loads((ppo / ADAPTER_CONFIG).read_text())["target_modules"]
    )


@pytest.mark.full
def test_ppo_measures_kl_from_it(stored, tmp_path):
    """It is policy and reference at once, so that before training the KL is zero."""
    write_data(tmp_path)
    (tmp_path / "f.py").write_text("def score(prompts, responses): return [float(len(r)) for r in responses]")
    line = ("ppo", "--model", stored / "plain", "--reward", tmp_path / "f.py", "--dataset", tmp_path / "prompts.jsonl",
            *SMALL[:4], "--eval-fraction", 0.2, *SHORT)  # fmt: skip
    done(*line, "--output", tmp_path / "one")
    first = json.loads((tmp_path / "one/metrics.jsonl").read_text().splitlines()[0])
    assert first["eval_kl"] == pytest.approx(0, abs=1e-6)
    done(*line, "--output", tmp_path / "two")
    assert_same_weights(tmp_path / "one", tmp_path / "two")
    small = ("--dataset", tmp_path / "demonstrations.jsonl", "--output", tmp_path / "x", "--lora-rank", 2)
    assert "lora_rank 2 is smaller than 4" in refused("sft", "--model", stored / "plain", *small)
