"""The fused parts against plain torch and its own derivatives, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from stages.native import fused
from stages.native.fused import Linear, gated_mlp, project, rms_norm, rotate


def numbers(*shape, seed=0, grad=True):
    drawn = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return drawn.requires_grad_(grad)


def linear(width, out, *, rank=3, bias=False, delta=True, seed=0):
    weight = numbers(out, width, seed=seed, grad=False)
    b = numbers(out, seed=seed + 1, grad=False) if bias else None
    if not delta:
        return Linear(weight, b, None, None)
    return Linear(weight, b, numbers(rank, width, seed=seed + 2), numbers(out, rank, seed=seed + 3), 0.7)


def plain(x, one):
    """The layer as it is defined, left to autograd."""
    out = functional.linear(x, one.weight, one.bias)
    return out if one.a is None else out + one.scale * (x @ one.a.T) @ one.b.T


def trained(*linears):
    return [part for one in linears for part in (one.a, one.b) if part is not None]


def same_gradients(ours, expected, inputs):
    """Both outputs, and the gradients of a fixed mixture of them, to 1e-12."""
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(ours, expected, strict=True))
    weights = [numbers(*x.shape, seed=90 + i, grad=False) for i, x in enumerate(ours)]
    grads = [
        torch.autograd.grad(sum((w * x).sum() for w, x in zip(weights, outs, strict=True)), inputs)
        for outs in (ours, expected)
    ]
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tokens", [2, 40], ids=["beside the weight", "folded into it"])
@pytest.mark.parametrize("delta", [True, False])
def test_layers_on_the_same_states_are_those_computed_one_by_one(tokens, delta):
    x = numbers(tokens, 5)
    linears = (linear(5, 4, bias=True, seed=10), linear(5, 6, delta=delta, seed=20))
    assert fused.folds(tokens, linears[0].weight) == (tokens == 40)
    same_gradients(project(x, linears), [plain(x, one) for one in linears], [x, *trained(*linears)])


@pytest.mark.parametrize("tokens", [2, 40])
def test_a_residual_is_added_to_the_first(tokens):
    x, residual, one = numbers(tokens, 5), numbers(tokens, 4, seed=1), linear(5, 4, bias=True, seed=10)
    same_gradients(project(x, (one,), residual), [residual + plain(x, one)], [x, residual, *trained(one)])


@pytest.mark.parametrize("tokens", [2, 40])
@pytest.mark.parametrize("bare", [None, 0, 1, 2], ids=["all adapted", "gate bare", "up bare", "down bare"])
def test_the_gated_mlp_is_the_composition_of_its_parts(tokens, bare):
    x, residual = numbers(tokens, 5), numbers(tokens, 5, seed=1)
    shapes = ((5, 7), (5, 7), (7, 5))
    gate, up, down = (linear(*s, delta=i != bare, seed=10 * i + 10) for i, s in enumerate(shapes))
    expected = residual + plain(functional.silu(plain(x, gate)) * plain(x, up), down)
    same_gradients([gated_mlp(x, residual, gate, up, down)], [expected], [x, residual, *trained(gate, up, down)])


def test_frozen_deltas_and_inputs_get_no_gradient():
    x, one = numbers(3, 5, grad=False), linear(5, 4)
    frozen = Linear(one.weight, None, one.a.detach(), one.b.detach(), one.scale)
    learning, still = project(x, (one, frozen))
    assert learning.requires_grad
    (learning.sum() + still.sum()).backward()
    assert one.a.grad is not None and frozen.a.grad is None and x.grad is None


@pytest.mark.parametrize("tokens", [2, 40])
def test_half_a_delta_may_learn(tokens):
    x, one = numbers(tokens, 5, grad=False), linear(5, 5, seed=10)
    half = one._replace(a=one.a.detach())
    same_gradients(project(x, (half,)), [plain(x, half)], [half.b])
    rest = linear(5, 5, delta=False, seed=20)
    expected = x + plain(functional.silu(plain(x, half)) * plain(x, rest), rest)
    same_gradients([gated_mlp(x, x, half, rest, rest)], [expected], [half.b])


def test_half_precision_never_folds_the_delta_away():
    """A delta of 2^-10 beside weights of 1 is lost when added in bfloat16, whose spacing there is 2^-7."""
    weight = torch.ones(4, 4, dtype=torch.bfloat16)
    a, b = torch.full((1, 4), 2.0**-10), torch.ones(4, 1)
    x = torch.tensor([[1.0, -1.0, 1.0, 0.0]] * 512, dtype=torch.bfloat16)
    (out,) = project(x, (Linear(weight, None, a, b, 4.0),))
    assert torch.equal(out - 1, torch.full_like(out, 0.0)) and not fused.folds(10**6, weight)
    lone = torch.tensor([[1.0, -1.0, 0.0, 0.0]], dtype=torch.bfloat16)
    (out,) = project(lone, (Linear(weight, None, torch.tensor([[2.0**-10, 0, 0, 0]]), b, 4.0),))
    assert (out == 2.0**-8).all()  # 4 x 2^-10, beside 1 - 1


def test_the_norm_is_that_of_its_definition():
    x, weight = numbers(6, 8), numbers(8, seed=1, grad=False)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    same_gradients([rms_norm(x, weight, 1e-5)], [expected], [x])


def test_the_norm_computes_in_fp32():
    """Squares of 300 overflow float16."""
    x = torch.full((1, 4), 300.0, dtype=torch.float16)
    assert torch.equal(rms_norm(x, torch.ones(4, dtype=torch.float16), 1e-6), torch.ones(1, 4, dtype=torch.float16))


def test_a_rotation_turns_each_pair_by_its_angle():
    """As complex numbers: (x_i + i x_(i+D/2)) e^(i angle)."""
    x, angle = numbers(3, 2, 6), numbers(3, 1, 3, seed=1, grad=False)
    turned = torch.complex(x[..., :3], x[..., 3:]) * torch.polar(torch.ones_like(angle), angle)
    expected = torch.cat([turned.real, turned.imag], dim=-1)
    same_gradients([rotate(x, angle.cos(), angle.sin())], [expected], [x])


def test_derivatives_agree_with_finite_differences():
    """Torch's own check, which knows nothing of our reference."""
    x, residual = numbers(4, 3), numbers(4, 3, seed=1)
    layers = [linear(*shape, rank=2, seed=10 * i) for i, shape in enumerate(((3, 5), (3, 5), (5, 3)), start=1)]
    assert torch.autograd.gradcheck(lambda x, r: gated_mlp(x, r, *layers), (x, residual))
    assert torch.autograd.gradcheck(lambda x: project(x, tuple(layers[:2])), (x,))
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, nn.Parameter(torch.ones(3).double()), 1e-3), (x,))
