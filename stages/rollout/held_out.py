"""How PPO's policy does on held-out prompts."""

from __future__ import annotations

from stages.models.tokens import PromptRow
from stages.rollout.experience import rollout_kl, sample_rollout
from stages.rollout.generate import Sampling
from stages.rollout.reward_sources import RewardSources
from stages.training.session import Session

HELD_OUT = ("score", "kl", "length", "eos_rate")  # what is measured of every response


def respond_to_held_out(
    session: Session, rewards: RewardSources, sampling: Sampling, prompts: list[PromptRow]
) -> tuple[dict[str, list[float]], list[dict]]:
    """Named columns with a number for each response to this rank's prompts, and the responses."""
    config = session.config
    mine = session.ranks.share(list(range(len(prompts))))
    if not mine:
        return {name: [] for name in HELD_OUT}, []
    keys = [(config.seed, "ppo", "held-out", i) for i in mine]
    rollout = sample_rollout(session.roles, "policy", session.text, [prompts[i] for i in mine], keys, sampling)
    kl = rollout_kl(session.roles, rollout, config.temperature).tolist()
    score = rewards.score(rollout.prompts, rollout.responses, rollout.texts, rollout.ended).tolist()
    lengths = [float(n) for n in rollout.lengths]
    columns = {"score": score, "kl": kl, "length": lengths, "eos_rate": rollout.ended.double().tolist()}
    samples = [
        {"prompt": p.text, "response": t, "score": s, "where": p.where}
        for p, t, s in zip(rollout.prompts, rollout.texts, score, strict=True)
    ]
    return columns, samples
