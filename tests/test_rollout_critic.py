"""When the critic's warm-up is over."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from stages.rollout.critic import critic_is_ready
from tests.parts import ppo_config


def readiness(variances: list[float | None], *, total: int = 100, **knobs: object) -> list[bool]:
    """Whether each update trains the policy, given the explained variance of its rollout."""
    session = SimpleNamespace(config=ppo_config(**knobs), progress=SimpleNamespace(facts={}), total=total)
    return [critic_is_ready(session, step, variance) for step, variance in enumerate(variances)]


@pytest.mark.parametrize(
    ("variances", "ready"),
    [
        ([-2.0, 0.1, 0.3, 0.34, 0.9], [False, False, False, True, True]),  # 0.34 is less than 0.05 above 0.3
        ([0.5, 0.4, 0.9], [False, True, True]),  # once over, over for good
        ([math.nan, 0.4], [True, True]),  # no variance to explain
    ],
)
def test_the_warm_up_ends_once_explained_variance_settles(variances, ready):
    assert readiness(variances) == ready


def test_the_warm_up_takes_a_tenth_of_the_updates_at_most():
    growing = [0.1 * step for step in range(6)]
    assert readiness(growing, total=30) == [False] * 3 + [True] * 3
    assert readiness(growing, total=9) == [True] * 6


def test_a_number_of_updates_is_kept_to():
    assert readiness([0.1, 0.1, 0.1], critic_warmup=2) == [False, False, True]
    assert readiness([None, None], critic_warmup=None) == [True, True]  # without a critic
