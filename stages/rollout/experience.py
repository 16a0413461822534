"""Rollouts and what the frozen roles think of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from stages.maths.kl import sequence_kl
from stages.models.forward import predictors, read_targets
from stages.models.roles import Roles
from stages.models.tokens import PromptRow, Text
from stages.rollout.generate import Sampling, generate
from stages.training.passes import collect


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
    """A rollout and how it was judged when it was sampled; everything on the base's device, fp32."""

    rollout: Rollout
    mask: Tensor  # (B, T) bool
    logprobs: Tensor  # (B, T) under the policy that sampled them, tempered
    reference_logprobs: Tensor  # (B, T)
    values: Tensor  # (B, T) of the state before each token
    score: Tensor  # (B,) what the reward sources say
    entropy: Tensor  # (B, T) of the policy's distribution at each token


def roll_out(
    roles: Roles, role: str, text: Text, prompts: list[PromptRow], keys: list[tuple[object, ...]], sampling: Sampling
) -> Rollout:
    """Sample one response per prompt under a role; `keys[i]` is the noise of response i."""
    with roles.use(role):
        responses = generate(roles.base, [p.ids for p in prompts], keys, text.stop_ids, sampling)
    texts = [text.response_text(p.ids, r) for p, r in zip(prompts, responses, strict=True)]
    stops = set(text.stop_ids)
    ended = torch.tensor([int(r[-1]) in stops for r in responses], dtype=torch.bool)
    return lay_out(prompts, responses, texts, ended)


def lay_out(prompts: list[PromptRow], responses: list[Tensor], texts: list[str], ended: Tensor) -> Rollout:
    """A rollout from its parts: sequences, targets and mask follow."""
    sequences = [torch.cat([p.ids, r]) for p, r in zip(prompts, responses, strict=True)]
    targets = [torch.arange(len(s)) >= len(p.ids) for p, s in zip(prompts, sequences, strict=True)]
    mask = pad_sequence([torch.ones(len(r), dtype=torch.bool) for r in responses], batch_first=True)
    return Rollout(prompts, responses, texts, ended, sequences, targets, mask)


def role_logprobs(
    roles: Roles, role: str, rollout: Rollout, temperature: float, micro_batch_size: int | str
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies (B, T) of the responses under a role, without gradient, zero off-mask."""

    def forward(rows: list[int]) -> list[Tensor]:
        sequences, targets = [rollout.sequences[i] for i in rows], [rollout.targets[i] for i in rows]
        reading = read_targets(roles.base, sequences, targets, temperature=temperature, want_entropy=True)
        both = torch.stack([reading.logprobs, reading.entropy], dim=-1)
        return list(both.split([len(rollout.responses[i]) for i in rows]))

    with roles.use(role):
        parts = collect(rollout.sizes, micro_batch_size, forward, on_cuda=roles.base.device.type == "cuda")
    padded = pad_sequence(parts, batch_first=True)
    return padded[..., 0], padded[..., 1]


def role_values(roles: Roles, role: str, head: str, rollout: Rollout, micro_batch_size: int | str) -> Tensor:
    """Values (B, T) of the state before each response token: a head on a role's hidden states, without gradient."""

    def forward(rows: list[int]) -> list[Tensor]:
        values = read_values(roles, head, [rollout.sequences[i] for i in rows], [rollout.targets[i] for i in rows])
        return list(values.split([len(rollout.responses[i]) for i in rows]))

    with roles.use(role):
        parts = collect(rollout.sizes, micro_batch_size, forward, on_cuda=roles.base.device.type == "cuda")
    return pad_sequence(parts, batch_first=True)


def read_values(roles: Roles, head: str, sequences: list[Tensor], targets: list[Tensor]) -> Tensor:
    """Values (M,) of the states before the target tokens, under the active role."""
    hidden = roles.base.hidden(sequences)
    return roles.heads[head](hidden[predictors(targets).to(hidden.device)])


def rollout_kl(roles: Roles, rollout: Rollout, temperature: float, micro_batch_size: int | str) -> Tensor:
    """Sequence KL (B,), estimator k1, from the role "policy" to the role "reference" on a rollout of the policy."""
    policy, _ = role_logprobs(roles, "policy", rollout, temperature, micro_batch_size)
    reference, _ = role_logprobs(roles, "reference", rollout, temperature, micro_batch_size)
    return sequence_kl(policy, reference, rollout.mask.to(policy.device))
