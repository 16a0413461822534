"""The critic of PPO: its initial adapter and head, and the states that its head takes."""

from __future__ import annotations

import math
from pathlib import Path

from stages.config import PpoConfig
from stages.models.heads import ScalarHead
from stages.models.roles import adapter_of, head_of
from stages.training.session import Session

SETTLED = 0.05  # explained variance grew by less than this in an update: the critic's warm-up is over
MOST_WARMUP = 0.1  # of all updates


def head_on_policy(config: PpoConfig) -> str | None:
    """The critic's head if it takes the policy's states, else None."""
    return "critic" if config.advantage == "gae" and config.critic == "shared" else None


def open_critic(session: Session) -> None:
    """Add the critic: that of the PPO checkpoint to go on from, else a copy of the reward model, else of the policy."""
    config, roles, base, model = session.config, session.roles, session.base, session.model
    earlier = earlier_critic(session)
    if config.critic == "shared":
        head = ScalarHead(base.width).to(base.device) if earlier is None else head_of(base, earlier)
        roles.heads["critic"] = head.copy(trainable=True)
        return
    reward = next((spec.checkpoint for spec in session.inputs.rewards if spec.checkpoint), None)
    folder = earlier or (reward.folder if reward else None)
    if folder is None:
        roles.add("critic", roles.adapters["policy"].copy(trainable=True), ScalarHead(base.width).to(base.device))
        return
    adapter = adapter_of(base, model, trainable=True, folder=folder)
    roles.add("critic", adapter, head_of(base, folder).copy(trainable=True))


def earlier_critic(session: Session) -> Path | None:
    """The critic's folder in the PPO checkpoint that training starts from, if its reward sources were the same."""
    config, manifest = session.config, session.model.manifest
    if manifest is None or manifest.stage != "ppo" or manifest.config.get("critic") != config.critic:
        return None
    sources = {digest for name, digest in manifest.inputs.items() if name.startswith("reward ")}
    return manifest.folder / "critic" if sources == {spec.digest for spec in session.inputs.rewards} else None


def critic_is_ready(session: Session, step: int, explained_variance: float | None) -> bool:
    """Whether update `step` trains the policy: True once critic_warmup is over, and without a critic.

    With critic_warmup `auto` it is over once explained variance grows by less than SETTLED from one update to the
    next, or after MOST_WARMUP of the updates. A critic that starts from a reward model has only scored whole responses.
    Source for the warm-up: Yuan et al. 2025, "What's Behind PPO's Collapse in Long-CoT?" (VC-PPO).
    """
    config, facts = session.config, session.progress.facts
    if config.critic_warmup is not None or explained_variance is None:
        return explained_variance is None or step >= config.critic_warmup
    before = facts.get("explained_variance", -math.inf)
    settled = not explained_variance >= before + SETTLED  # also if it is nan, as without any variance
    ready = bool(facts.get("critic_ready")) or settled or step >= int(MOST_WARMUP * session.total)
    facts |= {"critic_ready": float(ready)} if ready else {"explained_variance": explained_variance}
    return ready
