"""LoRA layers and adapters: what they compute, how they are stored, and that PEFT reads them alike."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from stages.errors import CheckpointError, ConfigError, ModelError
from stages.models.lora import (
    Adapter,
    Delta,
    LoraLinear,
    Switch,
    fresh,
    from_tensors,
    merge_and_unwrap,
    peft_config,
    random_a,
)
from stages.models.roles import Roles, save_adapter
from tests.parts import random_adapter, random_head, sequences_of, whole_model

IDS = sequences_of([11], seed=3)[0]


def logits_under(roles, role):
    with torch.no_grad(), roles.use(role):
        return roles.base.logits(roles.base.hidden([IDS]))


def with_role(base, adapter):
    roles = Roles(base)
    roles.add("policy", adapter)
    return roles


# --- one layer


def test_layer_adds_the_active_roles_delta_and_no_other():
    linear = nn.Linear(2, 3)
    linear.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    linear.bias.data = torch.tensor([0.0, 0.0, 1.0])
    switch = Switch()
    layer = LoraLinear(linear, switch)
    # A x = 2 + 3 * 3 = 11; B A x = (11, 0, -11); scale 0.5.
    layer.deltas["policy"] = Delta(
        nn.Parameter(torch.tensor([[1.0, 3.0]])), nn.Parameter(torch.tensor([[1.0], [0.0], [-1.0]])), 0.5
    )
    x = torch.tensor([[2.0, 3.0]])
    assert layer(x).tolist() == [[2.0, 3.0, 6.0]]
    switch.active = "policy"
    assert layer(x).tolist() == [[7.5, 3.0, 0.5]]
    assert layer(x[None]).tolist() == [[[7.5, 3.0, 0.5]]]
    switch.active = "critic"  # a role without a delta here
    assert layer(x).tolist() == [[2.0, 3.0, 6.0]]


def test_only_the_active_roles_weights_get_gradients(open_tiny):
    base = open_tiny("llama")
    roles = Roles(base)
    roles.add("policy", random_adapter(base, 1))
    roles.add("critic", random_adapter(base, 2))
    with roles.use("policy"):
        base.hidden([IDS]).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in roles.parameters("policy"))
    assert all(p.grad is None for p in roles.parameters("critic"))
    assert all(p.grad is None for p in base.model.parameters())


def test_every_linear_layer_but_the_output_layer_is_adapted(open_tiny):
    assert len(open_tiny("llama").layers) == 2 * 7
    assert len(open_tiny("gpt2").layers) == 2 * 4
    base = open_tiny("gpt_neox")
    assert {path.rsplit(".", 1)[-1] for path in base.layers} == {
        "query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h",
    }  # fmt: skip
    assert not isinstance(base.model.get_output_embeddings(), LoraLinear)


# --- making adapters


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_fresh_adapter_changes_nothing(open_tiny, architecture):
    base = open_tiny(architecture)
    roles = with_role(base, fresh(base.layers, 4, 8.0, [], seed=0))
    roles.add("bare", None)
    assert torch.equal(logits_under(roles, "policy"), logits_under(roles, "bare"))


def test_a_fresh_adapter_has_the_size_of_its_ranks(open_tiny):
    # Per llama block: q and o 32-32, k and v 32-16, gate, up and down 32-48; each costs rank * (in + out).
    adapter = fresh(open_tiny("llama").layers, 4, 8.0, [], seed=0)
    assert adapter.size == 2 * 4 * (2 * 64 + 2 * 48 + 3 * 80)
    assert {d.scale for d in adapter.deltas.values()} == {2.0}
    assert all(p.dtype == torch.float32 and p.requires_grad for p in adapter.parameters())


def test_layers_and_seeds_draw_their_own_numbers(open_tiny):
    layers = open_tiny("llama").layers
    first = fresh(layers, 4, 8.0, ["q_proj"], seed=0).deltas
    again = fresh(layers, 4, 8.0, ["q_proj"], seed=0).deltas
    other = fresh(layers, 4, 8.0, ["q_proj"], seed=100).deltas
    one, two = (f"model.layers.{i}.self_attn.q_proj" for i in (0, 1))
    assert torch.equal(first[one].a, again[one].a) and torch.equal(first[two].a, again[two].a)
    assert not torch.equal(first[one].a, first[two].a) and not torch.equal(first[one].a, other[one].a)


def test_targets_choose_layers_by_name_or_path(open_tiny):
    layers = open_tiny("llama").layers
    assert len(fresh(layers, 2, 2.0, ["q_proj", "v_proj"], seed=0).deltas) == 4
    one = fresh(layers, 2, 2.0, ["model.layers.1.mlp.up_proj"], seed=0)
    assert list(one.deltas) == ["model.layers.1.mlp.up_proj"]
    assert len(fresh(layers, 2, 2.0, ["mlp.up_proj"], seed=0).deltas) == 2


@pytest.mark.parametrize("targets", [["qproj"], ["q_proj", "c_attn"], ["proj"]])
def test_a_target_that_no_layer_has_is_refused_with_the_names_there_are(open_tiny, targets):
    with pytest.raises(ModelError) as caught:
        fresh(open_tiny("llama").layers, 2, 2.0, targets, seed=0)
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


@pytest.mark.parametrize(("rank", "alpha"), [(4, 3.0), (9, 8.0), (6, 32.0)])
def test_a_grown_adapter_is_the_same_function(open_tiny, rank, alpha):
    base = open_tiny("llama")
    small = random_adapter(base, 1, rank=4, alpha=8.0)
    roles = with_role(base, small)
    roles.add("grown", small.grown(rank, alpha, seed=9))
    difference = (logits_under(roles, "grown") - logits_under(roles, "policy")).abs().max()
    assert difference <= 1e-5
    grown = roles.adapters["grown"]
    assert (grown.rank, grown.alpha) == (rank, alpha)
    delta = next(iter(grown.deltas.values()))
    assert delta.a.shape[0] == rank and delta.scale == alpha / rank


def test_what_grows_can_learn(open_tiny):
    grown = random_adapter(open_tiny("llama"), 1, rank=4).grown(6, 6.0, seed=9)
    for delta in grown.deltas.values():
        assert delta.b[:, 4:].abs().max() == 0 and delta.b[:, :4].abs().max() > 0
        assert delta.a[4:].abs().min() > 0  # else neither factor of the new ranks would ever get a gradient
        assert delta.a.requires_grad and delta.b.requires_grad


def test_an_adapter_does_not_shrink(open_tiny):
    with pytest.raises(ConfigError, match="lora_rank 2 is smaller than the checkpoint's 4"):
        random_adapter(open_tiny("llama"), 1, rank=4).grown(2, 8.0, seed=0)


# --- files


def test_tensors_round_trip(open_tiny):
    base = open_tiny("gpt2")
    adapter = random_adapter(base, 1)
    again = from_tensors(base.layers, adapter.tensors(), 4, 8.0, where="x", trainable=False)
    assert list(again.deltas) == list(adapter.deltas)
    assert all(torch.equal(a, b) for a, b in zip(adapter.parameters(), again.parameters(), strict=True))
    assert not any(p.requires_grad for p in again.parameters())


def test_tensors_that_do_not_fit_are_refused(open_tiny):
    base = open_tiny("llama")
    good = random_adapter(base, 1).tensors()
    name = next(iter(good))

    def refused(tensors, rank=4):
        with pytest.raises(CheckpointError) as caught:
            from_tensors(base.layers, tensors, rank, 8.0, where="adapter_model.safetensors", trainable=False)
        assert caught.value.where == "adapter_model.safetensors"
        return caught.value.what

    path = "model.layers.0.self_attn.q_proj"
    assert path in refused({**good, name: good[name][:, :-1]})
    assert path in refused(good, rank=3)
    assert path in refused({k: v for k, v in good.items() if k != name.replace("lora_A", "lora_B")})
    other = {k.replace("layers.1", "layers.7"): v for k, v in good.items()}
    assert "model.layers.7.mlp.down_proj" in refused(other)
    assert "any layer" in refused({})


def test_peft_config_names_leaves_or_else_whole_paths(open_tiny):
    base = open_tiny("gpt2")
    whole = peft_config(base.model, base.layers, random_adapter(base, 1, rank=4, alpha=6.0), "some/base", "CAUSAL_LM")
    assert whole["target_modules"] == ["c_attn", "c_fc", "c_proj"]
    assert (whole["r"], whole["lora_alpha"], whole["fan_in_fan_out"]) == (4, 6.0, True)
    assert (whole["base_model_name_or_path"], whole["task_type"]) == ("some/base", "CAUSAL_LM")
    assert (whole["lora_dropout"], whole["bias"], whole["use_rslora"]) == (0.0, "none", False)
    # `c_proj` exists in attention and in the MLP: PEFT would adapt both if it were given that name.
    part = fresh(base.layers, 2, 2.0, ["attn.c_proj"], seed=0)
    named = peft_config(base.model, base.layers, part, "b", "CAUSAL_LM")["target_modules"]
    assert named == ["transformer.h.0.attn.c_proj", "transformer.h.1.attn.c_proj"]
    llama = open_tiny("llama")
    assert peft_config(llama.model, llama.layers, random_adapter(llama, 1), "b", "CAUSAL_LM")["fan_in_fan_out"] is False


PEFT_CASES = [("llama", ()), ("gpt2", ()), ("gpt_neox", ()), ("gpt2", ("attn.c_proj",)), ("llama", ("q_proj",))]


@pytest.mark.parametrize(("architecture", "targets"), PEFT_CASES)
def test_peft_loads_the_folder_with_equal_logits(model_folder, open_tiny, tmp_path, architecture, targets):
    from peft import PeftModel

    base = open_tiny(architecture)
    adapter = random_adapter(base, 1, rank=4, alpha=6.0, targets=targets)
    names = save_adapter(tmp_path, base, adapter)
    assert names == ["adapter_model.safetensors", "adapter_config.json"]
    roles = with_role(base, adapter)
    roles.add("bare", None)
    ours = logits_under(roles, "policy")
    assert (ours - logits_under(roles, "bare")).abs().max() > 1e-2
    theirs = PeftModel.from_pretrained(whole_model(model_folder(architecture)), tmp_path).eval()
    with torch.no_grad():
        assert (theirs(IDS[None]).logits[0] - ours).abs().max() <= 1e-5 * ours.abs().max()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
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


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "gpt2", "gpt_neox", "gemma2"])
def test_merged_weights_give_the_adapters_logits(open_tiny, tmp_path, architecture):
    """Check 51: merging in fp32 gives the adapter's logits, and so do the merged weights once saved and reloaded."""
    base = open_tiny(architecture)
    adapter = random_adapter(base, 1)
    roles = with_role(base, adapter)
    expected = logits_under(roles, "policy")
    merge_and_unwrap(base.model, base.layers, adapter)
    assert not any(isinstance(module, LoraLinear) for module in base.model.modules())
    with torch.no_grad():
        assert (base.model(IDS[None], use_cache=False).logits[0] - expected).abs().max() <= 1e-5 * expected.abs().max()
    base.model.save_pretrained(tmp_path)
    with torch.no_grad():
        again = whole_model(tmp_path)(IDS[None]).logits[0]
    assert (again - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_unwrapping_without_an_adapter_gives_the_base_back(model_folder, open_tiny):
    base = open_tiny("gpt2")
    merge_and_unwrap(base.model, base.layers, None)
    plain = whole_model(model_folder("gpt2")).state_dict()
    merged = base.model.state_dict()
    assert merged.keys() == plain.keys()
    assert all(torch.equal(merged[name], plain[name]) for name in plain)


def test_merging_adds_in_fp32_and_rounds_once():
    torch.manual_seed(0)
    linear = nn.Linear(64, 64, bias=False).bfloat16()
    weight = linear.weight.detach().clone()
    root = nn.Module()
    root.layer = LoraLinear(linear, Switch())
    a, b = torch.randn(1, 64), torch.randn(64, 1)
    adapter = Adapter(1, 0.01, {"layer": Delta(nn.Parameter(a), nn.Parameter(b), 0.01)})
    merge_and_unwrap(root, {"layer": root.layer}, adapter)
    assert root.layer is linear
    assert torch.equal(linear.weight, (weight.float() + 0.01 * (b @ a)).bfloat16())
