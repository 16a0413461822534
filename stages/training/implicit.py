"""Log-probabilities of whole responses, and the reward that a policy trained by preferences or PPO implies."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from stages.checkpoint.states import STATE
from stages.checkpoint.tensors import load_tensors, save_tensors, tensor_metadata
from stages.errors import CheckpointError
from stages.models.outputs import read_targets
from stages.models.quantised import is_four_bit
from stages.models.roles import Roles
from stages.models.tokens import TokenRow
from stages.training.comparing import TokenComparison
from stages.training.session import Session


def flatten(comparisons: list[TokenComparison]) -> list[TokenRow]:
    """Every response of every comparison, in order."""
    return [row for comparison in comparisons for row in comparison.responses]


def summed_logprobs(roles: Roles, role: str, rows: list[TokenRow], temperature: float = 1.0) -> Tensor:
    """Log-probability (N,) of each row's target tokens together under a role, without gradient, on the CPU."""

    def forward(rows: list[TokenRow]) -> list[Tensor]:
        return list(logprob_sums(roles, rows, temperature).cpu())

    sums = roles.collect(role, rows, forward)
    return torch.stack(sums) if sums else torch.zeros(0)  # a rank may have no rows


def logprob_sums(roles: Roles, rows: list[TokenRow], temperature: float = 1.0) -> Tensor:
    """The same for one forward pass under the active role, with gradient."""
    sequences, targets = [r.ids for r in rows], [r.targets for r in rows]
    logprobs = read_targets(roles.base, sequences, targets, temperature=temperature).logprobs
    return torch.stack([part.sum() for part in logprobs.split([int(t.sum()) for t in targets])])


# --- once per run ---------------------------------------------------------------------------------------------------


def cached_logprobs(session: Session, name: str, role: str, parts: list[list[TokenRow]]) -> Tensor:
    """`summed_logprobs` of a frozen role, kept beside the run's resume state under `name` for when it is resumed.

    Each part is computed by itself, so that its numbers do not depend, to the bit, on which others there are. The file
    names what the role computes with: one made from anything else is never used; a damaged one is made again, with a
    warning. Call it once the run has started: only then the folder is its own.
    """
    roles, run = session.roles, session.run
    rows = [row for part in parts for row in part]
    path = run.folder / STATE / f"{role}-{name}.safetensors"
    key = _key(roles, session.model.digest, rows)
    if path.exists():
        try:
            known = _read_cache(path, key, len(rows))
        except CheckpointError as error:
            session.reporter.warn(f"{path} is damaged and is made again ({error.what})")
        else:
            if known is not None:
                return known
    sums = torch.cat([summed_logprobs(roles, role, part) for part in parts])
    if run.writer:
        save_tensors(path, {"sums": sums}, {"key": key, "sha256": _sha256(sums)})
    return sums


def _read_cache(path: Path, key: str, count: int) -> Tensor | None:
    """The numbers in a file; None where they are of something else. Raises CheckpointError where it is damaged."""
    about = tensor_metadata(path)
    if about.get("key") != key:
        return None
    sums = load_tensors(path).get("sums")
    if sums is None or sums.shape != (count,) or _sha256(sums) != about.get("sha256"):
        raise CheckpointError("its numbers are not what was saved", where=str(path))
    return sums


def _key(roles: Roles, digest: str, rows: list[TokenRow]) -> str:
    """Identifies the numbers: the model, its precision and device, and every token that is asked about."""
    base = roles.base
    held = f"{base.dtype}{' in 4 bits' if any(is_four_bit(layer) for layer in base.layers.values()) else ''}"
    text = hashlib.sha256(f"1 {digest} {held} {base.device.type} {torch.__version__}".encode())
    for row in rows:
        text.update(f"{row.ids.tolist()} {row.targets.tolist()}".encode())
    return text.hexdigest()


def _sha256(numbers: Tensor) -> str:
    return hashlib.sha256(str(numbers.tolist()).encode()).hexdigest()
