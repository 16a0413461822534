"""The roles of RLHF as adapters and heads on one frozen base."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from stages.checkpoint.atomic import make_folder, write_json
from stages.checkpoint.states import read_state
from stages.checkpoint.tensors import load_tensors, read_header, save_tensors
from stages.errors import CheckpointError, ConfigError
from stages.models.base import Base
from stages.models.candidates import Candidate
from stages.models.heads import ScalarHead, head_from
from stages.models.lora import Adapter, adapter_from, config_to_save, initial_adapter, targeted
from stages.models.model_ref import ADAPTER_CONFIG, ModelRef, lora_type_of, read_adapter_shape
from stages.models.passes import Row

ADAPTER, HEAD = "adapter_model.safetensors", "head.safetensors"
SCORE_KEY = "base_model.model.score.weight"  # where PEFT looks for a sequence classifier's head
DEFAULT_RANK, DEFAULT_ALPHA = 32, 32.0


class Roles:
    """Named adapters and heads on one base; `with roles.use("policy"):` makes one the active one.

    A role without an adapter is the base alone. Forward and backward of a role stay inside its block, since
    gradient checkpointing runs the forward pass again during backward.
    """

    def __init__(self, base: Base):
        self.base = base
        self.adapters: dict[str, Adapter | None] = {}
        self.heads: dict[str, ScalarHead] = {}

    def add(self, role: str, adapter: Adapter | None, head: ScalarHead | None = None) -> None:
        """Put an adapter (None: the base alone) and perhaps a head under a role's name."""
        self.remove(role)
        self.adapters[role] = adapter
        if adapter is not None:
            self.base.lora.add(role, adapter)
            if adapter.config.use_dora and not self.base.has_dora:
                self.base.prepare_for_dora()
        if head is not None:
            self.heads[role] = head

    def remove(self, role: str) -> None:
        self.base.lora.remove(role)
        self.adapters.pop(role, None)
        self.heads.pop(role, None)

    @contextmanager
    def use(self, role: str) -> Iterator[None]:
        """Make `role` the active one within the block."""
        assert role in self.adapters, f"no role {role}"
        with self.base.lora.using(role):
            yield

    def accumulate(
        self,
        role: str,
        rows: Sequence[Row],
        forward: Callable[[list[Row]], tuple[Tensor, dict[str, float]]],
        sizes: list[int] | None = None,
    ) -> dict[str, float]:
        """Add the gradient of a batch under a role, pass by pass; returns named values (see `Passes.accumulate`).

        `sizes` are the rows' tokens, their own `size` by default.
        """
        with self.use(role):
            return self.base.passes.accumulate(rows, _sizes_of(rows) if sizes is None else sizes, forward)

    def collect(
        self,
        role: str,
        rows: Sequence[Row],
        forward: Callable[[list[Row]], list[Tensor]],
        sizes: list[int] | None = None,
    ) -> list[Tensor]:
        """One tensor per row, in order, computed under a role pass by pass, without gradient."""
        with self.use(role):
            return self.base.passes.collect(rows, _sizes_of(rows) if sizes is None else sizes, forward)

    def alike(self, a: str, b: str) -> bool:
        """True where two roles compute the same: equal adapters, or ones that change nothing."""
        both = self.adapters[a], self.adapters[b]
        if all(adapter is None or adapter.is_zero for adapter in both):
            return True
        if None in both:
            return False
        first, second = (adapter.tensors() for adapter in both)
        return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)

    def parameters(self, role: str) -> list[nn.Parameter]:
        """What a role trains: its adapter's weights and its head's."""
        adapter, head = self.adapters[role], self.heads.get(role)
        return [*(adapter.parameters() if adapter else ()), *(head.parameters() if head else ())]

    def zero_gradients(self) -> None:
        """Set the gradients of everything trained to zero."""
        heads = [p for head in self.heads.values() for p in head.parameters()]
        for parameter in [*heads, *(p for role in self.adapters for p in self.parameters(role))]:
            if parameter.grad is not None:
                parameter.grad.zero_()


def _sizes_of(rows: Sequence[Row]) -> list[int]:
    return [row.size for row in rows]  # type: ignore[attr-defined]


def new_adapter(
    base: Base, rank: int | None, alpha: float | None, targets: list[str], seed: int, lora_type: str = "lora"
) -> Adapter:
    """A trainable adapter that changes nothing yet; None takes the defaults."""
    return initial_adapter(base.layers, rank or DEFAULT_RANK, alpha or DEFAULT_ALPHA, targets, seed, lora_type)


def adapter_of(base: Base, source: ModelRef, *, trainable: bool, folder: Path | None = None) -> Adapter | None:
    """The adapter stored in a checkpoint, None for a plain base."""
    where = folder or source.folder
    if where is None:
        return None
    shape, tensors = read_adapter_shape(where), load_tensors(where / ADAPTER)
    return adapter_from(base.layers, tensors, *shape, where=str(where / ADAPTER), trainable=trainable)


def head_of(base: Base, folder: Path) -> ScalarHead:
    """The scalar head stored in a reward checkpoint or in a PPO checkpoint's critic."""
    path = folder / HEAD
    if not path.exists():
        raise CheckpointError("head.safetensors is missing", where=str(folder), fix="give a reward checkpoint")
    header, _ = read_header(path)
    if header.get("weight", {}).get("shape") != [base.width]:  # before so many numbers are read
        raise CheckpointError(
            "the scalar head does not fit the base", where=str(path), fix="train the reward model again"
        )
    return head_from(load_tensors(path), base.width, base.device, where=str(path))


def start_adapter(base: Base, source: ModelRef, config: Any, seed: int) -> Adapter:
    """What training starts from: the checkpoint's adapter (grown where a larger rank is asked for), or a fresh one.

    `config` has the knobs lora_rank, lora_alpha, lora_targets and lora_type. Raises ConfigError where other layers are
    asked for than the checkpoint's adapter has, or a smaller rank.
    """
    stored = adapter_of(base, source, trainable=True)
    rank, alpha, targets = config.lora_rank, config.lora_alpha, config.lora_targets
    if stored is None:
        return new_adapter(base, rank, alpha, targets, seed, lora_type_of(config, source))
    if targets and set(targeted(base.layers, targets)) != set(stored.paths):
        raise ConfigError(
            f"{source.name} adapts other layers: {', '.join(sorted({p.rsplit('.', 1)[-1] for p in stored.paths}))}",
            where="lora_targets",
            fix="leave lora_targets out to go on with them, or start from the base",
        )
    shape = rank or stored.config.r, alpha or stored.config.lora_alpha
    return stored if shape == (stored.config.r, stored.config.lora_alpha) else stored.grown(*shape, seed)


def save_adapter(folder: Path, base: Base, adapter: Adapter, head: ScalarHead | None = None) -> list[str]:
    """Write an adapter, and a head where there is one, as PEFT's files and head.safetensors; returns the file names."""
    make_folder(folder)
    tensors = adapter.tensors()
    if head is not None:
        tensors[SCORE_KEY] = head.weight.detach()[None]
    save_tensors(folder / ADAPTER, tensors)
    task = "SEQ_CLS" if head is not None else "CAUSAL_LM"
    write_json(folder / ADAPTER_CONFIG, config_to_save(adapter.config, base.source.base_name, task))
    if head is None:
        return [ADAPTER, ADAPTER_CONFIG]
    save_tensors(folder / HEAD, head.tensors())
    return [ADAPTER, ADAPTER_CONFIG, HEAD]


def candidate_adapter(base: Base, candidate: Candidate) -> Adapter | None:
    """The adapter of a checkpoint, or the one that a resume state holds; None for a plain base.

    Raises CheckpointError where the state's weights are not as many as its run's knobs say.
    """
    source = candidate.source
    if candidate.state is None:
        return adapter_of(base, source, trainable=False)
    if not candidate.is_unfinished:
        adapter = adapter_of(base, source, trainable=True)
    else:
        knobs = {name: candidate.knobs.get(name) for name in ("lora_rank", "lora_alpha", "lora_targets", "lora_type")}
        adapter = start_adapter(base, source, SimpleNamespace(**knobs), seed=0)
    flat = read_state(candidate.state).tensors.get("policy.weights")
    if flat is None or flat.numel() != adapter.size:
        raise CheckpointError(
            "the state holds no policy of this run's shape", where=str(candidate.state), fix="give another state"
        )
    if not torch.isfinite(flat).all():
        raise CheckpointError(
            "the state's weights are not finite numbers", where=str(candidate.state), fix="give an earlier state"
        )
    # The optimiser laid the weights end to end in the order of the adapter's own parameters.
    parts = flat.split([p.numel() for p in adapter.parameters()])
    for parameter, weights in zip(adapter.parameters(), parts, strict=True):
        parameter.data.copy_(weights.view_as(parameter))
        parameter.requires_grad_(False)
    return adapter


def frozen_copy(adapter: Adapter | None) -> Adapter | None:
    """A copy that is not trained; None stays None (the base alone)."""
    return adapter.copy(trainable=False) if adapter is not None else None
