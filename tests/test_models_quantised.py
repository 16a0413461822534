"""A base in 4 bits: its numbers, its gradients, and what training on it leaves behind."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

from stages.errors import ConfigError
from stages.inputs import open_inputs
from stages.models.adapter_files import LORA_A
from stages.models.base import load_base
from stages.models.model_ref import open_model
from stages.models.quantised import is_four_bit
from stages.models.roles import Roles, new_adapter
from stages.rollout.generate import check_engine
from tests.commands import SMALL, demonstrations, done, lines_of, manifest, refused, result, weights, write_data
from tests.parts import gradient, random_adapter, relative, sequences_of, sft_config
from tests.tiny import write_jsonl

CPU = torch.device("cpu")


@pytest.fixture
def without_bitsandbytes(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else real(name))


def test_without_the_package_nothing_is_loaded(without_bitsandbytes):
    with pytest.raises(ConfigError) as caught:
        open_inputs("sft", sft_config(model="there is no such model", load_in_4bit=True))
    assert str(caught.value) == (
        "--load-in-4bit: a base in 4 bits needs bitsandbytes, which is not installed\n"
        "  -> run pip install 'rlhf[4bit]', or leave --load-in-4bit out"
    )


def test_export_has_no_such_flag():
    assert "no such option: --load-in-4bit" in refused("export", "--model", "m", "--output", "o", "--load-in-4bit")


# --- with the package -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bitsandbytes():
    return pytest.importorskip("bitsandbytes")


@pytest.fixture
def opened(bitsandbytes, model_folder):
    """`opened("gpt2", four_bit=False)`: a base in 4 bits, or in full."""

    def get(architecture="llama-wide", *, four_bit=True, dtype=torch.float32, **options):
        source = open_model(str(model_folder(architecture, **options)), stages=(), what="--model")
        return load_base(source, device=CPU, dtype=dtype, four_bit=four_bit)

    return get


def states(base, sequences):
    with torch.no_grad():
        return base.hidden(sequences)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_layers_but_the_output_are_in_4_bits(opened, bitsandbytes, dtype):
    base = opened(dtype=dtype)
    assert len(base.layers) == 2 * 7 and base.packs and base.shares
    assert all(is_four_bit(layer) and layer.compute_dtype == dtype for layer in base.layers.values())
    held = sum(layer.weight.numel() * layer.weight.itemsize for layer in base.layers.values())
    assert held == 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64) // 2  # half a byte each
    assert base.output.weight.dtype == base.dtype == dtype


def test_states_are_those_of_the_rounded_weights(opened, bitsandbytes):
    """A base whose weights are what 4 bits hold of them gives the same states; NF4 errs by a tenth of the spread."""
    four, full = opened(scale=0.05), opened(scale=0.05, four_bit=False)
    sequences = sequences_of([9, 4, 12])
    found, exact = states(four, sequences), states(full, sequences)
    assert 0.05 < relative(found, exact) < 0.3  # some six such layers, one after the other
    for path, layer in four.layers.items():
        weight, mine = layer.weight, full.layers[path].weight.data
        rounded = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).float()
        assert 0.07 < relative(rounded, mine) < 0.11
        mine.copy_(rounded)
    assert relative(found, states(full, sequences)) < 1e-4


@pytest.mark.parametrize("passes_before", [0, 1])
def test_gradients_are_those_of_the_rounded_weights(opened, bitsandbytes, passes_before):
    """Also after a pass without gradient, at which bitsandbytes may repack a layer and lose its input's gradient."""
    four, full = opened(), opened(four_bit=False)
    for path, layer in four.layers.items():
        weight = layer.weight
        rounded = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
        full.layers[path].weight.data.copy_(rounded)
    sequences, found = sequences_of([9, 4, 12]), []
    for base in (four, full):
        roles = Roles(base)
        roles.add("policy", random_adapter(base, 1))
        with roles.use("policy"):
            for _ in range(passes_before):
                states(base, sequences)
            out = base.hidden(sequences)
            (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        found.append(gradient(roles.parameters("policy")))
    assert relative(found[0], found[1]) < 1e-3


def test_the_first_layers_have_a_gradient(opened):
    base = opened()
    path = "model.layers.0.self_attn.q_proj"
    adapter = random_adapter(base, 1, targets=(path,))
    roles = Roles(base)
    roles.add("policy", adapter)
    with roles.use("policy"):
        base.hidden(sequences_of([9])).square().sum().backward()
    assert adapter.weights[path + LORA_A].grad.abs().max() > 0


@pytest.mark.parametrize("architecture", ["llama-wide", "gpt2"])
def test_dora_begins_as_the_base_and_learns(opened, architecture):
    base = opened(architecture)
    sequences = sequences_of([9, 4])
    expected = states(base, sequences)
    roles = Roles(base)
    roles.add("policy", new_adapter(base, 4, 8.0, [], 0, "dora"))
    with roles.use("policy"):
        out = base.hidden(sequences)
        out.square().sum().backward()
    assert relative(out.detach(), expected) < 1e-4
    for name, weight in roles.adapters["policy"].weights.items():
        assert weight.dtype == torch.float32 and (weight.grad.abs().max() > 0) == (not name.endswith(LORA_A)), name


def test_transformers_samples_from_it(opened):
    """Our decoder covers the same architecture in full."""
    assert check_engine(opened(four_bit=False), "auto") == ()
    said = "the native decoder does not support `llama` in 4 bits; sampling with transformers, which is slower"
    assert check_engine(opened(), "auto") == (said,)


def test_gpt2s_layers_know_that_their_files_are_transposed(opened):
    base = opened("gpt2")
    layer = next(iter(base.layers.values()))
    assert is_four_bit(layer)
    assert random_adapter(base, 1).config.fan_in_fan_out is True


# --- the stages


@pytest.fixture(scope="module")
def trained(bitsandbytes, model_folder, tmp_path_factory):
    """A folder with data and an sft checkpoint that was trained on a base in 4 bits."""
    folder = tmp_path_factory.mktemp("four")
    write_data(folder)
    write_jsonl(folder / "demonstrations.jsonl", demonstrations()[:64])
    base, more = model_folder("llama-wide"), ("--load-in-4bit", "--learning-rate", "1e-2", "--max-steps", 6)
    line = ("sft", "--model", base, "--dataset", folder / "demonstrations.jsonl", "--output", folder / "sft")
    done(*line, *SMALL, *more)
    return folder


@pytest.mark.full
def test_a_base_in_4_bits_learns(trained):
    losses = [line["loss"] for line in lines_of(trained / "sft" / "metrics.jsonl")[1:]]
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.full
def test_the_checkpoint_stands_on_the_same_base_as_one_trained_in_full(trained, model_folder):
    found = manifest(trained / "sft")
    assert found["base"]["digest"] == open_model(str(model_folder("llama-wide")), stages=(), what="-").base_digest
    assert found["config"]["load_in_4bit"] is True and "bitsandbytes" in found["versions"]
    assert all(tensor.dtype == torch.float32 for tensor in weights(trained / "sft").values())


@pytest.mark.full
@pytest.mark.parametrize("how", [("--load-in-4bit",), ()])
def test_reward_and_ppo_go_on_from_it_in_4_bits_and_in_full(trained, tmp_path, how):
    reward, ppo = tmp_path / "reward", tmp_path / "ppo"
    small = (*SMALL, "--max-steps", 1, *how)
    line = ("reward", "--model", trained / "sft", "--dataset", trained / "comparisons.jsonl", "--output", reward)
    done(*line, *small, "--eval-limit", 16, "--limit-rows", 64, "--sft-samples", 0)
    line = ("ppo", "--model", trained / "sft", "--reward", reward, "--dataset", trained / "prompts.jsonl")
    done(*line, "--output", ppo, *small, "--max-response-tokens", 4, "--limit-rows", 32, "--learning-rate", 1e-5)
    (step,) = lines_of(ppo / "metrics.jsonl")[1:]
    assert step["grad_norm"] > 0 and abs(step["ratio_max"] - 1) < 1.0
    asked = ("--dataset", trained / "prompts.jsonl", "--limit-rows", 4, "--max-response-tokens", 4, *how)
    assert result("sample", "--model", ppo, *asked, "--output", tmp_path / "s.jsonl")["responses"] == 4
    assert "policy" in result("evaluate", "--model", ppo, "--reward", reward, *asked)


def test_an_adapter_trained_in_4_bits_is_merged_into_the_full_weights(trained, tmp_path):
    from transformers import AutoModelForCausalLM

    done("export", "--model", trained / "sft", "--output", tmp_path / "out")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {p.dtype for p in exported.parameters()} == {torch.float32}
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
