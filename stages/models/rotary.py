"""Rotary embeddings whose angles depend on a text's length: such texts share a forward pass only within a band.

longrope (Phi-3 and Phi-4 with 128k) rotates all positions of a text longer than the original limit by other factors;
dynamic NTK scaling has different factors for every length beyond it. Transformers takes those of a pass's longest text.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from torch import nn


class LengthBands:
    """The bands of text lengths with equal angles, by the kinds of rotary embedding in a model's config."""

    def __init__(self, model: nn.Module):
        kinds = list(_kinds_of(model.config.get_text_config()))
        self._limits = tuple(limit for kind, limit in kinds if kind == "longrope")
        self._growing = tuple(limit for kind, limit in kinds if kind == "dynamic")
        self._modules = [m for m in model.modules() if hasattr(m, "original_max_seq_len")] if self._growing else []

    @property
    def differ(self) -> bool:
        """True if there is more than one band."""
        return bool(self._limits or self._growing)

    def band_of(self, length: int) -> tuple[int, ...]:
        """A key for a text's length: texts with equal keys may share a pass."""
        steps = (int(length > limit) for limit in self._limits)
        return (*steps, *(length if length > limit else 0 for limit in self._growing))

    def group(self, lengths: list[int]) -> list[list[int]]:
        """The numbers of the texts that may share a pass, pass by pass."""
        bands = [self.band_of(length) for length in lengths]
        order = sorted(range(len(bands)), key=bands.__getitem__)
        return [list(same) for _, same in groupby(order, key=bands.__getitem__)]

    def forget(self) -> None:
        """Undo the effect of earlier passes: dynamic scaling keeps the factors of the longest text so far."""
        for module in self._modules:
            kinds = module.rope_type if isinstance(module.rope_type, dict) else {"": module.rope_type}
            for prefix in (f"{layer}_" if layer else "" for layer, kind in kinds.items() if "dynamic" in kind):
                setattr(module, f"{prefix}inv_freq", getattr(module, f"{prefix}original_inv_freq"))
                setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def _kinds_of(config: object) -> Iterator[tuple[str, int]]:
    """Each kind of length-dependent rotary embedding in a config, and the length up to which it changes nothing."""
    whole = getattr(config, "rope_parameters", None) or {}
    for part in [part for part in whole.values() if isinstance(part, dict)] or [whole]:
        kind, limit = part.get("rope_type", "default"), getattr(config, "max_position_embeddings", 0)
        if kind == "longrope":
            yield kind, int(part.get("original_max_position_embeddings") or limit)
        elif "dynamic" in kind:
            yield "dynamic", int(limit)
