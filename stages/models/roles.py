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
from stages.checkpoint.tensors import load_tensors, save_tensors
from stages.errors import CheckpointError, ConfigError
from stages.models.adapter_config import read_adapter_shape
from stages.models.adapter_files import ADAPTER, ADAPTER_CONFIG
from stages.models.base import Base
from stages.models.candidates import Candidate
from stages.models.heads import ScalarHead, head_from
from stages.models.lora import Adapter, adapter_from, config_to_save, initial_adapter, leaf_of, targeted
from stages.models.model_ref import ModelRef, lora_type_of
from stages.models.passes import Row

HEAD = "head.safetensors"
SCORE_KEY = "base_model.model.score.weight"  # where PEFT looks for a sequence classifier's head
DEFAULT_RANK, DEFAULT_ALPHA = 32, 32.0


class Roles:
    """Named adapters and heads on one base; `with roles.use("policy"):` makes one active.

    A role without an adapter is the base alone. Forward and backward of a role stay inside its block, since
    gradient checkpointing runs the forward pass again during backward.
    """

    def __init__(self, base: Base):
        self.base = base
        self.adapters: dict[str, Adapter | None] = {}
        self.heads: dict[str, ScalarHead] = {}

    def add(self, role: str, adapter: Adapter | None, head: ScalarHead | None = None) -> None:
        """Store an adapter (None: the base alone), and a head if there is one, under a role's name."""
        self.remove(role)
        self.adapters[role] = adapter
        if adapter is not None:
            self.base.lora.add(role, adapter)
            if adapter.config.use_dora and not self.base.has_dora:
                self.base.prepare_for_dora()
        if head is not None:
            self.heads[role] = head

    def remove(self, role: str) -> None:
        """Remove a role's adapter and head, if it has any."""
        self.base.lora.remove(role)
        self.adapters.pop(role, None)
        self.heads.pop(role, None)

    @contextmanager
    def use(self, role: str) -> Iterator[None]:
        """Make `role` active within the block."""
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

        `sizes` are the rows' tokens, by default their attribute `size`.
        """
        with self.use(role):
            return self.base.passes.accumulate(rows, sizes or _sizes_of(rows), forward)

    def collect(
        self,
        role: str,
        rows: Sequence[Row],
        forward: Callable[[list[Row]], list[Tensor]],
        sizes: list[int] | None = None,
    ) -> list[Tensor]:
        """One tensor per row, in order, computed under a role pass by pass, without gradient."""
        with self.use(role):
            return self.base.passes.collect(rows, sizes or _sizes_of(rows), forward)

    def alike(self, a: str, b: str) -> bool:
        """True if two roles compute the same: equal adapters, or ones that change nothing."""
        both = self.adapters[a], self.adapters[b]
        if all(adapter is None or adapter.is_zero for adapter in both):
            return True
        if None in both:
            return False
        first, second = (adapter.weights for adapter in both)
        return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)

    def parameters(self, role: str) -> list[nn.Parameter]:
        """The weights of a role's adapter and head."""
        adapter, head = self.adapters[role], self.heads.get(role)
        return [*(adapter.parameters() if adapter else ()), *(head.parameters() if head else ())]

    def zero_gradients(self) -> None:
        """Set all gradients to zero."""
        parts = [*(adapter for adapter in self.adapters.values() if adapter is not None), *self.heads.values()]
        for parameter in (p for part in parts for p in part.parameters()):
            if parameter.grad is not None:
                parameter.grad.zero_()


def _sizes_of(rows: Sequence[Row]) -> list[int]:
    return [row.size for row in rows]  # type: ignore[attr-defined]


def new_adapter(
    base: Base, rank: int | None, alpha: float | None, targets: list[str], seed: int, lora_type: str = "lora"
) -> Adapter:
    """A trainable adapter that changes nothing yet; None means the default rank or alpha."""
    return initial_adapter(base.layers, rank or DEFAULT_RANK, alpha or DEFAULT_ALPHA, targets, seed, lora_type)


def adapter_of(base: Base, ref: ModelRef, *, trainable: bool, folder: Path | None = None) -> Adapter | None:
    """The adapter stored in a checkpoint or in `folder`, None for a plain base."""
    folder = folder or ref.folder
    if folder is None:
        return None
    shape, tensors = read_adapter_shape(folder), load_tensors(folder / ADAPTER)
    about = {"where": str(folder / ADAPTER), "trainable": trainable, "factors": shape.factors}
    return adapter_from(base.layers, tensors, shape.rank, shape.alpha, shape.lora_type, **about)


def head_of(base: Base, folder: Path) -> ScalarHead:
    """The scalar head stored in a reward checkpoint or in a PPO checkpoint's critic."""
    path = folder / HEAD
    if not path.exists():
        raise CheckpointError(f"{HEAD} is missing", where=str(folder), fix="give a reward checkpoint")
    return head_from(load_tensors(path), base.width, base.device, where=str(path))


def start_adapter(base: Base, ref: ModelRef, config: Any, seed: int) -> Adapter:
    """The adapter at the start of training: the checkpoint's, grown if the knobs have a larger rank, or a fresh one.

    `config` has the knobs lora_rank, lora_alpha, lora_targets and lora_type. Raises ConfigError if they have other
    layers than the checkpoint's adapter. (`stages.inputs` has checked that its rank is not larger than the knob's.)
    """
    stored = adapter_of(base, ref, trainable=True)
    rank, alpha, targets = config.lora_rank, config.lora_alpha, config.lora_targets
    if stored is None:
        return new_adapter(base, rank, alpha, targets, seed, lora_type_of(config, ref))
    if targets and set(targeted(base.layers, targets)) != set(stored.paths):
        raise ConfigError(
            f"{ref.name} adapts other layers: {', '.join(sorted({leaf_of(path) for path in stored.paths}))}",
            where="lora_targets",
            fix="leave lora_targets out to train the same layers, or start from the base",
        )
    shape = rank or stored.config.r, alpha or stored.config.lora_alpha
    return stored if shape == (stored.config.r, stored.config.lora_alpha) else stored.grown(*shape, seed)


def save_adapter(folder: Path, base: Base, adapter: Adapter, head: ScalarHead | None = None) -> list[str]:
    """Write an adapter as PEFT's files, and a head, if any, as head.safetensors; returns the file names."""
    make_folder(folder)
    tensors = adapter.tensors()
    if head is not None:
        tensors[SCORE_KEY] = head.weight.detach()[None]
    save_tensors(folder / ADAPTER, tensors)
    task = "SEQ_CLS" if head is not None else "CAUSAL_LM"
    write_json(folder / ADAPTER_CONFIG, config_to_save(adapter.config, base.ref.loadable_name, task))
    if head is None:
        return [ADAPTER, ADAPTER_CONFIG]
    save_tensors(folder / HEAD, head.tensors())
    return [ADAPTER, ADAPTER_CONFIG, HEAD]


def candidate_adapter(base: Base, candidate: Candidate) -> Adapter | None:
    """The adapter of a checkpoint or of a resume state; None for a plain base.

    Raises CheckpointError if the state's weights do not fit its run's knobs, or are not finite.
    """
    ref = candidate.ref
    if candidate.state is None:
        return adapter_of(base, ref, trainable=False)
    if not candidate.is_unfinished:
        adapter = adapter_of(base, ref, trainable=True)
    else:
        knobs = {name: candidate.knobs.get(name) for name in ("lora_rank", "lora_alpha", "lora_targets", "lora_type")}
        adapter = start_adapter(base, ref, SimpleNamespace(**knobs), seed=0)
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
