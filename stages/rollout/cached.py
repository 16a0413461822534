"""Decoding with transformers' model and cache, and without a cache for bases whose cache changes the outputs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from stages.models.base import PROBE_TOKENS, Base, is_close
from stages.native.limits import tokens_at_once


class TransformersDecoder:
    """Decoding with transformers' own model and cache; rows are padded on the left."""

    def __init__(self, base: Base, prompts: list[Tensor]):
        from transformers import DynamicCache

        self.base, device, width = base, base.device, max(len(p) for p in prompts)
        self.ids = torch.stack([nn.functional.pad(p, (width - len(p), 0)) for p in prompts]).to(device)
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        self.mask = torch.arange(width, device=device)[None] >= (width - lengths)[:, None]
        self.ragged = not bool(self.mask.all())
        self.cache = DynamicCache(config=base.model.config)
        self.positions = (self.mask.long().cumsum(-1) - 1).clamp(min=0)

    def start(self) -> Tensor:
        return self._run(self.ids)

    def step(self, ids: Tensor) -> Tensor:
        self.positions = self.positions[:, -1:] + 1
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        return self._run(ids[:, None])

    def keep(self, rows: Tensor) -> None:
        self.cache.batch_select_indices(rows)
        self.positions, self.mask = self.positions[rows], self.mask[rows]

    def _run(self, ids: Tensor) -> Tensor:
        self.base.bands.forget()
        return self.base.body(
            input_ids=ids,
            attention_mask=self.mask if self.ragged else None,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state[:, -1]


class BandGroup(NamedTuple):
    """The numbers of rows in one band of lengths, and the decoder that they share."""

    rows: list[int]
    decoder: TransformersDecoder


class BandedDecoder:
    """The same for a base whose rotary embedding depends on the length of a text.

    Only rows within one band of lengths share a decoder. A row that grows into the next band is recomputed from its
    beginning, as transformers does for Phi-3: the cached keys were rotated by other factors.
    """

    def __init__(self, base: Base, prompts: list[Tensor]):
        self.base, self.texts = base, list(prompts)
        self.groups: list[BandGroup] = []

    def start(self) -> Tensor:
        return _in_order(self._begin(list(range(len(self.texts)))))

    def step(self, ids: Tensor) -> Tensor:
        bands, tokens = self.base.bands, ids.cpu()
        to_next_band = [i for i, t in enumerate(self.texts) if bands.band_of(len(t) + 1) != bands.band_of(len(t))]
        self.texts = [torch.cat([text, tokens[i : i + 1]]) for i, text in enumerate(self.texts)]
        self._select([[i for i in group.rows if i not in to_next_band] for group in self.groups])
        states = [(group.rows, group.decoder.step(ids[group.rows])) for group in self.groups]
        return _in_order(states + self._begin(to_next_band))

    def keep(self, rows: Tensor) -> None:
        chosen = rows.tolist()
        self._select([[i for i in chosen if i in group.rows] for group in self.groups])
        new = {old: number for number, old in enumerate(chosen)}
        self.groups = [BandGroup([new[i] for i in group.rows], group.decoder) for group in self.groups]
        self.texts = [self.texts[i] for i in chosen]

    def _begin(self, rows: list[int]) -> list[tuple[list[int], Tensor]]:
        """Prefill rows from their beginning, each band in a new group."""
        states = []
        for same in self.base.bands.group([len(self.texts[i]) for i in rows]):
            numbers = [rows[k] for k in same]
            decoder = TransformersDecoder(self.base, [self.texts[i] for i in numbers])
            self.groups.append(BandGroup(numbers, decoder))
            states.append((numbers, decoder.start()))
        return states

    def _select(self, chosen: list[list[int]]) -> None:
        """Keep these rows of every group, and drop groups without any."""
        groups, self.groups = self.groups, []
        for group, rows in zip(groups, chosen, strict=True):
            if rows and rows != group.rows:
                positions = torch.tensor([group.rows.index(i) for i in rows], device=self.base.device)
                group.decoder.keep(positions)
            if rows:
                self.groups.append(BandGroup(rows, group.decoder))


class RereadingDecoder:
    """Decoding that recomputes whole texts for every token: slow, and correct for every base."""

    def __init__(self, base: Base, prompts: list[Tensor]):
        self.base, self.texts = base, list(prompts)

    def start(self) -> Tensor:
        budget = tokens_at_once(on_cuda=self.base.device.type == "cuda")
        states, first = [], 0
        while first < len(self.texts):
            last = first + 1
            while last < len(self.texts) and sum(map(len, self.texts[first : last + 1])) <= budget:
                last += 1
            texts = self.texts[first:last]
            ends = torch.tensor([len(t) for t in texts]).cumsum(0) - 1
            states.append(self.base.hidden(texts, ends))
            first = last
        return torch.cat(states)

    def step(self, ids: Tensor) -> Tensor:
        self.texts = [torch.cat([text, token[None]]) for text, token in zip(self.texts, ids.cpu(), strict=True)]
        return self.start()

    def keep(self, rows: Tensor) -> None:
        self.texts = [self.texts[i] for i in rows.tolist()]


def _in_order(states: list[tuple[list[int], Tensor]]) -> Tensor:
    """States (R, H) by the numbers of their rows."""
    rows = torch.tensor([i for numbers, _ in states for i in numbers])
    return torch.cat([part for _, part in states])[rows.argsort().to(states[0][1].device)]


def cache_works(base: Base) -> bool:
    """Whether rows of different lengths, decoded together with a cache, have the states of whole texts.

    Measured once per base. Recurrent models, and some with their own position scheme, do not support padded rows.
    """
    if base.caches is None:
        with base.lora.using(None):
            base.caches = _probe_cache(base)
    return base.caches


@torch.no_grad()
def _probe_cache(base: Base) -> bool:
    """Compare two short texts that grow by two tokens, then one of them alone by a third, with and without a cache."""
    texts = [torch.tensor(text) % base.vocabulary for text in PROBE_TOKENS]
    exact = RereadingDecoder(base, texts)
    expected, actual = [exact.start()], []
    try:
        decoder = BandedDecoder(base, texts) if base.bands.differ else TransformersDecoder(base, texts)
        actual.append(decoder.start())
        for step, rows in enumerate(((0, 1), (0, 1), (1,))):
            if len(rows) == 1:
                exact.keep(torch.tensor(rows))
                decoder.keep(torch.tensor(rows, device=base.device))
            ids = torch.tensor([(5 + 2 * step + row) % base.vocabulary for row in rows], device=base.device)
            expected.append(exact.step(ids))
            actual.append(decoder.step(ids))
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError, AssertionError):
        return False  # an architecture with another kind of cache
    return all(is_close(a, b, base.dtype) for a, b in zip(actual, expected, strict=True))
