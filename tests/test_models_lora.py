"""LoRA adapters through PEFT: which one runs, how they start and grow, and that PEFT reads what is stored alike."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from stages.errors import CheckpointError, ModelError
from stages.models.base import load_base
from stages.models.lora import (
    LORA_A,
    LORA_B,
    MAGNITUDE,
    LoraLayers,
    adapter_from,
    config_to_save,
    initial_adapter,
    random_a,
)
from stages.models.model_ref import open_model
from stages.models.roles import Roles, adapter_of, save_adapter
from tests.marks import full
from tests.parts import base_parameters, gradient, random_adapter, random_head, sequences_of, whole_model

IDS = sequences_of([11], seed=3)[0]
TYPES = ("lora", "rslora", "dora")


def logits_under(roles, role):
    with torch.no_grad(), roles.use(role):
        return roles.base.logits(roles.base.hidden([IDS]))


def with_role(base, adapter):
    roles = Roles(base)
    roles.add("policy", adapter)
    return roles


# --- which adapter runs


def one_layer(bias=True):
    """A root with one linear layer of weight ((1, 0), (0, 1), (1, 1)) and bias (0, 0, 1)."""
    root = nn.Module()
    root.layer = nn.Linear(2, 3, bias=bias)
    root.layer.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    root.layer.bias.data = torch.tensor([0.0, 0.0, 1.0])
    return root.requires_grad_(False)


def by_hand(layers, lora_type="lora", alpha=0.5):
    """A = (1, 3), B = (1, 0, -1)' on that layer."""
    adapter = initial_adapter(layers.linear, 1, alpha, [], 0, lora_type)
    adapter.weights["layer" + LORA_A].data = torch.tensor([[1.0, 3.0]])
    adapter.weights["layer" + LORA_B].data = torch.tensor([[1.0], [0.0], [-1.0]])
    return adapter


def test_a_layer_adds_what_the_active_role_adds_and_no_other():
    root = one_layer()
    layers = LoraLayers(root)
    layers.add("policy", by_hand(layers))
    x = torch.tensor([[2.0, 3.0]])
    # A x = 2 + 3 * 3 = 11; B A x = (11, 0, -11); scale 0.5.
    assert root.layer(x).tolist() == [[2.0, 3.0, 6.0]]
    with layers.using("policy"):
        assert root.layer(x).tolist() == [[7.5, 3.0, 0.5]]
        assert root.layer(x[None]).tolist() == [[[7.5, 3.0, 0.5]]]
        with layers.using(None):
            assert root.layer(x).tolist() == [[2.0, 3.0, 6.0]]
    with layers.using("critic"):  # a role without an adapter here
        assert root.layer(x).tolist() == [[2.0, 3.0, 6.0]]


def test_dora_trains_the_lengths_of_the_rows():
    """W + s B A = ((1.5, 1.5), (0, 1), (0.5, -0.5)), of lengths (sqrt 4.5, 1, sqrt 0.5)."""
    root = one_layer()
    layers = LoraLayers(root)
    adapter = by_hand(layers, "dora")
    assert adapter.weights["layer" + MAGNITUDE].tolist() == pytest.approx([1, 1, math.sqrt(2)])  # lengths of W's rows
    layers.add("policy", adapter)
    with layers.using("policy"):
        found = root.layer(torch.tensor([[2.0, 3.0]]))[0].tolist()
    assert found == pytest.approx([7.5 / math.sqrt(4.5), 3.0, -0.5 * math.sqrt(2) / math.sqrt(0.5) + 1])


def test_all_layers_share_one_list_that_names_the_active_role(open_tiny):
    base = open_tiny("llama")
    roles = Roles(base)
    roles.add("policy", random_adapter(base, 1))
    roles.add("few", random_adapter(base, 2, targets=("q_proj",)))
    assert len(base.lora.adapted) == 14
    assert all(layer._active_adapter is base.lora.active for layer in base.lora.adapted.values())
    roles.remove("few")
    assert all(layer._active_adapter is base.lora.active for layer in base.lora.adapted.values())
    assert base.lora.active == []


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_layers_that_a_role_does_not_adapt_run_as_in_the_base(open_tiny, architecture):
    """Beside a role that adapts all layers, another adapts the same as it does alone."""
    name = {"llama": "v_proj", "gpt2": "attn.c_proj"}[architecture]
    alone = open_tiny(architecture)
    expected = logits_under(with_role(alone, random_adapter(alone, 1, targets=(name,))), "policy")
    base = open_tiny(architecture)
    roles = Roles(base)
    roles.add("all", random_adapter(base, 2))
    roles.add("few", random_adapter(base, 1, targets=(name,)))
    assert (logits_under(roles, "few") - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert len(roles.adapters["few"].paths) == 2


def test_each_role_keeps_its_flags_when_another_is_added(open_tiny):
    base = open_tiny("llama")
    roles = Roles(base)
    roles.add("policy", random_adapter(base, 1))
    roles.add("reference", random_adapter(base, 1).copy(trainable=False))
    roles.add("critic", random_adapter(base, 2))
    flags = {role: {p.requires_grad for p in roles.parameters(role)} for role in roles.adapters}
    assert flags == {"policy": {True}, "reference": {False}, "critic": {True}}
    assert not any(p.requires_grad for p in base_parameters(base))


def test_weights_of_an_adapter_are_fp32_on_a_base_in_half_precision(model_folder):
    source = open_model(str(model_folder("gpt2")), stages=(), what="--model")
    base = load_base(source, device=torch.device("cpu"), dtype=torch.bfloat16)
    roles = with_role(base, random_adapter(base, 1))
    held = [p for path, p in base.model.named_parameters() if "lora_" in path]
    assert {p.dtype for p in held} == {torch.float32}
    assert {id(p) for p in held} == {id(p) for p in roles.parameters("policy")}


@pytest.mark.parametrize("lora_type", TYPES)
def test_only_the_active_roles_weights_get_gradients(open_tiny, lora_type):
    base = open_tiny("llama")
    roles = Roles(base)
    roles.add("policy", random_adapter(base, 1, lora_type=lora_type))
    roles.add("critic", random_adapter(base, 2, lora_type=lora_type))
    with roles.use("policy"):
        base.hidden([IDS]).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in roles.parameters("policy"))
    assert all(p.grad is None for p in roles.parameters("critic"))
    assert all(p.grad is None for p in base_parameters(base))


def test_every_linear_layer_but_the_output_layer_is_adapted(open_tiny):
    assert len(open_tiny("llama").layers) == 2 * 7
    assert len(open_tiny("gpt2").layers) == 2 * 4
    base = open_tiny("gpt_neox")
    assert {path.rsplit(".", 1)[-1] for path in base.layers} == {
        "query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h",
    }  # fmt: skip
    roles = with_role(base, random_adapter(base, 1))
    assert base.lora.adapted.keys() == base.layers.keys() == set(roles.adapters["policy"].paths)
    assert type(base.model.get_output_embeddings()) is nn.Linear


@pytest.mark.parametrize(("rank", "alpha", "lora_type"), [(4, 8.0, "rslora"), (16, 3.0, "rslora"), (4, 8.0, "dora")])
def test_the_native_pass_agrees_with_peft(open_tiny, rank, alpha, lora_type):
    """Our own pass for rslora; DoRA leaves it, for every role."""
    base = open_tiny("llama")
    assert base.native is not None
    roles = with_role(base, random_adapter(base, 1, rank=rank, alpha=alpha, lora_type=lora_type))
    assert (base.native is None) == base.has_dora == (lora_type == "dora")
    found = logits_under(roles, "policy")
    with torch.no_grad(), roles.use("policy"):
        expected = base.model(IDS[None], use_cache=False).logits[0]
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_dora_leaves_the_native_pass_also_when_activations_are_recomputed(open_tiny):
    found = []
    for checkpoints in (False, True):
        base = open_tiny("llama")
        if checkpoints:
            base.checkpoint_activations()
        roles = with_role(base, random_adapter(base, 1, lora_type="dora"))
        with roles.use("policy"):
            base.hidden([IDS]).square().sum().backward()
        found.append(gradient(roles.parameters("policy")))
    assert (found[0] - found[1]).norm() <= 1e-5 * found[0].norm()


# --- making adapters


@pytest.mark.parametrize("lora_type", TYPES)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_an_initial_adapter_changes_nothing(open_tiny, architecture, lora_type):
    base = open_tiny(architecture)
    roles = with_role(base, initial_adapter(base.layers, 4, 8.0, [], 0, lora_type))
    roles.add("bare", None)
    difference = (logits_under(roles, "policy") - logits_under(roles, "bare")).abs().max()
    assert difference == 0 if lora_type != "dora" else difference <= 1e-5
    assert roles.alike("policy", "bare") == (lora_type != "dora")


def test_an_initial_adapter_has_the_size_of_its_ranks(open_tiny):
    # Per llama block: q and o 32-32, k and v 32-16, gate, up and down 32-48; each costs rank * (in + out).
    adapter = initial_adapter(open_tiny("llama").layers, 4, 8.0, [], seed=0)
    assert adapter.size == 2 * 4 * (2 * 64 + 2 * 48 + 3 * 80)
    assert adapter.scale == 2.0
    assert all(p.dtype == torch.float32 and p.requires_grad for p in adapter.parameters())
    dora = initial_adapter(open_tiny("llama").layers, 4, 8.0, [], 0, "dora")
    assert dora.size - adapter.size == 2 * (32 + 16 + 16 + 32 + 48 + 48 + 32)
    assert initial_adapter(open_tiny("llama").layers, 16, 8.0, [], 0, "rslora").scale == 2.0  # 8 / sqrt(16)


def test_layers_and_seeds_draw_their_own_numbers(open_tiny):
    layers = open_tiny("llama").layers
    first = initial_adapter(layers, 4, 8.0, ["q_proj"], seed=0).weights
    again = initial_adapter(layers, 4, 8.0, ["q_proj"], seed=0).weights
    other = initial_adapter(layers, 4, 8.0, ["q_proj"], seed=100).weights
    one, two = (f"model.layers.{i}.self_attn.q_proj.lora_A.weight" for i in (0, 1))
    assert torch.equal(first[one], again[one]) and torch.equal(first[two], again[two])
    assert not torch.equal(first[one], first[two]) and not torch.equal(first[one], other[one])


def test_targets_choose_layers_by_name_or_path(open_tiny):
    layers = open_tiny("llama").layers
    assert len(initial_adapter(layers, 2, 2.0, ["q_proj", "v_proj"], seed=0).paths) == 4
    one = initial_adapter(layers, 2, 2.0, ["model.layers.1.mlp.up_proj"], seed=0)
    assert one.paths == ["model.layers.1.mlp.up_proj"]
    assert len(initial_adapter(layers, 2, 2.0, ["mlp.up_proj"], seed=0).paths) == 2


@pytest.mark.parametrize("targets", [["qproj"], ["q_proj", "c_attn"], ["proj"]])
def test_a_target_that_no_layer_has_is_refused_with_the_names_there_are(open_tiny, targets):
    with pytest.raises(ModelError) as caught:
        initial_adapter(open_tiny("llama").layers, 2, 2.0, targets, seed=0)
    assert f"`{targets[-1]}`" in caught.value.what
    assert "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in caught.value.fix
    assert caught.value.where == "lora_targets"


def test_a_is_drawn_like_a_linear_layers_default_from_its_seed_alone():
    a = random_a(64, 100, torch.device("cpu"), seed=5)
    bound = 1 / math.sqrt(100)  # Kaiming uniform with a = sqrt 5
    assert a.abs().max() <= bound
    assert a.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
    torch.randn(7)
    assert torch.equal(a, random_a(64, 100, torch.device("cpu"), seed=5))
    assert not torch.equal(a, random_a(64, 100, torch.device("cpu"), seed=6))


def test_a_copy_is_independent(open_tiny):
    adapter = random_adapter(open_tiny("llama"), 1)
    twin = adapter.copy(trainable=False)
    for one, other in zip(adapter.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other) and one.data_ptr() != other.data_ptr() and not other.requires_grad


# --- growing


@pytest.mark.parametrize("lora_type", TYPES)
@pytest.mark.parametrize(("rank", "alpha"), [(9, 3.0), *full((4, 3.0), (9, 8.0), (6, 32.0))])
def test_a_grown_adapter_is_the_same_function(open_tiny, rank, alpha, lora_type):
    base = open_tiny("llama")
    small = random_adapter(base, 1, rank=4, alpha=8.0, lora_type=lora_type)
    roles = with_role(base, small)
    roles.add("grown", small.grown(rank, alpha, seed=9))
    difference = (logits_under(roles, "grown") - logits_under(roles, "policy")).abs().max()
    assert difference <= 1e-5
    grown = roles.adapters["grown"]
    assert (grown.config.r, grown.config.lora_alpha, len(next(grown.parameters()))) == (rank, alpha, rank)
    assert grown.scale == pytest.approx(alpha / (math.sqrt(rank) if lora_type == "rslora" else rank))


def test_what_grows_can_learn(open_tiny):
    grown = random_adapter(open_tiny("llama"), 1, rank=4).grown(6, 6.0, seed=9)
    one, two = (grown.weights[f"model.layers.{i}.self_attn.q_proj" + LORA_A] for i in (0, 1))
    assert not torch.equal(one[4:], two[4:])
    for path in grown.paths:
        a, b = grown.weights[path + LORA_A], grown.weights[path + LORA_B]
        assert b[:, 4:].abs().max() == 0 and b[:, :4].abs().max() > 0
        assert a[4:].abs().min() > 0  # else neither factor of the new ranks would ever get a gradient
        assert a.requires_grad and b.requires_grad


# --- files


@pytest.mark.parametrize("lora_type", TYPES)
def test_tensors_round_trip(open_tiny, lora_type):
    base = open_tiny("gpt2")
    adapter = random_adapter(base, 1, lora_type=lora_type)
    again = adapter_from(base.layers, adapter.tensors(), 4, 8.0, lora_type, where="x", trainable=False)
    assert again.config == adapter.config and again.weights.keys() == adapter.weights.keys()
    assert all(torch.equal(a, b) for a, b in zip(adapter.parameters(), again.parameters(), strict=True))
    assert not any(p.requires_grad for p in again.parameters())


def test_tensors_that_do_not_fit_are_refused(open_tiny):
    base = open_tiny("llama")
    good = random_adapter(base, 1).tensors()
    name = next(iter(good))

    def refused(tensors, rank=4, kind="lora"):
        with pytest.raises(CheckpointError) as caught:
            adapter_from(base.layers, tensors, rank, 8.0, kind, where="adapter_model.safetensors", trainable=False)
        assert caught.value.where == "adapter_model.safetensors"
        return caught.value.what

    path = "model.layers.0.self_attn.q_proj"
    assert path in refused({**good, name: good[name][:, :-1]})
    assert path in refused(good, rank=3)
    assert path in refused(good, kind="dora")  # no magnitudes
    assert path in refused({k: v for k, v in good.items() if k != name.replace("lora_A", "lora_B")})
    other = {k.replace("layers.1", "layers.7"): v for k, v in good.items()}
    assert "model.layers.7.mlp.down_proj" in refused(other)
    assert "any layer" in refused({})


def test_the_config_names_leaves_or_else_whole_paths(open_tiny):
    base = open_tiny("gpt2")
    whole = config_to_save(random_adapter(base, 1, rank=4, alpha=6.0).config, "some/base", "CAUSAL_LM")
    assert whole["target_modules"] == ["c_attn", "c_fc", "c_proj"]
    assert (whole["r"], whole["lora_alpha"], whole["fan_in_fan_out"]) == (4, 6.0, True)
    assert (whole["base_model_name_or_path"], whole["task_type"]) == ("some/base", "CAUSAL_LM")
    assert (whole["lora_dropout"], whole["bias"], whole["use_rslora"]) == (0.0, "none", False)
    # `c_proj` exists in attention and in the MLP: PEFT would adapt both if it were given that name.
    part = initial_adapter(base.layers, 2, 2.0, ["attn.c_proj"], seed=0)
    named = config_to_save(part.config, "b", "CAUSAL_LM")["target_modules"]
    assert named == ["transformer.h.0.attn.c_proj", "transformer.h.1.attn.c_proj"]
    assert random_adapter(open_tiny("llama"), 1).config.fan_in_fan_out is False


PEFT_CASES = [("llama", ()), *full(("gpt2", ()), ("gpt_neox", ()), ("gpt2", ("attn.c_proj",)), ("llama", ("q_proj",)))]


@pytest.mark.parametrize("lora_type", TYPES)
@pytest.mark.parametrize(("architecture", "targets"), PEFT_CASES)
def test_peft_loads_the_folder_with_equal_logits(model_folder, open_tiny, tmp_path, architecture, targets, lora_type):
    from peft import PeftModel

    base = open_tiny(architecture)
    adapter = random_adapter(base, 1, rank=4, alpha=6.0, targets=targets, lora_type=lora_type)
    names = save_adapter(tmp_path, base, adapter)
    assert names == ["adapter_model.safetensors", "adapter_config.json"]
    roles = with_role(base, adapter)
    roles.add("bare", None)
    ours = logits_under(roles, "policy")
    assert (ours - logits_under(roles, "bare")).abs().max() > 1e-2
    theirs = PeftModel.from_pretrained(whole_model(model_folder(architecture)), tmp_path).eval()
    with torch.no_grad():
        assert (theirs(IDS[None]).logits[0] - ours).abs().max() <= 1e-5 * ours.abs().max()
    theirs.save_pretrained(tmp_path / "again")  # and the other way round
    again = adapter_of(base, base.ref, trainable=False, folder=tmp_path / "again")
    assert all(torch.equal(a, b) for a, b in zip(adapter.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("architecture", ["llama", *full("gpt2", "gpt_neox")])
def test_peft_loads_a_reward_adapter_as_a_classifier(model_folder, open_tiny, tmp_path, architecture):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    base = open_tiny(architecture)
    roles = Roles(base)
    roles.add("reward", random_adapter(base, 1), random_head(base.width, 2, bias=0.7))
    names = save_adapter(tmp_path, base, roles.adapters["reward"], roles.heads["reward"])
    assert names == ["adapter_model.safetensors", "adapter_config.json", "head.safetensors"]
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["score"])
    with torch.no_grad(), roles.use("reward"):
        ours = roles.heads["reward"](base.hidden([IDS])[-1])
    plain = AutoModelForSequenceClassification.from_pretrained(model_folder(architecture), num_labels=1)
    theirs = PeftModel.from_pretrained(plain, tmp_path).eval()
    with torch.no_grad():
        assert theirs(IDS[None]).logits.item() == pytest.approx(ours.item() - 0.7, abs=1e-5)


# --- merging


@pytest.mark.parametrize("lora_type", TYPES)
@pytest.mark.parametrize("architecture", ["llama", *full("llama-tied", "gpt2", "gpt_neox", "gemma2")])
def test_merged_weights_give_the_adapters_logits(open_tiny, tmp_path, architecture, lora_type):
    """Check 51: merging in fp32 gives the adapter's logits, and so do the merged weights once saved and reloaded."""
    base = open_tiny(architecture)
    roles = with_role(base, random_adapter(base, 1, lora_type=lora_type))
    roles.add("other", random_adapter(base, 2))
    expected = logits_under(roles, "policy")
    base.lora.merge_and_unload("policy")
    assert not any("lora" in path for path, _ in base.model.named_modules())
    with torch.no_grad():
        assert (base.model(IDS[None], use_cache=False).logits[0] - expected).abs().max() <= 1e-5 * expected.abs().max()
    base.model.save_pretrained(tmp_path)
    with torch.no_grad():
        again = whole_model(tmp_path)(IDS[None]).logits[0]
    assert (again - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_unloading_without_an_adapter_gives_the_base_back(model_folder, open_tiny):
    base = open_tiny("gpt2")
    with_role(base, random_adapter(base, 1)).add("bare", None)
    base.lora.merge_and_unload("bare")
    plain = whole_model(model_folder("gpt2")).state_dict()
    merged = base.model.state_dict()
    assert merged.keys() == plain.keys()
    assert all(torch.equal(merged[name], plain[name]) for name in plain)


def test_merging_adds_in_fp32_and_rounds_once():
    torch.manual_seed(0)
    root = nn.Module()
    root.layer = nn.Linear(64, 64, bias=False).bfloat16().requires_grad_(False)
    linear, weight = root.layer, root.layer.weight.detach().clone()
    layers = LoraLayers(root)
    adapter = initial_adapter(layers.linear, 1, 0.01, [], 0)
    a, b = torch.randn(1, 64), torch.randn(64, 1)
    adapter.weights["layer" + LORA_A].data, adapter.weights["layer" + LORA_B].data = a, b
    layers.add("policy", adapter)
    layers.merge_and_unload("policy")
    assert root.layer is linear
    assert torch.equal(linear.weight, (weight.float() + 0.01 * (b @ a)).bfloat16())
