"""Sampling on the device: a response depends on its key, and not on what is sampled beside it."""

from __future__ import annotations

import pytest
import torch

from stages.models.roles import Roles
from stages.rollout.generate import Sampling, generate
from tests.gpu.conftest import CUDA
from tests.marks import full
from tests.parts import random_adapter, sequences_of

PROMPTS = (7, 3, 12, 5, 9, 1, 4, 8)
EVERY = tuple(range(len(PROMPTS)))
TOKENS = 16


def responses(base, roles, rows_at_once, chosen=EVERY):
    prompts = sequences_of(PROMPTS)
    keys = [("test", i) for i in chosen]
    sampling = Sampling(1.0, TOKENS, rollout_batch_size=rows_at_once)
    with roles.use("policy"):
        return generate(base, [prompts[i] for i in chosen], keys, (2, 3), sampling)


@pytest.mark.parametrize("architecture", ["llama", *full("mistral", "gpt2", "gemma2")])
def test_the_same_keys_give_the_same_responses_whatever_the_batch(opened, architecture):
    """In fp32, where the order of sums moves a logit by less than a draw notices."""
    base = opened(architecture, scale=0.1)
    roles = Roles(base)
    roles.add("policy", random_adapter(base, 1))
    whole = responses(base, roles, 8)
    assert len({tuple(r.tolist()) for r in whole}) == len(whole)
    assert all(r.device.type == "cpu" and 1 <= len(r) <= TOKENS for r in whole)
    for rows in (1, 3):
        for mine, theirs in zip(responses(base, roles, rows), whole, strict=True):
            assert torch.equal(mine, theirs)
    for mine, i in zip(responses(base, roles, 8, [6, 0, 3]), (6, 0, 3), strict=True):
        assert torch.equal(mine, whole[i])


@pytest.mark.parametrize("device_name", [*full("cpu"), CUDA])
def test_in_half_precision_most_responses_are_the_same(opened):
    """A draw falls on another token where rounding moves the edge between two of them over its number: rarely."""
    base = opened("llama", scale=0.1, dtype=torch.bfloat16)
    roles = Roles(base)
    roles.add("policy", random_adapter(base, 1))
    alone, together = responses(base, roles, 1), responses(base, roles, 8)
    assert sum(torch.equal(a, b) for a, b in zip(alone, together, strict=True)) >= len(PROMPTS) // 2
