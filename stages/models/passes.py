"""Cuts a batch into forward passes: gradients add up, results are returned in the batch's order.

If a pass does not fit into memory, every later one is half as large; the result stays the same.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from stages.config import AUTO
from stages.errors import OutOfMemory
from stages.native.limits import out_of_memory, tokens_at_once

LARGEST_OF = "largest_"  # named values with this prefix are combined by their maximum, all others added

Row = TypeVar("Row")
Out = TypeVar("Out")


class PassesShrank(Exception):
    """A pass that adds to gradients ran out of memory: compute them again, from zero, in smaller passes."""


@dataclass
class Passes:
    """The forward passes of one base: their size as planned, and as reduced after running out of memory."""

    on_cuda: bool
    micro_batch_size: int | str = AUTO  # rows of a pass
    tokens: int | None = None  # of an `auto` pass; None: the device's default
    divisor: int = 1  # 2 if memory sufficed for half passes only, and so on
    check: Callable[[], None] = field(default=lambda: None)  # called before every pass; may raise StopRequested

    def accumulate(
        self, rows: Sequence[Row], sizes: list[int], forward: Callable[[list[Row]], tuple[Tensor, dict[str, float]]]
    ) -> dict[str, float]:
        """Add the gradient of every micro-batch's loss; returns the named values of `forward`, combined.

        `forward(rows)` returns a loss that is already divided by the whole batch's denominator, so the gradient does
        not depend on the cut of the batch. `sizes` are the rows' tokens. Raises PassesShrank if a pass ran out of
        memory, perhaps half-way through its backward; `loop.add_gradients` then begins again.
        """
        values: dict[str, float] = {}

        def forward_and_backward(rows: list[Row]) -> dict[str, float]:
            loss, part = forward(rows)
            loss.backward()
            return part

        for numbers in self._cut(range(len(rows)), sizes):
            part = self._attempt(forward_and_backward, [rows[i] for i in numbers], sizes[numbers[0]])
            if part is None:
                raise PassesShrank
            values = combine(values, part)
        return values

    @torch.no_grad()
    def collect(
        self, rows: Sequence[Row], sizes: list[int], forward: Callable[[list[Row]], list[Tensor]]
    ) -> list[Tensor]:
        """One tensor per row, in the batch's order, computed in micro-batches without gradients."""
        out: dict[int, Tensor] = {}
        while len(out) < len(rows):
            left = [number for number in range(len(rows)) if number not in out]
            for numbers in self._cut(left, sizes):
                results = self._attempt(forward, [rows[i] for i in numbers], sizes[numbers[0]])
                if results is None:
                    break  # the remaining rows are cut again, into smaller passes
                out |= zip(numbers, results, strict=True)
        return [out[number] for number in range(len(rows))]

    def halve(self, rows: int, what: str, tokens: int) -> None:
        """Halve every pass from now on; raises OutOfMemory, naming `what` failed, if the last one had a single row."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if rows == 1:
            raise OutOfMemory(
                f"out of memory in {what}",
                where="device",
                fix="try --gradient-checkpointing true, --load-in-4bit, fewer tokens per row, or a smaller --lora-rank",
                tokens=tokens,
            )
        self.divisor *= 2

    def _cut(self, numbers: Sequence[int], sizes: list[int]) -> list[list[int]]:
        options = {"on_cuda": self.on_cuda, "divisor": self.divisor, "tokens": self.tokens}
        cut = micro_batches([sizes[i] for i in numbers], self.micro_batch_size, **options)
        return [[numbers[i] for i in indices] for indices in cut]

    def _attempt(self, run: Callable[[list[Row]], Out], rows: list[Row], longest: int) -> Out | None:
        """The result of a pass; None if memory ran out, and then later passes are half as large.

        Raises OutOfMemory if a single row does not fit, StopRequested after a signal.
        """
        self.check()
        try:
            return run(rows)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            reason = str(error).splitlines()[0]
        # Outside the except block: while the error lives, so do the tensors of the pass.
        self.halve(len(rows), f"a pass over one row of {longest} tokens: {reason}", longest)
        return None


def combine(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    """The named values of two parts of a batch, added or by their maximum."""
    out = dict(one)
    for name, value in other.items():
        merge = max if name.startswith(LARGEST_OF) else operator.add
        out[name] = merge(out[name], float(value)) if name in out else float(value)
    return out


def micro_batches(
    lengths: list[int], size: int | str, *, on_cuda: bool, divisor: int = 1, tokens: int | None = None
) -> list[list[int]]:
    """Cut items of these token lengths into forward passes: `size` items each, or as many as fit a token budget.

    The budget is `tokens`, or the device's default. Passes are smaller by the factor `divisor`, down to a single item.

    Longest first, neighbours alike in length: little padding for bases that need it, and the pass that needs the most
    memory comes first.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    if isinstance(size, int):
        size = max(1, size // divisor)
        return [order[i : i + size] for i in range(0, len(order), size)]
    budget = (tokens or tokens_at_once(on_cuda=on_cuda)) // divisor
    groups: list[list[int]] = []
    used = budget + 1
    for i in order:
        if used + lengths[i] > budget:
            groups.append([])
            used = 0
        groups[-1].append(i)
        used += lengths[i]
    return groups
