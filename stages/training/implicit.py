"""Log-probabilities of whole responses, and a cache of them for a frozen role."""

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
    """Summed log-probabilities (N,) of each row's target tokens under a role, without gradient, on the CPU."""

    def forward(rows: list[TokenRow]) -> list[Tensor]:
        return list(logprob_sums(roles, rows, temperature).cpu())

    sums = roles.collect(role, rows, forward)
    return torch.stack(sums) if sums else torch.zeros(0)  # a rank may have no rows


def logprob_sums(roles: Roles, rows: list[TokenRow], temperature: float = 1.0) -> Tensor:
    """Summed log-probabilities (N,) of each row's target tokens under the active role, with gradient, in one pass."""
    sequences, targets = [r.ids for r in rows], [r.targets for r in rows]
    logprobs = read_targets(roles.base, sequences, targets, temperature=temperature).logprobs
    return torch.stack([part.sum() for part in logprobs.split([int(t.sum()) for t in targets])])


# --- the cache


def cached_logprobs(session: Session, name: str, role: str, parts: list[list[TokenRow]]) -> Tensor:
    """`summed_logprobs` of a frozen role, cached under `name` beside the run's resume state.

    Each part is computed separately, so that its numbers do not depend, to the bit, on the other parts. The file has a
    key of everything the numbers depend on: one with another key is not used, and a damaged one is made again, with a
    warning. Call this only after the run has started and locked its folder.
    """
    roles, run = session.roles, session.run
    rows = [row for part in parts for row in part]
    path = run.folder / STATE / f"{role}-{name}.safetensors"
    key = _key(roles, session.model.digest, rows)
    if path.exists():
        try:
            cached = _read_cache(path, key, len(rows))
        except CheckpointError as error:
            cached = None
            session.reporter.warn(f"{path} is damaged and is made again ({error.what})")
        if cached is not None:
            return cached
    sums = torch.cat([summed_logprobs(roles, role, part) for part in parts])
    if run.writer:
        save_tensors(path, {"sums": sums}, {"key": key, "sha256": _sha256(sums)})
    return sums


def _read_cache(path: Path, key: str, count: int) -> Tensor | None:
    """The numbers in a file; None if its key differs. Raises CheckpointError if it is damaged."""
    metadata = tensor_metadata(path)
    if metadata.get("key") != key:
        return None
    sums = load_tensors(path).get("sums")
    if sums is None or sums.shape != (count,) or _sha256(sums) != metadata.get("sha256"):
        raise CheckpointError("its numbers are not those that were saved", where=str(path))
    return sums


def _key(roles: Roles, model_digest: str, rows: list[TokenRow]) -> str:
    """A digest of what the numbers depend on: the model, its precision and device, and every token."""
    base = roles.base
    precision = f"{base.dtype}{' in 4 bits' if any(is_four_bit(layer) for layer in base.layers.values()) else ''}"
    key = hashlib.sha256(f"1 {model_digest} {precision} {base.device.type} {torch.__version__}".encode())
    for row in rows:
        key.update(f"{row.ids.tolist()} {row.targets.tolist()}".encode())
    return key.hexdigest()


def _sha256(numbers: Tensor) -> str:
    return hashlib.sha256(str(numbers.tolist()).encode()).hexdigest()
