"""Products whose sums have a fixed order: y = x W^T, and its partial sums by unit.

Weights are rows here; where they lie in panels the product is in quant/. On a CPU with the C++ kernels, and on a GPU
with those in Triton, an entry of y has the same bits whatever rows and columns are computed beside it, on any number of
threads. Without them torch's own product serves, with x filled up to a fixed number of rows; whether that keeps the
promise is for a check on the machine to say.
"""

from __future__ import annotations

import functools
from ctypes import c_int, c_int64, c_void_p
from typing import Any

import torch
import torch.nn.functional as F

from llama_dist.kernels import build, triton_here
from llama_dist.kernels.tree import merge, roots

AVX512_BF16 = 2  # what the kernels call a processor that multiplies bfloat16 itself
FEW = 16  # up to so many rows the C++ kernel is the faster product where weights lie as rows
ROWS = 16  # torch's product gets a multiple of so many rows: its kernels differ for fewer


@functools.cache
def _compiled() -> Any:
    x = w = (c_void_p, c_int64)
    return build.function("linear", c_int, *x, *w, c_void_p, c_void_p, c_int64, c_int64, c_int, *[c_int64] * 5, c_int)


def compiled(x: torch.Tensor) -> bool:
    """Whether the C++ kernel serves x."""
    return x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float32) and _compiled() is not None


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 itself: there torch's products are good, and weights lie as rows."""
    return bool(build.function("instructions")() == AVX512_BF16)


def single(x: torch.Tensor) -> bool:
    """Whether the kernel of one row is the fastest for x."""
    return x.shape[0] == 1 and triton_here.serves(x)


def fastest(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [M, K] times w [N, K] transposed, plus bias [N], by the fastest product: its bits depend on M."""
    if single(x):
        from llama_dist.kernels import triton_single

        return triton_single.linear(x, w, bias)
    return linear(x, w, bias) if x.shape[0] <= FEW and compiled(x) else F.linear(x, w, bias)


def _run(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor, unit: int, first: int
) -> torch.Tensor:
    """y [..., M, N] of x [M, K] and w [N, K]; more dimensions of y are the roots."""
    function = _compiled()
    assert function is not None and x.dtype == w.dtype
    assert x.stride(-1) == w.stride(-1) == y.stride(-1) == 1, (x.stride(), w.stride(), y.stride())
    function(
        x.dtype == torch.bfloat16,
        x.data_ptr(),
        x.stride(0),
        w.data_ptr(),
        w.stride(0),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        y.stride(-2),
        y.stride(0),
        y.dtype == torch.float32,
        x.shape[0],
        w.shape[0],
        x.shape[1],
        unit,
        first,
        torch.get_num_threads(),
    )
    return y


def linear(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """x [M, K] times w [N, K] transposed, plus bias [N]: [M, N], in x's dtype or in float32 if `dtype` says so."""
    if compiled(x):
        y = torch.empty(x.shape[0], w.shape[0], dtype=dtype or x.dtype)
        return _run(x, w, bias, y, max(1, x.shape[1]), 0)
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
    if compiled(x):
        y = torch.empty(len(roots(first, n_units)), x.shape[0], w.shape[0], dtype=torch.float32)
        return _run(x, w, None, y, unit, first) if n_units else y
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
