"""Runs a whole batch as micro-batches: gradients add up, results come back in the batch's order."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stages.training import signals
from stages.training.batching import micro_batches


def accumulate(
    lengths: list[int],
    size: int | str,
    forward: Callable[[list[int]], tuple[Tensor, dict[str, float]]],
    *,
    on_cuda: bool,
) -> dict[str, float]:
    """Backward the loss of every micro-batch; returns the named sums that `forward` reports, added up.

    `forward(rows)` gives a loss that is already divided by the whole batch's denominator, so the gradient does not
    depend on how the batch was cut.
    """
    sums: dict[str, float] = {}
    for rows in micro_batches(lengths, size, on_cuda=on_cuda):
        signals.check()
        loss, counted = forward(rows)
        loss.backward()
        for name, value in counted.items():
            sums[name] = sums.get(name, 0.0) + float(value)
    return sums


@torch.no_grad()
def collect(
    lengths: list[int], size: int | str, forward: Callable[[list[int]], list[Tensor]], *, on_cuda: bool
) -> list[Tensor]:
    """One tensor per item of the batch, in the batch's order, computed in micro-batches without gradients."""
    out: list[Tensor | None] = [None] * len(lengths)
    for rows in micro_batches(lengths, size, on_cuda=on_cuda):
        signals.check()
        for row, value in zip(rows, forward(rows), strict=True):
            out[row] = value
    return out  # type: ignore[return-value]
