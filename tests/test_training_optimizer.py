"""Our AdamW, clipping and schedules against torch's and against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from stages.training.optimizer import AdamW, clip, learning_rate_at


def parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((5, 3), (4,), (), (2, 2, 2))]


def loss_of(weights, step):
    """Something whose gradient changes in size and sign from step to step."""
    return sum(((p * math.cos(step) + 0.3) ** 2 * (i + 1)).sum() + p.sin().sum() for i, p in enumerate(weights))


def adamw(weights, **options):
    return AdamW(weights, **{"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0} | options)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(("beta1", "beta2", "eps"), [(0.9, 0.999, 1e-8), (0.8, 0.95, 1e-5), (0.0, 0.5, 1e-3)])
def test_twenty_steps_are_those_of_torch(weight_decay, beta1, beta2, eps):
    ours, theirs = parameters(), parameters()
    mine = adamw(ours, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay)
    torchs = torch.optim.AdamW(theirs, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay)
    for step in range(20):
        rate = 0.05 * (1 - step / 20)
        torchs.param_groups[0]["lr"] = rate
        mine.zero()
        torchs.zero_grad()
        loss_of(ours, step).backward()
        loss_of(theirs, step).backward()
        mine.step(rate)
        torchs.step()
    assert mine.updates == 20
    for one, other, start in zip(ours, theirs, parameters(), strict=True):
        assert (one - other).abs().max() <= 1e-6 and (one - start).abs().max() > 0.1


def test_a_first_step_by_hand():
    """Bias correction makes the first step the learning rate itself, in the gradient's sign, after the decay."""
    weight = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = adamw([weight], weight_decay=0.5)
    (weight * torch.tensor([3.0, -0.01])).sum().backward()
    optimizer.step(0.1)
    assert weight.tolist() == pytest.approx([1.0 * 0.95 - 0.1, -2.0 * 0.95 + 0.1], abs=1e-6)


def test_gradients_add_up_until_they_are_forgotten():
    weights = parameters()
    optimizer = adamw(weights)
    sum(p.sum() for p in weights).backward()
    sum(p.sum() for p in weights).backward()
    assert optimizer.gradient.tolist() == [2.0] * 28
    assert all((p.grad == 2).all() and p.grad.shape == p.shape for p in weights)
    optimizer.zero()
    assert all((p.grad == 0).all() for p in weights)
    sum(p.sum() for p in weights).backward()
    assert optimizer.gradient.tolist() == [1.0] * 28  # still the same buffer


def test_weights_keep_their_values_and_shapes_when_they_move_into_the_buffer():
    weights = parameters()
    adamw(weights)
    for one, other in zip(weights, parameters(), strict=True):
        assert torch.equal(one, other)


def test_only_fp32_is_trained():
    with pytest.raises(AssertionError):
        adamw([nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))])


def test_saved_state_goes_on_bit_by_bit():
    """Three steps, save, load into a fresh optimiser, three more: the same bits as six steps."""

    def steps(weights, optimizer, numbers):
        for step in numbers:
            optimizer.zero()
            loss_of(weights, step).backward()
            optimizer.step(0.01)

    whole = parameters()
    steps(whole, adamw(whole), range(6))
    first = parameters()
    optimizer = adamw(first)
    steps(first, optimizer, range(3))
    saved = {name: tensor.clone() for name, tensor in optimizer.tensors("policy").items()}
    assert set(saved) == {"policy.weights", "policy.mean", "policy.square"}
    second = parameters(seed=9)
    again = adamw(second)
    again.load("policy", saved, optimizer.updates)
    steps(second, again, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(whole, second, strict=True))


@pytest.mark.parametrize("max_norm", [1.0, 0.01, 1e6])
def test_clipping_is_torchs_over_all_optimisers_together(max_norm):
    ours, theirs = parameters(), parameters()
    optimizers = [adamw(ours[:2]), adamw(ours[2:])]
    loss_of(ours, 1).backward()
    loss_of(theirs, 1).backward()
    norm = clip(optimizers, max_norm)
    expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    assert norm == pytest.approx(expected.item(), rel=1e-6)
    for one, other in zip(ours, theirs, strict=True):
        assert (one.grad - other.grad).abs().max() <= 1e-6 * max(1.0, other.grad.abs().max())


def test_clipping_by_hand():
    """3 and 4 have the norm 5; clipped to 1 they are 0.6 and 0.8, and 0 turns clipping off."""
    weights = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
    optimizers = [adamw(weights[:1]), adamw(weights[1:])]

    def set_gradients():
        optimizers[0].gradient.fill_(3.0)
        optimizers[1].gradient.fill_(4.0)

    set_gradients()
    assert clip(optimizers, 0.0) == 5.0 and weights[1].grad.item() == 4.0
    assert clip(optimizers, 10.0) == 5.0 and weights[1].grad.item() == 4.0
    assert clip(optimizers, 1.0) == 5.0
    assert [w.grad.item() for w in weights] == pytest.approx([0.6, 0.8], abs=1e-6)
    optimizers[0].gradient.fill_(float("nan"))
    assert math.isnan(clip(optimizers, 1.0))
    optimizers[0].gradient.fill_(float("inf"))
    assert clip(optimizers, 1.0) == math.inf


@pytest.mark.parametrize(
    ("schedule", "warmup", "rates"),
    [
        ("constant", 0.0, [2.0] * 8),
        ("constant", 0.5, [0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0, 2.0]),
        ("linear", 0.0, [2.0, 1.75, 1.5, 1.25, 1.0, 0.75, 0.5, 0.25]),
        ("linear", 0.5, [0.5, 1.0, 1.5, 2.0, 2.0, 1.5, 1.0, 0.5]),
        ("linear", 0.3, [2 / 3, 4 / 3, 2.0, 2.0, 1.6, 1.2, 0.8, 0.4]),  # ceil(2.4) = 3 steps of warm-up
        ("cosine", 0.5, [0.5, 1.0, 1.5, 2.0, 2.0, 1 + math.sqrt(0.5), 1.0, 1 - math.sqrt(0.5)]),
        ("linear", 1.0, [0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0]),
    ],
)
def test_learning_rates_by_hand(schedule, warmup, rates):
    assert [learning_rate_at(s, 8, 2.0, schedule, warmup) for s in range(8)] == pytest.approx(rates)
