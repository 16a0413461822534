"""LoRA adapters (Hu et al. 2021) on one frozen base, run and stored by PEFT.

An adapter is a set of parameters under PEFT's names; PEFT's layers run these same parameters for every role that uses
it. All layers share one list with the name of the active role, so that switching is one assignment and never touches
`requires_grad`, while PEFT's `set_adapter` walks over the layers and freezes the other adapters.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stages.errors import CheckpointError, ModelError
from stages.models.adapter_files import LORA_A, LORA_B, MAGNITUDE, PEFT_PREFIX, adapter_shapes
from stages.models.checks import check_stored
from stages.models.quantised import is_four_bit, quiet_bitsandbytes

if TYPE_CHECKING:
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer

MAMBA = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")  # kernels bypass PEFT's layer at `out_proj`


@dataclass
class Adapter:
    """One role's weights, by PEFT's names without its prefix, and their PEFT config.

    For each layer A (rank, in), B (out, rank) and, with DoRA, the magnitudes (out,) of the rows of W + scale B A.
    """

    config: LoraConfig
    weights: dict[str, nn.Parameter]

    @property
    def paths(self) -> list[str]:
        """Paths of the adapted layers in the base."""
        return [name.removesuffix(LORA_A) for name in self.weights if name.endswith(LORA_A)]

    @property
    def scale(self) -> float:
        """The factor of B A: alpha / rank, or alpha / sqrt(rank) if rank-stabilised (Kalajdzievski 2023)."""
        return self.config.lora_alpha / (math.sqrt(self.config.r) if self.config.use_rslora else self.config.r)

    @property
    def is_zero(self) -> bool:
        """True if the adapter certainly changes nothing; never for DoRA, which rounds."""
        return not self.config.use_dora and not any(w.any() for n, w in self.weights.items() if n.endswith(LORA_B))

    def parameters(self) -> Iterator[nn.Parameter]:
        yield from self.weights.values()

    @property
    def size(self) -> int:
        """Number of weights."""
        return sum(p.numel() for p in self.parameters())

    def tensors(self) -> dict[str, Tensor]:
        """Weights as adapter_model.safetensors holds them."""
        return {PEFT_PREFIX + name: weight.detach() for name, weight in self.weights.items()}

    def copy(self, *, trainable: bool) -> Adapter:
        """An independent adapter with the same numbers."""
        twins = {n: nn.Parameter(w.detach().clone(), requires_grad=trainable) for n, w in self.weights.items()}
        return Adapter(self.config, twins)

    def grown(self, rank: int, alpha: float, seed: int) -> Adapter:
        """An adapter that computes the same at a larger rank: new rows of A are random, new columns of B are zero."""
        twin = self.copy(trainable=True)
        twin.config = dataclasses.replace(self.config, r=rank, lora_alpha=alpha)
        for index, path in enumerate(self.paths):
            old = self.weights[path + LORA_A].detach(), self.weights[path + LORA_B].detach()
            a, b = filled_up(*old, rank, self.scale / twin.scale, seed + index)
            twin.weights[path + LORA_A], twin.weights[path + LORA_B] = nn.Parameter(a), nn.Parameter(b)
        return twin


class LoraLayers:
    """The linear layers of a base, and PEFT's layers around those with adapters.

    `active` holds the active role's name; while it is empty, and in layers that the role does not adapt, the base runs
    alone.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.linear = linear_layers(model)
        self.adapted: dict[str, LoraLayer] = {}
        self.active: list[str] = []

    def add(self, role: str, adapter: Adapter) -> None:
        """Make PEFT's layers run an adapter under a role's name."""
        from peft import inject_adapter_in_model

        flags = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a second adapter on one model
            config = copy.deepcopy(adapter.config)  # PEFT changes it
            inject_adapter_in_model(config, self.model, role, low_cpu_mem_usage=True, state_dict=adapter.weights)
        for path in adapter.paths:
            layer = self.adapted[path] = self.model.get_submodule(path)
            layer.lora_A[role].weight = adapter.weights[path + LORA_A]
            layer.lora_B[role].weight = adapter.weights[path + LORA_B]
            if adapter.config.use_dora:
                layer.lora_magnitude_vector[role].weight = adapter.weights[path + MAGNITUDE]
        for layer in self.adapted.values():
            layer._active_adapter = self.active
        for parameter, flag in flags:  # PEFT freezes all but the new adapter
            parameter.requires_grad_(flag)

    @contextmanager
    def using(self, role: str | None) -> Iterator[None]:
        """Make a role the active one within the block; None is the base alone."""
        before = self.active[:]
        self.active[:] = [] if role is None else [role]
        try:
            yield
        finally:
            self.active[:] = before

    def remove(self, role: str) -> None:
        """Remove a role's adapter, if it has one."""
        assert role not in self.active, f"{role} is in use"
        for layer in self.adapted.values():
            layer.delete_adapter(role)
        getattr(self.model, "peft_config", {}).pop(role, None)

    @torch.no_grad()
    def merge_and_unload(self, role: str) -> None:
        """Fold a role's adapter into the base's own weights, rounding once, and put the plain layers back."""
        for path, layer in self.adapted.items():
            if role in layer.lora_A:
                layer.merge(adapter_names=[role])
            self.model.set_submodule(path, layer.base_layer)
        self.adapted.clear()
        vars(self.model).pop("peft_config", None)


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """All linear layers but the output layer, by their paths; raises ModelError if there is none."""
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    is_mamba = getattr(getattr(model, "config", None), "model_type", None) in MAMBA
    linear = {
        path: module
        for path, module in model.named_modules()
        if module is not output and not (is_mamba and leaf_of(path) == "out_proj") and _is_linear(module)
    }
    if not linear:
        raise ModelError("the model has no linear layers that LoRA could adapt", where="model", fix="use another base")
    return linear


@torch.no_grad()
def _is_linear(module: nn.Module) -> bool:
    """True for a layer that only computes W x + b; some routers of experts are linear layers by type alone."""
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


def targeted(layers: dict[str, nn.Module], targets: list[str]) -> dict[str, nn.Module]:
    """The layers that targets name, or all without targets; raises ModelError for a target that names nothing."""
    chosen = set() if targets else set(layers)
    for target in targets:
        paths = {path for path in layers if f".{path}".endswith(f".{target}")}
        if not paths:
            names = ", ".join(sorted({leaf_of(path) for path in layers}))
            raise ModelError(
                f"no linear layer is called `{target}`", where="lora_targets", fix=f"choose from this model's: {names}"
            )
        chosen |= paths
    return {path: layer for path, layer in layers.items() if path in chosen}


def leaf_of(path: str) -> str:
    """The last part of a layer's path, such as q_proj."""
    return path.rsplit(".", 1)[-1]


def shape_of(layer: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear layer; GPT-2's Conv1D stores its weight transposed, 4-bit layers store it packed."""
    if hasattr(layer, "in_features"):
        return layer.in_features, layer.out_features
    return layer.weight.shape[0], layer.weight.shape[1]


def is_transposed(layer: nn.Module) -> bool:
    """True if the base's file holds the weight as (in, out): GPT-2's Conv1D, also once it is held in 4 bits."""
    from transformers.pytorch_utils import Conv1D

    return issubclass(getattr(layer, "source_cls", type(layer)), Conv1D)


# --- making adapters


def initial_adapter(
    layers: dict[str, nn.Module], rank: int, alpha: float, targets: list[str], seed: int, lora_type: str = "lora"
) -> Adapter:
    """A trainable adapter that changes nothing yet (B = 0), on all layers or on those that `targets` name.

    Raises ModelError for a target that is no layer's name.
    """
    chosen = targeted(layers, targets)
    weights: dict[str, nn.Parameter] = {}
    for index, (path, layer) in enumerate(chosen.items()):
        width, out = shape_of(layer)
        a = random_a(rank, width, layer.weight.device, seed + index)
        b = torch.zeros(out, rank, device=layer.weight.device)
        weights[path + LORA_A], weights[path + LORA_B] = nn.Parameter(a), nn.Parameter(b)
        if lora_type == "dora":
            weights[path + MAGNITUDE] = nn.Parameter(_magnitudes(layer, a, b))
            if not weights[path + MAGNITUDE].all():
                raise ModelError(
                    f"a row of the weight of {path} is zero, and DoRA divides by its norm",
                    where="lora_type",
                    fix="use --lora-type lora, or rslora",
                )
    return Adapter(lora_config(layers, list(chosen), rank, alpha, lora_type), weights)


def random_a(rank: int, width: int, device: torch.device, seed: int) -> Tensor:
    """A (rank, in) matrix drawn uniformly as nn.Linear's default (Kaiming, a = sqrt 5), a function of the seed."""
    uniform = torch.rand(rank, width, generator=torch.Generator().manual_seed(seed))
    return ((uniform * 2 - 1) * (1.0 / math.sqrt(width))).to(device)


def filled_up(a: Tensor, b: Tensor, rank: int, factor: float, seed: int) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank) with the product factor B A: new rows of A are random, new columns of B zero."""
    larger_a = random_a(rank, a.shape[1], a.device, seed)
    larger_a[: len(a)] = a
    larger_b = b.new_zeros(len(b), rank)
    larger_b[:, : len(a)] = b * factor
    return larger_a, larger_b


def _magnitudes(layer: nn.Module, a: Tensor, b: Tensor) -> Tensor:
    """Norms (out,) of the rows of a layer's weight, with which DoRA begins (Liu et al. 2024); b is zero."""
    quiet_bitsandbytes()
    from peft.tuners.lora.dora import DoraLinearLayer

    dora = DoraLinearLayer(fan_in_fan_out=not hasattr(layer, "in_features"))
    dora.update_layer(base_layer=layer, lora_A=a, lora_B=b, scaling=1.0)
    return dora.weight.detach().float()


def adapter_from(
    layers: dict[str, nn.Module],
    tensors: dict[str, Tensor],
    rank: int,
    alpha: float,
    lora_type: str,
    *,
    where: str,
    trainable: bool,
    factors: dict[str, float] | None = None,
) -> Adapter:
    """An adapter from PEFT-named tensors; raises CheckpointError if they do not fit the base's layers.

    `factors` are those of an `AdapterShape`: such layers are filled up to `rank`.
    """
    tensors = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in tensors.items()}
    for index, (path, factor) in enumerate((factors or {}).items()):
        old = tensors[path + LORA_A].float(), tensors[path + LORA_B].float()
        tensors[path + LORA_A], tensors[path + LORA_B] = filled_up(*old, rank, factor, index)
    stored = {name.removesuffix(LORA_A) for name in tensors if name.endswith(LORA_A)}
    chosen = [path for path in layers if path in stored]
    weights: dict[str, nn.Parameter] = {}
    for path in chosen:
        width, out = shape_of(layers[path])
        shapes = adapter_shapes(path, rank, width, out, lora_type)
        check_stored(tensors, shapes, f"the adapter's weights for {path}", where)
        for name in shapes:
            weight = tensors[name].to(layers[path].weight.device, torch.float32)
            weights[name] = nn.Parameter(weight, requires_grad=trainable)
    unknown = sorted(stored - set(layers)) or sorted(tensors.keys() - weights.keys() - {"score.weight"})
    if unknown or not weights:
        name = unknown[0] if unknown else "any layer"
        what, fix = f"the adapter is for {name}, which the base lacks", "use the base it was trained on"
        if leaf_of(name) in ("lm_head", "embed_out"):
            what, fix = f"the adapter changes {name}, the output layer, which all roles share", "merge it into its base"
        raise CheckpointError(what, where=where, fix=fix)
    return Adapter(lora_config(layers, chosen, rank, alpha, lora_type), weights)


# --- PEFT's config


def lora_config(layers: dict[str, nn.Module], paths: list[str], rank: int, alpha: float, lora_type: str) -> LoraConfig:
    """PEFT's config of an adapter on the layers at these paths, by the last parts of their names if that is enough."""
    quiet_bitsandbytes()
    from peft import LoraConfig

    leaves = {leaf_of(path) for path in paths}
    by_leaf = {path for path in layers if leaf_of(path) in leaves}
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=leaves if by_leaf == set(paths) else set(paths),
        fan_in_fan_out=any(is_transposed(layers[path]) for path in paths),
        use_rslora=lora_type == "rslora",
        use_dora=lora_type == "dora",
    )


def config_to_save(config: LoraConfig, base_name: str, task: str) -> dict[str, Any]:
    """adapter_config.json of an adapter, which PeftModel and serving engines load as it is."""
    heads = ["score"] if task == "SEQ_CLS" else None
    about = {"base_model_name_or_path": base_name, "task_type": task, "inference_mode": True, "modules_to_save": heads}
    plain = dataclasses.replace(config, **about).to_dict()
    return {name: sorted(value) if isinstance(value, set) else value for name, value in plain.items()}
