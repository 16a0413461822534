"""Random numbers are a function of (seed, purpose, step, ...), not of what ran before: a resumed run repeats them."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def derive(*names: object) -> int:
    """A 63-bit seed from any names and numbers."""
    text = "\x1f".join(str(n) for n in names)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def permutation(n: int, *names: object) -> list[int]:
    """A random permutation of range(n), the same for the same names."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(derive(*names))).tolist()


def noise(keys: list[tuple[object, ...]], length: int) -> Tensor:
    """Uniform numbers in [0, 1), a row of `length` per key: (len(keys), length) float64 on the CPU.

    A row depends only on its key, so a response does not depend on the others in its batch.
    """
    generator = torch.Generator()
    rows = [torch.rand(length, generator=generator.manual_seed(derive(*key)), dtype=torch.float64) for key in keys]
    return torch.stack(rows) if rows else torch.zeros(0, length, dtype=torch.float64)
