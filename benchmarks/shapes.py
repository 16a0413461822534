"""Models of real shapes with random weights, built on the device; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import torch

from stages.models.base import Base, base_of
from stages.models.model_ref import ModelRef
from stages.training.memory import Shapes, shapes_of

QWEN = {"model_type": "qwen2", "max_position_embeddings": 32768, "rope_theta": 1e6, "rms_norm_eps": 1e-6}
LLAMA = {"model_type": "llama", "max_position_embeddings": 131072, "rope_theta": 5e5, "rms_norm_eps": 1e-5}


def _sizes(vocabulary: int, hidden: int, inner: int, layers: int, heads: int, kv_heads: int, tied: bool) -> dict:
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": tied,
    }


SHAPES = {
    "tiny": LLAMA | _sizes(320, 64, 128, 2, 4, 2, tied=False),
    "qwen2.5-0.5b": QWEN | _sizes(151936, 896, 4864, 24, 14, 2, tied=True),
    "qwen2.5-1.5b": QWEN | _sizes(151936, 1536, 8960, 28, 12, 2, tied=True),
    "qwen2.5-7b": QWEN | _sizes(152064, 3584, 18944, 28, 28, 4, tied=False),
    "llama-3.1-8b": LLAMA | _sizes(128256, 4096, 14336, 32, 32, 8, tied=False),
}


def build(sizes: dict, device: torch.device, dtype: torch.dtype) -> tuple[Base, Shapes]:
    """A base of these sizes, made where it will stay, and what the memory plan knows of it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**sizes)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    shapes = shapes_of(config.to_dict(), {name: tuple(p.shape) for name, p in model.named_parameters()})
    nowhere = Path("random-weights")
    source = ModelRef(str(nowhere), nowhere, str(nowhere), "", nowhere, "", None, config.to_dict())
    return base_of(model, source), shapes


def bare_bytes(sizes: dict, width: int) -> int:
    """Bytes of the weights alone, before anything is built; biases and norms, a thousandth, left out."""
    return width * (layer_weights(sizes) + sizes["vocab_size"] * sizes["hidden_size"] * (1 if is_tied(sizes) else 2))


def layer_weights(sizes: dict) -> int:
    """Weights of all linear layers but the output layer."""
    hidden, inner, heads = sizes["hidden_size"], sizes["intermediate_size"], sizes["num_attention_heads"]
    keys = hidden // heads * sizes["num_key_value_heads"]
    return sizes["num_hidden_layers"] * (2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * inner)


def is_tied(sizes: dict) -> bool:
    """True where the output layer is the embedding."""
    return bool(sizes["tie_word_embeddings"])
