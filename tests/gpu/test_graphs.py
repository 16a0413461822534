"""Captured decoding steps on a real device."""

from __future__ import annotations

import pytest
import torch

from stages.models.roles import Roles
from stages.native import graphs
from stages.rollout.generate import Sampling, respond
from tests.parts import random_adapter, sequences_of


@pytest.mark.gpu
@pytest.mark.parametrize("device_name", ["cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen3"])
def test_captured_steps_give_what_steps_give(opened, monkeypatch, architecture, dtype):
    """Rows end at different times; slots grow over several captures. In fp32 the responses are equal."""
    base = opened(architecture, scale=0.1, dtype=dtype)
    roles = Roles(base)
    roles.add("policy", random_adapter(base, 1))
    prompts, keys = sequences_of([7, 3, 12, 5, 9, 1, 4]), [("graph", i) for i in range(7)]
    monkeypatch.setattr(graphs, "SLOT_STEP", 16)
    with roles.use("policy"):
        found = respond(base, prompts, keys, (2, 3), Sampling(1.0, 48))
        assert base.native.capture_failure is None
        monkeypatch.setattr(graphs, "WORTH_IT", 10**6)
        expected = respond(base, prompts, keys, (2, 3), Sampling(1.0, 48))
    same = [torch.equal(a.tokens, b.tokens) for a, b in zip(found, expected, strict=True)]
    assert all(same) if dtype == torch.float32 else sum(same) >= 4
    for a, b in zip(found, expected, strict=True):
        if torch.equal(a.tokens, b.tokens):
            assert (a.logprobs - b.logprobs).abs().max() < (1e-4 if dtype == torch.float32 else 0.1)
