"""Our own forward pass and decoder for Llama-shaped models."""
