"""Writes a stage's checkpoint: its files, which are read back and compared, and the manifest last."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stages.checkpoint import atomic
from stages.checkpoint.manifest import Manifest, Parent, versions
from stages.checkpoint.run import read_metrics, write_config
from stages.checkpoint.tensors import save_tensors
from stages.knobs import as_dict
from stages.models.base import Base
from stages.models.heads import ScalarHead
from stages.models.lora import Adapter
from stages.models.model_ref import ModelRef
from stages.models.roles import HEAD, Roles, save_adapter
from stages.models.tokens import Text
from stages.training.devices import peak_memory_gb
from stages.training.progress import diverged
from stages.training.reload import check_reload, check_tokenizer, probe_sequences

if TYPE_CHECKING:
    from stages.training.session import Session

LOGS = ("metrics.jsonl", "samples.jsonl")


def publish_checkpoint(
    session: Session,
    role: str,
    metrics: dict[str, Any],
    *,
    rewards: Sequence[ModelRef] = (),
    extra_files: tuple[str, ...] = (),
) -> None:
    """Write the checkpoint of `role`, and of the critic if there is one; load it, compare it, write its manifest.

    Raises TrainingStopped if the trained model computes states that are not finite.
    """
    roles, base, run, text = session.roles, session.base, session.run, session.text
    lines = read_metrics(run)
    _stop_if_states_overflow(roles, role, step=len(lines) - 1)
    adapter, head = roles.adapters[role], roles.heads.get(role)
    files = save_adapter(run.folder, base, adapter, head)
    check_reload(base, run.folder, adapter, head)
    if "critic" in roles.heads:
        critic = roles.adapters.get("critic")  # None: a shared critic is only a head on the policy's adapter
        files += _save_critic(run.folder / "critic", base, critic, roles.heads["critic"])
        trunk = None if critic else run.folder
        check_reload(base, run.folder / "critic", critic or adapter, roles.heads["critic"], trunk=trunk)
    files += save_tokenizer(run.folder, text)
    check_tokenizer(run.folder, text, trust_remote_code=session.config.trust_remote_code)
    write_config(run, session.config)
    files += ["config.yaml", *extra_files, *(name for name in LOGS if (run.folder / name).exists())]
    parents = [("model", session.inputs.source), *(("reward", reward) for reward in rewards)]
    run.finish(_manifest(session, metrics, lines, parents), files)


def _manifest(
    session: Session, metrics: dict[str, Any], lines: list[dict[str, float]], parents: list[tuple[str, ModelRef]]
) -> Manifest:
    base, data = session.base, session.inputs.data
    train = {"source": data.source, "digest": data.digest, "rows": len(data.rows), **session.row_counts}
    train |= {"form": session.form} if session.form else {}
    steps = [line for line in lines if line["step"] > 0]
    seconds = sum(line.get("seconds", 0.0) for line in steps)
    rates = {w: sum(line.get(w, 0) for line in steps) / max(seconds, 1e-9) for w in ("tokens", "samples")}
    return Manifest(
        stage=session.stage,
        base=base.ref.base_ref,
        parents=tuple(
            Parent(role, str(ref.folder.resolve()), ref.manifest.stage, ref.digest)
            for role, ref in parents
            if ref.folder is not None
        ),
        tokenizer_digest=base.ref.tokenizer_digest,
        stop_token_ids=session.text.stop_ids,
        config=as_dict(session.config),
        datasets={"train": train},
        metrics=metrics,
        throughput={f"{what}_per_second": rate for what, rate in rates.items()}
        | {"memory_gb": peak_memory_gb(base.device)},
        versions=versions(),
        device=torch.cuda.get_device_name(base.device) if base.device.type == "cuda" else "cpu",
        dtype=str(base.dtype).removeprefix("torch."),
        steps=len(steps),
        seconds=seconds,
    )


@torch.no_grad()
def _stop_if_states_overflow(roles: Roles, role: str, step: int) -> None:
    with roles.use(role):
        states = roles.base.hidden(probe_sequences(roles.base))
    if not torch.isfinite(states).all():
        raise diverged("the trained model computes states that are not finite", step)


def _save_critic(folder: Path, base: Base, adapter: Adapter | None, head: ScalarHead) -> list[str]:
    """Save the critic; one without its own adapter has only a head. Returns the names of its files."""
    if adapter is not None:
        return [f"critic/{name}" for name in save_adapter(folder, base, adapter, head)]
    save_tensors(folder / HEAD, head.tensors())
    return [f"critic/{HEAD}"]


def save_tokenizer(folder: Path, text: Text) -> list[str]:
    """Save the tokenizer, every file atomically; returns their names."""
    with atomic.filling(folder) as temporary:
        text.tokenizer.save_pretrained(temporary)
        names = sorted(p.name for p in Path(temporary).iterdir() if p.is_file())
    return names
