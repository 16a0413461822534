"""The critic of PPO: its initial adapter and head, and the states that its head takes."""

from __future__ import annotations

from pathlib import Path

from stages.config import PpoConfig
from stages.models.heads import ScalarHead
from stages.models.roles import adapter_of, head_of
from stages.training.session import Session


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
