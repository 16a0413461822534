"""What tells whether training went well: watched conditions, verdicts, baselines, the curve over KL."""
