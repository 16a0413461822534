"""How much memory tensors take while a block runs, on a device without a counter of its own."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations in this block made and that are still alive: now, and at their most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in before:
                self._watch(tensor.untyped_storage())
        return out

    def _watch(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._known:
            return
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)

        def gone() -> None:
            self._known.discard(key)
            self.now -= size

        weakref.finalize(storage, gone)


@contextmanager
def saved_bytes(leave_out: list[Tensor]) -> Iterator[list[int]]:
    """Bytes that autograd keeps for the backward pass of what runs in this block, each storage once.

    `leave_out` are tensors that are there anyway, such as weights. The number is in the list when the block ends.
    """
    anyway = {x.untyped_storage().data_ptr() for x in leave_out}
    found: dict[int, int] = {}
    kept: list[Tensor] = []  # alive until the end, so that no address stands for two storages

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in anyway:
            found[storage.data_ptr()] = storage.nbytes()
            kept.append(x)
        return x

    total: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield total
    total.append(sum(found.values()))


@contextmanager
def peak_bytes(device: torch.device) -> Iterator[list[int]]:
    """The most that this block has on a device beyond what was there before; in the list when the block ends."""
    found: list[int] = []
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield found
        found.append(torch.cuda.max_memory_allocated(device) - before)
        return
    live = LiveBytes()
    with live:
        yield found
    found.append(live.peak)
