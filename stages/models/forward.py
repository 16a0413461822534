"""What stages read out of a forward pass: log-probabilities, values and scores, only where they are needed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from stages.maths.tensors import entropy, token_logprobs
from stages.models.base import Base
from stages.models.roles import Roles

LOGITS_AT_ONCE = 2**25  # elements of a logits chunk: 128 MiB in fp32


@dataclass(frozen=True)
class Reading:
    """What one forward pass said of the target tokens of a micro-batch, laid end to end."""

    logprobs: Tensor  # (M,) fp32
    entropy: Tensor  # (M,) fp32; zeros where it was not asked for
    hidden: Tensor  # (M, H) states from which the targets were predicted


def predictors(targets: list[Tensor]) -> Tensor:
    """Positions, in the flattened row, of the states that predict the target tokens: one before each."""
    return torch.cat(targets).nonzero().squeeze(-1) - 1


def read_targets(
    base: Base, sequences: list[Tensor], targets: list[Tensor], *, temperature: float = 1.0, want_entropy: bool = False
) -> Reading:
    """Log-probabilities of the target tokens under the active role.

    sequences: (L_i,) int64; targets: (L_i,) bool, never True at 0. Log-softmax in fp32 of logits / temperature.
    """
    before = predictors(targets).to(base.device)
    hidden = base.hidden(sequences)[before]
    tokens = torch.cat(sequences).to(base.device)[before + 1]
    logprobs, spread = _logprobs(base, hidden, tokens, temperature, want_entropy)
    return Reading(logprobs, spread, hidden)


def _logprobs(
    base: Base, hidden: Tensor, tokens: Tensor, temperature: float, want_entropy: bool
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies (M,), in chunks whose logits are thrown away and made again for backward."""
    rows = max(1, LOGITS_AT_ONCE // base.vocabulary)
    if len(hidden) <= rows:
        return _chunk(base, hidden, tokens, temperature, want_entropy)
    parts = [
        checkpoint(_chunk, base, h, t, temperature, want_entropy, use_reentrant=False)
        for h, t in zip(hidden.split(rows), tokens.split(rows), strict=True)
    ]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def _chunk(base: Base, hidden: Tensor, tokens: Tensor, temperature: float, want_entropy: bool) -> tuple[Tensor, Tensor]:
    logits = base.logits(hidden).float()
    if temperature != 1.0:
        logits = logits / (temperature + 1e-7)
    spread = entropy(logits) if want_entropy else logits.new_zeros(len(logits))
    return token_logprobs(logits, tokens), spread


def sequence_scores(roles: Roles, role: str, sequences: list[Tensor]) -> Tensor:
    """Scores (B,) fp32: the role's head on the hidden state of each sequence's last token, under the active role."""
    ends = torch.tensor([len(s) for s in sequences]).cumsum(0) - 1
    return roles.heads[role](roles.base.hidden(sequences)[ends.to(roles.base.device)])


def pad(flat: Tensor, lengths: list[int]) -> Tensor:
    """Lay flat per-token numbers (sum L_i,) out as rows (B, max L), zeros on the right; differentiable."""
    return torch.nn.utils.rnn.pad_sequence(list(flat.split(lengths)), batch_first=True)
