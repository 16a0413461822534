"""Runs a whole batch as micro-batches: gradients add up, results come back in the batch's order.

Where a pass does not fit into memory, every later one is half as large; what comes out stays the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from stages.errors import OutOfMemory
from stages.training import signals
from stages.training.batching import micro_batches

Out = TypeVar("Out")


class _Share:
    """The part of a full-sized pass that fits into memory, as far as this process has found out or planned."""

    divisor = 1
    tokens: int | None = None  # of an `auto` pass; None: the device's own budget


def pass_divisor() -> int:
    """1 where passes have their full size, 2 where memory sufficed for a half, and so on."""
    return _Share.divisor


def limit_tokens(tokens: int | None) -> None:
    """Let passes of `auto` size have at most so many tokens from here on; None takes the limit off."""
    _Share.tokens = tokens


class PassesShrank(Exception):
    """A pass that adds to gradients ran out of memory: they are to be made again, from zero, in smaller passes."""


def accumulate(
    lengths: list[int],
    size: int | str,
    forward: Callable[[list[int]], tuple[Tensor, dict[str, float]]],
    *,
    on_cuda: bool,
) -> dict[str, float]:
    """Backward the loss of every micro-batch; returns the named sums that `forward` reports, added up.

    `forward(rows)` gives a loss that is already divided by the whole batch's denominator, so the gradient does not
    depend on how the batch was cut. Raises PassesShrank if a pass ran out of memory, perhaps half-way through its
    backward; `loop.add_gradients` then begins again.
    """
    sums: dict[str, float] = {}

    def learn(rows: list[int]) -> dict[str, float]:
        loss, counted = forward(rows)
        loss.backward()
        return counted

    for rows in _passes(range(len(lengths)), lengths, size, on_cuda):
        counted = _attempt(learn, rows, lengths)
        if counted is None:
            raise PassesShrank
        for name, value in counted.items():
            sums[name] = sums.get(name, 0.0) + float(value)
    return sums


@torch.no_grad()
def collect(
    lengths: list[int], size: int | str, forward: Callable[[list[int]], list[Tensor]], *, on_cuda: bool
) -> list[Tensor]:
    """One tensor per item of the batch, in the batch's order, computed in micro-batches without gradients."""
    out: dict[int, Tensor] = {}
    while len(out) < len(lengths):
        left = [item for item in range(len(lengths)) if item not in out]
        for rows in _passes(left, lengths, size, on_cuda):
            values = _attempt(forward, rows, lengths)
            if values is None:
                break  # what is left is cut anew
            out |= zip(rows, values, strict=True)
    return [out[item] for item in range(len(lengths))]


def _passes(items: Sequence[int], lengths: list[int], size: int | str, on_cuda: bool) -> list[list[int]]:
    """Items cut into passes as large as memory allows, as far as is known now."""
    how = {"on_cuda": on_cuda, "divisor": _Share.divisor, "tokens": _Share.tokens}
    return [[items[i] for i in rows] for rows in micro_batches([lengths[i] for i in items], size, **how)]


def _attempt(run: Callable[[list[int]], Out], rows: list[int], lengths: list[int]) -> Out | None:
    """What a pass gives; None if memory ran out, and then later passes are half as large.

    Raises OutOfMemory if a single row does not fit, StopRequested after a signal.
    """
    signals.check()
    try:
        return run(rows)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        reason = str(error).splitlines()[0]
    # Outside the except block: while the error lives, so do the tensors of the pass.
    halve_passes(len(rows), f"a pass over one row of {lengths[rows[0]]} tokens: {reason}", lengths[rows[0]])
    return None


def out_of_memory(error: BaseException) -> bool:
    """True where torch could not have the memory it asked for."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def halve_passes(rows: int, what: str, tokens: int) -> None:
    """Halve every pass from now on; raises OutOfMemory, naming `what` failed, where the last one had a single row."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if rows == 1:
        raise OutOfMemory(
            f"out of memory in {what}",
            where="device",
            fix="try --gradient-checkpointing true, --load-in-4bit, fewer tokens per row, or a smaller --lora-rank",
            tokens=tokens,
        )
    _Share.divisor *= 2
