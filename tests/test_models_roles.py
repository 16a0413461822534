"""Roles on one base: which adapter is active, and what is stored of it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from stages.errors import CheckpointError, ConfigError
from stages.models.heads import ScalarHead
from stages.models.model_ref import open_model
from stages.models.roles import (
    ADAPTER,
    ADAPTER_CONFIG,
    HEAD,
    Roles,
    adapter_of,
    head_of,
    new_adapter,
    save_adapter,
    start_adapter,
)
from tests.parts import publish_checkpoint, random_adapter, random_head, sequences_of, sft_config

SEQUENCES = sequences_of([7, 4])


@pytest.fixture
def base(open_tiny):
    return open_tiny("llama")


@torch.no_grad()
def states(roles, role):
    with roles.use(role):
        return roles.base.hidden(SEQUENCES)


def test_each_role_runs_under_its_own_adapter(base):
    roles = Roles(base)
    roles.add("policy", random_adapter(base, 1))
    roles.add("critic", random_adapter(base, 2))
    roles.add("bare", None)
    with torch.no_grad():
        plain = base.hidden(SEQUENCES)
    policy, critic = states(roles, "policy"), states(roles, "critic")
    assert (policy - critic).abs().max() > 0.1 and (policy - plain).abs().max() > 0.1
    assert torch.equal(states(roles, "bare"), plain)
    assert torch.equal(states(roles, "policy"), policy)


def test_roles_are_alike_where_they_compute_the_same(base):
    roles = Roles(base)
    adapter = random_adapter(base, 1)
    roles.add("policy", adapter)
    roles.add("copy", adapter.copy(trainable=False))
    roles.add("other", random_adapter(base, 2))
    roles.add("bare", None)
    roles.add("fresh", new_adapter(base, None, None, [], 0))
    alike = {(a, b) for a in roles.adapters for b in roles.adapters if roles.alike(a, b)}
    same = ({"policy", "copy"}, {"other"}, {"bare", "fresh"})
    assert alike == {(a, b) for group in same for a in group for b in group}


def test_a_block_ends_with_the_role_that_was_active_before(base):
    roles = Roles(base)
    roles.add("policy", None)
    roles.add("critic", None)
    with roles.use("policy"):
        with pytest.raises(KeyError), roles.use("critic"):
            assert base.lora.active == ["critic"]
            raise KeyError
        assert base.lora.active == ["policy"]
    assert base.lora.active == []
    with pytest.raises(AssertionError, match="no role judge"), roles.use("judge"):
        pass


def test_a_role_can_be_replaced_and_removed(base):
    roles = Roles(base)
    first, second = random_adapter(base, 1), random_adapter(base, 2, targets=("q_proj",))
    roles.add("policy", first, ScalarHead(base.width))
    before = states(roles, "policy")
    roles.add("policy", second)
    assert "policy" not in roles.heads
    alone = Roles(base)
    alone.add("alone", second)
    assert torch.equal(states(roles, "policy"), states(alone, "alone"))  # nothing of the first adapter is left
    assert (states(roles, "policy") - before).abs().max() > 0.1
    roles.remove("policy")
    assert all("policy" not in layer.lora_A for layer in base.lora.adapted.values()) and not roles.adapters


def test_a_role_trains_its_adapter_and_its_head(base):
    roles = Roles(base)
    adapter, head = random_adapter(base, 1), random_head(base.width, 2)
    roles.add("critic", adapter, head)
    roles.add("bare", None)
    found = {id(p) for p in roles.parameters("critic")}
    assert found == {id(p) for p in (*adapter.parameters(), head.weight, head.bias)}
    assert len(roles.parameters("critic")) == 2 * 14 + 2
    assert roles.parameters("bare") == []


def test_an_adapter_has_rank_and_alpha_32_unless_told(base):
    adapter = new_adapter(base, None, None, [], seed=0)
    assert (adapter.config.r, adapter.config.lora_alpha, len(adapter.paths)) == (32, 32.0, 14)
    assert adapter.scale == 1.0
    assert new_adapter(base, 8, None, ["q_proj"], seed=0).scale == 4.0


# --- on disk


def test_what_is_saved_and_loaded_is_the_same_to_the_bit(base, tmp_path):
    """Check 51: the states under a saved and reloaded adapter and head are equal."""
    roles = Roles(base)
    roles.add("reward", random_adapter(base, 1), random_head(base.width, 2))
    assert save_adapter(tmp_path, base, roles.adapters["reward"], roles.heads["reward"]) == [
        ADAPTER,
        ADAPTER_CONFIG,
        HEAD,
    ]
    again = Roles(base)
    again.add("again", adapter_of(base, base.ref, trainable=False, folder=tmp_path), head_of(base, tmp_path))
    assert torch.equal(states(again, "again"), states(roles, "reward"))
    hidden = states(roles, "reward")
    assert torch.equal(again.heads["again"](hidden), roles.heads["reward"](hidden))
    stored = load_file(tmp_path / ADAPTER)
    assert torch.equal(stored["base_model.model.score.weight"][0], roles.heads["reward"].weight)
    assert all(tensor.dtype == torch.float32 for tensor in stored.values())


def test_a_plain_base_has_no_adapter(base):
    assert adapter_of(base, base.ref, trainable=True) is None


@pytest.mark.parametrize("config", [None, "{", "{}", '{"r": "x", "lora_alpha": 1}', "[]"])
def test_an_adapter_config_that_cannot_be_read_is_refused(base, tmp_path, config):
    save_adapter(tmp_path, base, random_adapter(base, 1))
    (tmp_path / ADAPTER_CONFIG).unlink()
    if config is not None:
        (tmp_path / ADAPTER_CONFIG).write_text(config)
    with pytest.raises(CheckpointError, match=r"adapter_config.json cannot be read") as caught:
        adapter_of(base, base.ref, trainable=False, folder=tmp_path)
    assert caught.value.where == str(tmp_path)


def test_a_damaged_adapter_or_head_is_refused_by_name(base, tmp_path):
    save_adapter(tmp_path, base, random_adapter(base, 1), random_head(base.width, 2))
    whole = (tmp_path / ADAPTER).read_bytes()
    (tmp_path / ADAPTER).write_bytes(whole[:-10])
    with pytest.raises(CheckpointError, match=ADAPTER):
        adapter_of(base, base.ref, trainable=False, folder=tmp_path)
    save_file({"weight": torch.zeros(3), "bias": torch.zeros(())}, tmp_path / HEAD)
    with pytest.raises(CheckpointError, match=f"{HEAD}: the scalar head's weights do not fit the base"):
        head_of(base, tmp_path)
    (tmp_path / HEAD).unlink()
    with pytest.raises(CheckpointError, match="head.safetensors is missing"):
        head_of(base, tmp_path)


# --- starting from a checkpoint


@pytest.fixture
def stored(base, tmp_path):
    """The source of an SFT checkpoint with an adapter of rank 4 and alpha 8, and that adapter."""
    adapter = random_adapter(base, 1, rank=4, alpha=8.0)
    folder = publish_checkpoint(tmp_path / "sft", base, "sft", adapter)
    return open_model(str(folder), stages=("sft",), what="--model"), adapter


@pytest.mark.parametrize(("rank", "alpha"), [(None, None), (4, None), (None, 8.0), (4, 8.0)])
def test_training_goes_on_from_a_checkpoints_adapter(base, stored, rank, alpha):
    source, adapter = stored
    started = start_adapter(base, source, sft_config(lora_rank=rank, lora_alpha=alpha), seed=0)
    for one, other in zip(started.parameters(), adapter.parameters(), strict=True):
        assert torch.equal(one, other) and one.requires_grad


@pytest.mark.parametrize(("rank", "alpha"), [(8, None), (None, 2.0), (8, 2.0)])
def test_another_rank_or_alpha_starts_as_the_same_function(base, stored, rank, alpha):
    source, adapter = stored
    roles = Roles(base)
    roles.add("stored", adapter)
    roles.add("started", start_adapter(base, source, sft_config(lora_rank=rank, lora_alpha=alpha), seed=0))
    assert (states(roles, "stored") - states(roles, "started")).abs().max() <= 1e-5
    config = roles.adapters["started"].config
    assert (config.r, config.lora_alpha) == (rank or 4, alpha or 8.0)


def test_a_base_starts_with_a_fresh_adapter(base):
    started = start_adapter(base, base.ref, sft_config(lora_targets=["q_proj"]), seed=0)
    assert (started.config.r, len(started.paths)) == (32, 2)
    assert started.is_zero


def test_the_config_names_the_base_by_an_absolute_path(base, tmp_path):
    save_adapter(tmp_path, base, random_adapter(base, 1))
    named = json.loads((tmp_path / ADAPTER_CONFIG).read_text())["base_model_name_or_path"]
    assert named == str(base.ref.base)


def test_other_layers_than_the_checkpoints_are_refused(base, stored, tmp_path):
    with pytest.raises(ConfigError, match="adapts other layers: down_proj, gate_proj, k_proj, o_proj") as caught:
        start_adapter(base, stored[0], sft_config(lora_targets=["q_proj"]), seed=0)
    assert caught.value.where == "lora_targets"
    few = random_adapter(base, 1, targets=("q_proj",))
    source = open_model(str(publish_checkpoint(tmp_path / "few", base, "sft", few)), stages=("sft",), what="--model")
    started = start_adapter(base, source, sft_config(lora_targets=["q_proj"]), seed=0)  # the same recipe, one stage on
    assert started.paths == few.paths == start_adapter(base, source, sft_config(), seed=0).paths
