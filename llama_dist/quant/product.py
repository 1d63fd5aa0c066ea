"""y = x W^T with packed W, and its partial sums by unit: in C++ or Triton, else with unpacked weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from llama_dist.kernels import linear as plain
from llama_dist.kernels import quantized, triton_here
from llama_dist.kernels.tree import roots
from llama_dist.quant.pack import unpack
from llama_dist.quant.packed import EXACT, Packed
from llama_dist.quant.scheme import Scheme

MANY = 64  # rows: of more a GPU's own product makes up for unpacking


def panels(dtype: torch.dtype, device: torch.device) -> Scheme | None:
    """How weights lie that are not quantised: in panels, where C++ has a product of them; None: as rows."""
    like = torch.empty(0, dtype=dtype, device=device)
    return EXACT[dtype] if quantized.compiled(like) else None


def linear(x: torch.Tensor, w: Packed, bias: torch.Tensor | None = None, reproducible: bool = True) -> torch.Tensor:
    """x [m, k] times w [n, k] transposed, plus bias [n]: [m, n] in x's dtype.

    A row's bits depend on the row alone where that must be, and on CPUs.
    """
    if not quantized.compiled(x):
        if triton_here.serves(x) and not w.scheme.exact:
            return _by_triton(x, w, bias, reproducible)
        return linear_twin(x, w, bias)
    return quantized.product(x, w, bias, torch.empty(len(x), w.rows, dtype=x.dtype), quantized.WHOLE)


def _by_triton(x: torch.Tensor, w: Packed, bias: torch.Tensor | None, reproducible: bool) -> torch.Tensor:
    from llama_dist.kernels import triton_packed, triton_packed_single, triton_unpack

    if reproducible:
        return triton_packed.linear(x, w, bias)
    if len(x) == 1:
        return triton_packed_single.linear(x, w, bias)
    if len(x) <= MANY:
        return triton_packed.linear(x, w, bias, few=len(x) <= triton_packed.FEW)
    return F.linear(x, triton_unpack.unpack(w, x.dtype), bias)


def linear_twin(x: torch.Tensor, w: Packed, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`linear` with the weights unpacked anew; x stays as it is."""
    return plain.linear(x, unpack(w).to(x.dtype), bias)


def unit_sums(x: torch.Tensor, w: Packed, first: int) -> torch.Tensor:
    """Partial products over K by unit, added up to the roots of this run of units: float32 [roots, m, n].

    x [m, k], w [n, k] hold the units from number `first` on.
    """
    if not quantized.compiled(x):
        if triton_here.serves(x) and not w.scheme.exact:
            from llama_dist.kernels import triton_packed

            return triton_packed.unit_sums(x, w, first)
        return unit_sums_twin(x, w, first)
    y = torch.empty(len(roots(first, w.n_units)), len(x), w.rows, dtype=torch.float32)
    return quantized.product(x, w, None, y, first) if w.n_units else y


def unit_sums_twin(x: torch.Tensor, w: Packed, first: int) -> torch.Tensor:
    """`unit_sums` with the weights unpacked anew."""
    return plain.unit_sums(x, unpack(w).to(x.dtype), w.unit, first)
