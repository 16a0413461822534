"""Our own forward pass against transformers' code on the same weights."""

from __future__ import annotations

import pytest
import torch

from stages.models.roles import Roles
from stages.native.forward import native_of
from tests.marks import full_but
from tests.parts import random_adapter, sequences_of
from tests.test_models_base import open_folder, save_model

COVERED = ["llama", "llama-tied", "qwen2", "qwen3", "mistral"]
OTHERS = ["gpt2", "gpt_neox", "gemma", "gemma2", "gemma3"]
LENGTHS = [9, 3, 14, 6, 1]


def with_adapter(base):
    roles = Roles(base)
    roles.add("policy", random_adapter(base, 1))
    return roles


def both_ways(base, run):
    """What `run` gives through our own pass, and through transformers'."""
    native, found = base.native, run()
    base.native = None
    expected = run()
    base.native = native
    return found, expected


def close(a, b, tolerance=1e-5):
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


@pytest.mark.parametrize("architecture", COVERED)
def test_covered_architectures_run_natively(open_tiny, architecture):
    assert open_tiny(architecture).native is not None


@pytest.mark.parametrize("architecture", OTHERS)
def test_others_run_through_transformers(open_tiny, architecture):
    assert open_tiny(architecture).native is None


@pytest.mark.parametrize("architecture", full_but(("llama", "mistral"), COVERED))
@pytest.mark.parametrize("shared", [False, True])
def test_states_and_gradients_are_those_of_transformers(open_tiny, architecture, shared):
    """Longer than a sliding window of 6, in rows with and without a beginning in common."""
    base = open_tiny(architecture)
    roles = with_adapter(base)
    sequences = sequences_of(LENGTHS)
    if shared:
        sequences = [torch.cat([sequences[2], s]) for s in sequences]
    adapter = roles.adapters["policy"]

    def run():
        for parameter in adapter.parameters():
            parameter.grad = None
        with roles.use("policy"):
            states = base.hidden(sequences)
            (states * torch.linspace(-1, 1, states.numel()).view_as(states)).sum().backward()
        return states.detach(), {n: p.grad for n, p in enumerate(adapter.parameters())}

    (states, gradients), (expected, expected_gradients) = both_ways(base, run)
    assert close(states, expected)
    assert all(close(gradients[n], expected_gradients[n], 5e-5) for n in gradients)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("shared", [False, True])
def test_wanted_places_have_the_states_of_the_whole(open_tiny, architecture, shared):
    """In any order, more than once, and where two sequences read the same place of a shared beginning."""
    base = open_tiny(architecture)
    sequences = sequences_of([9, 5, 7])
    if shared:
        sequences = [torch.cat([sequences[0], s]) for s in sequences]
    wanted = torch.tensor([7, 2, 2, sum(map(len, sequences)) - 1, len(sequences[0]) + 2, 0])
    with torch.no_grad():
        whole = base.hidden(sequences)
        assert close(base.hidden(sequences, wanted), whole[wanted])


def test_gradients_through_wanted_places_are_those_through_the_whole(open_tiny):
    base = open_tiny("llama")
    roles = with_adapter(base)
    sequences = sequences_of([9, 5, 7])
    wanted = torch.tensor([3, 3, 12, 20])
    found = []
    for pick in (lambda: base.hidden(sequences, wanted), lambda: base.hidden(sequences)[wanted]):
        for parameter in roles.parameters("policy"):
            parameter.grad = None
        with roles.use("policy"):
            states = pick()
            (states * torch.linspace(-1, 1, states.numel()).view_as(states)).sum().backward()
        found.append([p.grad.clone() for p in roles.parameters("policy")])
    assert all(close(a, b) for a, b in zip(*found, strict=True))


def test_recomputed_activations_give_the_same_gradients(open_tiny):
    base = open_tiny("qwen3")
    roles = with_adapter(base)
    found = []
    for recompute in (False, True):
        base.checkpoints = recompute
        for parameter in roles.parameters("policy"):
            parameter.grad = None
        with roles.use("policy"):
            base.hidden(sequences_of(LENGTHS)).square().sum().backward()
        found.append([p.grad.clone() for p in roles.parameters("policy")])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("rope", ["linear", "llama3", "yarn"])
def test_scaled_rotations_are_transformers_own(tmp_path, rope):
    import transformers as t

    more = {
        "linear": {"factor": 2.0},
        "llama3": {
            "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16
        },
        "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    }[rope]  # fmt: skip
    config = t.LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
        rope_parameters={"rope_type": rope, "rope_theta": 10000.0, **more},
    )  # fmt: skip
    base = open_folder(save_model(tmp_path, config))
    assert base.native is not None
    with torch.no_grad():
        found, expected = both_ways(base, lambda: base.hidden(sequences_of([40, 9])))
    assert close(found, expected)


def test_rotations_that_depend_on_the_length_are_left_to_transformers(tmp_path):
    import transformers as t

    config = t.LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=64, rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    )  # fmt: skip
    assert open_folder(save_model(tmp_path, config)).native is None


def test_another_activation_or_a_wrong_layer_is_not_taken_for_covered(open_tiny, monkeypatch):
    base = open_tiny("llama")
    monkeypatch.setattr(base.model.config, "hidden_act", "gelu")
    assert native_of(base.model) is None
    monkeypatch.undo()
    assert base._probe_native() is not None
    monkeypatch.setattr(base.model.model.layers[0].self_attn, "scaling", 0.5)
    native = native_of(base.model)
    monkeypatch.undo()
    monkeypatch.setattr("stages.models.base.native_of", lambda model: native)
    assert base._probe_native() is None  # its states are not transformers'
