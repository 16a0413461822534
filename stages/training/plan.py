"""The memory plan: what a stage will hold and at most need, how its passes are run, and what --dry-run says.

From file headers alone: nothing is loaded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from stages.config import AUTO
from stages.models.model_ref import ModelRef, lora_type_of, open_model
from stages.models.passes import micro_batches
from stages.models.roles import ADAPTER, DEFAULT_RANK
from stages.native.limits import tokens_at_once
from stages.recipe import is_function
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
    shapes_in,
    shapes_of,
    tensor_shapes,
)

SHARE = 0.9  # of the free memory that is planned with: the allocator's gaps and the libraries' own buffers need some
EFFICIENT_PASS_TOKENS = (
    2048  # tokens that keep a GPU's matrix units busy: where so many fit, nothing is recomputed to fit more
)


@dataclass(frozen=True)
class Work:
    """What a stage runs through its model, as far as memory depends on it."""

    stage: str
    sizes: list[int]  # tokens of every row that is learned from
    per_step: int = 1  # rows of one optimiser step
    read: float = 1.0  # share of the tokens whose logits are read
    computed: float = 1.0  # share of the tokens that is computed, once beginnings that rows share are computed once
    prompt: int = 0  # tokens of the longest prompt that is answered, 0 where nothing is sampled
    response: int = 0  # of the longest response
    at_once: int = 0  # responses sampled side by side
    repeated: int = 1  # how often each of `sizes` counts: the responses to a prompt


@dataclass(frozen=True)
class PassPlan:
    """How forward passes are run."""

    checkpointing: bool
    tokens: int  # of one pass, where rows are short enough


@dataclass(frozen=True)
class ResidentBytes:
    """What stands in memory for as long as a stage runs, in bytes, beside its base."""

    adapters: float
    moments: float  # and gradients
    copies: float  # of adapters, in the base's precision
    trained: int  # weights of one adapter

    @property
    def total(self) -> float:
        return self.adapters + self.moments + self.copies


def source_shapes(source: ModelRef, config: Any) -> Shapes:
    """The shapes of a base on disk; in 4 bits, or with DoRA, transformers runs it."""
    shapes = shapes_of(source.config, tensor_shapes(source.base))
    return replace(shapes, native=shapes.native and not config.load_in_4bit and not uses_dora(config, source))


def uses_dora(config: Any, source: ModelRef) -> bool:
    """Whether a stage trains DoRA adapters."""
    return lora_type_of(config, source) == "dora"


def adapter_size(config: Any, source: ModelRef, linear: dict[str, tuple[int, int]]) -> tuple[int, int]:
    """Weights of one adapter and its rank: the checkpoint's at the rank asked for, or a fresh one on the layers."""
    if source.folder is not None:
        stored = {name: shape for name, shape in shapes_in(source.folder / ADAPTER).items() if ".lora_" in name}
        rank = next(shape[0] for name, shape in stored.items() if ".lora_A." in name)
        wanted = config.lora_rank or rank
        magnitudes = sum(math.prod(shape) for shape in stored.values() if len(shape) == 1)
        return (sum(map(math.prod, stored.values())) - magnitudes) // rank * wanted + magnitudes, wanted
    targets = [f".{target}.weight" for target in config.lora_targets] or [""]
    chosen = [shape for name, shape in linear.items() if any(f".{name}".endswith(target) for target in targets)]
    rank = config.lora_rank or DEFAULT_RANK
    magnitudes = sum(out for out, _ in chosen) if uses_dora(config, source) else 0
    return sum(rank * (a + b) for a, b in chosen) + magnitudes, rank


def adapters_held(stage: str, config: Any, source: ModelRef) -> tuple[int, int]:
    """How many adapters a stage holds, and how many of them it trains; a reference that is the base alone has none."""
    reference = int(source.folder is not None)
    if stage == "dpo":
        return 1 + reference, 1
    if stage == "ppo":
        critic = int(config.advantage == "gae" and config.critic == "adapter")
        scoring = sum(not is_function(reward) for reward in config.reward)
        return 1 + reference + critic + scoring, 1 + critic
    return 1, 1


def resident_bytes(stage: str, config: Any, source: ModelRef, shapes: Shapes, width: int) -> ResidentBytes:
    """Adapters in fp32, and of those that are trained the gradient and both moments."""
    size, _ = adapter_size(config, source, shapes.linear)
    held, trained = adapters_held(stage, config, source)
    in_base_precision = size * width if width < FP32 and shapes.native else 0  # of the adapter that is active
    return ResidentBytes(held * size * FP32, 3 * trained * size * FP32, in_base_precision, size)


def largest_pass(config: Any, work: Work, tokens: int) -> int:
    """Tokens of the largest forward pass: of the longest rows that one optimiser step may meet, cut as they will be."""
    kinds = sorted(work.sizes, reverse=True)[: math.ceil(work.per_step / work.repeated)]
    longest = [size for size in kinds for _ in range(work.repeated)][: work.per_step]
    cut = micro_batches(longest, config.micro_batch_size, on_cuda=False, tokens=tokens)
    return max((sum(longest[i] for i in rows) for rows in cut), default=0)


def choose_passes(config: Any, work: Work, source: ModelRef, shapes: Shapes, free: float | None) -> PassPlan:
    """How passes are run where so many bytes are free beside the base; None: as many as wanted.

    Only the cut of a batch and what is recomputed depend on it, and so results only by rounding. Activations are
    recomputed without being asked for where passes large enough to be fast do not fit otherwise.
    """
    device = pick_device(config.device)
    default = tokens_at_once(on_cuda=device.type == "cuda")
    asked = config.gradient_checkpointing
    if free is None:
        return PassPlan(asked is True, default)
    width = pick_dtype(config.dtype, device).itemsize
    room = SHARE * free - resident_bytes(work.stage, config, source, shapes, width).total
    room -= logits_bytes(shapes, work.read * default, width)
    _, rank = adapter_size(config, source, shapes.linear)
    wanted = largest_pass(config, work, default)
    enough = (
        wanted if isinstance(config.micro_batch_size, int) else max(max(work.sizes), min(EFFICIENT_PASS_TOKENS, wanted))
    )
    how = {"rank": rank, "row": max(work.sizes), "on_cuda": device.type == "cuda"}
    for checkpointing in (False, True) if asked == AUTO else (asked,):
        kept, passing = activation_bytes(shapes, width, checkpointing=checkpointing, **how)
        fit = int(room / ((kept + passing) * work.computed))
        if fit >= enough:
            break
    return PassPlan(checkpointing, max(1, min(default, fit)))


def rollout_rows(config: Any, work: Work, source: ModelRef, shapes: Shapes, free: float | None) -> int | str:
    """Responses sampled side by side: as asked for, or fewer where `auto` would not fit into the free bytes."""
    if free is None or config.rollout_batch_size != AUTO:
        return config.rollout_batch_size
    device = pick_device(config.device)
    width, on_cuda = pick_dtype(config.dtype, device).itemsize, device.type == "cuda"
    room = SHARE * free - resident_bytes(work.stage, config, source, shapes, width).total
    if rollout_bytes(shapes, width, work, on_cuda=on_cuda) <= room:
        return AUTO
    none, one = (rollout_bytes(shapes, width, replace(work, at_once=n), on_cuda=on_cuda) for n in (0, 1))
    return max(1, int((room - none) / (one - none)))


def rollout_bytes(shapes: Shapes, width: int, work: Work, *, on_cuda: bool = False) -> float:
    """The larger of what a rollout's prompts take, computed and kept, and of what its last token takes to be drawn."""
    one, fits = cache_bytes(shapes, width), work.at_once * (work.prompt + work.response)
    if shapes.native:  # slots are there from the beginning, prompts are read a few at a time
        read = min(work.at_once * work.prompt, tokens_at_once(on_cuda=on_cuda))
        folded = (shapes.weights - shapes.other) * width if width == FP32 else 0
        return folded + fits * one + max(read * prefill_bytes(shapes, width), draw_bytes(shapes, work.at_once))
    first = work.at_once * work.prompt * (one + prefill_bytes(shapes, width))
    return max(first, fits * one + draw_bytes(shapes, work.at_once))


def memory_by_part(
    config: Any,
    work: Work,
    source: ModelRef,
    shapes: Shapes,
    *,
    passes: PassPlan | None = None,
    tokens: int | None = None,
) -> dict[str, float]:
    """Bytes at the peak by part; `tokens`: of a pass of exactly this size.

    A rollout and a pass are never there at once: the peak is what is held all the time and the larger of both.
    """
    device = pick_device(config.device)
    width, on_cuda = pick_dtype(config.dtype, device).itemsize, device.type == "cuda"
    passes = passes or choose_passes(config, work, source, shapes, None)
    held = resident_bytes(work.stage, config, source, shapes, width)
    _, rank = adapter_size(config, source, shapes.linear)
    size = largest_pass(config, work, passes.tokens) if tokens is None else tokens
    how = {"checkpointing": passes.checkpointing, "rank": rank, "row": max(work.sizes), "on_cuda": on_cuda}
    kept, passing = activation_bytes(shapes, width, **how)
    # Logits and what passes through a layer are never there together.
    logits = logits_bytes(shapes, size * work.read, width) if work.read else 0.0
    computed = size * work.computed
    parts = {
        "frozen base": base_bytes(shapes, width, four_bit=config.load_in_4bit),
        "adapters (weights)": held.adapters,
        "gradients and Adam moments": held.moments,
        "copies of adapters": held.copies,
        "activations of the largest pass": computed * kept + max(0.0, computed * passing - logits),
        "logits": logits,
    }
    if work.prompt:
        parts["rollout (keys, values)"] = rollout_bytes(shapes, width, work, on_cuda=on_cuda)
    return parts


def peak_of(parts: dict[str, float]) -> float:
    """The most that is there at once."""
    rollout = parts.get("rollout (keys, values)", 0.0)
    in_pass = parts["activations of the largest pass"] + parts["logits"]
    return sum(parts.values()) - rollout - in_pass + max(rollout, in_pass)


def memory_text(stage: str, config: Any, tokens: int) -> str:
    """The same estimate in a line, for a pass over one row of so many tokens."""
    known = ("sft", "reward", "ppo", "dpo")
    source = open_model(config.model, stages=known, what="--model", trust_remote_code=config.trust_remote_code)
    parts = memory_by_part(config, Work(stage, [tokens]), source, source_shapes(source, config), tokens=tokens)
    return ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in parts.items())


def plan_result(config: Any, source: ModelRef, work: Work, total: int, left_out: dict[str, int]) -> Result:
    """The plan of a stage that was resolved and checked but will not train."""
    device = pick_device(config.device)
    width = pick_dtype(config.dtype, device).itemsize
    shapes = source_shapes(source, config)
    free = free_memory(device)
    beside = None if free is None else free - base_bytes(shapes, width, four_bit=config.load_in_4bit)
    passes = choose_passes(config, work, source, shapes, beside)
    rows = rollout_rows(config, work, source, shapes, beside) if work.prompt else 0
    work = replace(work, at_once=rows) if isinstance(rows, int) else work
    parts = memory_by_part(config, work, source, shapes, passes=passes)
    memory = {name: size / 1e9 for name, size in parts.items()} | {"total": peak_of(parts) / 1e9}
    facts = {
        "rows": len(work.sizes) * work.repeated,
        **left_out,
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
    if beside is not None:
        rows["free on the device"] = free
        memory["free"] = free / 1e9
    tables = (facts_table(f"{work.stage}: the plan", facts), memory_table(rows))
    return Result(work.stage, "dry run", None, {"plan": facts, "memory_gb": memory}, tables)
