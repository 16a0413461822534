"""Scores of the policy's responses before PPO.

Equal scores give no learning signal; scores far from those of the demonstrations are extrapolation.
"""

from __future__ import annotations

from itertools import islice

from stages.data.rows import Prompt
from stages.models.roles import Roles
from stages.models.tokens import Text
from stages.rollout.experience import sample_rollout
from stages.rollout.generate import Sampling
from stages.rollout.reward_sources import model_scores
from stages.rollout.samples import prompts_up_to

TOKENS = 64
RESPONSES = 2  # to each prompt


def score_policy_responses(roles: Roles, text: Text, prompts: list[Prompt], limit: int, seed: int) -> dict[str, float]:
    """Scores under the role "reward" of RESPONSES responses by the role "policy" to each of the first `limit` prompts
    that fit, at temperature 1.

    Mean, standard deviation over all, and among responses to one prompt (root mean square over prompts); empty if no
    prompt leaves room for a response.
    """
    room = min(TOKENS, roles.base.context // 2)
    rows = list(islice(prompts_up_to(text, prompts, roles.base.context - room), limit))
    if not rows:
        return {}
    keys = [(seed, "reward", "spread", i, k) for i in range(len(rows)) for k in range(RESPONSES)]
    repeated_rows = [row for row in rows for _ in range(RESPONSES)]
    rollout = sample_rollout(roles, "policy", text, repeated_rows, keys, Sampling(1.0, room))
    scores = model_scores(roles, "reward", repeated_rows, rollout.responses, rollout.ended).double()
    within = scores.view(len(rows), RESPONSES).var(dim=1, unbiased=False).mean().sqrt()
    return {
        "prompts": len(rows),
        "count": len(scores),
        "mean": float(scores.mean()),
        "std": float(scores.std(unbiased=False)),
        "within_std": float(within),
        "eos_rate": float(rollout.ended.double().mean()),
    }
