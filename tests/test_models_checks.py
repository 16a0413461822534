"""What is wrong with a base is named as what it is, before anything is trained, and no run is lost at its end."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from stages.checkpoint.tensors import load_tensors, save_tensors
from stages.errors import CheckpointError, ModelError
from stages.models import base, lora
from stages.models.base import load_base
from stages.models.base_files import adapter_beside
from stages.models.checks import check_finite, library_reason
from stages.models.model_ref import open_model
from stages.models.roles import Roles, adapter_of, head_of, save_adapter
from stages.native import attention
from stages.training.reload import check_adaptable, check_reload
from tests.parts import random_adapter, random_head
from tests.test_models_base import SEQUENCES, SHAPE, expected_logits, logits_of, open_folder, save_model

MANY = {**SHAPE, "intermediate_size": 48, "max_position_embeddings": 128, "pad_token_id": 0, "eos_token_id": 2}


@pytest.fixture
def folder(model_folder, tmp_path):
    """A copy of a base that may be spoiled."""
    return shutil.copytree(model_folder("llama"), tmp_path / "base")


def change_config(folder, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def change_weight(folder, name: str, change) -> None:
    weights = load_tensors(folder / "model.safetensors")
    weights[name] = change(weights[name])
    save_tensors(folder / "model.safetensors", weights, {"format": "pt"})


def refusal(folder, dtype=torch.float32) -> str:
    with pytest.raises(ModelError) as caught:
        open_folder(folder, dtype)
    return str(caught.value)


# --- numbers that are none


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"]
)
def test_a_weight_that_is_no_number_is_named(folder, name, number):
    """Even of a token that no probe reads."""

    def spoil(weight):
        weight.view(-1)[-3] = number
        return weight

    change_weight(folder, name, spoil)
    said = refusal(folder)
    assert f"not finite numbers in float32: {name}" in said and str(folder) in said


def test_a_weight_too_large_for_the_precision_is_named_with_it(folder):
    change_weight(folder, "model.norm.weight", lambda weight: weight * 1e5)
    assert "not finite numbers in float16: model.norm.weight" in refusal(folder, torch.float16)
    open_folder(folder)


def test_states_that_overflow_are_not_put_down_to_padding(folder):
    """All weights are finite, their products are not."""
    for layer in range(2):
        change_weight(folder, f"model.layers.{layer}.mlp.down_proj.weight", lambda weight: weight * 0 + 3e38)
    assert "states that are not finite in float32" in refusal(folder)


def test_large_weights_whose_sum_is_infinite_are_no_fault():
    model = torch.nn.Linear(2, 2)
    model.weight.data.fill_(3e38)
    check_finite(model, where="here")


# --- files that do not fit each other


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"vocab_size": 310},
            r"shapes of its config.json: lm_head.weight \(\(300, 32\) in the files, \(310, 32\) by it",
        ),
        ({"num_key_value_heads": 4}, r"shapes of its config.json: model.layers.0.self_attn.k_proj.weight"),
        ({"num_hidden_layers": 3}, r"its weights lack model.layers.2.input_layernorm.weight and \d+ more"),
        (
            {"num_hidden_layers": 1},
            r"layers that its config.json does not count: model.layers.1.input_layernorm.weight",
        ),
        ({"hidden_act": "foo"}, r"its config.json describes no causal language model: KeyError 'foo'"),
        ({"vocab_size": -5}, r"its config.json describes no causal language model: .*negative dimension -5"),
    ],
)
def test_weights_and_config_that_do_not_fit_are_named(folder, values, said):
    change_config(folder, **values)
    with pytest.raises(ModelError, match=said) as caught:
        open_folder(folder)
    assert caught.value.where == str(folder) and len(str(caught.value).splitlines()) == 2


def test_layers_that_predict_later_tokens_are_rightly_left_out(folder):
    change_config(folder, num_hidden_layers=1, num_nextn_predict_layers=1)
    assert len(open_folder(folder).layers) == 7


def test_the_reason_of_a_librarys_exception_is_one_line():
    assert library_reason(ValueError("no such field:\n\n   int wanted\nmore")) == "no such field: int wanted"
    assert library_reason(KeyError("foo")) == "KeyError 'foo'" and library_reason(ValueError()) == "ValueError"


def test_a_model_whose_own_code_fails_is_refused(open_tiny, monkeypatch):
    def broken(self, sequence):
        raise KeyError("no such layer")

    monkeypatch.setattr(base.Base, "_alone", broken)
    with pytest.raises(ModelError, match="`llama` cannot be run on a plain text: KeyError 'no such layer'"):
        open_tiny("llama")
    monkeypatch.setattr(base.Base, "_alone", lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
    with pytest.raises(RuntimeError, match="out of memory"):
        open_tiny("llama")


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_8bit": True, "load_in_4bit": False}, "load_in_8bit"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq"}, "awq"),
    ],
)
def test_a_base_in_quantised_weights_is_refused_before_anything_loads(folder, how, said):
    for place in ({"quantization_config": how}, {"text_config": {"quantization_config": how}}):
        change_config(folder, quantization_config=None, **place) if "text_config" in place else change_config(
            folder, **place
        )
        with pytest.raises(ModelError, match=rf"holds quantised weights \({said}\)") as caught:
            open_model(str(folder), stages=(), what="--model")
        assert caught.value.where == "--model" and "--load-in-4bit" in caught.value.fix


# --- models that see ahead


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("xlnet", torch.float32),
        ("xlm", torch.float32),
        *(("bert-generation", d) for d in (torch.float32, torch.bfloat16)),
    ],
)
def test_a_model_that_sees_later_tokens_is_refused(tmp_path, name, dtype):
    import transformers as t

    config = {
        "xlnet": lambda: t.XLNetConfig(vocab_size=300, d_model=32, n_layer=2, n_head=4, d_inner=48),
        "bert-generation": lambda: t.BertGenerationConfig(**MANY),
        "xlm": lambda: t.XLMConfig(vocab_size=300, emb_dim=32, n_layers=2, n_heads=4),
    }[name]()
    assert f"`{name}` is no causal language model" in refusal(save_model(tmp_path, config), dtype)


def test_the_same_architecture_as_a_decoder_is_taken(tmp_path):
    import transformers as t

    folder = save_model(tmp_path, t.BertGenerationConfig(**MANY, is_decoder=True))
    expected = expected_logits(folder, SEQUENCES)
    assert (logits_of(open_folder(folder), SEQUENCES) - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_that_round_as_they_share_their_tokens_do_not_see_ahead(tmp_path, dtype):
    import transformers as t

    config = t.MixtralConfig(**MANY, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
    assert open_folder(save_model(tmp_path, config), dtype).packs


# --- attention that leaves something out


def test_the_plain_attention_is_the_measure_of_all_others(model_folder):
    """A kernel that knows nothing of Gemma 2's soft cap, as sdpa of transformers 5.17, is not what ours is held to."""
    from transformers import AttentionInterface, AutoModelForCausalLM
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    def without_cap(*args, softcap=None, **kwargs):
        return sdpa_attention_forward(*args, **kwargs)

    AttentionInterface.register("without_cap", without_cap)
    AttentionMaskInterface.register("without_cap", sdpa_mask)
    attention.register()
    model = AutoModelForCausalLM.from_pretrained(model_folder("gemma2")).eval()
    model.set_attn_implementation("without_cap")
    expected, (sequence,) = expected_logits(model_folder("gemma2"), SEQUENCES[2:3]), SEQUENCES[2:3]
    with torch.no_grad():
        assert (model(sequence[None]).logits[0] - expected).abs().max() > 0.01
        base._choose_attention(model)
        assert model.config._attn_implementation == attention.ATTENTION_NAME
        assert (model(sequence[None]).logits[0] - expected).abs().max() <= 1e-4


def test_where_neither_ours_nor_the_fused_one_is_right_the_plain_one_runs(model_folder, monkeypatch):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder("llama")).eval()
    assert model.config._attn_implementation == "sdpa"
    seen = iter((True, False, False))  # the plain one's logits, then the two that are compared with them
    monkeypatch.setattr(base, "is_close", lambda *_: next(seen) and False)
    attention.register()
    base._choose_attention(model)
    assert model.config._attn_implementation == "eager"


# --- adapters


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_an_adapter_or_a_head_that_is_no_number_is_refused(open_tiny, tmp_path, number):
    opened = open_tiny("llama")
    adapter, head = random_adapter(opened, 1), random_head(opened.width, 2)
    for weights in list(adapter.parameters())[:2]:
        kept = weights.data.clone()
        weights.data.view(-1)[-1] = number
        save_adapter(tmp_path, opened, adapter)
        with pytest.raises(CheckpointError, match=f"weights for {adapter.paths[0]} are not finite numbers"):
            adapter_of(opened, opened.ref, trainable=False, folder=tmp_path)
        weights.data.copy_(kept)
    for tensor in (head.weight, head.bias):
        kept = tensor.data.clone()
        tensor.data.view(-1)[-1] = number
        save_adapter(tmp_path, opened, adapter, head)
        with pytest.raises(CheckpointError, match="head's weights are not finite numbers"):
            head_of(opened, tmp_path)
        tensor.data.copy_(kept)


def test_narrow_layers_that_round_by_where_their_weights_lie_read_back(tmp_path):
    """Mamba's layers are 4 wide here: the products of equal weights at other places differ in their last bits."""
    import transformers as t

    config = t.MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, state_size=8, time_step_rank=4)
    opened = open_folder(save_model(tmp_path / "base", config))
    adapter = random_adapter(opened, 1, rank=3)
    save_adapter(tmp_path / "a", opened, adapter)
    check_reload(opened, tmp_path / "a", adapter)
    check_adaptable(opened, [])


@pytest.mark.full
def test_a_base_whose_adapters_do_not_read_back_is_refused_before_training(open_tiny, monkeypatch):
    opened = open_tiny("llama")
    check_adaptable(opened, [])
    assert all(not layer.lora_A for layer in opened.lora.adapted.values())
    name = lora.Adapter.tensors
    swapped = {"q_proj": "o_proj", "o_proj": "q_proj"}

    def crossed(self):
        return {
            ".".join(swapped.get(part, part) for part in key.split(".")): tensor for key, tensor in name(self).items()
        }

    monkeypatch.setattr(lora.Adapter, "tensors", crossed)
    with pytest.raises(ModelError, match="an adapter on `llama` does not read back as it was written"):
        check_adaptable(opened, [])


def test_a_router_that_is_a_linear_layer_by_its_type_is_not_adapted(tmp_path):
    """Of Phi-3.5-MoE: what it gives are three tensors."""
    import transformers as t

    config = t.PhimoeConfig(**MANY, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
    folder = save_model(tmp_path, config)
    opened = open_folder(folder)
    assert opened.layers and not any("router" in path for path in opened.layers)
    expected = expected_logits(folder, SEQUENCES)
    assert (logits_of(opened, SEQUENCES) - expected).abs().max() <= 1e-4 * expected.abs().max()
    roles = Roles(opened)
    roles.add("policy", random_adapter(opened, 1))
    with roles.use("policy"):
        assert (logits_of(opened, SEQUENCES) - expected).abs().max() > 0.1
    check_adaptable(opened, [])


def test_a_linear_layer_with_code_of_its_own_is_adapted_where_it_computes_the_same():
    class Same(torch.nn.Linear):
        def forward(self, x):
            return x @ self.weight.T + self.bias

    class Other(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x).sigmoid()

    class Several(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    kinds = torch.nn.Sequential(Same(3, 4), torch.nn.Linear(4, 3), Other(3, 3), Several(3, 3))
    assert list(lora.linear_layers(kinds)) == ["0", "1"]


# --- an adapter of PEFT beside the base


def with_adapter(folder):
    """A base's folder after training in place: a strong adapter of PEFT lies in it."""
    opened = open_folder(folder)
    adapter = random_adapter(opened, 5)
    for name, weight in adapter.weights.items():
        weight.data.mul_(20 if name.endswith(lora.LORA_B) else 1)
    save_adapter(folder, opened, adapter)
    return folder


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_an_adapter_beside_the_base_is_not_loaded_with_it(model_folder, tmp_path, architecture):
    plain = model_folder(architecture)
    folder = with_adapter(shutil.copytree(plain, tmp_path / "base"))
    source = open_model(str(folder), stages=(), what="--model")
    opened = load_base(source, device=torch.device("cpu"), dtype=torch.float32)
    assert source.base_digest == open_model(str(plain), stages=(), what="--model").base_digest
    assert torch.equal(logits_of(opened, SEQUENCES), logits_of(open_folder(plain), SEQUENCES))
    assert not any("lora" in name for name, _ in opened.model.named_parameters())
    (said,) = adapter_beside(folder)
    assert str(folder) in said and "is not used" in said and adapter_beside(plain) == ()


def test_the_weights_of_an_adapter_are_no_part_of_the_bases_digest(model_folder, tmp_path):
    """Also where the base's own weights have another file name."""
    folder = shutil.copytree(model_folder("llama"), tmp_path / "base")
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    before = open_model(str(folder), stages=(), what="--model").base_digest
    save_tensors(folder / "adapter_model.safetensors", {"x": torch.ones(3)})
    assert open_model(str(folder), stages=(), what="--model").base_digest == before
