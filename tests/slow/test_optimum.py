"""The real command on a model whose responses can be listed: it comes to rest at pi* ~ pi_ref exp(R / kl_coef)."""

from __future__ import annotations

import pytest
import torch

from benchmarks.optimum import CONTROL, TASKS, Bench

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    torch.set_num_threads(1)
    return Bench(tmp_path_factory.mktemp("optimum") / "task", TASKS["16 tokens, length 1, gpt2"])


def test_the_enumeration_is_whole_and_the_optimum_far_off(bench):
    problem = bench.problem
    torch.testing.assert_close(problem.reference.exp().sum(-1), torch.ones(4).double(), rtol=0, atol=1e-5)
    assert problem.distance(problem.reference) > 0.3
    assert problem.distance(bench.exact) < 0.01  # the adapter can hold it
    # The largest value there is: kl_coef log sum pi_ref exp(R / kl_coef).
    best = 0.1 * (problem.reference + problem.rewards / 0.1).logsumexp(-1).mean()
    torch.testing.assert_close(problem.objective(problem.optimum.log()), best, rtol=0, atol=1e-9)


@pytest.mark.parametrize("estimator", ["gae", "rloo", "reinforce++"])
def test_ppo_reaches_the_optimum(bench, estimator):
    """Checks 36, 38, from rollouts of real roles to the checkpoint on disk."""
    row = bench.run(estimator)
    assert row.passed, row


def test_k3_in_the_reward_misses_the_optimum(bench):
    """Check 37: the negative control."""
    row = bench.run(CONTROL)
    assert row.difference > 0.1, row
