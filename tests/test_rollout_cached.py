"""Sampling through transformers: whatever the architecture, each token follows the law of the whole text before it."""

from __future__ import annotations

import pytest
import torch

from stages.rollout.cached import RereadingDecoder, cache_works
from stages.rollout.generate import Sampling, check_engine, respond
from tests.marks import full
from tests.parts import sequences_of
from tests.test_models_base import SHAPE, open_folder, save_model


def config_of(name: str):
    import transformers as t

    many = {**SHAPE, "intermediate_size": 48, "max_position_embeddings": 128, "pad_token_id": 0, "eos_token_id": 2}
    return {
        "gpt_neox": lambda: t.GPTNeoXConfig(**many),
        "phi": lambda: t.PhiConfig(**many),
        "mamba": lambda: t.MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, state_size=8),
        "rwkv": lambda: t.RwkvConfig(vocab_size=300, hidden_size=32, attention_hidden_size=32, num_hidden_layers=2),
        "openai-gpt": lambda: t.OpenAIGPTConfig(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=128),
        "jamba": lambda: t.JambaConfig(
            **SHAPE, intermediate_size=48, num_key_value_heads=2, num_experts=4, attn_layer_period=2,
            attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, mamba_d_state=8, mamba_dt_rank=4,
            use_mamba_kernels=False,
        ),
    }[name]()  # fmt: skip


@pytest.mark.parametrize(
    ("name", "caches"),
    [
        ("phi", True),
        ("mamba", False),
        *full(("gpt_neox", True), ("rwkv", False), ("openai-gpt", False), ("jamba", None)),
    ],
)
def test_every_token_follows_the_law_of_its_text(tmp_path, name, caches):
    base = open_folder(save_model(tmp_path, config_of(name)))
    prompts, keys = sequences_of([3, 10, 7, 12]), [(0, i) for i in range(4)]
    stops = tuple(range(0, 300, 20))
    found = respond(base, prompts, keys, stops, Sampling(1.0, 8))
    assert caches is None or cache_works(base) == caches
    for prompt, key, response in zip(prompts, keys, found, strict=True):
        text = torch.cat([prompt, response.tokens])
        with torch.no_grad():
            whole = base.model(text[None], use_cache=False).logits[0].log_softmax(-1)
        expected = whole[len(prompt) - 1 : -1].gather(-1, response.tokens[:, None])[:, 0]
        assert (response.logprobs - expected).abs().max() <= 1e-4
        alone = respond(base, [prompt], [key], stops, Sampling(1.0, 8))[0]
        assert alone.tokens.tolist() == response.tokens.tolist()


def test_it_is_said_where_every_token_reads_its_text_again(tmp_path):
    base = open_folder(save_model(tmp_path, config_of("rwkv")))
    (said,) = check_engine(base, "auto")
    assert "`rwkv`" in said and "the whole text for every token" in said


def test_texts_are_read_in_passes_of_a_bounded_size(open_tiny, monkeypatch):
    monkeypatch.setattr("stages.native.limits.TOKENS_AT_ONCE_CPU", 12)
    base, prompts = open_tiny("gpt2"), sequences_of([3, 10, 7, 2, 30])
    run, sizes = base.hidden, []
    monkeypatch.setattr(base, "hidden", lambda texts, ends: sizes.append([len(t) for t in texts]) or run(texts, ends))
    with torch.no_grad():
        found = RereadingDecoder(base, prompts).start()
        expected = torch.stack([run([p])[-1] for p in prompts])
    assert sizes == [[3], [10], [7, 2], [30]]
    assert (found - expected).abs().max() <= 1e-5
