"""Runs a whole batch as micro-batches: gradients add up, results come back in the batch's order.

Where a pass does not fit into memory, every later one is half as large; what comes out stays the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
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


def divisor() -> int:
    """1 where passes have their full size, 2 where memory sufficed for a half, and so on."""
    return _Share.divisor


def limit_tokens(tokens: int | None) -> None:
    """Let passes of `auto` size have at most so many tokens from here on; None takes the limit off."""
    _Share.tokens = tokens


def accumulate(
    lengths: list[int],
    size: int | str,
    forward: Callable[[list[int]], tuple[Tensor, dict[str, float]]],
    *,
    on_cuda: bool,
    gradients: Iterable[Tensor] = (),
) -> dict[str, float]:
    """Backward the loss of every micro-batch; returns the named sums that `forward` reports, added up.

    `forward(rows)` gives a loss that is already divided by the whole batch's denominator, so the gradient does not
    depend on how the batch was cut. `gradients` are the buffers that backward adds into: a pass that ran out of memory
    half-way is taken back from them before it is made again in smaller ones.
    """
    buffers = list(gradients)
    sums: dict[str, float] = {}

    def learn(rows: list[int]) -> dict[str, float]:
        before = [buffer.clone() for buffer in buffers]
        try:
            loss, counted = forward(rows)
            loss.backward()
        except RuntimeError:
            for buffer, old in zip(buffers, before, strict=True):
                buffer.copy_(old)
            raise
        return counted

    for _, counted in _in_passes(lengths, size, learn, on_cuda):
        for name, value in counted.items():
            sums[name] = sums.get(name, 0.0) + float(value)
    return sums


@torch.no_grad()
def collect(
    lengths: list[int], size: int | str, forward: Callable[[list[int]], list[Tensor]], *, on_cuda: bool
) -> list[Tensor]:
    """One tensor per item of the batch, in the batch's order, computed in micro-batches without gradients."""
    out: list[Tensor | None] = [None] * len(lengths)
    for rows, values in _in_passes(lengths, size, forward, on_cuda):
        for row, value in zip(rows, values, strict=True):
            out[row] = value
    return out  # type: ignore[return-value]


def _in_passes(
    lengths: list[int], size: int | str, run: Callable[[list[int]], Out], on_cuda: bool
) -> Iterable[tuple[list[int], Out]]:
    """Rows of every pass and what it gave; passes shrink where memory runs out.

    Raises OutOfMemory where a single row does not fit.
    """
    left = list(range(len(lengths)))
    while left:
        how = {"on_cuda": on_cuda, "divisor": _Share.divisor, "tokens": _Share.tokens}
        cut = micro_batches([lengths[i] for i in left], size, **how)
        passes, left = [[left[i] for i in rows] for rows in cut], []
        for number, rows in enumerate(passes):
            signals.check()
            try:
                found = run(rows)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                reason = str(error).splitlines()[0]
            else:
                yield rows, found
                continue
            # Outside the except block: while the error lives, so do the tensors of the pass.
            smaller(len(rows), f"a pass over one row of {lengths[rows[0]]} tokens: {reason}", lengths[rows[0]])
            left = [row for later in passes[number:] for row in later]
            break


def out_of_memory(error: BaseException) -> bool:
    """True where torch could not have the memory it asked for."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def smaller(rows: int, what: str, tokens: int) -> None:
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
