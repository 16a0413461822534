"""Packed rows in the precision and with the kernels of the device, against single sequences and padded rows."""

from __future__ import annotations

import pytest
import torch

from stages.models.outputs import read_targets
from stages.models.roles import Roles
from tests.marks import full
from tests.parts import PACKING, gradient, random_adapter, relative, sequences_of, targets_from, unpacked

MILD = 0.05  # scale of the weights: small enough that rounding is not blown up from layer to layer
BF16, FP32 = torch.bfloat16, torch.float32
# How far two orders of the same arithmetic may be apart, relative to the size of the whole.
# Of log-probabilities, which hardly differ among themselves, and of gradients.
CLOSE = {FP32: (1e-5, 1e-5), BF16: (0.003, 0.03)}
SHARED, APART = [[4, 12, 7], [9, 3]], [[20], [5], [12], [12], [33]]


def families(shape):
    """Sequences in groups that share a beginning of nine tokens; a group of one shares none."""
    out = []
    for seed, group in enumerate(shape):
        prompt, *rest = sequences_of([9, *group], seed=seed)
        out += [torch.cat([prompt, part]) for part in rest] if len(group) > 1 else rest
    return out


def logprobs_and_gradient(base, roles, sequences):
    targets = targets_from(sequences, [3] * len(sequences))
    with roles.use("policy"):
        logprobs = read_targets(base, sequences, targets).logprobs
        (logprobs * torch.linspace(-1, 1, len(logprobs), device=base.device)).sum().backward()
    return logprobs.detach(), gradient(roles.parameters("policy"))


@pytest.mark.parametrize("shape", [SHARED, APART], ids=["shared", "apart"])
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("architecture", ["llama", *full(*PACKING[1:], "qwen2", "qwen3")])
def test_packed_equals_padded_in_values_and_gradients(opened, architecture, dtype, shape):
    """Grouped heads everywhere but in GPT-2 and GPT-NeoX, a sliding window of 6 in Mistral and Gemma 2 and 3."""
    base = opened(architecture, dtype=dtype, scale=MILD)
    assert base.packs and base.shares
    roles = Roles(base)
    roles.add("policy", random_adapter(base, 1))
    sequences = families(shape)
    packed = logprobs_and_gradient(base, roles, sequences)
    with unpacked(base):
        padded = logprobs_and_gradient(base, roles, sequences)
    for mine, theirs, close in zip(packed, padded, CLOSE[dtype], strict=True):
        assert torch.isfinite(mine).all() and relative(mine, theirs) < close


@pytest.mark.parametrize("architecture", ["llama", *full(*PACKING[1:])])
def test_shared_beginnings_give_the_states_of_single_sequences(opened, architecture):
    base = opened(architecture, dtype=BF16, scale=MILD)
    sequences = families(SHARED)
    with torch.no_grad():
        alone = torch.cat([base.hidden([s]) for s in sequences]).float()
        assert relative(base.hidden(sequences).float(), alone) < CLOSE[BF16][1]


def test_half_precision_is_close_to_full(opened):
    half, full = opened(dtype=BF16, scale=MILD), opened(scale=MILD)
    sequences = families(APART)
    targets = targets_from(sequences, [1] * len(sequences))
    with torch.no_grad():
        states = [base.hidden(sequences).float() for base in (half, full)]
        logprobs = [read_targets(base, sequences, targets).logprobs for base in (half, full)]
    assert logprobs[0].dtype == FP32
    assert relative(*states) < 0.03
    off = (logprobs[0] - logprobs[1]).abs()
    assert off.mean() < 0.01 and off.max() < 0.1
