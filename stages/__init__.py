"""The RLHF stages: supervised fine-tuning, reward modelling, PPO, and what reads their files."""

__version__ = "0.1.0"
