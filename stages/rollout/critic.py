"""The critic of PPO: what it starts from, and whose states it reads."""

from __future__ import annotations

from pathlib import Path

from stages.config import PpoConfig
from stages.models.heads import ScalarHead
from stages.models.roles import adapter_of, head_of
from stages.training.session import Session


def head_on_policy(config: PpoConfig) -> str | None:
    """The critic's head if it reads the policy's own states."""
    return "critic" if config.advantage == "gae" and config.critic == "shared" else None


def open_critic(session: Session) -> None:
    """Add the critic: that of the PPO run that goes on, else a copy of the reward model, else of the policy."""
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
    roles.add(
        "critic", adapter_of(base, model, trainable=True, folder=folder), head_of(base, folder).copy(trainable=True)
    )


def earlier_critic(session: Session) -> Path | None:
    """The critic of the PPO checkpoint that training goes on from, where it judged by the same rewards."""
    config, manifest = session.config, session.model.manifest
    if manifest is None or manifest.stage != "ppo" or manifest.config.get("critic") != config.critic:
        return None
    judged_by = {digest for name, digest in manifest.inputs.items() if name.startswith("reward ")}
    return manifest.folder / "critic" if judged_by == {spec.digest for spec in session.inputs.rewards} else None
