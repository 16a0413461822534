"""rslora and DoRA through the stages: trained, resumed, stored, read by PEFT, and refused where they cannot be."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import signal

import pytest
import torch

from stages.errors import CheckpointError, ModelError
from stages.models.adapter_config import read_adapter_shape
from stages.models.lora import adapter_from
from stages.models.roles import new_adapter
from tests.commands import SHORT, SMALL, assert_same_weights, contents, done, manifest, refused, result, rlhf, weights
from tests.commands import write_data as write_rows
from tests.parts import random_adapter, sequences_of, whole_model
from tests.test_resume import in_a_process

IDS = sequences_of([11], seed=3)[0]
STATES = ("--save-every", 1, "--keep-state", "--learning-rate", "1e-2")


@pytest.fixture(scope="module")
def place(tmp_path_factory, model_folder):
    """A folder with rows, and what SFT trains from them with DoRA."""
    folder = tmp_path_factory.mktemp("dora")
    write_rows(folder)
    line = ("sft", "--model", model_folder("llama"), "--dataset", folder / "demonstrations.jsonl")
    ended = done(*line, "--lora-type", "dora", "--output", folder / "sft", *SMALL, *STATES)
    assert ended.stderr.count("DoRA adapters run through transformers") == 1 == ended.stderr.count("slower")
    return folder


@pytest.fixture(scope="module")
def dora_chain(place):
    """The same folder, with a reward model and a PPO policy from that checkpoint."""
    folder, sft, reward = place, place / "sft", place / "reward"
    line = ("reward", "--model", sft, "--dataset", folder / "comparisons.jsonl", "--eval-limit", 16)
    done(*line, "--output", reward, *SMALL)
    ppo = ("ppo", "--model", sft, "--reward", reward, "--dataset", folder / "prompts.jsonl", *SMALL, *SHORT)
    ended = done(*ppo, "--output", folder / "ppo")
    assert ended.stderr.count("slower") == 1
    return folder


@pytest.mark.full
def test_every_stage_goes_on_with_the_checkpoints_type(dora_chain):
    place = dora_chain
    for name in ("sft", "reward", "ppo", "ppo/critic"):
        stored = json.loads((place / name / "adapter_config.json").read_text())
        assert (stored["use_dora"], stored["use_rslora"], stored["r"]) == (True, False, 4)
    assert manifest(place / "sft")["config"]["lora_type"] == "dora"
    assert manifest(place / "ppo")["config"]["lora_type"] is None


@pytest.mark.full
def test_magnitudes_are_trained_and_stored(place, model_folder):
    from safetensors.torch import load_file

    base = load_file(model_folder("llama") / "model.safetensors")
    stored = load_file(place / "sft/adapter_model.safetensors")
    names = [name for name in stored if name.endswith("magnitude_vector")]
    assert len(names) == 14 and len(stored) == 3 * 14
    for name in names:
        path = name.removeprefix("base_model.model.").removesuffix(".lora_magnitude_vector")
        moved = (stored[name] - base[f"{path}.weight"].norm(dim=1)).abs()
        assert 1e-4 < moved.max() < 0.1  # three steps of at most 1e-2


@pytest.mark.full
@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_peft_gives_the_same_numbers(dora_chain, model_folder, stage, open_tiny):
    from peft import PeftModel

    from stages.models.roles import Roles, adapter_of

    base = open_tiny("llama")
    roles = Roles(base)
    roles.add("policy", adapter_of(base, base.ref, trainable=False, folder=dora_chain / stage))
    theirs = PeftModel.from_pretrained(whole_model(model_folder("llama")), dora_chain / stage).eval()
    with torch.no_grad(), roles.use("policy"):
        ours = base.logits(base.hidden([IDS]))
        assert (theirs(IDS[None]).logits[0] - ours).abs().max() <= 1e-5 * ours.abs().max()


@pytest.mark.full
@pytest.mark.parametrize("lora_type", ["rslora", "dora"])
def test_an_interrupted_run_ends_with_the_same_bits(place, model_folder, tmp_path, lora_type):
    line = ("sft", "--model", model_folder("gpt2"), "--dataset", place / "demonstrations.jsonl", *SMALL, *STATES)
    line += ("--lora-type", lora_type, "--samples", 0)
    done(*line, "--output", tmp_path / "whole")
    assert in_a_process(signal.SIGTERM, 2, *line, "--output", tmp_path / "stopped").returncode == 143
    done(*line, "--output", tmp_path / "stopped")
    assert_same_weights(tmp_path / "stopped", tmp_path / "whole")


@pytest.mark.full
def test_evaluate_and_export_take_dora(dora_chain, tmp_path):
    place = dora_chain
    line = ("evaluate", "--dataset", place / "prompts.jsonl", "--reward", place / "reward", "--limit-rows", 8, *SHORT)
    assert math.isfinite(result(*line, "--model", place / "ppo", "--against", place / "sft")["policy"]["score"])
    result(*line, "--model", place / "ppo", "--also", place / "sft/state", "--against", place / "sft")
    done("export", "--model", place / "ppo", "--output", tmp_path / "merged")  # compares what it wrote


def test_the_plan_counts_magnitudes(place, model_folder):
    line = ("--dataset", place / "demonstrations.jsonl", "--output", place / "x", "--dry-run")
    plan = result("sft", "--model", model_folder("llama"), *line, *SMALL, "--lora-type", "dora")["plan"]
    stored = sum(tensor.numel() for tensor in weights(place / "sft").values())
    assert plan["trainable_parameters_per_adapter"] == stored
    plan = result("sft", "--model", place / "sft", *line, "--batch-size", 8, "--lora-rank", 8)["plan"]
    magnitudes = 2 * (32 + 16 + 16 + 32 + 48 + 48 + 32)
    assert plan["trainable_parameters_per_adapter"] == 2 * (stored - magnitudes) + magnitudes


def test_another_type_than_the_checkpoints_is_refused(place, tmp_path):
    line = ("reward", "--model", place / "sft", "--dataset", place / "comparisons.jsonl", "--output", tmp_path / "x")
    said = refused(*line, "--lora-type", "lora")
    assert "lora_type is lora, but the adapter of" in said and "is dora" in said and "leave lora_type out" in said
    assert not (tmp_path / "x").exists()


def test_our_own_decoder_does_not_take_dora(place, tmp_path):
    line = ("sample", "--model", place / "sft", "--dataset", place / "prompts.jsonl", "--output", tmp_path / "s.jsonl")
    assert "the native decoder does not support DoRA" in refused(*line, "--rollout-engine", "native", *SHORT)
    ended = done(*line, *SHORT)
    assert ended.stderr.count("DoRA adapters run through transformers, which is slower") == 1


# --- DoRA among adapters of another kind


@pytest.fixture(scope="module")
def plain(place, model_folder):
    """An SFT checkpoint of plain LoRA on the base of the DoRA chain."""
    line = ("sft", "--model", model_folder("llama"), "--dataset", place / "demonstrations.jsonl", *SMALL)
    done(*line, "--output", place / "plain")
    return place / "plain"


@pytest.mark.full
def test_a_dora_reward_model_scores_a_plain_policy(dora_chain, plain, tmp_path):
    place = dora_chain
    line = ("ppo", "--model", plain, "--reward", place / "reward", "--dataset", place / "prompts.jsonl", *SHORT)
    said = refused(*line, "--output", tmp_path / "x", "--rollout-engine", "native")
    assert "the native decoder does not support DoRA adapters" in said and not (tmp_path / "x").exists()
    ended = done(*line, "--output", tmp_path / "x", *SMALL)
    assert ended.stderr.count("slower") == 1
    stored = {name: json.loads((tmp_path / "x" / name / "adapter_config.json").read_text()) for name in ("", "critic")}
    assert {name: config["use_dora"] for name, config in stored.items()} == {"": False, "critic": True}
    line = ("sample", "--model", tmp_path / "x", "--dataset", place / "prompts.jsonl", "--limit-rows", 2, *SHORT)
    ended = done(*line, "--output", tmp_path / "s.jsonl", "--rollout-engine", "native")  # its critic is not loaded
    assert "DoRA" not in ended.stderr


@pytest.mark.full
def test_a_plain_and_a_dora_policy_are_measured_side_by_side(dora_chain, plain):
    place = dora_chain
    line = ("evaluate", "--model", plain, "--dataset", place / "prompts.jsonl", "--limit-rows", 4, *SHORT)
    beside = ("--also", place / "sft", "--reward", place / "reward")
    found = result(*line, *beside)
    assert {row["label"] for row in found["frontier"]} == {"plain", "sft"}
    alone = result(*line, "--reward", place / "reward")
    assert found["policy"]["score"] == pytest.approx(alone["policy"]["score"])
    said = refused(*line, *beside, "--rollout-engine", "native")
    assert "the native decoder does not support DoRA adapters" in said


REFUSED = {
    "init_lora_weights": ["pissa", "olora", "loftq", "eva", "corda", "pissa_niter_4"],
    "peft_type": ["IA3"],
    "modules_to_save": [["lm_head"], ["score", "embed_tokens"]],
    "bias": ["all", "lora_only"],
    "use_rslora": [True],  # with use_dora
    "rank_pattern": [{"(a+)+$": 2}, {"q_proj": 0}, {"q_proj": "2"}, ["q_proj"]],
    "alpha_pattern": [{"q_proj|v_proj": 2}, {"q_proj": -1}],
    "lora_bias": [True],
    "target_parameters": [["experts.down_proj"]],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in REFUSED.items() for value in values])
def test_what_one_shared_base_cannot_hold_is_refused_by_its_name(place, tmp_path, key, value):
    stored = json.loads((place / "sft/adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(stored | {key: value}))
    with pytest.raises(CheckpointError, match=f"adapter_config.json .*{key}") as caught:
        read_adapter_shape(tmp_path)
    assert caught.value.where == str(tmp_path)


def test_such_a_checkpoint_is_refused_before_a_model_loads(place, tmp_path, monkeypatch):
    shutil.copytree(place / "sft", tmp_path / "sft")
    file = tmp_path / "sft/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init_lora_weights": "pissa"}))
    about = json.loads((tmp_path / "sft/checkpoint.json").read_text())
    about["files"]["adapter_config.json"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (tmp_path / "sft/checkpoint.json").write_text(json.dumps(about))
    monkeypatch.setattr("stages.models.base.load_base", None)
    line = ("sample", "--dataset", place / "prompts.jsonl", "--output", tmp_path / "s.jsonl", *SHORT)
    said = refused(*line, "--model", tmp_path / "sft")
    assert "init_lora_weights 'pissa'" in said and "the base that all roles share" in said


def test_a_type_that_there_is_not_is_refused_with_those_there_are(place, tmp_path):
    ended = rlhf("sft", "--model", "m", "--dataset", "d", "--output", tmp_path, "--lora-type", "pissa")
    assert ended.code == 2 and "rslora" in ended.stderr and "dora" in ended.stderr
    assert contents(tmp_path) == {}


def test_dora_refuses_a_row_of_zeros(open_tiny):
    """DoRA divides by the norm of every row of the weight."""
    base = open_tiny("llama")
    path, layer = next(iter(base.layers.items()))
    layer.weight.data[3] = 0
    with pytest.raises(ModelError, match=f"a row of the weight of {path} is zero"):
        new_adapter(base, 4, 8.0, [], 0, "dora")


def test_tensors_that_no_layer_has_are_refused(open_tiny):
    base = open_tiny("llama")
    tensors = random_adapter(base, 1).tensors() | {"base_model.model.foo.weight": torch.zeros(2)}
    with pytest.raises(CheckpointError, match="the adapter is for foo.weight, which the base lacks"):
        adapter_from(base.layers, tensors, 4, 8.0, "lora", where="a", trainable=False)
