"""y = x W^T with packed W in Triton, and its partial sums by unit: weights are unpacked where they are multiplied.

A program has one block of sixteen rows of W, so what a step reads of it is what is packed. A weight becomes the number
of x's type that `quant.pack.unpack` makes of it; sums are taken as in triton_linear.py, unit after unit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llama_dist.kernels.triton_linear import FUSED, TILE, in_steps
from llama_dist.quant.packed import Packed
from llama_dist.quant.scheme import BLOCK, GROUP, groups_of

DEPTH = {torch.bfloat16: 64, torch.float16: 64, torch.float32: 32}  # entries of K multiplied at a time: whole groups
WHOLE_BITS = (8, 6, 4)


@triton.jit(do_not_specialize=("rows", "columns", "n_units"))  # type: ignore[untyped-decorator]
def _blocks(
    x: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    factors: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    n_units: tl.tensor,
    unit: tl.tensor,
    unit_groups: tl.tensor,
    x_stride: tl.tensor,
    codes_stride: tl.tensor,
    scales_stride: tl.tensor,
    factors_stride: tl.tensor,
    HAS_BIAS: tl.constexpr,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    """A tile of one plane of y [planes, rows, columns]: of its `n_units` units x [rows, K] times sixteen rows of W."""
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    block = tl.program_id(1).to(tl.int64)
    plane = tl.program_id(2).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    column = block * BLOCK + lane
    is_row = (row < rows)[:, None]
    block_codes = codes + block * codes_stride + lane[None, :] * 4
    block_scales = scales + block * scales_stride + lane[None, :]
    block_factors = factors + block * factors_stride + lane
    number = tl.arange(0, DEPTH)
    # Of a group, step s has numbers 4 s up to 4 s + 3; four and six bits share bytes with step s + 4 (groups.h).
    step, of_four = number % GROUP // 4, number % 4
    total = tl.zeros((TILE, BLOCK), tl.float32)
    for u in range(plane * n_units, plane * n_units + n_units):
        factor = tl.load(block_factors + u * BLOCK)[None, :]
        for start in range(0, unit, DEPTH):
            at = start + number
            inside = at < unit
            group = (u * unit_groups + at // GROUP).to(tl.int64)
            held = inside[:, None] & (lane < BLOCK)[None, :]
            lines = block_codes + of_four[:, None]
            if BITS == 8:
                line = group * 8 + step
                code = tl.load(lines + (line * 4 * BLOCK)[:, None], mask=held, other=0).to(tl.int32)
            else:
                line = group * (4 if BITS == 4 else 6) + step % 4
                code = tl.load(lines + (line * 4 * BLOCK)[:, None], mask=held, other=0).to(tl.int32)
                code = (code >> (step // 4 * 4)[:, None]) & 15
                if BITS == 6:
                    line = group * 6 + 4 + step % 4 // 2
                    high = tl.load(lines + (line * 4 * BLOCK)[:, None], mask=held, other=0).to(tl.int32)
                    code |= ((high >> (step % 2 * 4 + step // 4 * 2)[:, None]) & 3) << 4
            if BITS == 4:
                of_group = block_scales + (group * 2 * BLOCK)[:, None]
                zero = tl.load(of_group + BLOCK, mask=held, other=0).to(tl.float32) / 16.0
            else:
                of_group = block_scales + (group * BLOCK)[:, None]
                zero = tl.full((DEPTH, BLOCK), 1 << (BITS - 1), tl.float32)
            scale = tl.load(of_group, mask=held, other=0).to(tl.float32)
            w = (((code.to(tl.float32) - zero) * scale) * factor).to(x.dtype.element_ty)
            a = tl.load(
                x + row[:, None] * x_stride + (u * unit + at)[None, :], mask=is_row & inside[None, :], other=0.0
            )
            total = tl.dot(a, w, total, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    place = (plane * rows + row[:, None]) * columns + column[None, :]
    tl.store(y + place, total.to(y.dtype.element_ty), mask=is_row & (column < columns)[None, :])


def _run(x: torch.Tensor, w: Packed, bias: torch.Tensor | None, y: torch.Tensor, n_units: int) -> torch.Tensor:
    """y [planes, M, N], packed, of x [M, K] and w [N, K]; a plane has so many units."""
    assert w.scheme.bits in WHOLE_BITS and x.stride(-1) == 1, (w.scheme, x.stride())
    assert all(t.stride(2) == 1 and t.stride(1) == t.shape[2] for t in w.parts), "the groups of a block in one piece"
    assert bias is None or bias.is_contiguous()
    planes, rows, columns = y.shape
    if y.numel():
        _blocks[(triton.cdiv(rows, TILE), triton.cdiv(columns, BLOCK), planes)](
            x,
            *w.parts,
            w.factors if bias is None else bias,
            y,
            rows,
            columns,
            n_units,
            w.unit,
            groups_of(w.unit),
            x.stride(0),
            *(t.stride(0) for t in w.parts),
            HAS_BIAS=bias is not None,
            BITS=w.scheme.bits,
            TILE=TILE,
            DEPTH=DEPTH[x.dtype],
            BLOCK=BLOCK,
            GROUP=GROUP,
            num_warps=4,
            num_stages=3,
            enable_fp_fusion=FUSED,
        )
    return y


def linear(x: torch.Tensor, w: Packed, bias: torch.Tensor | None = None) -> torch.Tensor:
    """As `quant.product.linear`: x [M, K] times w [N, K] transposed, plus bias [N] -> [M, N] in x's dtype."""
    y = torch.empty(1, x.shape[0], w.rows, dtype=x.dtype, device=x.device)
    return _run(x, w, bias, y, w.n_units)[0]


def unit_sums(x: torch.Tensor, w: Packed, first: int) -> torch.Tensor:
    """As `quant.product.unit_sums`: float32 [roots, M, N]. Units are planes of one product, added up in pairs."""
    return in_steps(lambda part, planes: _run(part, w, None, planes, 1), x, w.rows, w.n_units, first)
