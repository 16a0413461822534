"""How a reward model scores what the policy says before PPO: an even score teaches nothing, a far one is a guess."""

from __future__ import annotations

from stages.data.rows import Prompt
from stages.errors import DatasetError
from stages.models.roles import Roles
from stages.models.tokens import PromptRow, Text
from stages.rollout.experience import sample_rollout
from stages.rollout.generate import Sampling
from stages.rollout.reward_sources import model_scores

TOKENS = 64
RESPONSES = 2  # to each prompt


def score_policy_responses(roles: Roles, text: Text, prompts: list[Prompt], limit: int, seed: int) -> dict[str, float]:
    """Scores under the role "reward" of two answers each by the role "policy" to the first `limit` prompts that fit.

    At temperature 1. Mean, standard deviation over all, and within a prompt (root mean square over prompts); empty
    where no prompt leaves room for an answer.
    """
    room = min(TOKENS, roles.base.context // 2)
    rows: list[PromptRow] = []
    for prompt in prompts:
        if len(rows) == limit:
            break
        try:
            rows.append(text.prompt(prompt, roles.base.context - room))
        except DatasetError:  # too long to answer, though not too long to judge
            continue
    if not rows:
        return {}
    keys = [(seed, "reward", "spread", i, k) for i in range(len(rows)) for k in range(RESPONSES)]
    asked = [row for row in rows for _ in range(RESPONSES)]
    rollout = sample_rollout(roles, "policy", text, asked, keys, Sampling(1.0, room))
    scores = model_scores(roles, "reward", asked, rollout.responses, rollout.ended).double()
    within = scores.view(len(rows), RESPONSES).var(dim=1, unbiased=False).mean().sqrt()
    return {
        "prompts": len(rows),
        "count": len(scores),
        "mean": float(scores.mean()),
        "std": float(scores.std(unbiased=False)),
        "within_std": float(within),
        "eos_rate": float(rollout.ended.double().mean()),
    }
