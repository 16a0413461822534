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
    """A number for each response to this rank's prompts, and the rows of samples.jsonl.

    The numbers are in columns: HELD_OUT, and the score by each of several reward sources.
    """
    config = session.config
    numbers = session.ranks.share(list(range(len(prompts))))
    if not numbers:
        sources = rewards.names if len(rewards.names) > 1 else []
        return {name: [] for name in (*HELD_OUT, *(f"source_{source}" for source in sources))}, []
    keys = [(config.seed, "ppo", "held-out", i) for i in numbers]
    rollout = sample_rollout(session.roles, "policy", session.text, [prompts[i] for i in numbers], keys, sampling)
    kl = rollout_kl(session.roles, rollout, config.temperature).tolist()
    scores = rewards.score_by_source(rollout.prompts, rollout.responses, rollout.texts, rollout.ended)
    score = scores.total.tolist()
    lengths = [float(n) for n in rollout.lengths]
    columns = {"score": score, "kl": kl, "length": lengths, "eos_rate": rollout.ended.double().tolist()}
    columns |= {f"source_{name}": values.tolist() for name, values in scores.by_source.items()}
    samples = [
        {"prompt": p.text, "response": t, "score": s, "where": p.where} | ({"scores": parts} if parts else {})
        for p, t, s, parts in zip(rollout.prompts, rollout.texts, score, scores.parts, strict=True)
    ]
    return columns, samples
