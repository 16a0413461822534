"""A frozen base in 4 bits: NF4 with double quantisation (Dettmers et al. 2023), through bitsandbytes."""

from __future__ import annotations

import logging

import torch
from torch import nn


def four_bit_options(device: torch.device, dtype: torch.dtype) -> dict[str, object]:
    """Options of transformers' from_pretrained that hold every linear layer but the output in 4 bits, on `device`.

    Layers compute in `dtype`. A weight takes about 0.52 bytes: half a byte, and a byte of scale per 64 weights.
    """
    from transformers import BitsAndBytesConfig

    quiet_bitsandbytes()
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": config, "device_map": {"": device}}


def quiet_bitsandbytes() -> None:
    """Silence bitsandbytes, which at import logs the kernels that it lacks."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def is_four_bit(layer: nn.Module) -> bool:
    """True for a linear layer that is held in 4 bits."""
    return hasattr(layer, "quant_state")


def keep_gradients(model: nn.Module) -> nn.Module:
    """Stop bitsandbytes from repacking its layers on the CPU; returns the model.

    On CPUs with bfloat16 instructions it repacks a layer's weight at the first pass without gradient; from then on no
    pass gives its input a gradient, and nothing warns of it.
    """
    for layer in model.modules():
        if is_four_bit(layer):
            layer.support_avx512bf16_for_cpu = False
    return model
