"""Samples responses: one loop over transformers' cache, noise per (prompt, position), finished rows leave the batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stages.models.base import Base
from stages.training import signals
from stages.training.passes import divisor, out_of_memory, smaller
from stages.training.seeds import noise

ROWS_AT_ONCE = {"cpu": 64, "cuda": 256}


@dataclass(frozen=True)
class Sampling:
    """The sampling law. Log-probabilities of a rollout follow it only where nothing is filtered (top_p 1)."""

    temperature: float
    max_tokens: int
    top_p: float = 1.0
    rows_at_once: int | str = "auto"


def generate(
    base: Base,
    prompts: list[Tensor],
    keys: list[tuple[object, ...]],
    stop_ids: tuple[int, ...],
    sampling: Sampling,
    *,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Tensor]:
    """One response per prompt under the active role: token ids (L_i,), the first stop token included.

    `keys[i]` names response i's noise: the same key gives the same response whichever prompts are sampled beside it
    (up to rounding of the logits). Prompts are taken in order of length.
    """
    rows = sampling.rows_at_once
    size = rows if isinstance(rows, int) else ROWS_AT_ONCE[base.device.type]
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    out: list[Tensor | None] = [None] * len(prompts)
    done = 0
    while done < len(order):
        chosen = order[done : done + max(1, size // divisor())]
        try:
            uniform = noise([keys[i] for i in chosen], sampling.max_tokens).to(base.device)
            responses = _generate_batch(base, [prompts[i] for i in chosen], uniform, stop_ids, sampling)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            responses, reason = None, str(error).splitlines()[0]
        if responses is None:
            tokens = len(prompts[chosen[0]]) + sampling.max_tokens
            smaller(len(chosen), f"sampling one response, {tokens} tokens with its prompt: {reason}", tokens)
            continue
        for i, response in zip(chosen, responses, strict=True):
            out[i] = response
        done += len(chosen)
        progress(done)
    return out  # type: ignore[return-value]


@torch.inference_mode()
def _generate_batch(
    base: Base, prompts: list[Tensor], uniform: Tensor, stop_ids: tuple[int, ...], sampling: Sampling
) -> list[Tensor]:
    """Left-padded prefill, then one token at a time; a row leaves the cache once enough rows have ended."""
    from transformers import DynamicCache

    device, width = base.device, max(len(p) for p in prompts)
    ids = torch.stack([torch.nn.functional.pad(p, (width - len(p), 0)) for p in prompts]).to(device)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    mask = torch.arange(width, device=device)[None] >= (width - lengths)[:, None]
    ragged = not bool(mask.all())
    stops = torch.tensor(stop_ids, device=device)
    tokens = torch.zeros(len(prompts), sampling.max_tokens, dtype=torch.long, device=device)
    alive = torch.arange(len(prompts), device=device)  # rows still in the cache
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    cache = DynamicCache(config=base.model.config)
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    for step in range(sampling.max_tokens):
        signals.check()
        states = base.body(
            input_ids=ids,
            attention_mask=mask if ragged else None,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        drawn = draw(base.logits(states), uniform[alive, step], sampling.temperature, sampling.top_p)
        going = ~ended[alive]
        tokens[alive[going], step] = drawn[going]
        ended[alive[going]] |= torch.isin(drawn[going], stops)
        going = ~ended[alive]
        left = int(going.sum())
        if left == 0 or step + 1 == sampling.max_tokens:
            break
        positions, ids = positions[:, -1:] + 1, drawn[:, None]
        if left <= len(alive) * 3 // 4:
            kept = going.nonzero().squeeze(-1)
            cache.batch_select_indices(kept)
            alive, ids, positions, mask = alive[kept], ids[kept], positions[kept], mask[kept]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return _cut(tokens, ended, stops, step + 1)


def _cut(tokens: Tensor, ended: Tensor, stops: Tensor, generated: int) -> list[Tensor]:
    """Each row up to and including its first stop token."""
    is_stop = torch.isin(tokens, stops) & ended[:, None]
    first = torch.where(ended, is_stop.long().argmax(dim=1) + 1, generated).tolist()
    return [row[:length].clone() for row, length in zip(tokens.cpu(), first, strict=True)]


def draw(logits: Tensor, uniform: Tensor, temperature: float, top_p: float = 1.0) -> Tensor:
    """One token per row (B,) by inverting the cumulative distribution of softmax(logits / temperature) at `uniform`.

    logits (B, V), uniform (B,) in [0, 1). Temperature 0 takes the likeliest token. With top_p < 1 the smallest set of
    likeliest tokens whose probability reaches top_p is kept and renormalised (Holtzman et al. 2020).
    """
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits.double() / (temperature + 1e-7)).softmax(-1)
    if top_p < 1.0:
        ranked, order = probabilities.sort(dim=-1, descending=True, stable=True)
        ranked = ranked * (ranked.cumsum(-1) - ranked < top_p)
        probabilities = torch.zeros_like(ranked).scatter(-1, order, ranked)
    cumulative = probabilities.cumsum(-1)
    target = uniform.double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)
