"""Products of one row in Triton: y = x W^T as fast as W can be read, which cuBLAS is not at one row.

For runs that promise no bits: a row of several is another kernel's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llama_dist.kernels.triton_ahead import ahead

DEPTH = 1024  # entries of a row of W loaded at a time
AT_ONCE = 4  # such loads under way in a program
COLUMNS = 2  # rows of W that a program multiplies


@triton.jit(do_not_specialize=("columns",))  # type: ignore[untyped-decorator]
def _row(
    x: tl.tensor,
    w: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    columns: tl.tensor,
    w_stride: tl.tensor,
    HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    AT_ONCE: tl.constexpr,
    AHEAD: tl.constexpr,
) -> None:
    """y [columns]; GATED: silu of it times that of the next `columns` rows of W, rounded as by three kernels."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    at = tl.arange(0, DEPTH)
    place = w + column.to(tl.int64)[:, None] * w_stride + at[None, :]
    up = place + columns.to(tl.int64) * w_stride
    mine = (column < columns)[:, None]
    total = tl.zeros((COLUMNS, DEPTH), tl.float32)
    other = tl.zeros((COLUMNS, DEPTH), tl.float32)
    if AHEAD:  # what the kernel in front does not write is read before it has ended
        tl.extra.cuda.gdc_launch_dependents()
    inside = (at < K)[None, :]
    first = tl.load(place, mask=mine & inside, other=0.0)
    if GATED:
        first_up = tl.load(up, mask=mine & inside, other=0.0)
    if AHEAD:
        tl.extra.cuda.gdc_wait()
    by = tl.load(x + at, mask=at < K, other=0.0).to(tl.float32)[None, :]
    total += first.to(tl.float32) * by
    if GATED:
        other += first_up.to(tl.float32) * by
    for start in range(DEPTH, K, DEPTH * AT_ONCE):
        for step in tl.static_range(AT_ONCE):
            here = start + step * DEPTH
            there = here + at < K
            by = tl.load(x + here + at, mask=there, other=0.0).to(tl.float32)[None, :]
            total += tl.load(place + here, mask=mine & there[None, :], other=0.0).to(tl.float32) * by
            if GATED:
                other += tl.load(up + here, mask=mine & there[None, :], other=0.0).to(tl.float32) * by
    found = tl.sum(total, 1)
    kind = y.dtype.element_ty
    if HAS_BIAS:
        found += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)
    if GATED:
        gate = found.to(kind).to(tl.float32)
        silu = (gate / (1.0 + tl.exp(-gate))).to(kind).to(tl.float32)
        found = silu * tl.sum(other, 1).to(kind).to(tl.float32)
    tl.store(y + column, found.to(kind), mask=column < columns)


def _run(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor, gated: bool) -> torch.Tensor:
    assert x.shape[0] == 1 and x.dtype == w.dtype and x.stride(1) == w.stride(1) == 1, (x.shape, w.stride())
    columns, each = y.shape[1], 1 if gated else COLUMNS
    _row[(triton.cdiv(columns, each),)](
        x,
        w,
        w if bias is None else bias,
        y,
        columns,
        w.stride(0),
        HAS_BIAS=bias is not None,
        GATED=gated,
        K=x.shape[1],
        COLUMNS=each,
        DEPTH=DEPTH,
        AT_ONCE=AT_ONCE,
        num_warps=4,
        **ahead(x.device),
    )
    return y


def linear(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [1, K] times w [N, K] transposed, plus bias [N] -> [1, N]."""
    return _run(x, w, bias, torch.empty(1, w.shape[0], dtype=x.dtype, device=x.device), False)


def gated(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """silu(x W1^T) * (x W3^T), with w [2 N, K] both, W1 first -> [1, N]."""
    return _run(x, w, None, torch.empty(1, w.shape[0] // 2, dtype=x.dtype, device=x.device), True)
