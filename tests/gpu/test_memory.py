"""Memory on the device: what the plan says a pass takes, and a pass that does not get it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.shapes import build
from stages.models.roles import Roles, new_adapter
from stages.models.tokens import TokenRow
from stages.training.language import count_targets, learn_rows
from stages.training.optimizer import AdamW
from stages.training.plan import Work, memory_by_part, peak_of
from tests.gpu.conftest import CUDA
from tests.marks import full
from tests.memory import peak_bytes
from tests.parts import sequences_of, sft_config

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4}
LARGE = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16}
# Model, vocabulary, and rows of a batch (one forward pass) on each device.
SCALE = {"cpu": (SMALL, 300, (60, 60, 50, 30)), "cuda": (LARGE, 32000, (1024,) * 4 + (512,) * 8)}


@pytest.mark.parametrize(
    ("dtype", "checkpointing", "group"),  # query heads that share a key head; in fp32, CUDA has no kernel for several
    [
        ("bfloat16", True, 4),
        ("float32", False, 1),
        *full(("bfloat16", False, 4), ("bfloat16", False, 1), ("float32", True, 1)),
    ],
)
def test_the_plan_is_within_15_percent_of_what_a_pass_takes(device, dtype, checkpointing, group):
    sizes, vocabulary, lengths = SCALE[device.type]
    sizes = sizes | {"num_key_value_heads": sizes["num_attention_heads"] // group}
    sizes |= {"model_type": "llama", "vocab_size": vocabulary}
    base, shapes = build(sizes | {"tie_word_embeddings": False}, device, getattr(torch, dtype))
    if checkpointing:
        base.checkpoint_activations()
    roles, weights = Roles(base), sum(p.numel() * p.itemsize for p in base.model.parameters())
    with peak_bytes(device) as peak:
        roles.add("policy", new_adapter(base, 32, 32.0, [], 0))
        optimizer = AdamW(roles.parameters("policy"), beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0)
        rows = [TokenRow(s, torch.arange(len(s)) >= len(s) // 2, False) for s in sequences_of(list(lengths))]
        learn_rows(roles, "policy", rows, count_targets(rows))
    assert float(optimizer.gradient.abs().max()) > 0
    config = sft_config(device=device.type, dtype=dtype, lora_rank=32, gradient_checkpointing=checkpointing)
    parts = memory_by_part(config, Work("sft", list(lengths), len(lengths), read=0.5), base.ref, shapes)
    assert parts["frozen base"] == weights
    assert peak_of(parts) - weights == pytest.approx(peak[0], rel=0.15)


@pytest.mark.parametrize("device_name", [pytest.param("cpu", marks=pytest.mark.slow), CUDA])
def test_a_batch_in_too_little_memory_gives_the_same_loss_and_gradient(device):
    if device.type == "cpu" and not Path("/proc/self/statm").exists():
        pytest.skip("the limit is set through Linux's accounts")
    whole = learn(device, 0)
    short = learn(device, int(0.55 * whole["peak"]))
    assert whole["divisor"] == 1 and short["divisor"] in (2, 4, 8)
    assert short["peak"] < 0.75 * whole["peak"]  # of the limit itself, the pass that failed came near it
    for name in ("loss", "norm"):
        assert short[name] == pytest.approx(whole[name], rel=1e-5)


def learn(device: torch.device, allowed: int) -> dict:
    words = [sys.executable, "-m", "tests.gpu.short_of_memory", str(device), str(allowed)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])
