"""All randomness is a function of (seed, purpose, step, ...), never of what ran before: resuming repeats it exactly."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def derive(*names: object) -> int:
    """A 63-bit seed from any names and numbers."""
    text = "\x1f".join(str(n) for n in names)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def permutation(n: int, *names: object) -> list[int]:
    """A shuffle of range(n), the same whenever the names are."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(derive(*names))).tolist()


def noise(keys: list[tuple[object, ...]], length: int) -> Tensor:
    """Uniform numbers in [0, 1), a row of `length` per key: (len(keys), length) float64 on the CPU.

    A row depends on its key alone, so a response does not depend on which others are sampled beside it.
    """
    generator = torch.Generator()
    rows = [torch.rand(length, generator=generator.manual_seed(derive(*key)), dtype=torch.float64) for key in keys]
    return torch.stack(rows) if rows else torch.zeros(0, length, dtype=torch.float64)
