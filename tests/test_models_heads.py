"""The scalar head of reward models and critics."""

from __future__ import annotations

import math

import pytest
import torch

from stages.errors import CheckpointError
from stages.models.heads import ScalarHead, head_from


def test_a_score_is_the_weighted_sum_plus_the_bias():
    head = ScalarHead(3)
    head.weight.data = torch.tensor([1.0, -2.0, 0.5])
    head.bias.data = torch.tensor(0.25)
    hidden = torch.tensor([[[1.0, 1.0, 1.0], [2.0, 0.0, 4.0]]])
    assert head(hidden).tolist() == [[-0.25, 4.25]]


def test_scores_of_half_precision_states_are_fp32():
    head = ScalarHead(64).randomise(0)
    hidden = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    exact = hidden.double() @ head.weight.double()
    assert head(hidden).dtype == torch.float32
    assert (head(hidden).double() - exact).abs().max() < 1e-5  # bf16 arithmetic would be off by about 1e-2


def test_a_new_head_scores_everything_zero_until_it_is_randomised():
    assert ScalarHead(8)(torch.randn(4, 8)).abs().max() == 0
    width = 4095
    weight = ScalarHead(width).randomise(3).weight
    assert weight.std().item() == pytest.approx(1 / math.sqrt(width + 1), rel=0.05)
    assert abs(weight.mean().item()) < 4 / width
    assert ScalarHead(width).randomise(3).bias.item() == 0


def test_a_random_head_is_a_function_of_its_seed():
    one = ScalarHead(16).randomise(3).weight
    torch.randn(5)
    assert torch.equal(one, ScalarHead(16).randomise(3).weight)
    assert not torch.equal(one, ScalarHead(16).randomise(4).weight)


def test_a_copy_is_independent_and_trains_or_not():
    head = ScalarHead(4).randomise(0)
    head.bias.data.fill_(2.0)
    frozen, trained = head.copy(trainable=False), head.copy(trainable=True)
    head.weight.data.zero_()
    head.bias.data.zero_()
    assert frozen.bias.item() == trained.bias.item() == 2.0 and frozen.weight.abs().sum() > 0
    assert not any(p.requires_grad for p in frozen.parameters())
    assert all(p.requires_grad for p in trained.parameters())


def test_tensors_round_trip_and_come_back_frozen():
    head = ScalarHead(4).randomise(0)
    head.bias.data.fill_(-1.5)
    again = head_from(head.tensors(), 4, torch.device("cpu"), where="head.safetensors")
    assert torch.equal(again.weight, head.weight) and again.bias.item() == -1.5
    assert not any(p.requires_grad for p in again.parameters())


@pytest.mark.parametrize(
    "tensors",
    [
        {"weight": torch.zeros(5), "bias": torch.zeros(())},
        {"weight": torch.zeros(1, 4), "bias": torch.zeros(())},
        {"weight": torch.zeros(4), "bias": torch.zeros(1)},
        {"weight": torch.zeros(4)},
        {"weight": torch.zeros(4), "bias": torch.zeros(()), "gain": torch.ones(())},
    ],
)
def test_a_head_for_another_width_or_form_is_refused(tensors):
    with pytest.raises(CheckpointError) as caught:
        head_from(tensors, 4, torch.device("cpu"), where="x/head.safetensors")
    assert caught.value.where == "x/head.safetensors"
