"""The frozen base: its states and logits are the model's, however it is run."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from stages.errors import ModelError
from stages.models.base import Base, load_base
from stages.models.model_ref import open_model, stop_ids_of
from stages.models.outputs import read_targets
from stages.models.roles import Roles
from stages.native import attention
from stages.native import forward as native
from stages.rollout.generate import Sampling, generate
from tests.marks import full
from tests.parts import (
    gradient,
    publish_checkpoint,
    random_adapter,
    random_head,
    relative,
    roles_on,
    sequences_of,
    unpacked,
    whole_model,
)
from tests.tiny import ARCHITECTURES, build_tokenizer

SEQUENCES = sequences_of([10, 3, 17, 1])
SHAPE = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def save_model(folder, config, scale=0.2):
    """A random model of any config with the usual tokenizer; biases and norms vary too."""
    from transformers import AutoModelForCausalLM

    build_tokenizer(folder)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * scale if parameter.dim() > 1 else parameter + scale)
    model.save_pretrained(folder)
    return folder


def open_folder(folder, dtype=torch.float32):
    source = open_model(str(folder), stages=(), what="--model")
    return load_base(source, device=torch.device("cpu"), dtype=dtype)


@torch.no_grad()
def expected_logits(folder, sequences):
    model = whole_model(folder)
    return torch.cat([model(s[None]).logits[0] for s in sequences])


@torch.no_grad()
def logits_of(base, sequences):
    return base.logits(base.hidden(sequences))


# --- the same numbers as the model itself


@pytest.mark.parametrize(
    "architecture", ["llama", "gpt2", *full(*(a for a in ARCHITECTURES if a not in ("llama", "gpt2")))]
)
def test_packed_and_padded_logits_are_the_whole_models(model_folder, open_tiny, architecture):
    base = open_tiny(architecture)
    expected = expected_logits(model_folder(architecture), SEQUENCES)
    assert base.packs
    assert (logits_of(base, SEQUENCES) - expected).abs().max() <= 1e-5 * expected.abs().max()
    with unpacked(base):
        assert (logits_of(base, SEQUENCES) - expected).abs().max() <= 1e-5 * expected.abs().max()


def readouts():
    import transformers as t

    many = {**SHAPE, "intermediate_size": 48, "max_position_embeddings": 128, "pad_token_id": 0, "eos_token_id": 2}
    return {
        "granite": lambda: t.GraniteConfig(**many, logits_scaling=3.0),
        "cohere": lambda: t.CohereConfig(**many, logit_scale=0.3),
        "opt": lambda: t.OPTConfig(**SHAPE, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=128),
        "gptj": lambda: t.GPTJConfig(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=128, rotary_dim=4),
        "bloom": lambda: t.BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=4),
        "gpt_oss": lambda: t.GptOssConfig(
            **many, num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=6
        ),
    }


@pytest.mark.parametrize("name", ["bloom", *full("granite", "cohere", "opt", "gptj", "gpt_oss")])
def test_other_readouts_and_attentions_are_right_too(tmp_path, name):
    """Scaled logits, positions with an offset, ALiBi, attention sinks: whatever ours lacks, the model's own does."""
    folder = save_model(tmp_path, readouts()[name]())
    base = open_folder(folder)
    expected = expected_logits(folder, SEQUENCES)
    assert (logits_of(base, SEQUENCES) - expected).abs().max() <= 1e-4 * expected.abs().max()
    with unpacked(base):
        assert (logits_of(base, SEQUENCES) - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_a_model_with_attention_sinks_keeps_its_own_attention(tmp_path):
    """Negative: under our attention, which has no sinks, its logits would be off by far more than rounding."""
    base = open_folder(save_model(tmp_path, readouts()["gpt_oss"]()))
    assert base.model.config._attn_implementation != attention.ATTENTION_NAME
    own = logits_of(base, SEQUENCES)
    base.model.set_attn_implementation(attention.ATTENTION_NAME)
    assert (logits_of(base, SEQUENCES) - own).abs().max() > 0.1


def test_a_model_whose_biases_lean_on_places_in_the_row_is_padded(tmp_path):
    base = open_folder(save_model(tmp_path, readouts()["bloom"]()))
    assert not base.packs  # ALiBi measures distances in the row, across sequences


def test_half_precision_logits_stay_near(model_folder):
    base = open_folder(model_folder("llama"), torch.bfloat16)
    expected = expected_logits(model_folder("llama"), SEQUENCES)
    assert base.dtype == torch.bfloat16 and base.packs
    assert relative(logits_of(base, SEQUENCES).float(), expected) < 0.05


def test_the_base_is_frozen_and_free_of_dropout(open_tiny):
    base = open_tiny("gpt2")  # its config asks for dropout 0.1
    assert not base.model.training and not any(p.requires_grad for p in base.model.parameters())
    assert (base.width, base.vocabulary, base.context) == (32, 300, 128)
    assert torch.equal(base.hidden(SEQUENCES), base.hidden(SEQUENCES))


# --- padding tokens


@pytest.mark.parametrize("pad", [None, 2, 299])
def test_the_pad_token_changes_nothing(model_folder, open_tiny, tmp_path, pad):
    """No pad token, one equal to EOS, or any other: log-probabilities, scores and responses are the same."""
    folder = shutil.copytree(model_folder("llama"), tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": pad}))
    sequences = [*SEQUENCES, torch.tensor([1, 0, 2, 299, 5])]  # texts may hold the pad token too
    read = []
    for base in (open_tiny("llama"), open_folder(folder)):
        for context in (torch.no_grad(), unpacked(base)):
            with torch.no_grad(), context:
                read.append(base.hidden(sequences))
        read.append(generate(base, sequences, [(0, i) for i in range(5)], (2,), Sampling(1.0, 8)))
    assert torch.equal(read[0], read[3]) and torch.equal(read[1], read[4])
    assert all(torch.equal(a, b) for a, b in zip(read[2], read[5], strict=True))


# --- recomputing activations


def gradients_of(base, sequences):
    roles = roles_on(base)
    with roles.use("policy"):
        reading = read_targets(base, sequences, [torch.arange(len(s)) >= 1 for s in sequences])
        reading.logprobs.sum().backward()
    with roles.use("critic"):
        roles.heads["critic"](base.hidden(sequences)).square().sum().backward()
    return torch.cat([gradient(roles.parameters("policy")), gradient(roles.parameters("critic"))])


@pytest.mark.parametrize("architecture", ["llama", *full("gpt2", "gpt_neox", "gemma2")])
@pytest.mark.parametrize("packs", [True, False])
def test_recomputing_activations_gives_the_same_gradient(open_tiny, architecture, packs):
    base = open_tiny(architecture)
    base.packs = packs
    expected = gradients_of(base, SEQUENCES[:3])
    base.checkpoint_activations()
    assert expected.norm() > 1
    assert relative(gradients_of(base, SEQUENCES[:3]), expected) <= 1e-6


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_activations_really_are_recomputed(open_tiny, monkeypatch, architecture):
    """Blocks of our own forward pass, and of transformers'."""
    base = open_tiny(architecture)
    roles = roles_on(base)
    calls = []
    if base.native is None:
        base.layers["transformer.h.0.mlp.c_fc"].register_forward_hook(lambda *_: calls.append(1))
    else:
        block = native._run_block
        first = base.native.blocks[0]
        monkeypatch.setattr(native, "_run_block", lambda b, *rest: (b is first and calls.append(1)) or block(b, *rest))

    def passes():
        calls.clear()
        with roles.use("policy"):
            base.hidden(SEQUENCES).sum().backward()
        return len(calls)

    assert passes() == 1
    base.checkpoint_activations()
    assert passes() == 2


def test_recomputing_leaves_dropout_off_wherever_it_lives(tmp_path):
    """OPT calls dropout as a function with a number kept in the layer, which no search for modules finds."""
    import transformers as t

    config = t.OPTConfig(
        **SHAPE, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=128, dropout=0.3, attention_dropout=0.3
    )
    base = open_folder(save_model(tmp_path, config))
    expected = base.hidden(SEQUENCES).detach()
    base.checkpoint_activations()
    assert torch.equal(base.hidden(SEQUENCES).detach(), expected)


@pytest.mark.parametrize("architecture", ["gemma", *full("llama")])
def test_sampling_keeps_its_cache_while_activations_are_recomputed(open_tiny, architecture):
    """In train mode transformers' layers drop the cache, and every new token would see itself alone."""
    base = open_tiny(architecture)
    keys = [(0, i) for i in range(4)]
    expected = generate(base, SEQUENCES, keys, (2,), Sampling(1.0, 8))
    base.checkpoint_activations()
    gradients_of(base, SEQUENCES)
    found = generate(base, SEQUENCES, keys, (2,), Sampling(1.0, 8))
    assert [r.tolist() for r in found] == [r.tolist() for r in expected]


def test_a_base_that_cannot_recompute_or_does_so_differently_is_refused(open_tiny, monkeypatch):
    base = open_tiny("gpt2")
    monkeypatch.setattr(type(base.model), "supports_gradient_checkpointing", False)
    with pytest.raises(ModelError, match="cannot recompute its activations"):
        base.checkpoint_activations()
    monkeypatch.undo()
    norm = base.model.transformer.ln_f
    forward = norm.forward
    monkeypatch.setattr(norm, "forward", lambda x: forward(x) * (2.0 if norm.training else 1.0))
    with pytest.raises(ModelError, match="something else in train mode"):
        base.checkpoint_activations()


# --- what is refused


def test_a_readout_that_is_not_understood_is_refused(tmp_path):
    """BERT's head has a layer between the states and the output layer."""
    import transformers as t

    folder = save_model(tmp_path, t.BertConfig(**SHAPE, intermediate_size=48, max_position_embeddings=64))
    with pytest.raises(ModelError, match="`bert` has an output layer of an unsupported kind") as caught:
        open_folder(folder)
    assert caught.value.where == "--model"


def test_a_model_that_is_all_of_a_piece_is_refused(tmp_path):
    import transformers as t

    config = t.Llama4TextConfig(
        **SHAPE, intermediate_size=48, intermediate_size_mlp=48, num_key_value_heads=2, head_dim=8,
        max_position_embeddings=128, num_local_experts=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with pytest.raises(ModelError, match="`llama4_text` does not come apart"):
        open_folder(save_model(tmp_path, config))


def test_a_model_that_mixes_padded_sequences_is_refused(open_tiny, monkeypatch):
    alone = Base._hidden_padded

    def leaking(self, sequences):
        return alone(self, sequences) + float(len(sequences) > 1)

    monkeypatch.setattr(Base, "_hidden_padded", leaking)
    with pytest.raises(ModelError, match="does not keep padded sequences apart"):
        open_tiny("llama")


@pytest.mark.parametrize("broken", ["leaks", "raises", "nan"])
def test_a_model_that_cannot_be_packed_is_padded(open_tiny, monkeypatch, broken):
    def packed(self, sequences):
        if broken == "raises":
            raise TypeError("no such mask")
        states = self._hidden_padded(sequences)
        return states * torch.nan if broken == "nan" else states + (torch.arange(len(states)) > 6)[:, None]

    monkeypatch.setattr(Base, "_hidden_packed", packed)
    assert not open_tiny("llama").packs


def test_a_base_that_transformers_cannot_load_is_refused_in_a_line(model_folder, tmp_path):
    folder = shutil.copytree(model_folder("llama"), tmp_path / "base")
    source = open_model(str(folder), stages=(), what="--model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "no-such-model", "architectures": []}))
    with pytest.raises(ModelError, match="the base cannot be loaded: ") as caught:
        load_base(source, device=torch.device("cpu"), dtype=torch.float32)
    assert caught.value.where == str(folder) and len(caught.value.what.splitlines()) == 1


# --- stop tokens


def test_stop_ids_come_from_both_of_the_bases_files(tmp_path):
    source = SimpleNamespace(manifest=None, base=tmp_path)
    assert stop_ids_of(source) == ()
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 2}))
    assert stop_ids_of(source) == (2,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [6, 2]}))
    assert stop_ids_of(source) == (2, 6)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": None}))
    assert stop_ids_of(source) == (2, 6)


def test_a_checkpoint_brings_its_own_stop_ids(open_tiny, tmp_path):
    base = open_tiny("llama")
    folder = publish_checkpoint(tmp_path / "sft", base, "sft", random_adapter(base, 1), stops=(2, 6))
    source = open_model(str(folder), stages=("sft",), what="--model")
    assert stop_ids_of(source) == (2, 6)


# --- one base, several roles


def test_the_bases_own_weights_stay_what_they_were(model_folder, open_tiny):
    base = open_tiny("gpt2")
    roles = Roles(base)
    roles.add("critic", random_adapter(base, 1), random_head(base.width, 2))
    with roles.use("critic"):
        roles.heads["critic"](base.hidden(SEQUENCES)).sum().backward()
    plain = whole_model(model_folder("gpt2")).state_dict()
    mine = {n.replace(".base_layer.", "."): v for n, v in base.model.state_dict().items() if ".lora_" not in n}
    assert mine.keys() == plain.keys() and all(torch.equal(mine[name], plain[name]) for name in plain)


@pytest.mark.parametrize("architecture", ["llama", *full("gpt2")])
def test_gradients_of_states_read_more_than_once_have_the_same_bits_every_time(open_tiny, architecture):
    """As of the end of a prompt that many responses share, on more threads than one."""
    base = open_tiny(architecture)
    roles = roles_on(base)
    generator = torch.Generator().manual_seed(0)
    wanted = torch.randint(40, (4000,), generator=generator)
    weights = torch.randn(4000, base.width, generator=generator)
    threads, found = torch.get_num_threads(), []
    torch.set_num_threads(4)
    try:
        for _ in range(12):
            for parameter in roles.parameters("policy"):
                parameter.grad = None
            with roles.use("policy"):
                (base.hidden(sequences_of([40]), wanted) * weights).sum().backward()
            found.append(torch.cat([p.grad.flatten() for p in roles.parameters("policy")]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], again) for again in found)
