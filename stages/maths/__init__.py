"""The algorithm as pure functions of tensors: torch and nothing else, masks required, sources cited."""
