"""The best of several responses to each prompt, as demonstrations that `rlhf sft` trains on.

Rejection sampling: RAFT (Dong et al. 2023, "RAFT: Reward rAnked FineTuning for Generative Foundation Model Alignment")
and Llama 2 (Touvron et al. 2023, section 3.2.3).
"""

from __future__ import annotations

import torch
from torch import Tensor

from stages.models.tokens import PromptRow
from stages.rollout.reward_sources import RewardSources, Scores


def score_responses(
    rewards: RewardSources, prompts: list[PromptRow], responses: list[Tensor], texts: list[str], stops: set[int]
) -> Scores:
    """Scores of responses, of which each prompt has the same number, prompt by prompt."""
    each = len(responses) // len(prompts)
    repeated = [prompt for prompt in prompts for _ in range(each)]
    ended = torch.tensor([int(response[-1]) in stops for response in responses])
    return rewards.score_by_source(repeated, responses, texts, ended)


def choose_best(scores: Tensor, texts: list[str]) -> list[int | None]:
    """The number of each prompt's best response by `scores` (P, N), the first of equals; None if all are blank.

    A blank response is never chosen: there is nothing in it to learn.
    """
    blank = torch.tensor([not text.strip() for text in texts]).view_as(scores)
    best = scores.masked_fill(blank, -torch.inf).argmax(dim=1).tolist()
    return [None if all(nothing) else k for k, nothing in zip(best, blank.tolist(), strict=True)]
