"""The plan that --dry-run prints, against the model that it speaks of."""

from __future__ import annotations

import pytest
import torch

from stages.models.source import open_source
from stages.training.plan import memory_by_part, plan_result, tensor_shapes
from tests.parts import ppo_config, publish_checkpoint, random_adapter, sft_config, whole_model
from tests.tiny import ARCHITECTURES


def source_of(folder, stages=()):
    return open_source(str(folder), stages=stages, what="--model")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_counts_are_those_of_the_model(model_folder, open_tiny, architecture):
    source = source_of(model_folder(architecture))
    parts = memory_by_part(sft_config(lora_rank=4, device="cpu"), source, 1, 100)
    assert parts["trainable parameters"] == random_adapter(open_tiny(architecture), 1, rank=4).size
    weights = sum(p.numel() for p in whole_model(model_folder(architecture)).parameters())
    assert parts["frozen base"] == 4 * weights
    assert parts["adapters (weights)"] == 4 * parts["trainable parameters"]
    assert parts["gradients and Adam moments"] == 12 * parts["trainable parameters"]


def test_precision_halves_the_base_and_not_the_adapters(model_folder):
    source = source_of(model_folder("llama"))
    whole, half = (memory_by_part(sft_config(dtype=d, device="cpu"), source, 1, 100) for d in ("float32", "bfloat16"))
    assert half["frozen base"] == whole["frozen base"] / 2
    assert half["adapters (weights)"] == whole["adapters (weights)"]


def test_ppo_holds_four_adapters_and_trains_two(model_folder):
    source = source_of(model_folder("llama"))
    one = memory_by_part(sft_config(device="cpu"), source, 1, 100)
    four = memory_by_part(ppo_config(device="cpu"), source, 4, 100)
    assert four["adapters (weights)"] == 4 * one["adapters (weights)"]
    assert four["gradients and Adam moments"] == 2 * one["gradients and Adam moments"]


def test_the_adapter_is_of_the_layers_and_the_rank_asked_for(model_folder):
    source = source_of(model_folder("llama"))

    def trained(**knobs):
        return memory_by_part(sft_config(device="cpu", **knobs), source, 1, 100)["trainable parameters"]

    # q_proj is 32-32 and v_proj 32-16, in two blocks each.
    assert trained(lora_rank=8, lora_targets=["q_proj", "v_proj"]) == 8 * 2 * (64 + 48)
    assert trained(lora_targets=["model.layers.1.mlp.up_proj"]) == 32 * (32 + 48)


def test_a_checkpoints_adapter_has_its_own_rank_and_layers(open_tiny, tmp_path):
    base = open_tiny("llama")
    adapter = random_adapter(base, 1, rank=4, targets=("q_proj",))
    source = source_of(publish_checkpoint(tmp_path / "sft", base, "sft", adapter), ("sft",))

    def trained(**knobs):
        return memory_by_part(ppo_config(device="cpu", **knobs), source, 4, 100)["trainable parameters"]

    assert trained() == adapter.size == 4 * 2 * 64
    assert trained(lora_rank=12) == 3 * adapter.size


def test_longer_passes_need_more_memory_and_recomputing_less(model_folder):
    source = source_of(model_folder("llama"))

    def activations(longest=100, **knobs):
        config = sft_config(device="cpu", **knobs)
        return memory_by_part(config, source, 1, longest)["activations of one forward pass"]

    assert activations(micro_batch_size=4) == 2 * activations(micro_batch_size=2)
    assert activations(micro_batch_size=2, longest=300) == 3 * activations(micro_batch_size=2)
    assert activations(longest=100) == activations(longest=200)  # the budget of `auto` holds either
    assert activations(gradient_checkpointing=True) < activations() / 2


def test_weights_that_are_there_twice_count_once(tmp_path):
    from safetensors.torch import save_file

    for name in ("model-00001-of-00002", "model-00002-of-00002", "consolidated"):
        save_file({f"{name}.weight": torch.zeros(2, 3)}, tmp_path / f"{name}.safetensors")
    assert tensor_shapes(tmp_path) == {
        "model-00001-of-00002.weight": (2, 3),
        "model-00002-of-00002.weight": (2, 3),
    }


def test_the_plan_in_numbers(model_folder):
    config = sft_config(device="cpu", batch_size=4, lora_rank=4)
    result = plan_result("sft", config, source_of(model_folder("llama")), [10, 30, 20], 7, {"held_out_rows": 2})
    assert (result.command, result.status, result.output) == ("sft", "dry run", None)
    assert result.data["plan"] == {
        "rows": 3,
        "held_out_rows": 2,
        "steps": 7,
        "batch_size": 4,
        "tokens_per_epoch": 60,
        "longest_row_tokens": 30,
        "trainable_parameters_per_adapter": 2 * 4 * (2 * 64 + 2 * 48 + 3 * 80),
    }
    memory = dict(result.data["memory_gb"])
    assert memory.pop("total") == pytest.approx(sum(memory.values()))
    assert "trainable parameters" not in memory
    assert ("tokens per epoch", "60") in result.tables[0].rows
