"""The memory plan: its parts against the model that it speaks of, and what is decided by it."""

from __future__ import annotations

import pytest
import torch

from stages import ppo
from stages.models.base import load_base
from stages.models.model_ref import open_model
from stages.models.roles import Roles
from stages.models.tokens import TokenRow
from stages.native.prefixes import pack
from stages.rollout.generate import Sampling, generate
from stages.training import plan
from stages.training.language import count_targets, learn_rows
from stages.training.memory import FOUR_BIT, activation_bytes, cache_bytes, shapes_of, tensor_shapes
from stages.training.plan import (
    Work,
    choose_passes,
    largest_pass,
    memory_by_part,
    peak_of,
    plan_result,
    rollout_bytes,
    rollout_rows,
    source_shapes,
)
from stages.training.seeds import permutation
from tests.marks import full, full_but
from tests.memory import LiveBytes, saved_bytes
from tests.parts import (
    ppo_config,
    prompt_rows,
    publish_checkpoint,
    random_adapter,
    sequences_of,
    sft_config,
    whole_model,
)
from tests.tiny import ARCHITECTURES

ACTIVATIONS, MOMENTS = "activations of the largest pass", "gradients and Adam moments"
CPU = torch.device("cpu")


def source_of(folder, stages=()):
    return open_model(str(folder), stages=stages, what="--model")


def parts_of(config, source, work):
    return memory_by_part(config, work, source, source_shapes(source, sft_config()))


def sft_parts(source, longest=100, **knobs):
    return parts_of(sft_config(**{"device": "cpu", **knobs}), source, Work("sft", [longest]))


# --- what is held


@pytest.mark.parametrize("architecture", full_but(("llama-tied", "gpt2", "gemma3"), ARCHITECTURES))
def test_counts_are_those_of_the_model(model_folder, open_tiny, architecture):
    source = source_of(model_folder(architecture))
    parts = sft_parts(source, lora_rank=4)
    weights = sum(p.numel() for p in whole_model(model_folder(architecture)).parameters())
    assert parts["frozen base"] == 4 * weights
    assert parts["adapters (weights)"] == 4 * random_adapter(open_tiny(architecture), 1, rank=4).size
    assert parts[MOMENTS] == 3 * parts["adapters (weights)"]
    assert parts["copies of adapters"] == 0  # fp32 needs none


def test_precision_halves_the_base_and_not_the_adapters(model_folder):
    source = source_of(model_folder("llama"))
    whole, half = (sft_parts(source, dtype=d) for d in ("float32", "bfloat16"))
    assert half["frozen base"] == whole["frozen base"] / 2
    assert half["adapters (weights)"] == whole["adapters (weights)"]
    assert (whole["copies of adapters"], half["copies of adapters"]) == (0, half["adapters (weights)"] / 2)


def test_four_bits_take_what_bitsandbytes_says_they_take(model_folder):
    """Half a byte a weight, and its scales, whose own scales are one in fp32 for 256 of them."""
    pytest.importorskip("bitsandbytes")
    source = source_of(model_folder("llama-wide"))
    base = load_base(source, device=CPU, dtype=torch.float32, four_bit=True)
    held = 0
    for layer in base.layers.values():
        state = layer.weight.quant_state
        held += layer.weight.nbytes + state.absmax.nbytes
        held += 4 * layer.weight.numel() * 2 / (64 * 256)  # a tiny layer's own second scales are rounded up
    whole, four = sft_parts(source)["frozen base"], sft_parts(source, load_in_4bit=True)["frozen base"]
    linear = sum(layer.weight.numel() * 2 for layer in base.layers.values())
    assert whole - four == pytest.approx(linear * (4 - FOUR_BIT))
    assert linear * FOUR_BIT == pytest.approx(held)


@pytest.mark.parametrize(
    ("knobs", "held", "trained"),
    [
        ({}, 3, 2),  # policy, critic, reward; the reference is the base alone
        ({"reward": ["rm", "f.py:score=0.3"]}, 3, 2),
        ({"reward": ["f.py:score"]}, 2, 2),
        ({"critic": "shared"}, 2, 1),
        ({"advantage": "grpo", "responses_per_prompt": 2}, 2, 1),
    ],
)
def test_the_adapters_of_ppo(model_folder, knobs, held, trained):
    source = source_of(model_folder("llama"))
    one = sft_parts(source)["adapters (weights)"]
    parts = parts_of(ppo_config(**{"device": "cpu", "reward": ["rm"], **knobs}), source, Work("ppo", [100]))
    assert parts["adapters (weights)"] == held * one and parts[MOMENTS] == 3 * trained * one


def test_the_adapter_is_of_the_layers_and_the_rank_asked_for(model_folder):
    source = source_of(model_folder("llama"))

    def weights(**knobs):
        return sft_parts(source, **knobs)["adapters (weights)"] / 4

    # q_proj is 32-32 and v_proj 32-16, in two blocks each.
    assert weights(lora_rank=8, lora_targets=["q_proj", "v_proj"]) == 8 * 2 * (64 + 48)
    assert weights(lora_targets=["model.layers.1.mlp.up_proj"]) == 32 * (32 + 48)


def test_a_checkpoints_adapter_has_its_own_rank_and_layers_and_is_its_own_reference(open_tiny, tmp_path):
    base = open_tiny("llama")
    adapter = random_adapter(base, 1, rank=4, targets=("q_proj",))
    source = source_of(publish_checkpoint(tmp_path / "sft", base, "sft", adapter), ("sft",))

    def weights(**knobs):
        config = ppo_config(device="cpu", reward=["rm"], **knobs)
        return parts_of(config, source, Work("ppo", [100]))["adapters (weights)"] / 4

    assert weights() == 4 * adapter.size == 4 * 4 * 2 * 64
    assert weights(lora_rank=12) == 3 * weights()


def test_weights_that_are_there_twice_count_once(tmp_path):
    from safetensors.torch import save_file

    for name in ("model-00001-of-00002", "model-00002-of-00002", "consolidated"):
        save_file({f"{name}.weight": torch.zeros(2, 3)}, tmp_path / f"{name}.safetensors")
    assert tensor_shapes(tmp_path) == {
        "model-00001-of-00002.weight": (2, 3),
        "model-00002-of-00002.weight": (2, 3),
    }


def test_a_config_that_says_little_or_differs_from_layer_to_layer_is_estimated_all_the_same():
    tensors = {"layers.0.up.weight": (8, 4), "embed.weight": (10, 4), "layers.0.norm.weight": (4,)}
    poor = shapes_of({"model_type": "x"}, tensors)
    assert (poor.layers, poor.heads, poor.weights, poor.linear) == (1, 1, 32 + 44, {"layers.0.up.weight": (8, 4)})
    config = {"num_hidden_layers": 2, "hidden_size": 4, "num_attention_heads": "?", "intermediate_size": [6, 8]}
    assert shapes_of(config, tensors).inner == 8
    assert shapes_of({"text_config": config}, tensors) == shapes_of(config, tensors)
    assert activation_bytes(shapes_of(config, tensors), 2, checkpointing=False)[0] > 0


# --- what comes and goes, against what autograd and torch really take


def opened(folder, dtype, checkpointing, rank=4):
    source = source_of(folder)
    base = load_base(source, device=CPU, dtype=dtype)
    if checkpointing:
        base.checkpoint_activations()
    roles = Roles(base)
    adapter = random_adapter(base, 1, rank=rank)
    roles.add("policy", adapter)
    return source, base, roles, adapter


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *full(torch.bfloat16)])
@pytest.mark.parametrize(
    "architecture", ["llama", "gpt2", *full("qwen2", "qwen3", "mistral", "gemma", "gemma3", "gpt_neox")]
)
def test_activations_are_those_that_autograd_keeps(model_folder, architecture, dtype, checkpointing):
    source, base, roles, adapter = opened(model_folder(architecture), dtype, checkpointing)
    sequences = sequences_of([90, 71, 60])
    there = [*base.model.parameters(), *base.model.buffers(), *adapter.parameters()]
    with roles.use("policy"), saved_bytes(there) as found:
        base.hidden(sequences)
    shapes = source_shapes(source, sft_config())
    kept, _ = activation_bytes(shapes, dtype.itemsize, checkpointing=checkpointing, rank=4, row=75)
    assert 221 * kept == pytest.approx(found[0], rel=0.25)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_peak_of_a_pass_is_the_plans(model_folder, dtype, checkpointing):
    source, base, roles, adapter = opened(model_folder("llama"), getattr(torch, dtype), checkpointing)
    rows = [TokenRow(s, torch.arange(len(s)) >= 40, False) for s in sequences_of([120, 120, 100, 100])]
    for parameter in adapter.parameters():
        parameter.grad = torch.zeros_like(parameter)
    live = LiveBytes()
    with roles.use("policy"), live:
        learn_rows(roles, "policy", rows, count_targets(rows))
    config = sft_config(device="cpu", dtype=dtype, lora_rank=4, gradient_checkpointing=checkpointing)
    parts = parts_of(config, source, Work("sft", [120, 120, 100, 100], 4, read=280 / 440))
    expected = sum(parts[name] for name in (ACTIVATIONS, "logits", "copies of adapters"))
    assert expected == pytest.approx(live.peak, rel=0.1)


def test_the_cache_of_a_rollout(open_tiny, model_folder):
    from transformers import DynamicCache

    base, cache = open_tiny("llama"), DynamicCache()
    with torch.no_grad():
        base.body(input_ids=torch.ones(3, 7, dtype=torch.long), past_key_values=cache, use_cache=True)
    held = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
    source = source_of(model_folder("llama"))
    assert 3 * 7 * cache_bytes(source_shapes(source, sft_config()), 4) == held


@pytest.mark.parametrize("dtype", [torch.bfloat16, *full(torch.float32)])
@pytest.mark.parametrize(("prompt", "response"), [(50, 50), *full((100, 4), (4, 100))])
def test_the_peak_of_a_rollout_is_the_plans(model_folder, dtype, prompt, response):
    source, base, roles, _ = opened(model_folder("llama"), dtype, False)
    live, prompts = LiveBytes(), sequences_of([prompt] * 16)
    with roles.use("policy"), live:
        generate(base, prompts, [(i,) for i in range(16)], (-1,), Sampling(1.0, response))
    work = Work("ppo", [100], prompt=prompt, response=response, at_once=16)
    assert rollout_bytes(source_shapes(source, sft_config()), dtype.itemsize, work) == pytest.approx(
        live.peak, rel=0.15
    )


def test_what_runs_on_cuda_is_planned_as_it_runs_there_in_fp32_too(model_folder):
    """Prompts are read in passes of CUDA's size, and attention weights of short rows are not kept."""
    shapes = source_shapes(source_of(model_folder("llama")), sft_config())
    work = Work("ppo", [100], prompt=100, response=1, at_once=170)
    more = rollout_bytes(shapes, 4, work, on_cuda=True) - rollout_bytes(shapes, 4, work)
    assert more == (16384 - 2048) * (3 * 48 + 5 * 32) * 4
    here, there = (activation_bytes(shapes, 4, checkpointing=False, row=100, on_cuda=c)[0] for c in (False, True))
    assert here - there == 2 * (4 * 100 - 32) * 4  # layers x (heads x row - the attention's result, kept once)


def test_a_rollout_and_a_pass_are_never_there_at_once(model_folder):
    config, source = ppo_config(device="cpu"), source_of(model_folder("llama"))
    small = parts_of(config, source, Work("ppo", [100], prompt=10, response=90, at_once=1))
    large = parts_of(config, source, Work("ppo", [100], prompt=10, response=90, at_once=10_000))
    rollout = "rollout (keys, values)"
    assert peak_of(small) == pytest.approx(sum(small.values()) - small[rollout])
    assert peak_of(large) == pytest.approx(sum(large.values()) - large[ACTIVATIONS] - large["logits"])


def test_the_largest_pass_is_cut_from_the_longest_rows_of_a_step():
    sizes = [10, 900, 500, 20, 800, 700]
    auto, twos = sft_config(), sft_config(micro_batch_size=2)
    assert largest_pass(auto, Work("sft", sizes, 3), 5000) == 900 + 800 + 700
    assert largest_pass(auto, Work("sft", sizes, 3), 1600) == 800 + 700
    assert largest_pass(auto, Work("sft", sizes, 3), 100) == 900
    assert largest_pass(twos, Work("sft", sizes, 3), 100) == 900 + 800


def test_shared_beginnings_and_unread_tokens_need_less(model_folder):
    source, config = source_of(model_folder("llama")), sft_config(device="cpu")

    def parts(**work):
        return parts_of(config, source, Work("sft", [100] * 4, 4, **work))

    assert parts(read=0.5)["logits"] == parts()["logits"] / 2 and parts(read=0.0)["logits"] == 0
    assert parts(read=0.0, computed=0.6)[ACTIVATIONS] == pytest.approx(0.6 * parts(read=0.0)[ACTIVATIONS])


@pytest.mark.parametrize(("several", "minibatches"), [(1, 1), (4, 1), (4, 2), (8, 3)])
def test_a_minibatch_of_ppo_shares_only_the_prompts_whose_responses_meet_in_it(several, minibatches):
    """Against rows that are shuffled, cut and packed as they will be."""
    shape = {"batch_size": 32, "responses_per_prompt": several, "minibatches": minibatches}
    config = ppo_config(device="cpu", max_response_tokens=10, **shape)
    prompts, ends = sequences_of([30] * 32, vocabulary=10**9), sequences_of([10] * 32 * several, 1, 10**9)
    work, rows = ppo.work_of(config, prompt_rows(prompts)), 32 * several
    lengths = []
    for part in range(minibatches):
        chosen = permutation(rows, 0)[part * rows // minibatches : (part + 1) * rows // minibatches]
        row = pack([torch.cat([prompts[i // several], ends[i]]) for i in chosen], share=True)
        lengths.append((len(chosen), len(row.ids)))
    assert work.per_step == max(count for count, _ in lengths)
    assert work.computed == pytest.approx(sum(n for _, n in lengths) / (rows * 40), rel=0.05)


# --- what is decided by it


def decide(source, free, asked="auto", size="auto", rows=64, longest=100):
    config = sft_config(device="cpu", gradient_checkpointing=asked, micro_batch_size=size, lora_rank=4)
    return choose_passes(config, Work("sft", [longest] * rows, rows), source, source_shapes(source, sft_config()), free)


def test_memory_is_used_as_far_as_it_goes_and_recomputing_comes_last(model_folder, monkeypatch):
    monkeypatch.setattr("stages.native.limits.TOKENS_AT_ONCE_CPU", 4096)
    source = source_of(model_folder("llama"))
    shapes = source_shapes(source, sft_config())
    (kept, passing), less = (activation_bytes(shapes, 4, checkpointing=c, rank=4, row=100) for c in (False, True))
    held = 4 * 4 * 4 * 2 * (2 * 64 + 2 * 48 + 3 * 80)  # weights, gradients, two moments: 4 x fp32 x rank x layers
    logits = 12 * 4096 * 300

    def free_for(tokens, each):
        return (held + logits + (tokens + 0.5) * each) / 0.9

    for recompute, tokens, free in (
        (False, 4096, None),
        (False, 4096, free_for(5000, kept + passing)),  # no more than is wanted
        (False, 3000, free_for(3000, kept + passing)),
        (False, 2048, free_for(2048, kept + passing)),
        (True, 3000, free_for(3000, sum(less))),  # would be far less than 2048 without
        (True, 1, 0),
    ):
        assert vars(decide(source, free)) == {"checkpointing": recompute, "tokens": tokens}
    assert decide(source, free_for(2047, kept + passing)).checkpointing
    assert not decide(source, free_for(500, kept + passing), rows=5).checkpointing  # a step has no more tokens
    assert decide(source, free_for(499, kept + passing), rows=5).checkpointing
    assert decide(source, free_for(200, kept + passing), longest=201, rows=1).checkpointing
    assert not decide(source, 0, asked=False).checkpointing and decide(source, 1e12, asked=True).checkpointing
    assert not decide(source, free_for(300, kept + passing), size=3).checkpointing
    assert decide(source, free_for(299, kept + passing), size=3).checkpointing


def test_fewer_responses_are_sampled_at_once_where_all_do_not_fit(model_folder):
    source, work = source_of(model_folder("llama")), Work("ppo", [100], prompt=60, response=40, at_once=64)
    config, shapes = ppo_config(device="cpu", lora_rank=4, reward=["f.py:score"]), source_shapes(source, sft_config())
    held = 2 * 5 * 4 * 4 * 2 * (2 * 64 + 2 * 48 + 3 * 80)  # policy and critic
    kept = 2 * 2 * 16 * 4  # keys and values of a token
    folded = 4 * 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)  # the linear layers of two blocks once more
    one = 100 * kept + max(60 * (3 * 48 + 5 * 32) * 4, 24 * 300)  # slots, and the prompts' pass or the last draw
    assert rollout_rows(config, work, source, shapes, None) == "auto"
    assert rollout_rows(config, work, source, shapes, (held + folded + 64.1 * one) / 0.9) == "auto"
    assert rollout_rows(config, work, source, shapes, (held + folded + 10.5 * one) / 0.9) == 10
    assert rollout_rows(config, work, source, shapes, 0) == 1
    asked = ppo_config(device="cpu", rollout_batch_size=7)
    assert rollout_rows(asked, work, source, shapes, 0) == 7


def test_the_cut_of_a_batch_leaves_its_loss_alone(open_tiny):
    base = open_tiny("llama")
    roles = Roles(base)
    roles.add("policy", random_adapter(base, 1))
    rows = [TokenRow(s, torch.arange(len(s)) >= 2, False) for s in sequences_of([40, 30, 20, 10])]
    calls, hidden = [], base.hidden
    base.hidden = lambda rows, *wanted: calls.append(len(rows)) or hidden(rows, *wanted)
    found = []
    for tokens in (None, 50, 1):
        base.passes.tokens = tokens
        found.append(learn_rows(roles, "policy", rows, count_targets(rows))["loss"])
    assert calls == [4, 1, 2, 1, 1, 1, 1, 1]
    assert found == pytest.approx([found[0]] * 3, rel=1e-6)


# --- what a person sees


def test_the_plan_in_numbers(model_folder):
    config = sft_config(device="cpu", batch_size=4, lora_rank=4)
    work = Work("sft", [10, 30, 20], 4, read=0.5)
    result = plan_result(config, source_of(model_folder("llama")), work, 7, {"held_out_rows": 2})
    assert (result.command, result.status, result.output) == ("sft", "dry run", None)
    assert result.data["plan"] == {
        "rows": 3,
        "held_out_rows": 2,
        "steps": 7,
        "batch_size": 4,
        "tokens_per_epoch": 60,
        "longest_row_tokens": 30,
        "largest_pass_tokens": 60,
        "gradient_checkpointing": False,
        "trainable_parameters_per_adapter": 2 * 4 * (2 * 64 + 2 * 48 + 3 * 80),
    }
    memory = dict(result.data["memory_gb"])
    assert memory.pop("total") == pytest.approx(sum(memory.values()))
    assert "free" not in memory
    assert ("tokens per epoch", "60") in result.tables[0].rows
    assert ("gradient checkpointing", "off") in result.tables[0].rows


def test_where_the_device_says_what_is_free_so_does_the_plan(model_folder, monkeypatch):

    monkeypatch.setattr(plan, "free_memory", lambda device: 5_000_000)
    config, source = sft_config(device="cpu", lora_rank=4), source_of(model_folder("llama"))
    result = plan_result(config, source, Work("sft", [100] * 64, 64), 7, {})
    assert result.data["plan"]["gradient_checkpointing"] is True and result.data["memory_gb"]["free"] == 0.005
    assert result.data["memory_gb"]["total"] < 0.005
    assert ("gradient checkpointing", "on") in result.tables[0].rows
    monkeypatch.setattr(plan, "free_memory", lambda device: 2_500_000)
    work = Work("ppo", [100] * 64, 64, prompt=60, response=40, at_once=64)
    result = plan_result(ppo_config(device="cpu", lora_rank=4), source, work, 7, {})
    assert 1 < result.data["plan"]["responses_at_once"] < 64 and result.data["memory_gb"]["total"] < 0.0025
