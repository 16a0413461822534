"""The memory plan: the bytes a stage will need, the size of its forward passes, and the result of --dry-run.

It reads only file headers; nothing is loaded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from stages.checkpoint.tensors import shapes_in
from stages.config import AUTO
from stages.models.adapter_files import ADAPTER, LORA_A
from stages.models.model_ref import ModelRef, lora_type_of
from stages.models.passes import micro_batches
from stages.models.roles import DEFAULT_RANK
from stages.native.limits import tokens_at_once
from stages.places import BUILTIN, is_function
from stages.results import Result
from stages.tables import facts_table, memory_table
from stages.training.devices import free_memory, pick_device, pick_dtype
from stages.training.memory import (
    FP32,
    Shapes,
    activation_bytes,
    base_bytes,
    cache_bytes,
    draw_bytes,
    logits_bytes,
    prefill_bytes,
    shapes_of,
    tensor_shapes,
)

SHARE = 0.9  # of the free memory is planned with; gaps of the allocator and buffers of libraries need the rest
EFFICIENT_PASS_TOKENS = 2048  # keep a GPU's matrix units busy; if so many fit, nothing is recomputed to fit more


@dataclass(frozen=True)
class Work:
    """What a stage runs through its model, as far as memory depends on it."""

    stage: str
    sizes: list[int]  # tokens of every row that is learned from
    per_step: int = 1  # rows of one optimiser step
    read: float = 1.0  # share of the tokens whose logits are read
    computed: float = 1.0  # share of the tokens that is computed if a prefix shared by several rows is computed once
    prompt: int = 0  # tokens of the longest prompt that is answered, 0 if nothing is sampled
    response: int = 0  # tokens of the longest response
    at_once: int = 0  # responses sampled in parallel
    repeated: int = 1  # how often each of `sizes` counts: the responses to a prompt
    beside: float = 0.0  # bytes of the sequence classifiers that are held beside the base


@dataclass(frozen=True)
class PassPlan:
    """How forward passes are run."""

    checkpointing: bool
    tokens: int  # of one pass; a single longer row is a pass of its own


@dataclass(frozen=True)
class ResidentBytes:
    """Bytes that a stage holds from its beginning to its end, without its base."""

    adapters: float
    moments: float  # and gradients
    copies: float  # of adapters, in the base's precision

    @property
    def total(self) -> float:
        return self.adapters + self.moments + self.copies


def source_shapes(source: ModelRef, config: Any) -> Shapes:
    """The shapes of a base on disk; in 4 bits, or with DoRA, transformers runs it."""
    shapes = shapes_of(source.config, tensor_shapes(source.base))
    through_transformers = config.load_in_4bit or lora_type_of(config, source) == "dora"
    return replace(shapes, native=shapes.native and not through_transformers)


def precision_of(config: Any) -> tuple[int, bool]:
    """Bytes of one number of the base, and whether it is on CUDA."""
    device = pick_device(config.device)
    return pick_dtype(config.dtype, device).itemsize, device.type == "cuda"


def bytes_beside(classifiers: list[ModelRef], config: Any) -> float:
    """Bytes of the weights of sequence classifiers."""
    width, _ = precision_of(config)
    return sum(width * math.prod(shape) for ref in classifiers for shape in tensor_shapes(ref.base).values())


def adapter_size(config: Any, source: ModelRef, linear: dict[str, tuple[int, int]]) -> tuple[int, int]:
    """Weights of one adapter and its rank: a checkpoint's at the config's rank, or a fresh one on `linear` layers."""
    if source.folder is not None:
        stored = {name: shape for name, shape in shapes_in(source.folder / ADAPTER).items() if ".lora_" in name}
        rank = config.lora_rank or max(shape[0] for name, shape in stored.items() if name.endswith(LORA_A))
        sides = sum(s[1] if name.endswith(LORA_A) else s[0] for name, s in stored.items() if len(s) == 2)
        return rank * sides + sum(math.prod(shape) for shape in stored.values() if len(shape) == 1), rank
    targets = [f".{target}.weight" for target in config.lora_targets] or [""]
    chosen = [shape for name, shape in linear.items() if any(f".{name}".endswith(target) for target in targets)]
    rank = config.lora_rank or DEFAULT_RANK
    magnitudes = sum(out for out, _ in chosen) if lora_type_of(config, source) == "dora" else 0
    return sum(rank * (a + b) for a, b in chosen) + magnitudes, rank


def adapters_held(stage: str, config: Any, source: ModelRef) -> tuple[int, int]:
    """Number of adapters that a stage holds, and of those it trains; a reference that is the base alone has none."""
    reference = int(source.folder is not None)
    if stage == "dpo":
        return 1 + reference, 1
    if stage == "ppo":
        critic = int(config.advantage == "gae" and config.critic == "adapter")
        scoring = sum(not is_function(name) and not name.startswith(BUILTIN) for name in config.reward)
        return 1 + reference + critic + scoring, 1 + critic
    return 1, 1


def resident_bytes(stage: str, config: Any, source: ModelRef, shapes: Shapes, width: int) -> ResidentBytes:
    """Bytes of all adapters in fp32, and of the gradient and both Adam moments of those that are trained."""
    size, _ = adapter_size(config, source, shapes.linear)
    held, trained = adapters_held(stage, config, source)
    copies = size * width if width < FP32 and shapes.native else 0  # of the adapter that is active
    return ResidentBytes(held * size * FP32, 3 * trained * size * FP32, copies)


def largest_pass(config: Any, work: Work, tokens: int) -> int:
    """Tokens of the largest forward pass if one optimiser step has the longest rows, cut into micro-batches."""
    distinct = sorted(work.sizes, reverse=True)[: math.ceil(work.per_step / work.repeated)]
    longest = [size for size in distinct for _ in range(work.repeated)][: work.per_step]
    cut = micro_batches(longest, config.micro_batch_size, on_cuda=False, tokens=tokens)
    return max((sum(longest[i] for i in rows) for rows in cut), default=0)


def choose_passes(config: Any, work: Work, source: ModelRef, shapes: Shapes, free: float | None) -> PassPlan:
    """How passes are run if `free` bytes are left beside the base; None: unlimited.

    It decides only micro-batches and recomputation, and so affects results only by rounding. `auto` recomputes
    activations if passes that are large enough to be fast do not fit otherwise.
    """
    width, on_cuda = precision_of(config)
    default = tokens_at_once(on_cuda=on_cuda)
    if free is None:
        return PassPlan(config.gradient_checkpointing is True, default)
    room = SHARE * free - resident_bytes(work.stage, config, source, shapes, width).total
    room -= logits_bytes(shapes, work.read * default, width) + work.beside
    _, rank = adapter_size(config, source, shapes.linear)
    wanted = largest_pass(config, work, default)
    row = max(work.sizes)
    enough = wanted if isinstance(config.micro_batch_size, int) else max(row, min(EFFICIENT_PASS_TOKENS, wanted))
    choices = (False, True) if config.gradient_checkpointing == AUTO else (config.gradient_checkpointing,)
    for checkpointing in choices:
        saved, transient = activation_bytes(
            shapes, width, checkpointing=checkpointing, rank=rank, row=row, on_cuda=on_cuda
        )
        fit = int(room / ((saved + transient) * work.computed))
        if fit >= enough:
            break
    return PassPlan(checkpointing, max(1, min(default, fit)))


def rollout_rows(config: Any, work: Work, source: ModelRef, shapes: Shapes, free: float | None) -> int | str:
    """The config's rollout_batch_size; for `auto`, fewer responses if all do not fit into the free bytes."""
    if free is None or config.rollout_batch_size != AUTO:
        return config.rollout_batch_size
    width, on_cuda = precision_of(config)
    room = SHARE * free - resident_bytes(work.stage, config, source, shapes, width).total
    if rollout_bytes(shapes, width, work, on_cuda=on_cuda) <= room:
        return AUTO
    none, one = (rollout_bytes(shapes, width, replace(work, at_once=n), on_cuda=on_cuda) for n in (0, 1))
    return max(1, int((room - none) / (one - none)))


def rollout_bytes(shapes: Shapes, width: int, work: Work, *, on_cuda: bool = False) -> float:
    """Peak bytes of a rollout: the larger of reading its prompts and of drawing its last token."""
    per_token, tokens = cache_bytes(shapes, width), work.at_once * (work.prompt + work.response)
    draw = draw_bytes(shapes, work.at_once)
    if shapes.native:  # the whole cache is allocated first, and prompts are read a few at a time
        read = min(work.at_once * work.prompt, tokens_at_once(on_cuda=on_cuda))
        folded = (shapes.weights - shapes.other) * width if width == FP32 else 0
        return folded + tokens * per_token + max(read * prefill_bytes(shapes, width), draw)
    return max(work.at_once * work.prompt * (per_token + prefill_bytes(shapes, width)), tokens * per_token + draw)


def memory_by_part(
    config: Any,
    work: Work,
    source: ModelRef,
    shapes: Shapes,
    *,
    passes: PassPlan | None = None,
    tokens: int | None = None,
) -> dict[str, float]:
    """Bytes at the peak by part, for the largest pass or for one of `tokens`; `peak_of` has the total."""
    width, on_cuda = precision_of(config)
    passes = passes or choose_passes(config, work, source, shapes, None)
    held = resident_bytes(work.stage, config, source, shapes, width)
    _, rank = adapter_size(config, source, shapes.linear)
    size = largest_pass(config, work, passes.tokens) if tokens is None else tokens
    saved, transient = activation_bytes(
        shapes, width, checkpointing=passes.checkpointing, rank=rank, row=max(work.sizes), on_cuda=on_cuda
    )
    # Logits and the transient tensors of a layer never exist at the same time.
    logits = logits_bytes(shapes, size * work.read, width) if work.read else 0.0
    computed = size * work.computed
    parts = {
        "frozen base": base_bytes(shapes, width, four_bit=config.load_in_4bit),
        "adapters (weights)": held.adapters,
        "gradients and Adam moments": held.moments,
        "copies of adapters": held.copies,
        "activations of the largest pass": computed * saved + max(0.0, computed * transient - logits),
        "logits": logits,
    }
    if work.beside:
        parts["sequence classifiers"] = work.beside
    if work.prompt:
        parts["rollout (keys, values)"] = rollout_bytes(shapes, width, work, on_cuda=on_cuda)
    return parts


def peak_of(parts: dict[str, float]) -> float:
    """Bytes needed at the same time: a rollout and a training pass never are, so the larger of the two counts."""
    rollout = parts.get("rollout (keys, values)", 0.0)
    in_pass = parts["activations of the largest pass"] + parts["logits"]
    return sum(parts.values()) - rollout - in_pass + max(rollout, in_pass)


def memory_text(stage: str, config: Any, source: ModelRef, tokens: int) -> str:
    """Memory by part in one line, for a pass over one row of so many tokens."""
    parts = memory_by_part(config, Work(stage, [tokens]), source, source_shapes(source, config), tokens=tokens)
    return ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in parts.items())


def plan_result(config: Any, source: ModelRef, work: Work, total: int, about: dict[str, float]) -> Result:
    """The result of --dry-run: steps, rows, passes, memory and what `about` adds, of a stage that will not train."""
    width, _ = precision_of(config)
    shapes = source_shapes(source, config)
    free = free_memory(pick_device(config.device))
    free_beside_base = None if free is None else free - base_bytes(shapes, width, four_bit=config.load_in_4bit)
    passes = choose_passes(config, work, source, shapes, free_beside_base)
    rows = rollout_rows(config, work, source, shapes, free_beside_base) if work.prompt else 0
    work = replace(work, at_once=rows) if isinstance(rows, int) else work
    parts = memory_by_part(config, work, source, shapes, passes=passes)
    memory = {name: size / 1e9 for name, size in parts.items()} | {"total": peak_of(parts) / 1e9}
    facts = {
        "rows": len(work.sizes) * work.repeated,
        **about,
        "steps": total,
        "batch_size": config.batch_size,
        "tokens_per_epoch": sum(work.sizes) * work.repeated,
        "longest_row_tokens": max(work.sizes),
        "largest_pass_tokens": largest_pass(config, work, passes.tokens),
        "gradient_checkpointing": passes.checkpointing,
        **({"responses_at_once": work.at_once} if work.prompt else {}),
        "trainable_parameters_per_adapter": adapter_size(config, source, shapes.linear)[0],
    }
    label = {"total": "total (counting the larger of training pass and rollout)"} if work.prompt else {}
    rows = {label.get(name, name): 1e9 * size for name, size in memory.items()}
    if free_beside_base is not None:
        rows["free on the device"] = free
        memory["free"] = free / 1e9
    tables = (facts_table(f"{work.stage}: the plan", facts), memory_table(rows))
    return Result(work.stage, "dry run", None, {"plan": facts, "memory_gb": memory}, tables)
