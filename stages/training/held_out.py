"""Loss on held-out demonstrations."""

from __future__ import annotations

import math

from torch import Tensor

from stages.files.rows import Demonstration, Prompt
from stages.models.forward import read_targets
from stages.models.roles import Roles
from stages.models.tokens import TokenRow
from stages.training.passes import collect


def count_targets(rows: list[TokenRow]) -> int:
    """Tokens that are learned, over rows."""
    return sum(int(row.targets.sum()) for row in rows)


def held_out_loss(roles: Roles, role: str, rows: list[TokenRow], micro_batch_size: int | str) -> dict[str, float]:
    """Mean loss per target token of rows under a role, and its exponential; empty without rows."""
    if not rows:
        return {}

    def forward(micro: list[int]) -> list[Tensor]:
        chosen = [rows[i] for i in micro]
        logprobs = read_targets(roles.base, [r.ids for r in chosen], [r.targets for r in chosen]).logprobs
        return [part.double().sum().cpu() for part in logprobs.split([int(r.targets.sum()) for r in chosen])]

    with roles.use(role):
        on_cuda = roles.base.device.type == "cuda"
        sums = collect([len(r.ids) for r in rows], micro_batch_size, forward, on_cuda=on_cuda)
    loss = -float(sum(sums)) / count_targets(rows)
    return {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700.0))}


def prompt_of(row: Demonstration) -> Prompt | None:
    """The prompt of a demonstration, to see what the policy answers; None where there is none."""
    if row.messages and not row.completion:
        last = max(i for i, message in enumerate(row.messages) if message["role"] == "assistant")
        return Prompt(row.where, row.messages[:last]) if last else None
    return Prompt(row.where, row.prompt, messages=row.messages[:-1]) if row.prompt else None
