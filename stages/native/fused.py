"""The parts of a Llama-shaped block, each with its own backward pass that stores and computes only what LoRA needs.

Base weights and norms are frozen, so they get no gradient. For one call the adapter's delta is folded into the weight
if that is cheaper and exact (fp32 with many tokens), else computed separately.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class Linear(NamedTuple):
    """A frozen linear layer and the delta of the active role: y = x W' + bias + scale (x A') B'."""

    weight: Tensor  # (out, in)
    bias: Tensor | None  # (out,)
    a: Tensor | None  # (rank, in) fp32
    b: Tensor | None  # (out, rank) fp32
    scale: float = 1.0


def project(x: Tensor, linears: tuple[Linear, ...], residual: Tensor | None = None) -> tuple[Tensor, ...]:
    """Several linear layers on the same states: x (N, in) -> one (N, out) each; `residual` is added to the first."""
    flat = [part for linear in linears for part in linear[:4]]
    return _Project.apply(x, residual, tuple(linear.scale for linear in linears), *flat)


def gated_mlp(x: Tensor, residual: Tensor, gate: Linear, up: Linear, down: Linear) -> Tensor:
    """residual + down(silu(gate(x)) * up(x)), (N, H) -> (N, H); the backward pass computes the product again."""
    flat = [part for linear in (gate, up, down) for part in linear[:4]]
    return _GatedMlp.apply(x, residual, (gate.scale, up.scale, down.scale), *flat)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension, the root mean square in fp32 (Zhang and Sennrich 2019)."""
    return _RmsNorm.apply(x, weight, eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021) of x (N, heads, D) by angles whose cos and sin are (N, 1, D / 2)."""
    return _Rotate.apply(x, cos, sin)


# --- one linear layer, forwards and backwards


def folds(tokens: int, weight: Tensor) -> bool:
    """True if folding the delta into the weight is exact to rounding, and cheaper than two thin products per token."""
    out, width = weight.shape
    return weight.dtype in (torch.float32, torch.float64) and tokens * (out + width) >= 2 * out * width


def folded(linear: Linear) -> Tensor:
    """W + scale B A, (out, in)."""
    if linear.a is None:
        return linear.weight
    dtype = linear.weight.dtype
    return torch.addmm(linear.weight, linear.b.to(dtype), linear.a.to(dtype), alpha=linear.scale)


def apply(x: Tensor, linear: Linear, onto: Tensor | None = None) -> Tensor:
    """The layer on x (N, in) -> (N, out), added to `onto` if given."""
    with_delta = linear.a is not None
    fold = with_delta and folds(len(x), linear.weight)
    weight = folded(linear) if fold else linear.weight
    if onto is not None:
        out = torch.addmm(onto, x, weight.T)
        if linear.bias is not None:
            out += linear.bias
    else:
        out = functional.linear(x, weight, linear.bias)
    if with_delta and not fold:
        out.addmm_(x @ linear.a.to(x.dtype).T, linear.b.to(x.dtype).T, alpha=linear.scale)
    return out


def _gradients(
    grad: Tensor, x: Tensor, linear: Linear, into: Tensor | None, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x (added to `into`), A and B, given that of the output; `needs`: x's, the delta's."""
    needs_x, needs_delta = needs
    through = da = db = None
    fold = linear.a is not None and folds(len(x), linear.weight)
    if linear.a is not None and (needs_delta or not fold):
        through = (grad @ linear.b.to(grad.dtype)) * linear.scale  # (N, rank)
    if needs_delta:
        down = x @ linear.a.to(x.dtype).T
        da, db = (through.T @ x).to(linear.a.dtype), (down.T @ grad).mul_(linear.scale).T.to(linear.b.dtype)
    if needs_x:
        weight = folded(linear) if fold else linear.weight
        into = grad @ weight if into is None else into.addmm_(grad, weight)
        if linear.a is not None and not fold:
            into.addmm_(through, linear.a.to(grad.dtype))
    return into, da, db


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, residual: Tensor | None, scales: tuple[float, ...], *flat: Tensor | None):
        ctx.scales = scales
        ctx.save_for_backward(x, *flat)
        first, *others = _linears(flat, scales)
        return (apply(x, first, residual), *(apply(x, linear) for linear in others))

    @staticmethod
    def backward(ctx, *grads: Tensor):
        x, *flat = ctx.saved_tensors
        dx, out = None, []
        for i, (grad, linear) in enumerate(zip(grads, _linears(flat, ctx.scales), strict=True)):
            dx, da, db = _gradients(grad, x, linear, dx, (ctx.needs_input_grad[0], _trains(ctx, i)))
            out += [None, None, da, db]
        return dx, grads[0] if ctx.needs_input_grad[1] else None, None, *out


class _GatedMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, residual: Tensor, scales: tuple[float, ...], *flat: Tensor | None) -> Tensor:
        gate, up, down = _linears(flat, scales)
        opened, raised = apply(x, gate), apply(x, up)
        ctx.scales = scales
        ctx.save_for_backward(x, opened, raised, *flat)
        return apply(functional.silu(opened).mul_(raised), down, residual)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, opened, raised, *flat = ctx.saved_tensors
        gate, up, down = _linears(flat, ctx.scales)
        trains = [_trains(ctx, i) for i in range(3)]
        active = functional.silu(opened)
        inner, down_a, down_b = _gradients(grad, active * raised, down, None, (True, trains[2]))
        d_raised = active.mul_(inner)
        d_opened = torch.ops.aten.silu_backward(inner.mul_(raised), opened)
        needs_x = ctx.needs_input_grad[0]
        dx, gate_a, gate_b = _gradients(d_opened, x, gate, None, (needs_x, trains[0]))
        dx, up_a, up_b = _gradients(d_raised, x, up, dx, (needs_x, trains[1]))
        deltas = (None, None, gate_a, gate_b, None, None, up_a, up_b, None, None, down_a, down_b)
        return dx, grad if ctx.needs_input_grad[1] else None, None, *deltas


def _linears(flat: tuple[Tensor | None, ...] | list[Tensor | None], scales: tuple[float, ...]) -> list[Linear]:
    return [Linear(*flat[4 * i : 4 * i + 4], scale) for i, scale in enumerate(scales)]


def _trains(ctx, number: int) -> bool:
    """True if layer `number` of those laid flat behind the first three arguments has a delta that is trained."""
    start = 3 + 4 * number
    return any(ctx.needs_input_grad[start + 2 : start + 4])


# --- norm and rotation


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, inverse = normed(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, inverse = ctx.saved_tensors
        wide = x.to(inverse.dtype)
        scaled = (grad * weight).to(inverse.dtype)
        along = (scaled * wide).sum(-1, keepdim=True).mul_(inverse.pow(3)).div_(x.shape[-1])
        return scaled.mul_(inverse).addcmul_(wide, along, value=-1).to(grad.dtype), None, None


def normed(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / rms(x) * weight without a gradient, and 1 / rms(x) (..., 1)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    inverse = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (wide * inverse).to(x.dtype).mul_(weight), inverse


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return rotate_pairs(x, cos, sin, 1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return rotate_pairs(grad, *ctx.saved_tensors, -1), None, None


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor, direction: int = 1) -> Tensor:
    """Each pair (i, i + D / 2) of the last dimension rotated by its angle, or back if direction is -1."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    (first, second), (new_first, new_second) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(first, cos, out=new_first).addcmul_(second, sin, value=-direction)
    torch.mul(second, cos, out=new_second).addcmul_(first, sin, value=direction)
    return out
