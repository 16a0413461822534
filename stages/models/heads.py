"""The scalar head of a reward model or critic: one number from a hidden state."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from stages.models.checks import check_stored


class ScalarHead(nn.Module):
    """score = w . h + b in fp32, for hidden states h of shape (..., H)."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))  # (H,)
        self.bias = nn.Parameter(torch.zeros(()))  # makes demonstrations score 0 on average

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.float() @ self.weight + self.bias

    def randomise(self, seed: int) -> ScalarHead:
        """Draw the weight with standard deviation 1 / sqrt(H + 1) (Stiennon 2020, released code)."""
        width = self.weight.numel()
        drawn = torch.randn(width, generator=torch.Generator().manual_seed(seed)) / math.sqrt(width + 1)
        self.weight.data.copy_(drawn)
        return self

    def copy(self, *, trainable: bool) -> ScalarHead:
        """An independent head with the same numbers."""
        twin = ScalarHead(self.weight.numel()).to(self.weight.device)
        twin.load_state_dict(self.state_dict())
        return twin.requires_grad_(trainable)

    def tensors(self) -> dict[str, Tensor]:
        """Weights for head.safetensors."""
        return {"weight": self.weight.detach(), "bias": self.bias.detach()}


def head_from(tensors: dict[str, Tensor], width: int, device: torch.device, *, where: str) -> ScalarHead:
    """A frozen head from head.safetensors; raises CheckpointError if it is not one for this base."""
    head = ScalarHead(width)
    shapes = {name: tuple(part.shape) for name, part in head.state_dict().items()}
    expected = dict.fromkeys(tensors) | shapes  # None, which no shape equals, for any further tensor
    check_stored(tensors, expected, "the scalar head's weights", where)
    head.load_state_dict(tensors)
    return head.to(device).requires_grad_(False)
