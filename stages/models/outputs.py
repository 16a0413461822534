"""Outputs of forward passes: log-probabilities, entropies and scores, computed only for the tokens that need them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stages.maths.tensors import at_least_fp32, token_logprobs
from stages.models.base import Base
from stages.models.roles import Roles
from stages.native.limits import LOGITS_AT_ONCE


@dataclass(frozen=True)
class TargetOutputs:
    """Outputs of one forward pass for the target tokens of a micro-batch, laid end to end."""

    logprobs: Tensor  # (M,) fp32
    entropy: Tensor  # (M,) fp32; zeros unless asked for
    hidden: Tensor  # (M, H) states from which the targets were predicted


def predictors(targets: list[Tensor]) -> Tensor:
    """Positions, in the flattened row, of the states that predict the target tokens: one before each."""
    return torch.cat(targets).nonzero().squeeze(-1) - 1


def read_targets(
    base: Base, sequences: list[Tensor], targets: list[Tensor], *, temperature: float = 1.0, want_entropy: bool = False
) -> TargetOutputs:
    """Log-probabilities of the target tokens under the active role.

    sequences: (L_i,) int64; targets: (L_i,) bool, never True at 0. Log-softmax in fp32 of logits / temperature.
    """
    before = predictors(targets)
    hidden = base.hidden(sequences, before)
    tokens = torch.cat(sequences)[before + 1].to(base.device)
    logprobs, entropy = TargetLogprobs.apply(hidden, base, tokens, temperature, want_entropy)
    return TargetOutputs(logprobs, entropy, hidden)


class TargetLogprobs(torch.autograd.Function):
    """Log-probabilities of tokens (M,) from states (M, H), and entropies (M,), zeros unless asked for.

    Each row's two numbers depend on its state alone, so the forward pass computes their gradients too, chunk by chunk,
    while the logits exist: nothing of the size of the vocabulary is stored or computed twice.
    """

    @staticmethod
    def forward(
        ctx, hidden: Tensor, base: Base, tokens: Tensor, temperature: float, want_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        rows = max(1, LOGITS_AT_ONCE // base.vocabulary)
        grads = [torch.empty_like(hidden) for _ in range(1 + want_entropy)] if ctx.needs_input_grad[0] else []
        logprobs = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        entropy = torch.zeros_like(logprobs)
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            states = hidden[part].detach().requires_grad_(bool(grads))
            with torch.set_grad_enabled(bool(grads)):
                raw = base.logits(states)
            logprobs[part], entropy[part], *by_logits = compute_logprobs_and_grads(
                raw.detach(), tokens[part], temperature, want_entropy, with_grads=bool(grads)
            )
            for grad, by in zip(grads, by_logits, strict=True):
                (grad[part],) = torch.autograd.grad(raw, states, by.to(raw.dtype), retain_graph=by is not by_logits[-1])
        ctx.save_for_backward(*grads)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, *grads: Tensor):
        terms = [
            grad[:, None].to(by_state.dtype) * by_state
            for grad, by_state in zip(grads, ctx.saved_tensors, strict=False)
        ]
        return sum(terms[1:], terms[0]), None, None, None, None


def compute_logprobs_and_grads(
    raw: Tensor, tokens: Tensor, temperature: float, want_entropy: bool, *, with_grads: bool
) -> tuple[Tensor, ...]:
    """Log-probabilities and entropies (M,) of logits (M, V), then the gradient (M, V) of each `with_grads`.

    For p = softmax(z / t): d log p_y / dz = (1[y] - p) / t and dH / dz = -p (log p + H) / t.
    """
    divisor = 1.0 if temperature == 1.0 else temperature + 1e-7
    logits = at_least_fp32(raw) if divisor == 1.0 else at_least_fp32(raw) / divisor
    if not (want_entropy or with_grads):
        plain = token_logprobs(logits, tokens)
        return plain, torch.zeros_like(plain)
    total = logits.logsumexp(-1, keepdim=True)
    logprob = logits.gather(-1, tokens[:, None]) - total
    log_p = (logits - total).clamp_(min=torch.finfo(logits.dtype).min)  # an impossible token's p log p is 0
    p = log_p.exp()
    entropy = -(p * log_p).sum(-1, keepdim=True) if want_entropy else torch.zeros_like(logprob)
    if not with_grads:
        return logprob[:, 0], entropy[:, 0]
    by_entropy = [log_p.add_(entropy).mul_(p).div_(-divisor)] if want_entropy else []
    by_logprob = p.neg_().scatter_add_(-1, tokens[:, None], torch.ones_like(logprob)).div_(divisor)
    return (logprob[:, 0], entropy[:, 0], by_logprob, *by_entropy)


def sequence_scores(roles: Roles, role: str, sequences: list[Tensor]) -> Tensor:
    """Scores (B,) fp32: the role's head on the hidden state of each sequence's last token, under the active role."""
    ends = torch.tensor([len(s) for s in sequences]).cumsum(0) - 1
    return roles.heads[role](roles.base.hidden(sequences, ends))


def pad(flat: Tensor, lengths: list[int]) -> Tensor:
    """Lay flat per-token numbers (sum L_i,) out as rows (B, max L), zeros on the right; differentiable."""
    return torch.nn.utils.rnn.pad_sequence(list(flat.split(lengths)), batch_first=True)
