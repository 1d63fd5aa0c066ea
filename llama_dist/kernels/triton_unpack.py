"""Packed weights back to numbers in Triton, for products of so many rows that cuBLAS's own makes up for it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llama_dist.kernels.triton_ahead import ahead, follow
from llama_dist.quant.packed import Packed
from llama_dist.quant.scheme import BLOCK, groups_of

WORDS = 64  # of sixteen rows that a program unpacks: of four bytes


@triton.jit  # type: ignore[untyped-decorator]
def _unpack(
    codes: tl.tensor,
    scales: tl.tensor,
    factors: tl.tensor,
    w: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    codes_stride: tl.tensor,
    scales_stride: tl.tensor,
    factors_stride: tl.tensor,
    N_UNITS: tl.constexpr,
    UNIT: tl.constexpr,
    UNIT_WORDS: tl.constexpr,
    BITS: tl.constexpr,
    FLOATS: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
) -> None:
    """Some words of one block of rows into w [rows, columns]; codes and words as in triton_packed.py."""
    follow(AHEAD)
    LINES: tl.constexpr = 8 if BITS == 8 else 4
    block = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    lane = tl.arange(0, BLOCK)[None, :]
    group, step, u = at // LINES, at % LINES, at // UNIT_WORDS
    held = (at < N_UNITS * UNIT_WORDS)[:, None] & (lane < BLOCK)
    of_codes = codes + block * codes_stride + lane
    word = tl.load(of_codes + ((group * BITS + step) * BLOCK)[:, None], mask=held, other=0)
    if BITS == 6:
        more = tl.load(of_codes + ((group * BITS + 4 + step // 2) * BLOCK)[:, None], mask=held, other=0)
        more = more >> (step % 2 * 4)[:, None]
    factor = tl.load(factors + block * factors_stride + (u * BLOCK)[:, None] + lane, mask=held, other=0.0)
    if FLOATS:
        scale = factor
        zero = factor
    elif BITS == 4:
        of_group = scales + block * scales_stride + (group * 2 * BLOCK)[:, None] + lane
        scale = tl.load(of_group, mask=held, other=0).to(tl.float32)
        zero = tl.load(of_group + BLOCK, mask=held, other=0).to(tl.float32) * 0.0625
    else:
        of_group = scales + block * scales_stride + (group * BLOCK)[:, None] + lane
        scale = tl.load(of_group, mask=held, other=0).to(tl.float32)
        zero = tl.full(word.shape, 1 << (BITS - 1), tl.float32)
    # Where the four codes of a word go that lie side by side; those of its upper halves 16 columns on.
    entry = tl.arange(0, 4 * WORDS)
    of_word = tl.program_id(0) * WORDS + entry // 4
    in_unit = (
        of_word // LINES * 32 + of_word % LINES * 4 + entry % 4 - of_word // UNIT_WORDS * (UNIT_WORDS // LINES * 32)
    )
    row = block * BLOCK + tl.arange(0, BLOCK)
    for half in tl.static_range(8 // LINES):
        column = in_unit + 16 * half
        mine = (row < rows)[:, None] & ((of_word < N_UNITS * UNIT_WORDS) & (column < UNIT))[None, :]
        a = _number(word, more if BITS == 6 else word, half, 0, zero, scale, factor, BITS, FLOATS)
        b = _number(word, more if BITS == 6 else word, half, 1, zero, scale, factor, BITS, FLOATS)
        c = _number(word, more if BITS == 6 else word, half, 2, zero, scale, factor, BITS, FLOATS)
        d = _number(word, more if BITS == 6 else word, half, 3, zero, scale, factor, BITS, FLOATS)
        four = tl.join(tl.join(a, c), tl.join(b, d)).reshape(WORDS, BLOCK, 4)
        laid = tl.permute(four, (1, 0, 2)).reshape(BLOCK, 4 * WORDS)
        to = row[:, None] * columns + (of_word // UNIT_WORDS * UNIT + column)[None, :]
        tl.store(w + to, laid.to(w.dtype.element_ty), mask=mine)


@triton.jit  # type: ignore[untyped-decorator]
def _number(
    word: tl.tensor,
    more: tl.tensor,
    HALF: tl.constexpr,
    BYTE: tl.constexpr,
    zero: tl.tensor,
    scale: tl.tensor,
    factor: tl.tensor,
    BITS: tl.constexpr,
    FLOATS: tl.constexpr,
) -> tl.tensor:
    """The weights that begin at that place of the words, in float32."""
    code = (word >> (8 * BYTE + 4 * HALF)) & (255 if BITS == 8 else 15)
    if BITS == 6:
        code |= ((more >> (8 * BYTE + 2 * HALF)) & 3) << 4
    if FLOATS:  # its bits, moved to those of a float, are a 2^120th of it
        bits = ((code << 24) >> 4) & -0x78100000  # 0x87f00000
        steps = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36
    else:
        steps = (code.to(tl.float32) - zero) * scale
    return steps * factor


def unpack(w: Packed, dtype: torch.dtype) -> torch.Tensor:
    """`quant.pack.unpack` in that type: [rows, columns]."""
    out = torch.empty(w.shape, dtype=dtype, device=w.device)
    codes, unit_words = w.codes.view(torch.int32), groups_of(w.unit) * (8 if w.scheme.bits == 8 else 4)
    _unpack[(triton.cdiv(unit_words * w.n_units, WORDS), len(codes))](
        codes,
        w.scales,
        w.factors,
        out,
        *out.shape,
        codes.stride(0),
        w.scales.stride(0),
        w.factors.stride(0),
        N_UNITS=w.n_units,
        UNIT=w.unit,
        UNIT_WORDS=unit_words,
        BITS=w.scheme.bits,
        FLOATS=w.scheme.floats,
        WORDS=WORDS,
        BLOCK=BLOCK,
        num_warps=4,
        enable_fp_fusion=False,
        **ahead(w.device),
    )
    return out
