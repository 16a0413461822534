"""A frozen base in 4 bits: NF4 with double quantisation (Dettmers et al. 2023), through bitsandbytes."""

from __future__ import annotations

import logging

import torch
from torch import nn


def four_bit_options(device: torch.device, dtype: torch.dtype) -> dict[str, object]:
    """What transformers' from_pretrained takes to hold every linear layer but the output in 4 bits, on `device`.

    Layers compute in `dtype`. About 0.52 bytes per weight are held: half a byte, and per 64 weights a scale of a byte.
    """
    from transformers import BitsAndBytesConfig

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells at import which kernels it does without
    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": how, "device_map": {"": device}}


def is_four_bit(layer: nn.Module) -> bool:
    """True for a linear layer that is held in 4 bits."""
    return hasattr(layer, "quant_state")


def keep_gradients(model: nn.Module) -> nn.Module:
    """Stop bitsandbytes from repacking its layers on the CPU; returns the model.

    On CPUs with bfloat16 instructions it packs a layer's weight anew at the first pass without gradient, and every pass
    from then on gives its input no gradient at all, without a word.
    """
    for layer in model.modules():
        if is_four_bit(layer):
            layer.support_avx512bf16_for_cpu = False
    return model
