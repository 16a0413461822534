"""The native forward pass through Llama-shaped bodies, over the weights that transformers loaded.

Covers Llama, Mistral, Qwen2 and Qwen3; every other architecture runs through transformers' code. Loading a base
measures whether the two agree (see stages/models/base.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stages.native import attention
from stages.native.dense import DenseAttention
from stages.native.fused import Linear, gated_mlp, normed, project, rms_norm, rotate
from stages.native.limits import COVERED, LONGEST_DENSE
from stages.native.prefixes import Packing

Keep = Callable[[int, Tensor, Tensor], None]  # a layer's number, its keys and values (N, kv heads, D)
ROTATIONS = ("default", "linear", "llama3", "yarn")  # those whose angles depend on the position alone


@dataclass(frozen=True)
class Norm:
    """A frozen root-mean-square norm, with gradient for its input."""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def without_grad(self, x: Tensor) -> Tensor:
        """The same numbers, without autograd's overhead."""
        return normed(x, self.weight, self.eps)[0]


@dataclass(frozen=True)
class Block:
    """One layer: its norms, the modules with its linear layers, and the shape of its attention.

    The linear layers are looked up when they run, since PEFT wraps them once they are adapted.
    """

    before_attention: Norm
    before_mlp: Norm
    query_norm: Norm | None
    key_norm: Norm | None
    attention: nn.Module
    mlp: nn.Module
    head_size: int
    kv_heads: int
    scale: float
    window: int | None

    def qkv(self) -> tuple[Linear, Linear, Linear]:
        module = self.attention
        return under_role(module.q_proj), under_role(module.k_proj), under_role(module.v_proj)

    def o(self) -> Linear:
        return under_role(self.attention.o_proj)

    def gate_up_down(self) -> tuple[Linear, Linear, Linear]:
        return under_role(self.mlp.gate_proj), under_role(self.mlp.up_proj), under_role(self.mlp.down_proj)


def under_role(layer: nn.Module) -> Linear:
    """A linear layer with the weights of the active role, if PEFT's layer around it has any."""
    if type(layer) is nn.Linear:
        return Linear(layer.weight, layer.bias, None, None)
    weight, bias = layer.base_layer.weight, layer.base_layer.bias
    for role in layer.active_adapters:
        if role in layer.lora_A:
            return Linear(weight, bias, layer.lora_A[role].weight, layer.lora_B[role].weight, layer.scaling[role])
    return Linear(weight, bias, None, None)


class Native:
    """A body's blocks, its embedding and last norm, and the angles of its positions."""

    def __init__(self, body: nn.Module, blocks: list[Block]):
        self.blocks = blocks
        self.embedding: nn.Module = body.embed_tokens
        self.norm = _norm(body.norm)
        self._rotary: nn.Module = body.rotary_emb
        self.capture_failure: str | None = None  # why capturing a decoding step as a CUDA graph failed, if it did

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin (N, 1, D / 2) of the rotary embedding at positions (N,)."""
        cos, sin = self._rotary(self.embedding.weight, positions[None])
        half = cos.shape[-1] // 2
        return cos[0, :, None, :half].contiguous(), sin[0, :, None, :half].contiguous()

    def hidden(
        self, row: Packing, wanted: Tensor | None, *, recompute: bool = False, keep: Keep | None = None
    ) -> Tensor:
        """Final hidden states of a packed row (N, H), or only those at the indices `wanted` (M,): (M, H).

        After the last attention only wanted states are computed. With `recompute` the backward pass computes
        activations again (Chen et al. 2016). `keep(layer, keys, values)` is called with every layer's keys and values.
        """
        device = self.embedding.weight.device
        x = self.embedding(row.ids.to(device))
        angles = self.angles(row.positions.to(device))
        segments = attention.segments(tuple(row.groups), device)
        run: Callable[..., Tensor] = _run_block
        if recompute and torch.is_grad_enabled():
            run = partial(checkpoint, _run_block, use_reentrant=False)
        for number, block in enumerate(self.blocks):
            last = block is self.blocks[-1]
            show = partial(keep, number) if keep is not None else None
            x = run(block, x, angles, segments, wanted if last else None, show)
        return self.norm(x)


def _run_block(
    block: Block,
    x: Tensor,
    angles: tuple[Tensor, Tensor],
    segments: attention.Segments,
    wanted: Tensor | None,
    show: Callable[[Tensor, Tensor], None] | None,
) -> Tensor:
    """One layer on states (N, H)."""
    q, k, v = heads_of(block, block.before_attention(x), angles)
    if show is not None:
        show(k, v)
    mixed = attend_native(q, k, v, segments, attention.Rule(block.scale, block.window))
    del q, k, v  # to be freed before the widest layers, unless a backward pass needs them
    if wanted is not None:
        x, mixed = x[wanted], mixed[wanted]
    (x,) = project(mixed, (block.o(),), residual=x)
    del mixed
    return gated_mlp(block.before_mlp(x), x, *block.gate_up_down())


def attend_native(q: Tensor, k: Tensor, v: Tensor, segments: attention.Segments, rule: attention.Rule) -> Tensor:
    """Attention within a packed row, q (N, heads, D), k and v (N, kv heads, D) -> (N, heads D)."""
    if not q.is_cuda and q.dtype == torch.float32 and segments.longest[1] <= LONGEST_DENSE:
        return DenseAttention.apply(q, k, v, segments.groups, rule.scale, rule.window).flatten(1)
    return attention.attend_packed(*(x.transpose(0, 1)[None] for x in (q, k, v)), segments, rule).flatten(2)[0]


def heads_of(block: Block, x: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (N, heads, D), keys and values (N, kv heads, D) of normed states (N, H), rotated by their positions."""
    q, k, v = (y.unflatten(-1, (-1, block.head_size)) for y in project(x, block.qkv()))
    if block.query_norm is not None and block.key_norm is not None:
        q, k = block.query_norm(q), block.key_norm(k)
    return rotate(q, *angles), rotate(k, *angles), v


def native_of(model: nn.Module) -> Native | None:
    """The native form of a loaded model that has no adapters yet; None if its architecture is not covered."""
    config, body = model.config, model.base_model
    rope = getattr(config, "rope_parameters", None) or {}
    if config.model_type not in COVERED or rope.get("rope_type", "default") not in ROTATIONS:
        return None
    if getattr(config, "hidden_act", None) != "silu" or "rope_type" not in rope:
        return None
    blocks = [_block_of(layer, config) for layer in body.layers]
    linears = (m for b in blocks for part in (b.attention, b.mlp) for m in part.children() if isinstance(m, nn.Linear))
    plain = all(type(linear) is nn.Linear for linear in linears)
    return Native(body, blocks) if plain else None


def _block_of(layer: nn.Module, config: object) -> Block:
    module = layer.self_attn
    window = config.sliding_window if config.model_type == "mistral" else getattr(module, "sliding_window", None)
    return Block(
        before_attention=_norm(layer.input_layernorm),
        before_mlp=_norm(layer.post_attention_layernorm),
        query_norm=_norm(module.q_norm) if hasattr(module, "q_norm") else None,
        key_norm=_norm(module.k_norm) if hasattr(module, "k_norm") else None,
        attention=module,
        mlp=layer.mlp,
        head_size=module.head_dim,
        kv_heads=module.k_proj.out_features // module.head_dim,
        scale=module.scaling,
        window=window,
    )


def _norm(module: nn.Module) -> Norm:
    return Norm(module.weight, module.variance_epsilon)
