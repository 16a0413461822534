"""Bytes of memory that a model needs, from its shapes: weights, activations, key-value cache, logits."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from stages.checkpoint.tensors import shapes_in
from stages.native.limits import COVERED, LOGITS_AT_ONCE, LONGEST_DENSE

FP32, FP64 = 4, 8
FOUR_BIT = 0.5 + 1 / 64 + FP32 / (64 * 256)  # bytes of a weight in NF4, with its share of the two levels of scales
NOT_ADAPTED = ("embed", "wte", "wpe", "lm_head", "shared")
NAMES = {  # of the same size in the configs of different architectures
    "layers": ("num_hidden_layers", "n_layer"),
    "heads": ("num_attention_heads", "n_head"),
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "inner": ("intermediate_size", "n_inner"),
}


@dataclass(frozen=True)
class Shapes:
    """Sizes of an architecture; widths are numbers per token."""

    layers: int
    heads: int
    hidden: int
    queries: int  # heads x head size
    keys: int  # key-value heads x head size
    inner: int  # of the feed-forward part
    curve: int  # kept tensors of width `inner`: gate before and after its activation, up, product; fewer without gate
    norms: int  # per layer, those of whole hidden states
    centred: bool  # norms are LayerNorm, which keeps no fp32 copy, and not RMSNorm
    head_norms: bool  # queries and keys are normalised per head
    native: bool  # the native forward pass runs it, unless its weights are in 4 bits
    vocabulary: int
    linear: dict[str, tuple[int, int]]  # shapes of the layers that can have adapters, by name
    other: int  # all other weights

    @property
    def weights(self) -> int:
        return self.other + sum(a * b for a, b in self.linear.values())


def tensor_shapes(base: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of every tensor of a base, by name, read from its safetensors headers."""
    # Some hub models have a second copy of their weights in files with other names.
    files = sorted(base.glob("model*.safetensors")) or sorted(base.glob("*.safetensors"))
    return {name: shape for path in files for name, shape in shapes_in(path).items()}


def shapes_of(config: dict, tensors: dict[str, tuple[int, ...]]) -> Shapes:
    """The sizes in a base's config.json and the shapes of its tensors.

    What a config lacks follows from the tensors, so that unlisted architectures are estimated too.
    """
    inner = config.get("text_config")
    config = inner if isinstance(inner, dict) and inner else config
    linear = {n: s for n, s in tensors.items() if len(s) == 2 and not any(part in n for part in NOT_ADAPTED)}
    layers, heads, hidden, inner = (_number(config, names) for names in NAMES.values())
    layers, heads, hidden = max(layers, 1), max(heads, 1), hidden or _usual_size(linear)
    head_size = _number(config, ("head_dim",)) or hidden // heads
    vectors = [name for name, shape in tensors.items() if shape == (hidden,) and ("norm" in name or "ln_" in name)]
    scales = [name for name in vectors if name.endswith("weight")]
    return Shapes(
        layers=layers,
        heads=heads,
        hidden=hidden,
        queries=heads * head_size,
        keys=(_number(config, ("num_key_value_heads",)) or heads) * head_size,
        inner=inner or 4 * hidden,
        curve=4 if any("gate" in name for name in linear) else 5 if "gelu_new" in config.values() else 2,
        norms=max(1, len(scales) // layers),
        centred=len(vectors) > len(scales),
        head_norms=any("q_norm" in name for name in tensors),
        native=config.get("model_type") in COVERED,
        vocabulary=_number(config, ("vocab_size",)),
        linear=linear,
        other=sum(math.prod(shape) for name, shape in tensors.items() if name not in linear),
    )


def base_bytes(shapes: Shapes, width: int, *, four_bit: bool) -> float:
    """Bytes of the frozen base at `width` bytes per weight; in 4 bits, only weights outside linear layers have them."""
    linear = shapes.weights - shapes.other
    return shapes.other * width + linear * (FOUR_BIT if four_bit else width)


def activation_bytes(
    shapes: Shapes, width: int, *, checkpointing: bool, rank: int = 32, row: int = 1024, on_cuda: bool = False
) -> tuple[float, float]:
    """Bytes per token of a forward pass with gradients: kept until the backward pass, and transient.

    Numbers have `width` bytes; transformers' norms keep fp32 copies. `rank` is that of the adapters, `row` the tokens
    of the longest row. With checkpointing a layer keeps only its input, and one layer at a time is recomputed. Not
    counted: attention weights of architectures with soft-capping (Gemma 2), which grow with the square of a row.
    """
    s, layers_linear = shapes, max(1, len(shapes.linear) // shapes.layers)
    inputs = (2 * s.hidden + s.queries) * width  # of the projections to q, k, v, of the feed-forward part, and of o
    if s.native:
        norms = s.norms * (s.hidden * width + FP32) + ((s.queries + s.keys) * width if s.head_norms else 0)
        attention = (2 * s.queries + 2 * s.keys) * width + s.heads * FP32
        if width == FP32 and row <= LONGEST_DENSE and not on_cuda:  # keeps attention weights, and its result only once
            attention += s.heads * row * FP32 - s.queries * width
        layer, passing = norms + inputs + attention + 2 * s.inner * width, 3 * s.inner * width
        last = s.hidden * width
    else:
        norms = s.norms * s.hidden * (width if s.centred else FP32)
        norms += (s.queries + s.keys) * FP32 if s.head_norms else 0
        attention = 2 * (s.queries + s.keys) * width + s.heads * FP32  # q, k, v, result; log-sum-exp
        curve = s.curve * s.inner * width
        if width < FP32:  # every PEFT layer keeps its input in fp32
            inputs = ((layers_linear - 2) * s.hidden + s.queries + s.inner) * FP32
            curve -= s.inner * width
        layer = norms + inputs + attention + curve + layers_linear * rank * FP32
        passing = 3 * s.inner * FP32
        last = s.hidden * (width if s.centred else FP32)  # the norm after the last layer
    if checkpointing:
        return s.layers * s.hidden * width + last, layer + passing
    return s.layers * layer + last, passing


def prefill_bytes(shapes: Shapes, width: int) -> float:
    """Bytes per token of a forward pass without gradients, at the peak within one layer."""
    return (3 * shapes.inner + 5 * shapes.hidden) * width


def cache_bytes(shapes: Shapes, width: int) -> float:
    """Bytes of one token's keys and values in all layers."""
    return 2 * shapes.layers * shapes.keys * width


def logits_bytes(shapes: Shapes, rows: float, width: int) -> float:
    """Bytes of the logits of `rows` positions, with their logarithms and probabilities in fp32; one chunk at most."""
    return (3 * FP32 + (width if width < FP32 else 0)) * min(rows * shapes.vocabulary, LOGITS_AT_ONCE)


def draw_bytes(shapes: Shapes, rows: int) -> float:
    """Bytes to draw one token of each of `rows` responses: its distribution in fp64, in three copies."""
    return 3 * FP64 * rows * shapes.vocabulary


def _usual_size(linear: dict[str, tuple[int, int]]) -> int:
    """The size that most linear layers read or write, which is the width of the hidden states; 1 without layers."""
    sizes = Counter(size for shape in linear.values() for size in set(shape))
    return sizes.most_common(1)[0][0] if sizes else 1


def _number(config: dict, names: tuple[str, ...]) -> int:
    """The first of these names that has a number in a config, or the largest of one per layer; 0 if none has."""
    for name in names:
        numbers = config[name] if isinstance(config.get(name), list) else [config.get(name)]
        if numbers and all(type(number) is int and number > 0 for number in numbers):
            return max(numbers)
    return 0
