"""Learning rates for `auto`: they follow the width of the base, with a power law for each stage."""

from __future__ import annotations

REFERENCE_WIDTH = 2000
# Stage: rate at that width, and how fast it rises as a base gets narrower. Measured on widths of 64 to 576, with the
# rates that others publish for wider ones in mind: benchmarks/results/learning-rate-cpu.md.
LAWS = {"sft": (6e-4, 0.65), "reward": (6e-4, 0.42), "dpo": (5e-5, 0.7), "ppo": (3e-5, 0.8)}
CRITIC_FACTOR = 3.0  # the critic's rate is so many times the policy's


def auto_learning_rate(stage: str, width: int) -> float:
    """The peak learning rate of LoRA adapters on a base with hidden states of `width` numbers, to two digits.

    The form, rate x (2000 / width)^exponent, is that of tinker-cookbook's hyperparam_utils.
    """
    at_reference, exponent = LAWS[stage]
    return float(f"{at_reference * (REFERENCE_WIDTH / width) ** exponent:.1e}")
