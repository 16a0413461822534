"""Diagnostics of training: watched conditions, verdicts, baselines, the curve of score over KL."""
