"""Products with weights that lie as rows, whose sums have a fixed order: y = x W^T, and its partial sums by unit.

Where weights lie in panels, or are packed, the product is in quant/: so it is on a CPU with the C++ kernels. On a GPU
with those in Triton an entry of y has the same bits whatever rows and columns are computed beside it. Without kernels
torch's own product serves, with x filled up to a fixed number of rows; whether that keeps the promise is for a check on
the machine to say.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from llama_dist.kernels import triton_here
from llama_dist.kernels.tree import merge

ROWS = 16  # torch's product gets a multiple of so many rows: its kernels differ for fewer


def single(x: torch.Tensor) -> bool:
    """Whether the kernel of one row is the fastest for x."""
    return x.shape[0] == 1 and triton_here.serves(x)


def fastest(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [M, K] times w [N, K] transposed, plus bias [N], by the fastest product: its bits depend on M."""
    if single(x):
        from llama_dist.kernels import triton_single

        return triton_single.linear(x, w, bias)
    return F.linear(x, w, bias)


def linear(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """x [M, K] times w [N, K] transposed, plus bias [N]: [M, N], in x's dtype or in float32 if `dtype` says so."""
    if triton_here.serves(x):
        from llama_dist.kernels import triton_linear

        return triton_linear.linear(x, w, bias, dtype)
    return linear_twin(x, w, bias).to(dtype or x.dtype)


def linear_twin(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`linear` by torch's own product, of a multiple of ROWS rows."""
    short = -x.shape[0] % ROWS
    return F.linear(F.pad(x, (0, 0, 0, short)), w, bias)[: x.shape[0]]


def unit_sums(x: torch.Tensor, w: torch.Tensor, unit: int, first: int) -> torch.Tensor:
    """Partial products over K by unit, added up to the roots of this run of units: float32 [roots, M, N].

    x [M, K], w [N, K] hold whole units of `unit` entries, the first of them unit number `first`.
    """
    n_units = x.shape[1] // unit
    assert x.shape[1] == n_units * unit, f"{x.shape[1]} entries are no whole units of {unit}"
    if triton_here.serves(x):
        from llama_dist.kernels import triton_linear

        return triton_linear.unit_sums(x, w, unit, first)
    return unit_sums_twin(x, w, unit, first)


def unit_sums_twin(x: torch.Tensor, w: torch.Tensor, unit: int, first: int) -> torch.Tensor:
    """`unit_sums` by torch's own product."""
    parts = zip(torch.split(x, unit, 1), torch.split(w, unit, 1), strict=True)
    sums = [linear_twin(a.contiguous(), b.contiguous()).float() for a, b in parts if a.shape[1]]
    _, sums = merge([(0, first + i) for i in range(len(sums))], sums)
    return torch.stack(sums) if sums else torch.empty(0, len(x), len(w), device=x.device)
