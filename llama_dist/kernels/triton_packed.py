"""y = x W^T with packed W in Triton, and its partial sums by unit: weights are unpacked where they are multiplied.

A program has one block of sixteen rows of W, so what a step reads of it is what is packed. Codes are read in words of
four bytes; so x is laid out first by where in a word a number's code is, and each such part is a product of its own. A
weight becomes the number of x's type that `quant.pack.unpack` makes of it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from llama_dist.kernels.triton_ahead import ahead, follow
from llama_dist.kernels.triton_linear import FUSED, TILE, in_steps
from llama_dist.quant.packed import Packed
from llama_dist.quant.scheme import BLOCK, GROUP, INT8, groups_of

FEW = 16  # rows, of which a matrix unit takes a tile with less beside it
WORDS = {8: 64, 6: 32, 4: 32}  # by the bits of a code: words of a row multiplied at a time, of 256 numbers


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
    unit_words: tl.tensor,
    x_stride: tl.tensor,
    part_stride: tl.tensor,
    codes_stride: tl.tensor,
    scales_stride: tl.tensor,
    factors_stride: tl.tensor,
    HAS_BIAS: tl.constexpr,
    BITS: tl.constexpr,
    FLOATS: tl.constexpr,
    TILE: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
) -> None:
    """A tile of one plane of y [planes, rows, columns]: of its `n_units` units x times sixteen rows of W.

    x [rows, parts, words of all units]; part p goes with the codes that begin at bit 8 (p % 4) + 4 (p // 4) of a word.
    """
    follow(AHEAD)
    LINES: tl.constexpr = 8 if BITS == 8 else 4  # words of a group of a row
    STORED: tl.constexpr = BITS  # lines of a group as they lie: of six bits two more, for the high bits of four lines
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    block = tl.program_id(1).to(tl.int64)
    plane = tl.program_id(2).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    column = block * BLOCK + lane
    is_row = (row < rows)[:, None]
    block_codes = codes + block * codes_stride + lane[None, :]
    block_scales = scales + block * scales_stride + lane[None, :]
    block_factors = factors + block * factors_stride + lane
    x_row = x + row[:, None] * x_stride
    total = tl.zeros((TILE, BLOCK), tl.float32)
    for u in range(plane * n_units, plane * n_units + n_units):
        factor = tl.load(block_factors + u * BLOCK)[None, :]
        for start in range(0, unit_words, WORDS):
            in_unit = start + tl.arange(0, WORDS)
            inside = in_unit < unit_words
            at = u * unit_words + in_unit
            group, step = at // LINES, at % LINES
            held = inside[:, None] & (lane < BLOCK)[None, :]
            word = tl.load(block_codes + ((group * STORED + step) * BLOCK)[:, None], mask=held, other=0)
            if BITS == 6:
                more = tl.load(block_codes + ((group * STORED + 4 + step // 2) * BLOCK)[:, None], mask=held, other=0)
                more = more >> (step % 2 * 4).to(tl.int32)[:, None]
            if FLOATS:
                pass
            elif BITS == 4:
                of_group = block_scales + (group * 2 * BLOCK)[:, None]
                zero = tl.load(of_group + BLOCK, mask=held, other=0).to(tl.float32) / 16.0
            else:
                of_group = block_scales + (group * BLOCK)[:, None]
                zero = tl.full((WORDS, BLOCK), 1 << (BITS - 1), tl.float32)
            if not FLOATS:
                scale = tl.load(of_group, mask=held, other=0).to(tl.float32)
            for part in tl.static_range(32 // LINES):
                code = (word >> (8 * (part % 4) + 4 * (part // 4))) & (255 if BITS == 8 else 15)
                if BITS == 6:
                    code |= ((more >> (8 * (part % 4) + 2 * (part // 4))) & 3) << 4
                if FLOATS:  # its bits, moved to those of a float, are a 2^120th of it
                    bits = ((code << 24) >> 4) & -0x78100000  # 0x87f00000
                    steps = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36
                else:
                    # 2^23 + code, as its bits say, less 2^23: sooner than a conversion
                    steps = ((code | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0 - zero) * scale
                w = (steps * factor).to(x.dtype.element_ty)
                a = tl.load(x_row + (part * part_stride + at)[None, :], mask=is_row & inside[None, :], other=0.0)
                total = tl.dot(a, w, total, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    place = (plane * rows + row[:, None]) * columns + column[None, :]
    tl.store(y + place, total.to(y.dtype.element_ty), mask=is_row & (column < columns)[None, :])


def _parts(x: torch.Tensor, w: Packed) -> torch.Tensor:
    """x [M, K] by the place of a number's code in its word: [M, parts, words of all units], zeros where a unit ends."""
    groups = groups_of(w.unit)
    padded = x.reshape(len(x), w.n_units, w.unit)
    if short := groups * GROUP - w.unit:
        padded = F.pad(padded, (0, short))
    halves = 1 if w.scheme.bits == 8 else 2  # four and six bits: step s, 0 to 3, shares words with step s + 4
    laid = padded.view(len(x), w.n_units * groups, halves, -1, 4).permute(0, 2, 4, 1, 3)
    return laid.reshape(len(x), halves * 4, -1).contiguous()


def _run(
    x: torch.Tensor, w: Packed, bias: torch.Tensor | None, y: torch.Tensor, n_units: int, few: bool = False
) -> torch.Tensor:
    """y [planes, M, N], packed, of x [M, K] and w [N, K]; a plane has so many units. `few`: in tiles of FEW rows."""
    assert w.scheme.bits in WORDS and x.shape[1] == w.shape[1], (w.scheme, x.shape, w.shape)
    laid = [t.stride(2) == 1 and t.stride(1) == t.shape[2] for t in w.parts if t.numel()]
    assert all(laid), "the groups of a block in one piece"
    assert bias is None or bias.is_contiguous()
    planes, rows, columns = y.shape
    if y.numel():
        parts, codes = _parts(x, w), w.codes.view(torch.int32)
        tile, warps, stages = (FEW, 1, 2) if few else (TILE, 4, 3) if w.scheme == INT8 else (TILE, 2, 2)
        if x.dtype == torch.float32:
            stages = 1  # three take more than some devices share
        _blocks[(triton.cdiv(rows, tile), triton.cdiv(columns, BLOCK), planes)](
            parts,
            codes,
            w.scales,
            w.factors,
            w.factors if bias is None else bias,
            y,
            rows,
            columns,
            n_units,
            parts.shape[2] // w.n_units,
            parts.stride(0),
            parts.stride(1),
            codes.stride(0),
            w.scales.stride(0),
            w.factors.stride(0),
            HAS_BIAS=bias is not None,
            BITS=w.scheme.bits,
            FLOATS=w.scheme.floats,
            TILE=tile,
            WORDS=WORDS[w.scheme.bits],
            BLOCK=BLOCK,
            num_warps=warps,
            num_stages=stages,
            enable_fp_fusion=FUSED,
            **ahead(x.device),
        )
    return y


def linear(x: torch.Tensor, w: Packed, bias: torch.Tensor | None = None, few: bool = False) -> torch.Tensor:
    """As `quant.product.linear`: x [M, K] times w [N, K] transposed, plus bias [N] -> [M, N] in x's dtype.

    `few`: by another tile, for few rows that need not have the bits that they have among many.
    """
    y = torch.empty(1, x.shape[0], w.rows, dtype=x.dtype, device=x.device)
    return _run(x, w, bias, y, w.n_units, few)[0]


def unit_sums(x: torch.Tensor, w: Packed, first: int) -> torch.Tensor:
    """As `quant.product.unit_sums`: float32 [roots, M, N]. Units are planes of one product, added up in pairs."""
    return in_steps(lambda part, planes: _run(part, w, None, planes, 1), x, w.rows, w.n_units, first)
