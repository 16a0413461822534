"""Sampling of responses: noise per (prompt, position); finished rows leave the batch; two decoders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from stages.errors import ConfigError, ModelError, NotFiniteError
from stages.maths.tensors import at_least_fp32, entropy_of
from stages.models.base import DORA_NOTE, Base
from stages.models.quantised import is_four_bit
from stages.native.decode import Layer, NativeDecoder, layers_of
from stages.native.graphs import capture_for
from stages.native.limits import out_of_memory
from stages.rollout.cached import BandedDecoder, RereadingDecoder, TransformersDecoder, cache_works
from stages.training.seeds import noise

MOST_RESPONSES = 10**7  # of one command, which holds them until they are measured or written
ROWS_AT_ONCE = {"cpu": 64, "cuda": 256}


@dataclass(frozen=True)
class Sampling:
    """How responses are sampled. A rollout's log-probabilities match the sampling distribution only if top_p is 1."""

    temperature: float
    max_tokens: int
    top_p: float = 1.0
    rollout_batch_size: int | str = "auto"
    engine: str = "auto"  # "native", "transformers", or the first of them that supports the base


@dataclass(frozen=True)
class Response:
    """One sampled response, with measures taken when each token was drawn, fp32 on the CPU."""

    tokens: Tensor  # (L,) int64, the first stop token included
    logprobs: Tensor  # (L,) under softmax(logits / temperature), before any filter
    entropy: Tensor  # (L,) of that distribution
    values: Tensor  # (L,) of the state before each token; zeros without a head


class Decoder(Protocol):
    """A batch of rows that grow by one token at a time."""

    def start(self) -> Tensor:
        """States (R, H) of every prompt's last token."""

    def step(self, ids: Tensor) -> Tensor:
        """States (R, H) after one more token (R,) of every row."""

    def keep(self, rows: Tensor) -> None:
        """Drop all other rows."""


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
    (up to rounding of the logits).
    """
    return [r.tokens for r in respond(base, prompts, keys, stop_ids, sampling, progress=progress)]


def respond(
    base: Base,
    prompts: list[Tensor],
    keys: list[tuple[object, ...]],
    stop_ids: tuple[int, ...],
    sampling: Sampling,
    *,
    head: nn.Module | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Response]:
    """As `generate`, with log-probabilities, entropies, and the values that a head computes from the same states.

    The longest prompts come first. Raises ModelError if the native engine is required and does not support the base,
    NotFiniteError if log-probabilities under the active role are not finite.
    """
    size = sampling.rollout_batch_size
    size = ROWS_AT_ONCE[base.device.type] if size == "auto" else size
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    out: list[Response | None] = [None] * len(prompts)
    layers: list[Layer] | None = None
    done = 0
    while done < len(order):
        chosen = order[done : done + max(1, size // base.passes.divisor)]
        try:
            layers = layers or native_layers(base, sampling.engine)
            uniform = noise([keys[i] for i in chosen], sampling.max_tokens).to(base.device)
            batch = [prompts[i] for i in chosen]
            responses = _sample_batch(base, layers, batch, uniform, stop_ids, sampling, head)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            responses, reason = None, str(error).splitlines()[0]
        if responses is None:
            tokens = len(prompts[chosen[0]]) + sampling.max_tokens
            base.passes.halve(len(chosen), f"sampling one response, {tokens} tokens with its prompt: {reason}", tokens)
            continue
        for i, response in zip(chosen, responses, strict=True):
            out[i] = response
        done += len(chosen)
        progress(done)
    if out and not torch.cat([response.logprobs for response in out]).isfinite().all():
        raise NotFiniteError(
            "sampling gives log-probabilities that are not finite: weights of the base or of its adapter are too large",
            where=base.ref.name,
            fix="use another checkpoint, or train it again with a lower --learning-rate",
        )
    return out  # type: ignore[return-value]


@torch.no_grad()
def native_layers(base: Base, engine: str) -> list[Layer] | None:
    """The base's layers under the active role for the native decoder; None if transformers samples."""
    check_engine(base, engine)
    return None if engine == "transformers" or base.native is None else layers_of(base.native)


def check_count(responses: int, how: str, where: str, fix: str) -> None:
    """Raise ConfigError for more responses than memory holds; `how` says from what they come."""
    if responses > MOST_RESPONSES:
        raise ConfigError(f"{how} {responses:,} responses; the maximum is {MOST_RESPONSES:,}", where=where, fix=fix)


def check_engine(base: Base, engine: str) -> tuple[str, ...]:
    """Notes on the engine that will sample; raises ModelError if the native one is required but not supported."""
    if base.native is not None or engine == "transformers":
        return ()
    variant = " in 4 bits" if any(is_four_bit(layer) for layer in base.layers.values()) else ""
    variant += " with DoRA adapters" if base.has_dora else ""
    reason = f"the native decoder does not support `{base.ref.config['model_type']}`{variant}"
    if engine == "native":
        raise ModelError(reason, where="rollout_engine", fix="remove --rollout-engine")
    if not cache_works(base):
        slower = "recomputing the whole text for every token, since transformers' cache changes its outputs"
        return (f"{reason}; sampling with transformers, {slower}",)
    if base.has_dora:
        return (DORA_NOTE,)
    return (f"{reason}; sampling with transformers, which is slower",)


@torch.inference_mode()
def _sample_batch(
    base: Base,
    layers: list[Layer] | None,
    prompts: list[Tensor],
    uniform: Tensor,
    stop_ids: tuple[int, ...],
    sampling: Sampling,
    head: nn.Module | None,
) -> list[Response]:
    """Prefill, then one token at a time; a row leaves the batch once enough rows have ended."""
    device, limit = base.device, sampling.max_tokens
    decoder = _open_decoder(base, layers, prompts, limit)
    stops = torch.tensor(stop_ids, device=device)
    tokens = torch.zeros(len(prompts), limit, dtype=torch.long, device=device)
    recorded = torch.zeros(3, len(prompts), limit, device=device)  # log-probabilities, entropies, values
    active = torch.arange(len(prompts), device=device)  # numbers of the rows still in the batch
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    states = decoder.start()
    for step in range(limit):
        base.passes.check()
        log_probs = compute_log_probs(base.logits(states), sampling.temperature)
        drawn = draw(log_probs, uniform[active, step], sampling.temperature, sampling.top_p)
        logprobs, entropy = log_probs.gather(-1, drawn[:, None])[:, 0], entropy_of(log_probs)
        values = head(states) if head is not None else torch.zeros_like(logprobs)
        tokens[active, step] = drawn  # _cut drops what a finished row draws
        recorded[:, active, step] = torch.stack([logprobs.float(), entropy.float(), values.float()])
        ended[active] |= torch.isin(drawn, stops)
        unfinished = ~ended[active]
        left = int(unfinished.sum())
        if left == 0 or step + 1 == limit:
            break
        if left <= len(active) * 3 // 4:
            rows = unfinished.nonzero().squeeze(-1)
            decoder.keep(rows)
            active, drawn = active[rows], drawn[rows]
        states = decoder.step(drawn)
    return _cut(tokens, recorded, ended, stops, step + 1)


def _open_decoder(base: Base, layers: list[Layer] | None, prompts: list[Tensor], limit: int) -> Decoder:
    """The native decoder if there are layers for it, else one with transformers' cache if it is exact, or without.

    Decoding steps of the native one are captured, unless an earlier capture failed.
    """
    if layers is not None:
        capture = capture_for(base.device, limit) if base.native.capture_failure is None else None
        return NativeDecoder(base.native, layers, prompts, limit, capture)
    if not cache_works(base):
        return RereadingDecoder(base, prompts)
    return BandedDecoder(base, prompts) if base.bands.differ else TransformersDecoder(base, prompts)


def _cut(tokens: Tensor, recorded: Tensor, ended: Tensor, stops: Tensor, generated: int) -> list[Response]:
    """Each row up to and including its first stop token."""
    is_stop = torch.isin(tokens, stops) & ended[:, None]
    first = torch.where(ended, is_stop.long().argmax(dim=1) + 1, generated).tolist()
    rows = zip(tokens.cpu(), recorded.cpu().unbind(1), first, strict=True)
    return [Response(row[:n].clone(), *(x[:n].clone() for x in facts)) for row, facts, n in rows]


def compute_log_probs(logits: Tensor, temperature: float) -> Tensor:
    """Log-probabilities (B, V) of softmax(logits / temperature), in fp32 at least; at temperature 0 of the logits."""
    divisor = temperature + 1e-7 if temperature not in (0.0, 1.0) else 1.0
    return (at_least_fp32(logits) / divisor).log_softmax(-1)


def draw(log_probs: Tensor, uniform: Tensor, temperature: float, top_p: float = 1.0) -> Tensor:
    """One token per row (B,), by inverting the cumulative distribution (summed in fp64) at `uniform`.

    log_probs (B, V); uniform (B,) in [0, 1). Temperature 0 takes the likeliest token. With top_p < 1 only the smallest
    set of likeliest tokens whose probability reaches top_p remains, renormalised (Holtzman et al. 2020).
    """
    if temperature == 0:
        return log_probs.argmax(-1)
    probabilities = log_probs.exp()
    if top_p < 1.0:
        ranked, order = probabilities.sort(dim=-1, descending=True, stable=True)
        ranked = ranked * (ranked.cumsum(-1, dtype=torch.float64) - ranked < top_p)
        probabilities = torch.zeros_like(ranked).scatter(-1, order, ranked)
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    target = uniform.double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp(max=log_probs.shape[-1] - 1)
