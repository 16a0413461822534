"""The terminal: commands, options, progress and tables. Knows nothing of the algorithm."""
