"""The least time of a step with LoRA on a frozen base: operations / matrix-product rate, or bytes / bandwidth.

No weight gradients of the base are computed, so a token costs 2 operations per weight forward and 2 backward.
"""

from __future__ import annotations

from dataclasses import dataclass

from stages.training.memory import Shapes, cache_bytes


@dataclass(frozen=True)
class Ceilings:
    """What the device reached in this very run."""

    flops: float  # per second, of a large matrix product
    bytes: float  # per second, read and written, of a large copy


@dataclass(frozen=True)
class Iteration:
    """One PPO iteration: every prompt and response of one length."""

    prompts: int
    prompt: int  # tokens
    response: int
    at_once: int  # responses sampled side by side
    ppo_epochs: int = 1

    @property
    def tokens(self) -> int:
        return self.prompts * (self.prompt + self.response)


def linear_weights(shapes: Shapes) -> int:
    """Weights that every token is multiplied with, the output layer left out."""
    return sum(a * b for a, b in shapes.linear.values())


def head_weights(shapes: Shapes) -> int:
    """Weights that every token whose logits are read is multiplied with."""
    return shapes.vocabulary * shapes.hidden


def attention_flops(shapes: Shapes, length: float) -> float:
    """Of one token of a causal row of this length, forward: scores and their sum over half of the row on average."""
    return 4 * shapes.layers * shapes.queries * length / 2


def forward_flops(shapes: Shapes, tokens: int, length: float, read: int) -> float:
    """Of one pass over rows of a length, with the logits of `read` tokens."""
    body = tokens * (2 * linear_weights(shapes) + attention_flops(shapes, length))
    return body + 2 * read * head_weights(shapes)


def training_flops(shapes: Shapes, tokens: int, length: float, read: int) -> float:
    """Of one pass forward and backward: twice the products with weights, three times those of attention."""
    body = tokens * (4 * linear_weights(shapes) + 3 * attention_flops(shapes, length))
    return body + 4 * read * head_weights(shapes)


def step_bytes(shapes: Shapes, rows: int, length: float, width: int) -> float:
    """Read for one token of each of `rows` responses with so many tokens before it: all weights once, keys, values."""
    weights = linear_weights(shapes) + head_weights(shapes)
    return weights * width + rows * length * cache_bytes(shapes, width)


def iteration_seconds(shapes: Shapes, it: Iteration, ceilings: Ceilings, width: int) -> dict[str, float]:
    """The least time of every phase of a PPO iteration whose sampling gives the old log-probabilities for nothing."""
    length, read = it.prompt + it.response, it.prompts * it.response
    prefill = forward_flops(shapes, it.prompts * it.prompt, it.prompt, it.prompts)
    batches = it.prompts / it.at_once
    decode = batches * it.response * step_bytes(shapes, it.at_once, it.prompt + it.response / 2, width)
    passes = {name: forward_flops(shapes, it.tokens, length, read if name == "reference" else 0) for name in SCORING}
    return {
        "prefill": prefill / ceilings.flops,
        "decode": decode / ceilings.bytes,
        **{name: flops / ceilings.flops for name, flops in passes.items()},
        "train policy": it.ppo_epochs * training_flops(shapes, it.tokens, length, read) / ceilings.flops,
        "train critic": it.ppo_epochs * training_flops(shapes, it.tokens, length, 0) / ceilings.flops,
    }


SCORING = ("reference", "reward", "value")
