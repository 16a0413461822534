"""The rows of every optimiser step and PPO update."""

from __future__ import annotations

import math

from stages.training.seeds import permutation

FEWEST_STEPS, MOST_EPOCHS = 200, 3  # with epochs `auto`, a dataset of fewer steps is passed over again


def steps_in(n: int, batch_size: int, epochs: float | None, max_steps: int | None) -> int:
    """Optimiser steps of a run over n rows: max_steps, or those of `epochs` (an epoch's last batch may be short)."""
    if max_steps is not None:
        return max_steps
    per_epoch = math.ceil(n / batch_size)
    if epochs is None:
        return per_epoch * min(MOST_EPOCHS, math.ceil(FEWEST_STEPS / per_epoch))
    whole, part = divmod(epochs, 1.0)
    return max(1, int(whole) * per_epoch + math.ceil(round(part * per_epoch, 6)))  # 1.1 epochs of 10 are 11, not 12


def updates_in(n: int, batch_size: int, epochs: float, max_steps: int | None) -> int:
    """PPO updates of a run over n prompts: max_steps, or those that `epochs` fill (every update has a whole batch)."""
    if max_steps is not None:
        return max_steps
    return max(1, math.ceil(round(epochs * n / batch_size, 6)))


def batch_at(step: int, n: int, batch_size: int, seed: int, stage: str) -> list[int]:
    """Row numbers of optimiser step `step`: a slice of its epoch's permutation."""
    per_epoch = math.ceil(n / batch_size)
    epoch, place = divmod(step, per_epoch)
    order = permutation(n, seed, stage, "order", epoch)
    return order[place * batch_size : (place + 1) * batch_size]


def epoch_at(step: int, n: int, batch_size: int) -> float:
    """Number of epochs in `step` steps."""
    return step / math.ceil(n / batch_size)


def prompts_at(step: int, n: int, batch_size: int, seed: int) -> list[int]:
    """Row numbers of an update's prompts: always a whole batch, which may continue in the next epoch's permutation."""
    places = range(step * batch_size, (step + 1) * batch_size)
    orders = {epoch: permutation(n, seed, "ppo", "order", epoch) for epoch in {place // n for place in places}}
    return [orders[place // n][place % n] for place in places]
