"""The language-modelling loss on demonstrations: its gradient, and its value on held-out rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stages.maths.losses import token_nll
from stages.models.outputs import read_targets
from stages.models.roles import Roles
from stages.models.tokens import TokenRow
from stages.results import Reporter


def count_targets(rows: list[TokenRow]) -> int:
    """Number of target tokens in all rows."""
    return sum(int(row.targets.sum()) for row in rows)


def learn_rows(
    roles: Roles, role: str, rows: list[TokenRow], denominator: int, weight: float = 1.0
) -> dict[str, float]:
    """Add the gradient of weight x sum(token losses) / denominator under a role; returns the `loss`, unweighted.

    `denominator` is the number of targets of the whole step, over all micro-batches and ranks: a mean of means would
    weight short rows more.
    """

    def forward(rows: list[TokenRow]) -> tuple[Tensor, dict[str, float]]:
        logprobs = read_targets(roles.base, [r.ids for r in rows], [r.targets for r in rows]).logprobs
        loss = token_nll(logprobs, torch.ones_like(logprobs, dtype=torch.bool), denominator)
        return weight * loss, {"loss": loss.item()}

    return {"loss": 0.0} | roles.accumulate(role, rows, forward)


def held_out_loss(roles: Roles, role: str, rows: list[TokenRow]) -> dict[str, float]:
    """Mean loss per target token of rows under a role, and its exponential; empty without rows."""
    if not rows:
        return {}

    def forward(rows: list[TokenRow]) -> list[Tensor]:
        logprobs = read_targets(roles.base, [r.ids for r in rows], [r.targets for r in rows]).logprobs
        return [part.double().sum().cpu() for part in logprobs.split([int(r.targets.sum()) for r in rows])]

    loss = -float(sum(roles.collect(role, rows, forward))) / count_targets(rows)
    return {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700.0))}


def warn_above_uniform(loss: float, vocabulary: int, what: str, cause: str, reporter: Reporter) -> None:
    """Warn if a loss in nats per token is above that of a uniform guess; `cause` is the likely reason if known."""
    uniform = math.log(vocabulary)
    if not loss > uniform:
        return
    likely = cause or (
        "the base is untrained or damaged, its tokenizer belongs to another model, or it expects a beginning-of-text "
        "token that the rows do not have"
    )
    reporter.warn(
        f"{what} is {loss:.2f} nats per token, above ln({vocabulary}) = {uniform:.2f}, the loss of a uniform guess "
        f"over the vocabulary: this loss and its perplexity mean nothing. Likely cause: {likely}"
    )
