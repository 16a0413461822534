"""Which rows make a step, and how a step is cut."""

from __future__ import annotations

import pytest

from stages.models.passes import micro_batches
from stages.native.limits import TOKENS_AT_ONCE_CPU
from stages.training.batching import batch_at, epoch_at, prompts_at, steps_in, updates_in


@pytest.mark.parametrize(
    ("n", "batch", "epochs", "limit", "steps"),
    [
        (100, 10, 1.0, None, 10),
        (101, 10, 1.0, None, 11),
        (101, 10, 2.0, None, 22),
        (100, 10, 0.5, None, 5),
        (100, 10, 0.55, None, 6),
        (100, 10, 1.1, None, 11),  # 1.1 - 1 is a little more than 0.1
        (100, 10, 2.3, None, 23),
        (100, 10, 0.7, None, 7),
        (100, 10, 0.001, None, 1),
        (3, 64, 1.0, None, 1),
        (3200, 16, None, None, 200),  # auto: 200 steps are enough
        (3184, 16, None, None, 398),  # 199 are not
        (160, 16, None, None, 30),  # but three epochs are the most
        (160, 16, None, 7, 7),
        (100, 10, 1.0, 3, 3),
        (100, 10, 1.0, 50, 50),
    ],
)
def test_steps_of_a_run(n, batch, epochs, limit, steps):
    assert steps_in(n, batch, epochs, limit) == steps


@pytest.mark.parametrize(
    ("n", "batch", "epochs", "limit", "updates"),
    [
        (100, 10, 1.0, None, 10),
        (101, 10, 1.0, None, 11),
        (105, 10, 2.0, None, 21),  # 210 prompts: a batch may begin in one epoch and end in the next; steps_in has 22
        (100, 10, 1.1, None, 11),
        (3, 64, 1.0, None, 1),
        (100, 10, 1.0, 3, 3),
    ],
)
def test_updates_of_a_run(n, batch, epochs, limit, updates):
    assert updates_in(n, batch, epochs, limit) == updates
    assert all(len(prompts_at(step, n, batch, 0)) == batch for step in range(updates))


def test_an_epoch_has_every_row_once_and_the_next_another_order():
    first = [batch_at(step, 10, 4, 0, "sft") for step in range(3)]
    assert [len(b) for b in first] == [4, 4, 2]
    assert sorted(sum(first, [])) == list(range(10))
    second = [batch_at(step, 10, 4, 0, "sft") for step in range(3, 6)]
    assert sorted(sum(second, [])) == list(range(10)) and second != first
    assert batch_at(1, 10, 4, 0, "sft") == first[1]  # whatever was asked for before
    assert batch_at(0, 10, 4, 1, "sft") != first[0] and batch_at(0, 10, 4, 0, "reward") != first[0]


def test_epochs_behind():
    assert [epoch_at(step, 10, 4) for step in (0, 1, 3, 6)] == [0, pytest.approx(1 / 3), 1, 2]


def test_micro_batches_of_a_size_go_longest_first():
    assert micro_batches([3, 9, 5, 9, 1], 2, on_cuda=False) == [[1, 3], [2, 0], [4]]
    assert micro_batches([3, 9], 5, on_cuda=False) == [[1, 0]]
    assert micro_batches([], 2, on_cuda=False) == micro_batches([], "auto", on_cuda=False) == []


def test_automatic_micro_batches_fill_a_budget_of_tokens():
    half = TOKENS_AT_ONCE_CPU // 2
    lengths = [half, half, half + 1, 10, half - 10, 3 * TOKENS_AT_ONCE_CPU]
    groups = micro_batches(lengths, "auto", on_cuda=False)
    assert groups == [[5], [2], [0, 1], [4, 3]]
    assert sorted(sum(groups, [])) == list(range(6))
    assert len(micro_batches([1000] * 16, "auto", on_cuda=False)) == 8
    assert len(micro_batches([1000] * 16, "auto", on_cuda=True)) == 1
