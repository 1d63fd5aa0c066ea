"""Root-mean-square normalisation (Zhang and Sennrich 2019)."""

from __future__ import annotations

import torch
from torch import nn

from llama_dist.parallel.layers import Part


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension; the mean in float32, the product with weight in x's dtype."""

    def __init__(self, dim: int, eps: float, part: Part) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim, dtype=part.dtype, device=part.device), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return wide.type_as(x) * self.weight
