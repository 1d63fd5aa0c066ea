"""Norms and the gate in Triton: a program a row, whose sum depends on the row's length alone.

torch's reduction picks its configuration by the number of rows too. Nothing that may differ between two calls is shown
to the compiler, neither how a tensor is aligned nor the step between its rows: it would lay the sum out by that.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llama_dist.kernels.triton_ahead import ahead, follow

BLOCK = 1024  # numbers of the gate that a program computes


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=("x", "y", "weight", "total", "out", "x_stride", "y_stride", "dim", "eps")
)
def _norm(
    x: tl.tensor,
    y: tl.tensor,
    weight: tl.tensor,
    total: tl.tensor,
    out: tl.tensor,
    x_stride: tl.tensor,
    y_stride: tl.tensor,
    dim: tl.tensor,
    eps: tl.tensor,
    ADD: tl.constexpr,
    WIDTH: tl.constexpr,
    AHEAD: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, WIDTH)
    inside = at < dim
    by = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)  # which no kernel writes
    follow(AHEAD)
    kind = out.dtype.element_ty
    wide = tl.load(x + row * x_stride + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        both = (wide + tl.load(y + row * y_stride + at, mask=inside, other=0.0).to(tl.float32)).to(kind)
        tl.store(total + row * dim + at, both, mask=inside)
        wide = both.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / dim + eps)
    scaled = (wide * scale).to(kind).to(tl.float32)
    tl.store(out + row * dim + at, (scaled * by).to(kind), mask=inside)


@triton.jit(do_not_specialize=("a", "b", "out", "a_stride", "b_stride", "dim"))  # type: ignore[untyped-decorator]
def _gate(
    a: tl.tensor,
    b: tl.tensor,
    out: tl.tensor,
    a_stride: tl.tensor,
    b_stride: tl.tensor,
    dim: tl.tensor,
    BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
) -> None:
    follow(AHEAD)
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < dim
    kind = out.dtype.element_ty
    gate = tl.load(a + row * a_stride + at, mask=inside, other=0.0).to(tl.float32)
    by = tl.load(b + row * b_stride + at, mask=inside, other=0.0).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(kind).to(tl.float32)
    tl.store(out + row * dim + at, (silu * by).to(kind), mask=inside)


def _normed(
    x: torch.Tensor, y: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    assert weight.dtype == x.dtype and weight.is_contiguous() and x.stride(1) == 1, "a weight like the rows"
    n, dim = x.shape
    out = torch.empty((n, dim), dtype=x.dtype, device=x.device)
    total = out if y is None else torch.empty_like(out)
    if n:
        width = triton.next_power_of_2(dim)
        added, stride = (x, 0) if y is None else (y, y.stride(0))
        rows = (x, added, weight, total, out, x.stride(0), stride, dim, eps)
        n_warps = 4 if width <= 2048 else 8
        how = {"num_warps": n_warps, "enable_fp_fusion": False, **ahead(x.device)}
        _norm[(n,)](*rows, ADD=y is not None, WIDTH=width, **how)
    return total, out


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As `kernels.small.rms_norm`."""
    return _normed(x, None, weight, eps)[1]


def add_rms_norm(
    x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `kernels.small.add_rms_norm`."""
    assert y.shape == x.shape and y.dtype == x.dtype and y.stride(1) == 1, "rows in one piece, of one type"
    return _normed(x, y, weight, eps)


def silu_mul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """As `kernels.small.silu_mul`."""
    assert a.shape == b.shape and a.dtype == b.dtype and a.stride(1) == b.stride(1) == 1, "rows in one piece, alike"
    n, dim = a.shape
    out = torch.empty((n, dim), dtype=a.dtype, device=a.device)
    if n:
        grid = (n, triton.cdiv(dim, BLOCK))
        how = {"num_warps": 4, "enable_fp_fusion": False, **ahead(a.device)}
        _gate[grid](a, b, out, a.stride(0), b.stride(0), dim, BLOCK=BLOCK, **how)
    return out
