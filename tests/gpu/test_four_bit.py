"""A base in 4 bits on the device; skipped where bitsandbytes is not installed."""

from __future__ import annotations

import pytest
import torch

from stages.models.quantised import is_four_bit
from stages.models.roles import Roles
from tests.gpu.conftest import CUDA
from tests.marks import full
from tests.parts import gradient, random_adapter, relative, sequences_of

CLOSE = {torch.float32: 1e-3, torch.bfloat16: 0.03}


@pytest.mark.parametrize("device_name", [*full("cpu"), CUDA])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_and_gradients_are_those_of_the_rounded_weights(opened, device, dtype):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    four, plain = (opened("llama-wide", dtype=dtype, four_bit=bits, scale=0.05) for bits in (True, False))
    for path, layer in four.layers.items():
        weight = layer.weight
        assert is_four_bit(layer) and weight.device == device and weight.dtype == torch.uint8
        rounded = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
        plain.layers[path].weight.data.copy_(rounded)
    found, sequences = [], sequences_of([9, 4, 12])
    for base in (four, plain):
        roles = Roles(base)
        roles.add("policy", random_adapter(base, 1))
        with roles.use("policy"):
            states = base.hidden(sequences)
            (
                states.float() * torch.linspace(-1, 1, states.numel(), device=states.device).view_as(states)
            ).sum().backward()
        found.append((states.detach().float(), gradient(roles.parameters("policy"))))
    for mine, theirs in zip(*found, strict=True):
        assert relative(mine, theirs) < CLOSE[dtype]
