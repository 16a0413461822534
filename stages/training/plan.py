"""What --dry-run says: steps, tokens, trainable parameters and memory by part, from file headers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stages.models.roles import ADAPTER, DEFAULT_RANK
from stages.models.source import Source, open_source
from stages.results import Result, Table
from stages.training.batching import TOKENS_AT_ONCE_CPU, TOKENS_AT_ONCE_CUDA
from stages.training.devices import pick_device, pick_dtype

NOT_ADAPTED = ("embed", "wte", "wpe", "lm_head", "shared")
ADAPTERS = {"sft": 1, "reward": 1, "dpo": 2}  # others: policy, reference, critic and reward
TRAINABLE = "trainable parameters"
FP32 = 4
LOGITS_AT_ONCE_BYTES = 2**27


def tensor_shapes(base: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of every tensor of a base, by name, read from its safetensors headers."""
    # Some hub models hold their weights a second time, in files by other names.
    files = sorted(base.glob("model*.safetensors")) or sorted(base.glob("*.safetensors"))
    return {name: shape for path in files for name, shape in _shapes_in(path).items()}


def _shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def adapter_size(config: Any, source: Source, linear: dict[str, tuple[int, ...]]) -> int:
    """Weights of one adapter: the checkpoint's at the rank asked for, or a fresh one on the layers asked for."""
    if source.folder is not None:
        stored = {name: shape for name, shape in _shapes_in(source.folder / ADAPTER).items() if ".lora_" in name}
        rank = next(shape[0] for name, shape in stored.items() if ".lora_A." in name)
        return sum(map(_size, stored.values())) // rank * (config.lora_rank or rank)
    targets = [f".{target}.weight" for target in config.lora_targets] or [""]
    chosen = [shape for name, shape in linear.items() if any(f".{name}".endswith(target) for target in targets)]
    return sum((config.lora_rank or DEFAULT_RANK) * (a + b) for a, b in chosen)


def memory_by_part(
    config: Any, source: Source, adapters: int, longest: int, *, least: bool = False
) -> dict[str, float]:
    """Estimated bytes of the base, adapters with their gradients and moments, one pass's activations, and logits.

    With `least` a pass is the smallest there is: one row of `longest` tokens.
    """
    device = pick_device(config.device)
    width = pick_dtype(config.dtype, device).itemsize
    shapes = tensor_shapes(source.base)
    weights = sum(_size(shape) for shape in shapes.values())
    linear = {name: s for name, s in shapes.items() if len(s) == 2 and not any(part in name for part in NOT_ADAPTED)}
    trained = adapter_size(config, source, linear)
    on_cuda = device.type == "cuda"
    budget = max(longest, TOKENS_AT_ONCE_CUDA if on_cuda else TOKENS_AT_ONCE_CPU)
    if least or isinstance(config.micro_batch_size, int):
        budget = longest * (1 if least else config.micro_batch_size)
    per_token = sum(a + b for a, b in linear.values()) * width * (0.15 if config.gradient_checkpointing else 1.0)
    parts = {
        "frozen base": weights * width,
        "adapters (weights)": adapters * trained * FP32,
        "gradients and Adam moments": max(1, adapters // 2) * trained * FP32 * 3,
        "activations of one forward pass": budget * per_token,
        "logits": LOGITS_AT_ONCE_BYTES * 2,
    }
    return parts | {TRAINABLE: trained}


def memory_text(stage: str, config: Any, tokens: int) -> str:
    """The same estimate in a line, for a pass over one row of so many tokens."""
    known = ("sft", "reward", "ppo", "dpo")
    source = open_source(config.model, stages=known, what="--model", trust_remote_code=config.trust_remote_code)
    parts = memory_by_part(config, source, ADAPTERS.get(stage, 4), tokens, least=True)
    return ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in parts.items() if name != TRAINABLE)


def plan_result(
    stage: str, config: Any, source: Source, sizes: list[int], total: int, left_out: dict[str, int]
) -> Result:
    """The plan of a stage that was resolved and checked but will not train."""
    parts = memory_by_part(config, source, ADAPTERS.get(stage, 4), max(sizes))
    trained = int(parts.pop(TRAINABLE))
    memory = {name: size / 1e9 for name, size in parts.items()} | {"total": sum(parts.values()) / 1e9}
    facts = {
        "rows": len(sizes),
        **left_out,
        "steps": total,
        "batch_size": config.batch_size,
        "tokens_per_epoch": sum(sizes),
        "longest_row_tokens": max(sizes),
        "trainable_parameters_per_adapter": trained,
    }
    tables = (
        Table(
            f"{stage}: the plan", ("what", "how much"), tuple((k.replace("_", " "), f"{v:,}") for k, v in facts.items())
        ),
        Table("estimated peak memory", ("part", "GB"), tuple((k, f"{v:.3f}") for k, v in memory.items())),
    )
    return Result(stage, "dry run", None, {"plan": facts, "memory_gb": memory}, tables)


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size
