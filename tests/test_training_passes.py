"""A batch as micro-batches: the same gradient and the same results however it is cut."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from stages import reward
from stages.errors import StopRequested
from stages.models.outputs import read_targets, sequence_scores
from stages.models.passes import Passes, combine
from stages.models.roles import Roles
from stages.training.language import count_targets, learn_rows
from stages.training.signals import Signals
from tests.parts import (
    LENGTHS,
    STARTS,
    gradient,
    in_passes_of,
    random_adapter,
    random_head,
    relative,
    reward_config,
    token_comparisons,
    token_rows,
    unpacked,
)

MICRO = [1, 2, 4, "auto"]


@pytest.fixture
def roles(open_tiny):
    base = open_tiny("llama")
    roles = Roles(base)
    roles.add("policy", random_adapter(base, 1))
    roles.add("reward", random_adapter(base, 2), random_head(base.width, 3))
    return roles


def sft_gradient(roles, size):
    rows = token_rows()
    loss = learn_rows(in_passes_of(roles, size), "policy", rows, count_targets(rows))["loss"]
    return loss, gradient(roles.parameters("policy"))


def reward_gradient(roles, size, **knobs):
    sums = reward.backward_reward(in_passes_of(roles, size), token_comparisons(), 4, reward_config(**knobs))
    return sums, gradient(roles.parameters("reward"))


# --- gradients


def test_supervised_gradients_do_not_depend_on_the_cut(roles):
    """Check 24, SFT: rows of 3 to 20 tokens, in passes of 1, 2, 4 or as many as fit."""
    found = {size: sft_gradient(roles, size) for size in MICRO}
    for size in MICRO[1:]:
        assert found[size][0] == pytest.approx(found[1][0], rel=1e-5)
        assert relative(found[size][1], found[1][1]) <= 1e-5


def test_the_supervised_loss_is_the_mean_over_all_target_tokens(roles):
    rows = token_rows()
    with torch.no_grad(), roles.use("policy"):
        each = [read_targets(roles.base, [r.ids], [r.targets]).logprobs for r in rows]
    assert sum(map(len, each)) == sum(n - s for n, s in zip(LENGTHS, STARTS, strict=True)) == count_targets(rows)
    assert sft_gradient(roles, 2)[0] == pytest.approx(-torch.cat(each).mean().item(), rel=1e-5)


def test_a_mean_of_means_would_be_another_gradient(roles):
    """Check 25, negative: averaging each pass's own mean is off by more than 1 %, here by far more."""
    right = sft_gradient(roles, "auto")[1]
    for row in token_rows():
        learn_rows(roles, "policy", [row], count_targets([row]) * len(LENGTHS))
    assert relative(gradient(roles.parameters("policy")), right) > 0.01


@pytest.mark.parametrize("knobs", [{}, {"centre_coef": 0.1, "label_smoothing": 0.1, "loss_margin": True}])
def test_reward_gradients_do_not_depend_on_the_cut(roles, knobs):
    """Check 24, reward model: pairs, soft labels, margins and ranked lists."""
    found = {size: reward_gradient(roles, size, **knobs) for size in MICRO}
    for size in MICRO[1:]:
        assert found[size][0] == pytest.approx(found[1][0], rel=1e-5, abs=1e-6)
        assert relative(found[size][1], found[1][1]) <= 1e-5
    assert found[1][0]["pairs"] == 6


def test_the_reward_loss_is_the_mean_over_prompts_of_the_mean_over_pairs(roles):
    """Bradley-Terry by hand from single scores; the three pairs of the ranked prompt weigh a third each."""
    with torch.no_grad(), roles.use("reward"):
        scores = [[float(sequence_scores(roles, "reward", [r.ids])) for r in c.responses] for c in token_comparisons()]

    def cost(lead):
        return math.log1p(math.exp(-lead))

    a, b, c, d = scores
    lead = c[0] - c[1]
    expected = cost(a[0] - a[1]) + cost(b[1] - b[0]) + 0.8 * cost(lead) + 0.2 * cost(-lead)
    expected += (cost(d[0] - d[1]) + cost(d[0] - d[2]) + cost(d[2] - d[1])) / 3
    sums = reward_gradient(roles, "auto")[0]
    assert sums["loss"] == pytest.approx(expected / 4, rel=1e-4)
    leads = [a[0] - a[1], b[1] - b[0], lead, d[0] - d[1], d[0] - d[2], d[2] - d[1]]
    assert sums["accuracy"] == sum(x > 0 for x in leads)
    assert sums["margin"] == pytest.approx(sum(leads), rel=1e-4)
    smooth = reward_gradient(roles, "auto", loss_margin=True, centre_coef=0.5)[0]
    better, worse = [a[0], b[1], c[0], d[0], d[0], d[2]], [a[1], b[0], c[1], d[1], d[2], d[1]]
    squares = [(x + y) ** 2 for x, y in zip(better, worse, strict=True)]
    expected += cost(b[1] - b[0] - 0.7) - cost(b[1] - b[0]) + 0.5 * (sum(squares[:3]) + sum(squares[3:]) / 3)
    assert smooth["loss"] == pytest.approx(expected / 4, rel=1e-4)


def test_padding_gives_the_packed_gradients(roles):
    """Check 27, through the losses of SFT and of the reward model."""
    packed = sft_gradient(roles, "auto")[1], reward_gradient(roles, "auto")[1]
    with unpacked(roles.base):
        padded = sft_gradient(roles, 3)[1], reward_gradient(roles, 2)[1]
    assert all(relative(a, b) <= 1e-5 for a, b in zip(packed, padded, strict=True))


# --- the passes themselves


def test_accumulate_adds_up_gradients_and_sums():
    weight = nn.Parameter(torch.tensor(2.0))
    numbers, passes = torch.tensor([1.0, 10.0, 100.0]), []

    def forward(rows):
        passes.append(rows)
        return weight * numbers[rows].sum() / 3, {"sum": numbers[rows].sum(), "rows": len(rows)}

    assert Passes(False, 2).accumulate(range(3), [5, 9, 7], forward) == {"sum": 111.0, "rows": 3.0}
    assert passes == [[1, 2], [0]] and weight.grad.item() == 37.0
    assert Passes(False, 2).accumulate([], [], forward) == {}


def test_collect_puts_results_back_in_order_without_gradients():
    weight = nn.Parameter(torch.tensor(2.0))
    found = Passes(False, 2).collect(range(4), [5, 9, 7, 9], lambda rows: [weight * row for row in rows])
    assert [f.item() for f in found] == [0.0, 2.0, 4.0, 6.0] and not found[1].requires_grad
    with pytest.raises(ValueError):
        Passes(False, 2).collect(range(2), [5, 9], lambda rows: [weight])


def test_values_of_passes_are_added_up_or_the_largest_is_taken():
    values = [{"largest_ratio": 1.5, "rows": 2.0}, {"largest_ratio": 1.2, "rows": 3.0, "new": 1.0}]
    assert combine(*values) == {"largest_ratio": 1.5, "rows": 5.0, "new": 1.0}


@pytest.mark.parametrize("run", ["accumulate", "collect"])
def test_a_signal_is_heard_between_passes(run):
    passes, signals = [], Signals()

    def forward(rows):
        passes.append(rows)
        signals.received = 15
        return (nn.Parameter(torch.tensor(1.0)) * 1, {}) if run == "accumulate" else [torch.zeros(())]

    with pytest.raises(StopRequested):
        getattr(Passes(False, 1, check=signals.check), run)(range(3), [1, 2, 3], forward)
    assert len(passes) == 1
