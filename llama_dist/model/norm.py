"""Root-mean-square normalisation (Zhang and Sennrich 2019)."""

from __future__ import annotations

import torch
from torch import nn

from llama_dist.kernels.small import add_rms_norm, rms_norm
from llama_dist.parallel.layers import Part


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension; the mean in float32, the product with weight in x's dtype."""

    def __init__(self, dim: int, eps: float, part: Part) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim, dtype=part.dtype, device=part.device), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x.flatten(0, -2), self.weight, self.eps).view(x.shape)

    def of_sum(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x + y, both [n, dim], and the norm of it."""
        return add_rms_norm(x, y, self.weight, self.eps)
