"""Which rows make a step, and how a step is cut into forward passes without changing its result."""

from __future__ import annotations

import math

from stages.training.seeds import permutation

TOKENS_AT_ONCE_CPU = 2048  # a forward pass of `auto` size on the CPU: larger ones leave its caches
TOKENS_AT_ONCE_CUDA = 16384


def steps_in(n: int, batch_size: int, epochs: float, max_steps: int | None) -> int:
    """Optimiser steps of a run over n rows: max_steps, or so many epochs (the last batch of an epoch may be short)."""
    if max_steps is not None:
        return max_steps
    whole, part = divmod(epochs, 1.0)
    per_epoch = math.ceil(n / batch_size)
    return max(1, int(whole) * per_epoch + math.ceil(round(part * per_epoch, 6)))  # 1.1 epochs of 10 are 11, not 12


def batch_at(step: int, n: int, batch_size: int, seed: int, stage: str) -> list[int]:
    """Row numbers of optimiser step `step`: a slice of its epoch's shuffle."""
    per_epoch = math.ceil(n / batch_size)
    epoch, place = divmod(step, per_epoch)
    order = permutation(n, seed, stage, "order", epoch)
    return order[place * batch_size : (place + 1) * batch_size]


def epoch_at(step: int, n: int, batch_size: int) -> float:
    """How many epochs lie behind `step` steps."""
    return step / math.ceil(n / batch_size)


def micro_batches(
    lengths: list[int], size: int | str, *, on_cuda: bool, divisor: int = 1, tokens: int | None = None
) -> list[list[int]]:
    """Cut items of these token lengths into forward passes: `size` items each, or as many as fit a token budget.

    The budget is `tokens`, or the device's own. `divisor` makes passes so many times smaller, down to a single item.

    Longest first, neighbours alike in length: little padding where padding is needed, and the pass that needs the
    most memory comes first.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    if isinstance(size, int):
        size = max(1, size // divisor)
        return [order[i : i + size] for i in range(0, len(order), size)]
    budget = (tokens or (TOKENS_AT_ONCE_CUDA if on_cuda else TOKENS_AT_ONCE_CPU)) // divisor
    groups: list[list[int]] = []
    used = budget + 1
    for i in order:
        if used + lengths[i] > budget:
            groups.append([])
            used = 0
        groups[-1].append(i)
        used += lengths[i]
    return groups
