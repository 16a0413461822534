"""PPO's policy on held-out prompts: scores, KL, lengths and responses."""

from __future__ import annotations

from stages.models.tokens import PromptRow
from stages.rollout.experience import rollout_kl, sample_rollout
from stages.rollout.generate import Sampling
from stages.rollout.reward_sources import RewardSources
from stages.training.session import Session

HELD_OUT = ("score", "kl", "length", "eos_rate")  # measures of every response


def respond_to_held_out(
    session: Session, rewards: RewardSources, sampling: Sampling, prompts: list[PromptRow]
) -> tuple[dict[str, list[float]], list[dict]]:
    """Columns HELD_OUT with a number for each response to this rank's prompts, and the rows of samples.jsonl."""
    config = session.config
    numbers = session.ranks.share(list(range(len(prompts))))
    if not numbers:
        return {name: [] for name in HELD_OUT}, []
    keys = [(config.seed, "ppo", "held-out", i) for i in numbers]
    rollout = sample_rollout(session.roles, "policy", session.text, [prompts[i] for i in numbers], keys, sampling)
    kl = rollout_kl(session.roles, rollout, config.temperature).tolist()
    score = rewards.score(rollout.prompts, rollout.responses, rollout.texts, rollout.ended).tolist()
    lengths = [float(n) for n in rollout.lengths]
    columns = {"score": score, "kl": kl, "length": lengths, "eos_rate": rollout.ended.double().tolist()}
    samples = [
        {"prompt": p.text, "response": t, "score": s, "where": p.where}
        for p, t, s in zip(rollout.prompts, rollout.texts, score, strict=True)
    ]
    return columns, samples
