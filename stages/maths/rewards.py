"""From a score per response to a reward per token."""

from __future__ import annotations

import torch
from torch import Tensor

from stages.maths.tensors import last_index


def charge_missing_eos(score: Tensor, ended: Tensor, penalty: float, how: str) -> Tensor:
    """Scores (B,) with `penalty` charged where a response did not end (`ended` (B,) is False); penalty 0 charges none.

    `how` is "subtract" (score - penalty), "replace" (-penalty, whatever the score) or "floor" (the lower of the two,
    because plain replacement would reward never ending wherever the score is below -penalty).
    Raises ValueError for another `how`.

    Source: "replace" with penalty 1 is Ziegler 2019 and Huang 2024; "subtract" is TRL's `missing_eos_penalty`.
    """
    if penalty == 0:
        return score
    if how == "floor":
        charged = (score - penalty).clamp(max=-penalty)
    elif how == "subtract":
        charged = score - penalty
    elif how == "replace":
        charged = torch.full_like(score, -penalty)
    else:
        raise ValueError(f"missing EOS cannot be charged by {how!r}")
    return torch.where(ended, score, charged)


def shape_rewards(score: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Rewards (B, T): -kl_coef * kl (B, T) on `mask`, plus score (B,) at the last masked token; 0 off-mask.

    Source: Ziegler 2019, "Fine-Tuning Language Models from Human Preferences", eq. 2.
    """
    positions = torch.arange(mask.shape[1], device=mask.device)
    at_last = positions == last_index(mask)[:, None]
    penalty = (-kl_coef * kl).masked_fill(~mask, 0)
    return penalty + torch.where(at_last, score[:, None], 0)
