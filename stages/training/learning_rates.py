"""Learning rates for `auto`: they follow the width of the base."""

from __future__ import annotations

# Widths that were measured, and how far `auto` is from the best rate there: benchmarks/results/learning-rate-cpu.md.
REFERENCE_WIDTH = 2000
EXPONENT = 0.78
AT_REFERENCE_WIDTH = {"sft": 5e-4, "reward": 5e-4, "dpo": 5e-5, "ppo": 3e-5}
CRITIC_FACTOR = 3.0  # the critic's rate is so many times the policy's


def auto_learning_rate(stage: str, width: int) -> float:
    """The peak learning rate of LoRA adapters on a base with hidden states of `width` numbers, to two digits.

    A power law as in tinker-cookbook's hyperparam_utils: 5e-4 x (2000 / width)^0.78 for demonstrations; the factors of
    the other stages are measured.
    """
    rate = AT_REFERENCE_WIDTH[stage] * (REFERENCE_WIDTH / width) ** EXPONENT
    return float(f"{rate:.1e}")
