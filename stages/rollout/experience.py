"""Rollouts, and the log-probabilities, values and scores of their responses."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from stages.maths.kl import sequence_kl
from stages.models.outputs import predictors, read_targets
from stages.models.roles import Roles
from stages.models.tokens import PromptRow, Text
from stages.rollout.generate import Sampling, respond

CHECK_EVERY = 16  # one response in so many is recomputed, to measure how far sampling and training differ
TOLERANCE = 1e-4  # nats per token up to which the statistics recorded while sampling are used


@dataclass(frozen=True)
class TokenStats:
    """Log-probability, entropy and value of each response token under the policy, (B, T) fp32 each, zero off-mask."""

    logprobs: Tensor  # at the sampling temperature
    entropy: Tensor
    values: Tensor  # of the state before the token, by a head on the policy's states; zeros without one


@dataclass(frozen=True)
class Rollout:
    """Prompts and the responses sampled to them; T is the longest response."""

    prompts: list[PromptRow]  # B
    responses: list[Tensor]  # B of (L_i,) int64, the stop token included
    texts: list[str]  # B responses without special tokens
    ended: Tensor  # (B,) bool: stopped by itself
    sequences: list[Tensor]  # B of (P_i + L_i,) int64: prompt and response
    targets: list[Tensor]  # B of (P_i + L_i,) bool: True on the response
    mask: Tensor  # (B, T) bool
    sampled_stats: TokenStats | None = None  # recorded while sampling

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each response."""
        return [len(r) for r in self.responses]

    @cached_property
    def sizes(self) -> list[int]:
        """Tokens of each prompt and response together."""
        return [len(s) for s in self.sequences]


@dataclass(frozen=True)
class Experience:
    """A rollout with its log-probabilities, values and scores; everything on the base's device, fp32."""

    rollout: Rollout
    mask: Tensor  # (B, T) bool
    logprobs: Tensor  # (B, T) under the policy that sampled them, at the sampling temperature
    reference_logprobs: Tensor  # (B, T)
    values: Tensor  # (B, T) of the state before each token
    score: Tensor  # (B,) of the reward sources
    entropy: Tensor  # (B, T) of the policy's distribution at each token
    mismatch: float = 0.0  # largest difference found between the log-probabilities of sampling and training, nats
    by_source: dict[str, Tensor] = field(default_factory=dict)  # (B,) score of each of several reward sources


def sample_rollout(
    roles: Roles,
    role: str,
    text: Text,
    prompts: list[PromptRow],
    keys: list[tuple[object, ...]],
    sampling: Sampling,
    *,
    head: str | None = None,
) -> Rollout:
    """Sample one response per prompt under a role; `keys[i]` is the noise of response i.

    `head` names a head that computes values from the same states.
    """
    value_head = roles.heads[head] if head is not None else None
    with roles.use(role):
        sampled = respond(roles.base, [p.ids for p in prompts], keys, text.stop_ids, sampling, head=value_head)
    columns = zip(*((r.logprobs, r.entropy, r.values) for r in sampled), strict=True)
    stats = TokenStats(*(pad_sequence(list(column), batch_first=True).to(roles.base.device) for column in columns))
    responses = [r.tokens for r in sampled]
    texts = [text.response_text(p.ids, r) for p, r in zip(prompts, responses, strict=True)]
    stops = set(text.stop_ids)
    ended = torch.tensor([int(r[-1]) in stops for r in responses], dtype=torch.bool)
    return lay_out(prompts, responses, texts, ended, stats)


def lay_out(
    prompts: list[PromptRow], responses: list[Tensor], texts: list[str], ended: Tensor, stats: TokenStats | None = None
) -> Rollout:
    """A rollout from its parts, with sequences, targets and mask."""
    sequences = [torch.cat([p.ids, r]) for p, r in zip(prompts, responses, strict=True)]
    targets = [torch.arange(len(s)) >= len(p.ids) for p, s in zip(prompts, sequences, strict=True)]
    mask = pad_sequence([torch.ones(len(r), dtype=torch.bool) for r in responses], batch_first=True)
    return Rollout(prompts, responses, texts, ended, sequences, targets, mask, stats)


def collect_token_stats(
    roles: Roles, rollout: Rollout, temperature: float, *, head: str | None = None
) -> tuple[TokenStats, float]:
    """Log-probabilities, entropies and `head` values of the role "policy" on its rollout, and how far sampling differs.

    That is the largest difference of a log-probability (nats) over one response in CHECK_EVERY. Up to TOLERANCE the
    statistics recorded while sampling are used, and no other response is recomputed.
    """
    sampled, rows = rollout.sampled_stats, list(range(0, len(rollout.responses), CHECK_EVERY))
    mismatch = 0.0
    if sampled is not None:
        recomputed, _ = role_logprobs(roles, "policy", rollout, temperature, rows)
        width = recomputed.shape[1]
        mask = rollout.mask[rows, :width].to(recomputed.device)
        mismatch = float((sampled.logprobs[rows, :width] - recomputed).masked_fill(~mask, 0).abs().max())
        if mismatch <= TOLERANCE:
            return sampled, mismatch
    logprobs, entropy = role_logprobs(roles, "policy", rollout, temperature, want_entropy=True)
    values = torch.zeros_like(logprobs) if head is None else role_values(roles, "policy", head, rollout)
    return TokenStats(logprobs, entropy, values), mismatch


def role_logprobs(
    roles: Roles,
    role: str,
    rollout: Rollout,
    temperature: float,
    chosen: list[int] | None = None,
    *,
    want_entropy: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies (B, T) of the responses under a role, without gradient, zero off-mask.

    `chosen` limits them to these rows. Without want_entropy entropies are zeros.
    """
    picked = list(range(len(rollout.responses))) if chosen is None else chosen

    def forward(rows: list[int]) -> list[Tensor]:
        sequences, targets = [rollout.sequences[i] for i in rows], [rollout.targets[i] for i in rows]
        outputs = read_targets(roles.base, sequences, targets, temperature=temperature, want_entropy=want_entropy)
        both = torch.stack([outputs.logprobs, outputs.entropy], dim=-1)
        return list(both.split([rollout.lengths[i] for i in rows]))

    padded = pad_sequence(roles.collect(role, picked, forward, [rollout.sizes[i] for i in picked]), batch_first=True)
    return padded[..., 0], padded[..., 1]


def role_values(roles: Roles, role: str, head: str, rollout: Rollout) -> Tensor:
    """Values (B, T) of the state before each response token: a head on a role's hidden states, without gradient."""

    def forward(rows: list[int]) -> list[Tensor]:
        values = read_values(roles, head, [rollout.sequences[i] for i in rows], [rollout.targets[i] for i in rows])
        return list(values.split([rollout.lengths[i] for i in rows]))

    return pad_sequence(roles.collect(role, range(len(rollout.sizes)), forward, rollout.sizes), batch_first=True)


def read_values(roles: Roles, head: str, sequences: list[Tensor], targets: list[Tensor]) -> Tensor:
    """Values (M,) of the states before the target tokens, under the active role."""
    return roles.heads[head](roles.base.hidden(sequences, predictors(targets)))


def rollout_kl(roles: Roles, rollout: Rollout, temperature: float) -> Tensor:
    """Sequence KL (B,), estimator k1, from the role "policy" to the role "reference" on a rollout of the policy."""
    policy, _ = role_logprobs(roles, "policy", rollout, temperature)
    reference, _ = role_logprobs(roles, "reference", rollout, temperature)
    return sequence_kl(policy, reference, rollout.mask.to(policy.device))
