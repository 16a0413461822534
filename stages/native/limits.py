"""Limits of the native pass and of forward passes, and the test for errors of memory that ran out.

No torch at import: the memory plan is made before a model loads.
"""

from __future__ import annotations

COVERED = ("llama", "mistral", "qwen2", "qwen3")  # model types
LONGEST_DENSE = 384  # tokens that a query may look back on for attention by plain matrix products
TOKENS_AT_ONCE_CPU = 2048  # a forward pass of `auto` size on the CPU: larger ones leave its caches
TOKENS_AT_ONCE_CUDA = 16384
LOGITS_AT_ONCE = 2**25  # elements of a logits chunk: 128 MiB in fp32


def tokens_at_once(*, on_cuda: bool) -> int:
    """Tokens of a forward pass of `auto` size."""
    return TOKENS_AT_ONCE_CUDA if on_cuda else TOKENS_AT_ONCE_CPU


def out_of_memory(error: BaseException) -> bool:
    """True if torch could not allocate memory."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
