"""LoRA adapters: many low-rank deltas on one frozen linear layer, one of them active at a time (Hu et al. 2021).

The file format is PEFT's; the layer is our own because here four roles share one base: switching a role is one
attribute, never a walk over the modules, and it never touches `requires_grad`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from stages.errors import CheckpointError, ConfigError, ModelError
from stages.models.fused import Linear
from stages.models.quantised import is_four_bit

PEFT_PREFIX = "base_model.model."


class Switch:
    """Names the role whose adapter is active; None is the base alone. Shared by every layer of one base."""

    def __init__(self) -> None:
        self.active: str | None = None


class LoraLinear(nn.Module):
    """A frozen linear layer plus the delta of the active role: y = base(x) + scale * B A x."""

    def __init__(self, base: nn.Module, switch: Switch):
        super().__init__()
        self.base = base
        self.switch = switch
        self.deltas: dict[str, Delta] = {}  # not registered: adapters are owned by their roles, not by the base

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def now(self) -> Linear:
        """The layer under the active role, as the native forward pass takes it."""
        delta = self._delta()
        if delta is None:
            return Linear(self.base.weight, self.base.bias, None, None)
        return Linear(self.base.weight, self.base.bias, delta.a, delta.b, delta.scale)

    def _delta(self) -> Delta | None:
        return self.deltas.get(self.switch.active) if self.switch.active is not None else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.base(x)
        delta = self._delta()
        if delta is None:
            return out
        down = nn.functional.linear(x, delta.a.to(x.dtype))
        flat = torch.addmm(
            out.reshape(-1, out.shape[-1]), down.reshape(-1, down.shape[-1]), delta.b.to(x.dtype).T, alpha=delta.scale
        )
        return flat.view_as(out)


@dataclass
class Delta:
    """One layer's share of an adapter."""

    a: nn.Parameter  # (rank, in) fp32
    b: nn.Parameter  # (out, rank) fp32
    scale: float  # alpha / rank


@dataclass
class Adapter:
    """One role's deltas, by the path of the layer in the base."""

    rank: int
    alpha: float
    deltas: dict[str, Delta] = field(default_factory=dict)

    def parameters(self) -> Iterator[nn.Parameter]:
        for delta in self.deltas.values():
            yield delta.a
            yield delta.b

    @property
    def size(self) -> int:
        """Number of weights."""
        return sum(p.numel() for p in self.parameters())

    def tensors(self) -> dict[str, Tensor]:
        """Weights under PEFT's names, ready for adapter_model.safetensors."""
        out: dict[str, Tensor] = {}
        for path, delta in self.deltas.items():
            out[f"{PEFT_PREFIX}{path}.lora_A.weight"] = delta.a.detach()
            out[f"{PEFT_PREFIX}{path}.lora_B.weight"] = delta.b.detach()
        return out

    def copy(self, *, trainable: bool) -> Adapter:
        """An independent adapter with the same numbers."""
        twin = Adapter(self.rank, self.alpha)
        for path, delta in self.deltas.items():
            a = nn.Parameter(delta.a.detach().clone(), requires_grad=trainable)
            b = nn.Parameter(delta.b.detach().clone(), requires_grad=trainable)
            twin.deltas[path] = Delta(a, b, delta.scale)
        return twin

    def grown(self, rank: int, alpha: float, seed: int) -> Adapter:
        """The same function at a larger rank: new rows of A are random, new columns of B are zero.

        Raises ConfigError where `rank` is smaller, since that would change what the checkpoint does.
        """
        if rank < self.rank:
            raise ConfigError(
                f"lora_rank {rank} is smaller than the checkpoint's {self.rank}",
                where="lora_rank",
                fix=f"leave lora_rank out, or give at least {self.rank}; or start from the base",
            )
        twin = Adapter(rank, alpha)
        for index, (path, delta) in enumerate(self.deltas.items()):
            a = random_a(rank, delta.a.shape[1], delta.a.device, seed + index)
            a[: self.rank] = delta.a.detach()
            b = delta.b.new_zeros(delta.b.shape[0], rank)
            b[:, : self.rank] = delta.b.detach() * (delta.scale / (alpha / rank))
            twin.deltas[path] = Delta(nn.Parameter(a), nn.Parameter(b), alpha / rank)
        return twin


def random_a(rank: int, width: int, device: torch.device, seed: int) -> Tensor:
    """A (rank, in) matrix drawn uniformly as nn.Linear's default (Kaiming, a = sqrt 5), a function of the seed."""
    generator = torch.Generator().manual_seed(seed)
    bound = 1.0 / math.sqrt(width)
    return ((torch.rand(rank, width, generator=generator) * 2 - 1) * bound).to(device)


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Paths of all linear layers but the output layer; raises ModelError where there is none."""
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    linear = {p: module for p, module in model.named_modules() if module is not output and _is_linear(module)}
    if not linear:
        raise ModelError("the model has no linear layers that LoRA could adapt", where="model", fix="use another base")
    return linear


@torch.no_grad()
def _is_linear(module: nn.Module) -> bool:
    """True for a layer that computes W x + b and no more; some routers of experts are linear layers by type alone."""
    from transformers.pytorch_utils import Conv1D

    if not isinstance(module, (nn.Linear, Conv1D)):
        return False
    if type(module).forward in (nn.Linear.forward, Conv1D.forward) or is_four_bit(module):
        return True
    x = torch.ones(2, module.weight.shape[1], dtype=module.weight.dtype, device=module.weight.device)
    plain = nn.functional.linear(x, module.weight, module.bias)
    try:
        return bool((module(x) - plain).norm() <= 0.01 * plain.norm())
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
        return False


def _matches(path: str, target: str) -> bool:
    return path == target or path.endswith("." + target)


def wrap(model: nn.Module, switch: Switch) -> dict[str, LoraLinear]:
    """Replace every linear layer of the base (not the output layer) by a `LoraLinear`; returns them by path."""
    layers: dict[str, LoraLinear] = {}
    for path, module in linear_layers(model).items():
        parent_path, _, leaf = path.rpartition(".")
        layers[path] = LoraLinear(module, switch)
        setattr(model.get_submodule(parent_path), leaf, layers[path])
    return layers


def shape_of(base: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear layer; GPT-2's Conv1D stores its weight transposed, 4-bit layers store it packed."""
    if hasattr(base, "in_features"):
        return base.in_features, base.out_features
    return base.weight.shape[0], base.weight.shape[1]


def is_transposed(base: nn.Module) -> bool:
    """True where the base's file holds the weight as (in, out): GPT-2's Conv1D, also once it is held in 4 bits."""
    from transformers.pytorch_utils import Conv1D

    return issubclass(getattr(base, "source_cls", type(base)), Conv1D)


def fresh(layers: dict[str, LoraLinear], rank: int, alpha: float, targets: list[str], seed: int) -> Adapter:
    """A new trainable adapter that changes nothing yet (B = 0), on every layer or on those that `targets` names.

    Raises ModelError for a target that is no layer's name.
    """
    adapter = Adapter(rank, alpha)
    for index, (path, layer) in enumerate(targeted(layers, targets).items()):
        width, out = shape_of(layer.base)
        device = layer.base.weight.device
        a = random_a(rank, width, device, seed + index)
        adapter.deltas[path] = Delta(nn.Parameter(a), nn.Parameter(torch.zeros(out, rank, device=device)), alpha / rank)
    return adapter


def targeted(layers: dict[str, LoraLinear], targets: list[str]) -> dict[str, LoraLinear]:
    """The layers that targets name, all where there are none; raises ModelError for a target that names nothing."""
    for target in targets:
        if not any(_matches(path, target) for path in layers):
            names = sorted({path.rsplit(".", 1)[-1] for path in layers})
            raise ModelError(
                f"no linear layer is called `{target}`", where="lora_targets", fix=f"this model has {', '.join(names)}"
            )
    return {p: layer for p, layer in layers.items() if not targets or any(_matches(p, t) for t in targets)}


def from_tensors(
    layers: dict[str, LoraLinear], tensors: dict[str, Tensor], rank: int, alpha: float, *, where: str, trainable: bool
) -> Adapter:
    """An adapter from PEFT-named tensors; raises CheckpointError where they do not fit the base's layers."""
    adapter = Adapter(rank, alpha)
    paths = {name.removeprefix(PEFT_PREFIX).removesuffix(".lora_A.weight") for name in tensors if ".lora_A." in name}
    for path, layer in layers.items():
        if path not in paths:
            continue
        width, out = shape_of(layer.base)
        a = tensors.get(f"{PEFT_PREFIX}{path}.lora_A.weight")
        b = tensors.get(f"{PEFT_PREFIX}{path}.lora_B.weight")
        if a is None or b is None or a.shape != (rank, width) or b.shape != (out, rank):
            raise CheckpointError(
                f"the adapter's weights for {path} do not have the base's shape",
                where=where,
                fix="train it again on this base",
            )
        if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise CheckpointError(
                f"the adapter's weights for {path} are not finite numbers",
                where=where,
                fix="train it again with a lower --learning-rate; the run that wrote it had diverged",
            )
        device = layer.base.weight.device
        a = nn.Parameter(a.to(device, torch.float32), requires_grad=trainable)
        b = nn.Parameter(b.to(device, torch.float32), requires_grad=trainable)
        adapter.deltas[path] = Delta(a, b, alpha / rank)
    unknown = sorted(paths - set(layers))
    if unknown or not adapter.deltas:
        name = unknown[0] if unknown else "any layer"
        raise CheckpointError(
            f"the adapter is for {name}, which the base lacks", where=where, fix="use the base it was trained on"
        )
    return adapter


def peft_config(model: nn.Module, layers: dict[str, LoraLinear], adapter: Adapter, base_name: str, task: str) -> dict:
    """adapter_config.json as PEFT writes it, so that PeftModel and serving engines load the folder as it is."""
    leaves = sorted({path.rsplit(".", 1)[-1] for path in adapter.deltas})
    by_leaf = {path for path in layers if path.rsplit(".", 1)[-1] in leaves}
    config = {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base_name,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(is_transposed(layers[path].base) for path in adapter.deltas),
        "target_modules": leaves if by_leaf == set(adapter.deltas) else sorted(adapter.deltas),
        "init_lora_weights": True,
        "inference_mode": True,
        "use_rslora": False,
    }
    return config | ({"modules_to_save": ["score"]} if task == "SEQ_CLS" else {})


@torch.no_grad()
def merge_and_unwrap(model: nn.Module, layers: dict[str, LoraLinear], adapter: Adapter | None) -> None:
    """Fold an adapter into the base's own weights, in fp32 and then rounded, and put the plain layers back."""
    for path, layer in layers.items():
        delta = adapter.deltas.get(path) if adapter else None
        if delta is not None:
            change = (delta.b.float() @ delta.a.float()) * delta.scale
            if not hasattr(layer.base, "in_features"):
                change = change.T  # Conv1D stores (in, out)
            layer.base.weight.copy_(layer.base.weight.float() + change)
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer.base)
