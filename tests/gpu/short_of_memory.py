"""Learns from one batch in too little memory; run as a process of its own, since the limit holds for all of it.

python -m tests.gpu.short_of_memory DEVICE BYTES     BYTES beyond the model, 0 for as many as there are
"""

from __future__ import annotations

import json
import resource
import sys

import torch

from benchmarks.shapes import build
from stages.models.roles import Roles
from stages.models.tokens import TokenRow
from stages.training.devices import Ranks
from stages.training.language import count_targets, learn_rows
from stages.training.progress import add_gradients
from tests.memory import peak_bytes
from tests.parts import random_adapter, sequences_of

SIZES = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
ROWS, TOKENS = {"cpu": 16, "cuda": 128}, 128  # some 0.2 and 1.7 GB


def limit(device: torch.device, allowed: int) -> None:
    """Let this process have so many bytes more than it has."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(device) + allowed) / whole, device)
        return
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + allowed, resource.RLIM_INFINITY))


def main(device: torch.device, allowed: int) -> dict:
    """What came of it: the loss, a few numbers of the gradient, by what passes were divided, and the peak in bytes."""
    torch.manual_seed(0)
    count = ROWS[device.type]
    base, _ = build(SIZES, device, torch.float32)
    roles = Roles(base)
    roles.add("policy", random_adapter(base, 1))
    rows = [TokenRow(s, torch.arange(TOKENS) >= 64, False) for s in sequences_of([TOKENS] * count, vocabulary=512)]
    trained = roles.parameters("policy")
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    learn_rows(roles, "policy", rows[:1], 1)  # libraries take what they take before the limit is set
    roles.zero_gradients()
    if allowed:
        limit(device, allowed)
    base.passes.micro_batch_size = count
    with peak_bytes(device) as peak:
        sums = add_gradients(roles, Ranks(device), lambda: learn_rows(roles, "policy", rows, count_targets(rows)))
    numbers = torch.cat([p.grad.flatten() for p in trained]).double()
    found = {"loss": sums["loss"], "norm": float(numbers.norm()), "sum": float(numbers.sum())}
    return found | {"peak": peak[0], "divisor": base.passes.divisor}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(torch.device(sys.argv[1]), int(sys.argv[2]))))
