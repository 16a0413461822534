"""`rlhf export`, and what other tools make of a checkpoint: transformers and PEFT see the same model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.commands import done, lines_of, manifest, result, weights
from tests.marks import full

TEXTS = ["red one two three", "what is the time", "cat"]
ARCHITECTURES = pytest.mark.parametrize("architecture", ["llama", *full("gpt2", "gpt_neox", "qwen2", "gemma3")])


def encoded(folder: Path) -> list[torch.Tensor]:
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(folder)
    return [torch.tensor([words(text).input_ids]) for text in TEXTS]


def ours(folder: Path, base_folder: Path) -> tuple[list[torch.Tensor], list[float]]:
    """Logits, and scores where there is a head, of TEXTS as the stages compute them."""
    from stages.models.base import load_base
    from stages.models.model_ref import open_model
    from stages.models.outputs import sequence_scores
    from stages.models.roles import Roles, adapter_of, head_of

    source = open_model(str(folder), stages=("sft", "reward", "ppo"), what="--model")
    base = load_base(source, device=torch.device("cpu"), dtype=torch.float32)
    roles = Roles(base)
    has_head = (folder / "head.safetensors").exists()
    roles.add("it", adapter_of(base, source, trainable=False), head_of(base, folder) if has_head else None)
    ids = [row[0] for row in encoded(folder)]
    with roles.use("it"), torch.no_grad():
        logits = [base.logits(base.hidden([row])) for row in ids]
        scores = sequence_scores(roles, "it", ids).tolist() if has_head else []
    return logits, scores


@ARCHITECTURES
def test_exported_policies_give_the_checkpoints_logits(chain, architecture):
    """Check 51: merged in fp32, saved, loaded by transformers."""
    from transformers import AutoModelForCausalLM

    found = chain(architecture)
    model = AutoModelForCausalLM.from_pretrained(found.folder / "exported").eval()
    plain = AutoModelForCausalLM.from_pretrained(found.base).eval()
    expected, _ = ours(found.ppo, found.base)
    for ids, wanted in zip(encoded(found.ppo), expected, strict=True):
        with torch.no_grad():
            assert torch.allclose(model(input_ids=ids).logits[0], wanted, atol=1e-4)
            assert (plain(input_ids=ids).logits[0] - wanted).abs().max() > 1e-3  # training has left its mark
    assert found.ended["export"].code == 0


@ARCHITECTURES
def test_exported_reward_models_give_the_checkpoints_scores(chain, architecture):
    """score = logit + score_bias of config.json; padding a batch on the right or the left changes nothing."""
    from transformers import AutoModelForSequenceClassification

    found = chain(architecture)
    model = AutoModelForSequenceClassification.from_pretrained(found.folder / "exported_reward").eval()
    _, expected = ours(found.reward, found.base)
    assert model.config.num_labels == 1
    for ids, wanted in zip(encoded(found.reward), expected, strict=True):
        with torch.no_grad():
            assert float(model(input_ids=ids).logits) + model.config.score_bias == pytest.approx(wanted, abs=1e-4)
    pad, rows = model.config.pad_token_id, [row[0] for row in encoded(found.reward)]
    assert pad not in (None, 2)
    width = max(len(row) for row in rows)
    batch = torch.stack([torch.nn.functional.pad(row, (0, width - len(row)), value=pad) for row in rows])
    mask = torch.stack([(torch.arange(width) < len(row)).long() for row in rows])
    with torch.no_grad():
        scores = model(input_ids=batch, attention_mask=mask).logits[:, 0] + model.config.score_bias
    assert scores.tolist() == pytest.approx(expected, abs=1e-4)


@ARCHITECTURES
def test_peft_loads_the_folder_as_it_is(chain, architecture):
    """adapter_model.safetensors and adapter_config.json are PEFT's own."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    found = chain(architecture)
    expected, _ = ours(found.ppo, found.base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(found.base), found.ppo).eval()
    for ids, wanted in zip(encoded(found.ppo), expected, strict=True):
        with torch.no_grad():
            assert torch.allclose(model(input_ids=ids).logits[0], wanted, atol=1e-4)
    assert json.loads((found.ppo / "adapter_config.json").read_text())["base_model_name_or_path"] == str(found.base)


@ARCHITECTURES
def test_peft_loads_a_reward_model_as_a_sequence_classifier(chain, architecture):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    found = chain(architecture)
    _, expected = ours(found.reward, found.base)
    plain = AutoModelForSequenceClassification.from_pretrained(found.base, num_labels=1, pad_token_id=0)
    model = PeftModel.from_pretrained(plain, found.reward).eval()
    bias = float(weights(found.reward)["head.safetensors:bias"])
    for ids, wanted in zip(encoded(found.reward), expected, strict=True):
        with torch.no_grad():
            assert float(model(input_ids=ids).logits) + bias == pytest.approx(wanted, abs=1e-4)


@pytest.mark.full
@pytest.mark.parametrize(("dtype", "within"), [("bfloat16", 0.3), ("float16", 0.05)])
def test_other_precisions_are_rounded_once(chain, tmp_path, dtype, within):
    from transformers import AutoModelForCausalLM

    found = chain()
    told = result("export", "--model", found.ppo, "--output", tmp_path / "x", "--dtype", dtype)
    assert told["dtype"] == dtype and told["largest_difference"] < within
    merged = AutoModelForCausalLM.from_pretrained(found.folder / "exported").state_dict()
    rounded = AutoModelForCausalLM.from_pretrained(tmp_path / "x").state_dict()
    assert all(t.dtype == getattr(torch, dtype) for t in rounded.values())
    assert all(torch.equal(rounded[name], merged[name].to(rounded[name].dtype)) for name in merged)


def test_an_export_is_a_base_for_another_run(chain, tmp_path):
    """A merged model has nothing of ours left in it, and trains like any other base."""
    found = chain()
    line = ("sft", "--model", found.folder / "exported", "--dataset", found.demonstrations, "--output", tmp_path / "x")
    done(*line, "--max-steps", 1, "--batch-size", 4, "--lora-rank", 2)
    assert manifest(tmp_path / "x")["parents"] == []


@pytest.mark.full
def test_an_exported_policy_says_what_the_checkpoint_says(chain, tmp_path):
    found = chain()
    said = []
    for name, model in (("a", found.ppo), ("b", found.folder / "exported")):
        line = ("sample", "--model", model, "--dataset", found.prompts, "--max-response-tokens", 6, "--limit-rows", 12)
        done(*line, "--output", tmp_path / f"{name}.jsonl")
        said.append([row["response"] for row in lines_of(tmp_path / f"{name}.jsonl")])
    assert said[0] == said[1]


@pytest.mark.full
def test_an_exported_model_stops_where_the_checkpoint_does(chain):
    """The chat template's end of turn is among the ends that generate() knows."""
    found = chain(chat=True)
    config = json.loads((found.folder / "exported" / "generation_config.json").read_text())
    assert config["eos_token_id"] == manifest(found.ppo)["stop_token_ids"] == [2, 6]


def test_a_dry_run_says_what_would_be_written(chain, tmp_path):
    told = result("export", "--model", chain().reward, "--output", tmp_path / "x", "--dry-run")
    assert told["plan"] == {"kind": "AutoModelForSequenceClassification", "dtype": "float32"}
    assert not (tmp_path / "x").exists()


def test_an_empty_folder_may_be_filled(chain, tmp_path):
    done("export", "--model", chain().sft, "--output", tmp_path)
    assert (tmp_path / "model.safetensors").exists() and (tmp_path / "tokenizer.json").exists()
