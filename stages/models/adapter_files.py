"""The files of an adapter, under PEFT's names, and what their headers tell without torch."""

from __future__ import annotations

from pathlib import Path

from stages.checkpoint.digests import weight_files
from stages.checkpoint.tensors import shapes_in
from stages.errors import CheckpointError

ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
AGAIN = "copy the checkpoint again, or train it again"
PEFT_PREFIX = "base_model.model."
LORA_A, LORA_B, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"


def adapter_shapes(path: str, rank: int, width: int, out: int, lora_type: str) -> dict[str, tuple[int, ...]]:
    """Shapes of an adapter's tensors for the layer at a path, which maps `width` numbers to `out`."""
    shapes: dict[str, tuple[int, ...]] = {path + LORA_A: (rank, width), path + LORA_B: (out, rank)}
    return shapes | ({path + MAGNITUDE: (out,)} if lora_type == "dora" else {})


def check_adapter_header(folder: Path, base: Path, ranks: int | dict[str, int], lora_type: str) -> None:
    """Raise CheckpointError unless the tensors in an adapter's file have the shapes of its config and of the base.

    `ranks` is the rank of all layers, or that of every layer by its path.
    Layers that the base's files hold under other names, or in parts, are checked once the base is loaded.
    """
    stored = {name.removeprefix(PEFT_PREFIX): shape for name, shape in shapes_in(folder / ADAPTER).items()}
    weights = {name: shape for file in weight_files(base) for name, shape in shapes_in(file).items()}
    ends = (LORA_A, LORA_B, MAGNITUDE)
    paths = dict.fromkeys(name.removesuffix(end) for name in stored for end in ends if name.endswith(end))
    if not paths:
        raise CheckpointError("holds no weights of LoRA", where=str(folder / ADAPTER), fix=AGAIN)
    for path in paths:
        a, b = stored.get(path + LORA_A, ()), stored.get(path + LORA_B, ())
        sizes = weights.get(f"{path}.weight", ())
        if len(sizes) != 2:
            sizes = (b[0] if b else 0, a[-1] if a else 0)
        out, width = sizes[::-1] if a[-1:] != sizes[1:] == b[:1] else sizes  # GPT-2's layers are stored transposed
        rank = ranks.get(path, 0) if isinstance(ranks, dict) else ranks
        wanted = adapter_shapes(path, rank, width, out, lora_type)
        found = {path + end: stored[path + end] for end in ends if path + end in stored}
        if found != wanted:
            what = f"its tensors for {path} are {_describe(found)}; with r {rank} and {lora_type} of {ADAPTER_CONFIG}"
            what += f", this base needs {_describe(wanted)}"
            raise CheckpointError(what, where=str(folder / ADAPTER), fix=AGAIN)


def _describe(shapes: dict[str, tuple[int, ...]]) -> str:
    named = (f"{name.split('.lora_')[1].removesuffix('.weight')} {list(shape)}" for name, shape in shapes.items())
    return ", ".join(f"lora_{text}" for text in named)
