"""Products of one row in Triton: y = x W^T as fast as W can be read, which cuBLAS is not at one row.

For runs that promise no bits: a row of several is another kernel's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llama_dist.kernels.triton_ahead import ahead

DEPTH = 2048  # entries of a row of W loaded at a time; half as many of two rows


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
    DEPTH: tl.constexpr,
    AT_ONCE: tl.constexpr,
    AHEAD: tl.constexpr,
) -> None:
    """An entry of y [columns]. GATED: its silu, times what the next `columns` rows of W give, rounded as by three."""
    column = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, DEPTH)
    place = w + column * w_stride + at
    up = place + columns.to(tl.int64) * w_stride
    total = tl.zeros((DEPTH,), tl.float32)
    other = tl.zeros((DEPTH,), tl.float32)
    if AHEAD:  # what the kernel in front does not write is read before it has ended
        tl.extra.cuda.gdc_launch_dependents()
    first = tl.load(place, mask=at < K, other=0.0)
    if GATED:
        first_up = tl.load(up, mask=at < K, other=0.0)
    if AHEAD:
        tl.extra.cuda.gdc_wait()
    by = tl.load(x + at, mask=at < K, other=0.0).to(tl.float32)
    total += first.to(tl.float32) * by
    if GATED:
        other += first_up.to(tl.float32) * by
    for start in range(DEPTH, K, DEPTH * AT_ONCE):
        for step in tl.static_range(AT_ONCE):
            here = start + step * DEPTH
            there = here + at < K
            by = tl.load(x + here + at, mask=there, other=0.0).to(tl.float32)
            total += tl.load(place + here, mask=there, other=0.0).to(tl.float32) * by
            if GATED:
                other += tl.load(up + here, mask=there, other=0.0).to(tl.float32) * by
    found = tl.sum(total, 0)
    kind = y.dtype.element_ty
    if HAS_BIAS:
        found += tl.load(bias + column).to(tl.float32)
    if GATED:
        gate = found.to(kind).to(tl.float32)
        silu = (gate / (1.0 + tl.exp(-gate))).to(kind).to(tl.float32)
        found = silu * tl.sum(other, 0).to(kind).to(tl.float32)
    tl.store(y + column, found.to(kind))


def _run(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor, gated: bool) -> torch.Tensor:
    assert x.shape[0] == 1 and x.dtype == w.dtype and x.stride(1) == w.stride(1) == 1, (x.shape, w.stride())
    columns = y.shape[1]
    _row[(columns,)](
        x,
        w,
        w if bias is None else bias,
        y,
        columns,
        w.stride(0),
        HAS_BIAS=bias is not None,
        GATED=gated,
        K=x.shape[1],
        DEPTH=DEPTH // 2 if gated else DEPTH,
        AT_ONCE=3 if gated else 1,
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
