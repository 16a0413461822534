"""The native decoder: one token per row and step, keys and values in slots allocated beforehand.

Every row begins at the front of its slot, so prompts of different lengths need no padding; a step reads the slots only
as far as the longest row has filled its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from stages.native.forward import Block, Native
from stages.native.fused import Linear, folded, rotate_pairs
from stages.native.graphs import Capture, FixedSteps, Step
from stages.native.limits import out_of_memory, tokens_at_once
from stages.native.prefixes import pack


class StackedLinears(NamedTuple):
    """Linear layers that read the same states, ready for decoding: x -> all their outputs side by side."""

    weights: tuple[Tensor, ...]  # (out, in) each; a single one if the adapter is folded in
    biases: tuple[Tensor | None, ...]
    down: Tensor | None  # (ranks, in) of all layers with a delta; None if it is folded in
    up: tuple[Tensor | None, ...]  # (rank, out) each, scaled


class Layer(NamedTuple):
    """One block's linear layers under one role."""

    block: Block
    qkv: StackedLinears
    o: StackedLinears
    gate_up: StackedLinears
    down: StackedLinears


def stack_linears(linears: Sequence[Linear]) -> StackedLinears:
    """Linear layers under a role, made ready for many steps.

    In fp32 the delta is folded into copies of the weights; in half precision that would round it away, so it stays
    separate.
    """
    dtype, biases = linears[0].weight.dtype, tuple(linear.bias for linear in linears)
    if dtype == torch.float32:
        weight = torch.cat([folded(linear) for linear in linears])
        bias = None if biases[0] is None else torch.cat(biases)
        return StackedLinears((weight,), (bias,), None, (None,))
    downs = [linear.a.to(dtype) for linear in linears if linear.a is not None]
    ups = tuple(None if linear.b is None else (linear.b.T * linear.scale).to(dtype) for linear in linears)
    weights = tuple(linear.weight for linear in linears)
    return StackedLinears(weights, biases, torch.cat(downs) if downs else None, ups)


def apply_stacked(x: Tensor, layer: StackedLinears) -> Tensor:
    """The outputs (R, sum out) of states (R, in)."""
    outs = [functional.linear(x, w, bias) for w, bias in zip(layer.weights, layer.biases, strict=True)]
    if layer.down is not None:
        thin, start = x @ layer.down.T, 0
        for out, up in zip(outs, layer.up, strict=True):
            if up is not None:
                out.addmm_(thin[:, start : start + len(up)], up)
                start += len(up)
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)


def layers_of(native: Native) -> list[Layer]:
    """Every block under the active role."""
    layers = []
    for block in native.blocks:
        *gate_up, down = block.gate_up_down()
        layers.append(Layer(block, *map(stack_linears, (block.qkv(), [block.o()], gate_up, [down]))))
    return layers


class KvCache:
    """Keys and values of the rows being sampled: per layer (rows, kv heads, room, D) each."""

    def __init__(self, keys: list[Tensor], values: list[Tensor]):
        self.keys, self.values = keys, values

    @classmethod
    def empty(cls, native: Native, rows: int, room: int) -> KvCache:
        """Slots for so many rows of up to `room` tokens."""
        shapes = [(rows, b.kv_heads, room, b.head_size) for b in native.blocks]
        return cls(*([native.embedding.weight.new_zeros(shape) for shape in shapes] for _ in range(2)))

    def first(self, rows: int) -> KvCache:
        """The first rows, in the same memory."""
        return KvCache([x[:rows] for x in self.keys], [x[:rows] for x in self.values])

    def keep(self, rows: Tensor, *, in_place: bool) -> None:
        """Leave only these rows, in this order; in place they become the first ones, and memory stays as it is."""
        for slots in (self.keys, self.values):
            for i, slot in enumerate(slots):
                if in_place:
                    slot[: len(rows)] = slot[rows]
                else:
                    slots[i] = slot[rows]


class NativeDecoder:
    """Rows being sampled through the native forward pass under the active role."""

    def __init__(
        self, native: Native, layers: list[Layer], prompts: list[Tensor], more: int, capture: Capture | None = None
    ):
        self.native, self.layers, self.prompts = native, layers, prompts
        self.device = native.embedding.weight.device
        lengths, rows = [len(p) for p in prompts], len(prompts)
        self.filled = max(lengths)
        room = self.filled + more
        self.cache = KvCache.empty(native, rows, room)
        self.angles = native.angles(torch.arange(room, device=self.device))
        self.positions = torch.tensor(lengths, device=self.device)  # (R,) of each row's next token
        self.fixed: FixedSteps | None = None
        if capture is not None:
            self._inputs = torch.zeros(2, rows, dtype=torch.long, device=self.device)  # ids, positions
            self.fixed = FixedSteps(capture, self._fixed_step, rows, room)

    def start(self) -> Tensor:
        """States (R, H) of the last token of every prompt; shared prefixes are computed once in each pass."""
        budget = tokens_at_once(on_cuda=self.device.type == "cuda")
        cuts, tokens = [0], 0
        for i, prompt in enumerate(self.prompts):
            if tokens and tokens + len(prompt) > budget:
                cuts.append(i)
                tokens = 0
            tokens += len(prompt)
        cuts.append(len(self.prompts))
        return torch.cat([self._prefill(first, last) for first, last in pairwise(cuts)])

    def _prefill(self, first: int, last: int) -> Tensor:
        """Fill the slots of some rows; states (last - first, H) of their last tokens."""
        prompts, device = self.prompts[first:last], self.device
        row = pack(prompts, share=True)
        lengths = torch.tensor([len(p) for p in prompts])
        indices = torch.arange(int(lengths.sum())) if row.indices is None else row.indices
        owners = torch.repeat_interleave(torch.arange(first, last), lengths).to(device)
        positions = torch.cat([torch.arange(len(p)) for p in prompts]).to(device)
        ends, inverse = indices[lengths.cumsum(0) - 1].to(device).unique(return_inverse=True)
        indices = indices.to(device)

        def keep(layer: int, keys: Tensor, values: Tensor) -> None:
            self.cache.keys[layer][owners, :, positions] = keys[indices]
            self.cache.values[layer][owners, :, positions] = values[indices]

        return self.native.hidden(row, ends, keep=keep)[inverse]

    def step(self, ids: Tensor) -> Tensor:
        """States (R, H) after one more token (R,) of every row."""
        self.filled += 1
        states = self._in_fixed_shape(ids) if self.fixed is not None else None
        if states is None:
            slots = self.cache.first(len(ids))
            states = decode(self.native, self.layers, slots, ids, self.positions, self.filled, self.angles)
        self.positions = self.positions + 1
        return states

    def _in_fixed_shape(self, ids: Tensor) -> Tensor | None:
        """The states of `step` through a captured step; None, from here on, if capturing fails."""
        assert self.fixed is not None
        rows = len(ids)
        self._inputs[0, :rows], self._inputs[1, :rows] = ids, self.positions
        self._inputs[1, rows:] = 0  # padding writes to the front of slots that are no longer read
        try:
            return self.fixed.run(rows, self.filled)[:rows]
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            self.native.capture_failure, self.fixed = str(error).splitlines()[0], None
            return None

    def _fixed_step(self, rows: int, filled: int) -> Step:
        ids, positions = self._inputs[:, :rows]
        return partial(decode, self.native, self.layers, self.cache.first(rows), ids, positions, filled, self.angles)

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these."""
        self.cache.keep(rows, in_place=self.fixed is not None)
        self.positions = self.positions[rows]


def decode(
    native: Native,
    layers: list[Layer],
    slots: KvCache,
    ids: Tensor,
    positions: Tensor,
    filled: int,
    angles: tuple[Tensor, Tensor],
) -> Tensor:
    """Final states (R, H) of tokens (R,), whose keys and values enter their rows' slots at `positions` (R,).

    Slots are read up to `filled`; `angles` are cos and sin of every position.
    """
    rows = torch.arange(len(ids), device=ids.device)
    cos, sin = angles[0][positions], angles[1][positions]
    behind = positions[:, None] - torch.arange(filled, device=ids.device)  # (R, S) how far back each slot lies
    masks = {window: _mask(behind, window, native) for window in {layer.block.window for layer in layers}}
    x = native.embedding(ids)
    for number, (block, qkv, o, gate_up, down) in enumerate(layers):
        keys, values = slots.keys[number], slots.values[number]
        q, k, v = _heads(block, apply_stacked(block.before_attention.without_grad(x), qkv))
        keys[rows, :, positions], values[rows, :, positions] = rotate_pairs(k, cos, sin), v
        mixed = _attend(
            rotate_pairs(q, cos, sin), keys[:, :, :filled], values[:, :, :filled], masks[block.window], block.scale
        )
        x = x + apply_stacked(mixed, o)
        gate, up = apply_stacked(block.before_mlp.without_grad(x), gate_up).chunk(2, dim=-1)
        x = x + apply_stacked(functional.silu(gate).mul_(up), down)
    return native.norm.without_grad(x)


def _mask(behind: Tensor, window: int | None, native: Native) -> Tensor:
    """What is added to attention logits, (R, 1, 1, S): 0 for slots that a row may attend to, else -inf."""
    visible = behind >= 0
    if window is not None:
        visible &= behind < window
    zero = torch.zeros((), dtype=native.embedding.weight.dtype, device=behind.device)
    return torch.where(visible, zero, float("-inf"))[:, None, None]


def _heads(block: Block, outs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (R, heads, D), keys and values (R, kv heads, D), normed if the model does that."""
    inner = block.kv_heads * block.head_size
    parts = outs.split([outs.shape[-1] - 2 * inner, inner, inner], dim=-1)
    q, k, v = (part.unflatten(-1, (-1, block.head_size)) for part in parts)
    if block.query_norm is not None and block.key_norm is not None:
        q, k = block.query_norm.without_grad(q), block.key_norm.without_grad(k)
    return q, k, v


def _attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """One query per head, q (R, heads, D), over keys and values (R, kv heads, S, D) -> (R, heads D).

    Heads that share keys are rows of one product. Fused kernels made for long queries are slower at one.
    """
    grouped = q.unflatten(1, (keys.shape[1], -1)) * scale  # (R, kv heads, group, D)
    weights = (grouped @ keys.transpose(-1, -2) + mask).softmax(-1, dtype=torch.float32).to(q.dtype)
    return (weights @ values).flatten(1)
