"""Products of one row with packed W in Triton: weights become numbers in registers, and no matrix unit is asked.

For runs that promise no bits, as triton_single.py. Weights are the float32 numbers that codes, scales and factors say;
the kernel of several rows rounds them to x's type.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llama_dist.kernels.triton_ahead import ahead, follow
from llama_dist.quant.packed import Packed
from llama_dist.quant.scheme import BLOCK, groups_of

WORDS = 256  # of a row, loaded at a time: of four bytes; half as many where there are
MANY = 1024  # blocks of rows


@triton.jit  # type: ignore[untyped-decorator]
def _part(
    x: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    factors: tl.tensor,
    at: tl.tensor,
    N_UNITS: tl.constexpr,
    UNIT: tl.constexpr,
    UNIT_WORDS: tl.constexpr,
    BITS: tl.constexpr,
    FLOATS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """x times the weights of the words `at` of sixteen rows: [words, BLOCK] float32."""
    LINES: tl.constexpr = 8 if BITS == 8 else 4  # words of a group of a row
    lane = tl.arange(0, BLOCK)[None, :]
    group, step = at // LINES, at % LINES
    there = at < N_UNITS * UNIT_WORDS
    held = there[:, None] & (lane < BLOCK)
    word = tl.load(codes + ((group * BITS + step) * BLOCK)[:, None] + lane, mask=held, other=0)
    if BITS == 6:
        more = tl.load(codes + ((group * BITS + 4 + step // 2) * BLOCK)[:, None] + lane, mask=held, other=0)
        more = more >> (step % 2 * 4)[:, None]
    u = at // UNIT_WORDS
    if N_UNITS == 1:
        factor = tl.load(factors + lane)
    else:
        factor = tl.load(factors + (u * BLOCK)[:, None] + lane, mask=held, other=0.0)
    in_unit = (group - u * (UNIT_WORDS // LINES)) * 32 + step * 4  # the place of the word's first code
    sums = tl.zeros(word.shape, tl.float32)
    all_x = tl.zeros(at.shape, tl.float32)
    for part in tl.static_range(32 // LINES):
        code = (word >> (8 * (part % 4) + 4 * (part // 4))) & (255 if BITS == 8 else 15)
        if BITS == 6:
            code |= ((more >> (8 * (part % 4) + 2 * (part // 4))) & 3) << 4
        here = in_unit + 16 * (part // 4) + part % 4
        by = tl.load(x + u * UNIT + here, mask=there & (here < UNIT), other=0.0).to(tl.float32)
        if FLOATS:  # its bits, moved to those of a float, are a 2^120th of it
            bits = ((code << 24) >> 4) & -0x78100000  # 0x87f00000
            number = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36
        else:  # 2^23 + code, as its bits say, less 2^23: sooner than a conversion
            number = (code | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
            all_x += by
        sums += number * by[:, None]
    if FLOATS:
        return sums * factor
    if BITS == 4:
        of_group = scales + (group * 2 * BLOCK)[:, None] + lane
        zero = tl.load(of_group + BLOCK, mask=held, other=0).to(tl.float32) * 0.0625
    else:
        of_group = scales + (group * BLOCK)[:, None] + lane
        zero = tl.full(word.shape, 1 << (BITS - 1), tl.float32)
    return (sums - zero * all_x[:, None]) * (tl.load(of_group, mask=held, other=0).to(tl.float32) * factor)


@triton.jit(do_not_specialize=("columns",))  # type: ignore[untyped-decorator]
def _row(
    x: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    factors: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    columns: tl.tensor,
    codes_stride: tl.tensor,
    scales_stride: tl.tensor,
    factors_stride: tl.tensor,
    N_UNITS: tl.constexpr,
    UNIT: tl.constexpr,
    UNIT_WORDS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BITS: tl.constexpr,
    FLOATS: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
) -> None:
    """Sixteen entries of y [columns]."""
    follow(AHEAD)
    block = tl.program_id(0).to(tl.int64)
    column = block * BLOCK + tl.arange(0, BLOCK)
    of_codes, of_scales = codes + block * codes_stride, scales + block * scales_stride
    of_factors = factors + block * factors_stride
    total = tl.zeros((WORDS, BLOCK), tl.float32)
    for start in range(0, N_UNITS * UNIT_WORDS, WORDS):
        at = start + tl.arange(0, WORDS)
        total += _part(x, of_codes, of_scales, of_factors, at, N_UNITS, UNIT, UNIT_WORDS, BITS, FLOATS, BLOCK)
    found = tl.sum(total, 0)
    if HAS_BIAS:
        found += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)
    tl.store(y + column, found.to(y.dtype.element_ty), mask=column < columns)


def linear(x: torch.Tensor, w: Packed, bias: torch.Tensor | None = None) -> torch.Tensor:
    """As `quant.product.linear` of x [1, K]."""
    assert x.shape == (1, w.shape[1]) and x.stride(1) == 1 and not w.scheme.exact, (x.shape, w.shape, w.scheme)
    y = torch.empty(1, w.rows, dtype=x.dtype, device=x.device)
    codes = w.codes.view(torch.int32)
    share = 1 if len(codes) < MANY else 2
    _row[(len(codes),)](
        x,
        codes,
        w.scales,
        w.factors,
        w.factors if bias is None else bias,
        y,
        w.rows,
        codes.stride(0),
        w.scales.stride(0),
        w.factors.stride(0),
        N_UNITS=w.n_units,
        UNIT=w.unit,
        UNIT_WORDS=groups_of(w.unit) * (8 if w.scheme.bits == 8 else 4),  # of six bits those with the low ones
        HAS_BIAS=bias is not None,
        BITS=w.scheme.bits,
        FLOATS=w.scheme.floats,
        WORDS=WORDS // share,
        BLOCK=BLOCK,
        num_warps=16 // share,
        **ahead(x.device),
    )
    return y
