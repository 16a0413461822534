"""The terminal: commands, options, progress and tables. Independent of the algorithm."""
