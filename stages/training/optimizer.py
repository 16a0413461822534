"""AdamW over one flat buffer: every trained weight is a view into it, and so is every gradient.

With one buffer, clipping, summing over ranks, saving and the update are single operations; and without torch.optim
every command starts about a second faster.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019), bias-corrected as in Kingma & Ba 2015."""

    def __init__(self, parameters: list[nn.Parameter], *, beta1: float, beta2: float, eps: float, weight_decay: float):
        assert parameters and all(p.dtype == torch.float32 for p in parameters)
        self.beta1, self.beta2, self.eps, self.weight_decay = beta1, beta2, eps, weight_decay
        sizes = [p.numel() for p in parameters]
        self.weights = torch.cat([p.detach().reshape(-1) for p in parameters])  # (N,)
        self.gradient = torch.zeros_like(self.weights)
        self.mean = torch.zeros_like(self.weights)
        self.square = torch.zeros_like(self.weights)
        self.updates = 0
        parts = zip(parameters, self.weights.split(sizes), self.gradient.split(sizes), strict=True)
        for parameter, weight, gradient in parts:
            parameter.data = weight.view_as(parameter)
            parameter.grad = gradient.view_as(parameter)  # backward adds into it in place

    def zero(self) -> None:
        """Set the gradient to zero."""
        self.gradient.zero_()

    def step(self, learning_rate: float) -> None:
        """Make one update from the current gradient."""
        self.updates += 1
        self.mean.lerp_(self.gradient, 1 - self.beta1)
        self.square.mul_(self.beta2).addcmul_(self.gradient, self.gradient, value=1 - self.beta2)
        correction = math.sqrt(1 - self.beta2**self.updates)
        denominator = (self.square.sqrt() / correction).add_(self.eps)
        self.weights.mul_(1 - learning_rate * self.weight_decay)
        self.weights.addcdiv_(self.mean, denominator, value=-learning_rate / (1 - self.beta1**self.updates))

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The state to save, by keys that begin with `name`."""
        return {f"{name}.weights": self.weights, f"{name}.mean": self.mean, f"{name}.square": self.square}

    def load(self, name: str, tensors: dict[str, Tensor], updates: int) -> None:
        """Restore saved state; weights are overwritten in place, since parameters are views of them."""
        self.weights.copy_(tensors[f"{name}.weights"])
        self.mean.copy_(tensors[f"{name}.mean"])
        self.square.copy_(tensors[f"{name}.square"])
        self.updates = updates


def clip(optimizers: list[AdamW], max_norm: float) -> float:
    """Scale the joint gradient of optimisers to a norm of at most `max_norm` (0: no limit); returns its norm before."""
    norm = math.sqrt(sum(float(o.gradient.double().square().sum()) for o in optimizers))
    if 0 < max_norm < norm:
        for optimizer in optimizers:
            optimizer.gradient.mul_(max_norm / (norm + 1e-6))
    return norm


def learning_rate_at(step: int, total: int, peak: float, schedule: str, warmup_ratio: float) -> float:
    """Learning rate of step `step` (from 0) of `total`: linear warm-up to the peak, then the schedule."""
    warmup = math.ceil(warmup_ratio * total)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    if schedule == "linear":
        return peak * (1 - done)
    if schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * done))
    return peak
