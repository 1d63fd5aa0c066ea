"""Products in Triton whose sums have a fixed order: y = x W^T, and its partial sums by unit.

A program sums over K from its beginning to its end: cuBLAS, which picks its kernel by shape, may split K for few rows.
Rows and columns past the last are zeros. The tile's size goes by the shape, but a tensor core adds up an entry in the
same order in tiles of all these sizes (seen on an H200); where a device does not, all are of one size.
So an entry of y has the same bits whatever is computed beside it. Number of rows and columns are kept from the
compiler, which might take another way for special ones.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from llama_dist.kernels.tree import roots
from llama_dist.kernels.triton_ahead import ahead, follow

log = logging.getLogger("llama_dist")

TILE = 64  # rows
FUSED = True  # multiply and add in one rounding, whatever Triton's default is
SCRATCH = 2**24  # numbers of partial products at a time


class Tile(NamedTuple):
    """Rows, columns and entries of K at a time; and how Triton is told to compute them."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


OF_FLOAT32 = Tile(64, 64, 32, 4, 3)
SQUARE, NARROW, LARGE = Tile(64, 64, 64, 4, 3), Tile(64, 32, 128, 4, 4), Tile(128, 128, 64, 8, 3)
FILLED = 256  # programs that keep a GPU's memory busy; large tiles are worth it from a quarter of that on


@functools.cache
def _agree(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether tiles of all sizes give the same bits on a device; asked for before anything is recorded there."""
    generator = torch.Generator().manual_seed(7)
    x, w = (torch.randn(n, 512, generator=generator).to(device, dtype) for n in (150, 140))
    try:
        return tiles_agree(x, w)
    except Exception as err:  # one that does not fit: of Triton's own types
        log.info("products in tiles of one size: %s", " ".join(str(err).split())[:300])
        return False


def tile_for(like: torch.Tensor, rows: int, columns: int, planes: int) -> Tile:
    """The fastest one: large where there is work for it, narrow where square ones would be few."""
    if like.dtype == torch.float32:
        return OF_FLOAT32
    if like.device.type == "cuda" and not _agree(like.device, like.dtype):
        return SQUARE
    if rows > TILE and triton.cdiv(rows, 128) * triton.cdiv(columns, 128) * planes >= FILLED // 4:
        return LARGE
    few = triton.cdiv(rows, TILE) * triton.cdiv(columns, TILE) * planes < FILLED
    return NARROW if few else SQUARE


@triton.jit(do_not_specialize=("rows", "columns"))  # type: ignore[untyped-decorator]
def _tiles(
    x: tl.tensor,
    w: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    unit: tl.tensor,
    x_stride: tl.tensor,
    w_stride: tl.tensor,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    AHEAD: tl.constexpr,
) -> None:
    """One tile of one plane of y [units, rows, columns]: the product over that unit of x [rows, K], w [columns, K]."""
    follow(AHEAD)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    plane = tl.program_id(2).to(tl.int64)
    x_row = x + row[:, None] * x_stride + plane * unit
    w_row = w + column[:, None] * w_stride + plane * unit
    is_row, is_column = (row < rows)[:, None], (column < columns)[:, None]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, unit, DEPTH):
        at = start + tl.arange(0, DEPTH)
        inside = (at < unit)[None, :]
        a = tl.load(x_row + at[None, :], mask=is_row & inside, other=0.0)
        b = tl.load(w_row + at[None, :], mask=is_column & inside, other=0.0)
        total = tl.dot(a, tl.trans(b), total, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    place = (plane * rows + row[:, None]) * columns + column[None, :]
    tl.store(y + place, total.to(y.dtype.element_ty), mask=is_row & (column < columns)[None, :])


def _run(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    unit: int,
    tile: Tile | None = None,
) -> torch.Tensor:
    """y [units, M, N], packed, of x [M, K] and w [N, K], K being so many whole units."""
    assert x.dtype == w.dtype and x.stride(-1) == w.stride(-1) == 1, (x.stride(), w.stride())
    assert bias is None or bias.is_contiguous()
    planes, rows, columns = y.shape
    if y.numel():
        tile = tile or tile_for(x, rows, columns, planes)
        grid = (triton.cdiv(rows, tile.rows), triton.cdiv(columns, tile.columns), planes)
        _tiles[grid](
            x,
            w,
            w if bias is None else bias,
            y,
            rows,
            columns,
            unit,
            x.stride(0),
            w.stride(0),
            HAS_BIAS=bias is not None,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            DEPTH=tile.depth,
            num_warps=tile.warps,
            num_stages=tile.stages,
            enable_fp_fusion=FUSED,
            **ahead(x.device),
        )
    return y


def linear(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """As `kernels.linear.linear`: x [M, K] times w [N, K] transposed, plus bias [N] -> [M, N]."""
    y = torch.empty(1, x.shape[0], w.shape[0], dtype=dtype or x.dtype, device=x.device)
    return _run(x, w, bias, y, x.shape[1])[0]


def tiles_agree(x: torch.Tensor, w: torch.Tensor) -> bool:
    """Whether tiles of all sizes give x [M, K] times w [N, K] the same bits on this device."""
    if x.dtype == torch.float32:
        return True
    y = torch.empty(3, 1, x.shape[0], w.shape[0], dtype=torch.float32, device=x.device)
    found = [_run(x, w, None, of, x.shape[1], tile) for of, tile in zip(y, (SQUARE, NARROW, LARGE), strict=True)]
    return all(torch.equal(other, found[0]) for other in found[1:])


def unit_sums(x: torch.Tensor, w: torch.Tensor, unit: int, first: int) -> torch.Tensor:
    """As `kernels.linear.unit_sums`: float32 [roots, M, N]. Units are planes of one product, added up in pairs."""
    n_units = x.shape[1] // unit
    return in_steps(lambda part, planes: _run(part, w, None, planes, unit), x, w.shape[0], n_units, first)


def in_steps(
    product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    columns: int,
    n_units: int,
    first: int,
) -> torch.Tensor:
    """Sums of units number `first` and on, float32 [roots, M, columns]; `product` fills planes [units, rows, columns].

    Some rows of x at a time, so that the planes take little memory.
    """
    nodes = roots(first, n_units)
    sums = torch.empty(len(nodes), x.shape[0], columns, dtype=torch.float32, device=x.device)
    step = max(TILE, SCRATCH // max(1, n_units * columns))
    for start in range(0, x.shape[0], step):
        part = x[start : start + step]
        planes = torch.empty(n_units, len(part), columns, dtype=torch.float32, device=x.device)
        product(part, planes)
        for root, held in zip(sums, torch.split(planes, [2**level for level, _ in nodes]), strict=True):
            while len(held) > 1:
                held = held[0::2] + held[1::2]
            root[start : start + step] = held[0]
    return sums
