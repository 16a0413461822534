"""Reward functions that come with rlhf, by name: `--reward builtin:NAME`. Imports no torch."""
