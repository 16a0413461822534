"""Cuts a batch into forward passes: gradients add up, results come back in the batch's order.

If a pass does not fit into memory, every later one is half as large; the result stays the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from stages.config import AUTO
from stages.errors import OutOfMemory
from stages.native.limits import out_of_memory, tokens_at_once

LARGEST_OF = "largest_"  # named values that begin so are combined by their largest, all others added

Row = TypeVar("Row")
Out = TypeVar("Out")


class PassesShrank(Exception):
    """A pass that adds to gradients ran out of memory: they are to be made again, from zero, in smaller passes."""


def _never_stop() -> None:
    pass


@dataclass
class Passes:
    """The forward passes of one base: how large they are, as far as is planned or was found out."""

    on_cuda: bool
    micro_batch_size: int | str = AUTO  # rows of a pass
    tokens: int | None = None  # of an `auto` pass; None: the device's own budget
    divisor: int = 1  # 2 if memory sufficed for half passes only, and so on
    check: Callable[[], None] = _never_stop  # called before every pass; raises StopRequested after a signal

    def accumulate(
        self, rows: Sequence[Row], sizes: list[int], forward: Callable[[list[Row]], tuple[Tensor, dict[str, float]]]
    ) -> dict[str, float]:
        """Backward the loss of every micro-batch; returns the named values that `forward` reports, combined.

        `forward(rows)` gives a loss that is already divided by the whole batch's denominator, so the gradient does not
        depend on how the batch was cut. `sizes` are the rows' tokens. Raises PassesShrank if a pass ran out of memory,
        perhaps half-way through its backward; `loop.add_gradients` then begins again.
        """
        values: dict[str, float] = {}

        def learn(rows: list[Row]) -> dict[str, float]:
            loss, counted = forward(rows)
            loss.backward()
            return counted

        for numbers in self._cut(range(len(rows)), sizes):
            counted = self._attempt(learn, [rows[i] for i in numbers], sizes[numbers[0]])
            if counted is None:
                raise PassesShrank
            values = combine(values, counted)
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
                    break  # what is left is cut anew
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
        """Row numbers cut into passes as large as memory allows, as far as is known now."""
        lengths = [sizes[i] for i in numbers]
        cut = micro_batches(
            lengths, self.micro_batch_size, on_cuda=self.on_cuda, divisor=self.divisor, tokens=self.tokens
        )
        return [[numbers[i] for i in places] for places in cut]

    def _attempt(self, run: Callable[[list[Row]], Out], rows: list[Row], longest: int) -> Out | None:
        """What a pass gives; None if memory ran out, and then later passes are half as large.

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
    """Named values of two parts of a batch as those of both."""
    out = dict(one)
    for name, value in other.items():
        if name not in out:
            out[name] = float(value)
        else:
            out[name] = max(out[name], float(value)) if name.startswith(LARGEST_OF) else out[name] + float(value)
    return out


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
