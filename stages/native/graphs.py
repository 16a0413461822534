"""Decoding steps of fixed shape, so that on CUDA a step is one replayed graph and not hundreds of launches.

A step is captured for a number of rows and a filled length of the slots; fewer rows run padded to the next size, and
slots beyond a row's own tokens are masked. Only `cuda_graph` needs a GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SLOT_STEP = 128  # slots are read up to a multiple of this
WORTH_IT = 16  # new tokens from which on a capture pays

Step = Callable[[], Tensor]
Capture = Callable[[Step], Step]


class FixedSteps:
    """Steps that are captured once for each shape they come in: `make(rows, filled)` is the step of one shape."""

    def __init__(self, capture: Capture, make: Callable[[int, int], Step], rows: int, room: int):
        self.capture, self.make, self.rows, self.room = capture, make, rows, room
        self._captured: dict[tuple[int, int], Step] = {}

    def run(self, rows: int, filled: int) -> Tensor:
        """States of `rows` rows, and of padding behind them, whose slots are filled up to `filled`."""
        shape = at_least(rows, self.rows), min(self.room, -(-filled // SLOT_STEP) * SLOT_STEP)
        if shape not in self._captured:
            self._captured[shape] = self.capture(self.make(*shape))
        return self._captured[shape]()


def at_least(rows: int, most: int) -> int:
    """The next power of two, or `most` if that is less."""
    return min(most, 1 << (rows - 1).bit_length())


def cuda_graph() -> Capture:
    """A function that captures steps as CUDA graphs, which share one pool of memory.

    It raises RuntimeError if a step cannot be captured, or if its graph gives other states than the step itself.
    """
    pool = torch.cuda.graph_pool_handle()

    def capture(step: Step) -> Step:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # once outside a graph: libraries initialise at their first call
            expected = step().clone()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            out = step()

        def replay() -> Tensor:
            graph.replay()
            return out

        error = (replay().float() - expected.float()).abs().max()
        if not error <= 1e-2 * expected.float().abs().max():
            raise RuntimeError(f"a replayed decoding step is {float(error):.3g} off")
        return replay

    return capture


def capture_for(device: torch.device, tokens: int) -> Capture | None:
    """How steps are captured on a device; None if they are not: on the CPU, or for a few tokens."""
    return cuda_graph() if device.type == "cuda" and tokens >= WORTH_IT else None
