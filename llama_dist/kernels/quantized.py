"""The product with packed weights in C++, for the room quant/, which knows how they are packed."""

from __future__ import annotations

import functools
from ctypes import c_int, c_int64, c_void_p
from typing import Any

import torch

from llama_dist.kernels import build

WHOLE = -1  # in place of the first unit's number: one sum over all units


@functools.cache
def _compiled() -> Any:
    weights = (c_int, c_void_p, c_void_p, c_void_p, *[c_int64] * 4)
    rest = (c_void_p, c_void_p, c_int64, c_int64, c_int, *[c_int64] * 3, c_int)
    return build.function("quantized", c_int, c_void_p, c_int64, *weights, *rest)


def compiled(x: torch.Tensor) -> bool:
    """Whether the C++ kernel serves x."""
    return x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float32) and _compiled() is not None


def product(
    x: torch.Tensor,
    bits: int,
    codes: torch.Tensor,
    scales: torch.Tensor,
    factors: torch.Tensor,
    unit: int,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    first: int,
) -> torch.Tensor:
    """x [m, n_units * unit] times packed weights, plus bias [n] -> y [..., m, n], in x's dtype or float32.

    codes, scales, factors: as quant/packed.py says, of n rows or a few more that fill a block. y's planes are the roots
    of the tree over units number first ... first + n_units - 1; `first` WHOLE: one sum over all units, one plane.

    Each group of 32 numbers of x is rounded to 8 bits. The sum over a group is exact.
    """
    m, n = y.shape[-2:]
    assert x.stride(1) == y.stride(-1) == 1 and x.shape == (m, factors.shape[1] * unit), (x.shape, y.shape)
    assert n <= len(codes) * 16 and (bias is None or (bias.dtype == x.dtype and bias.is_contiguous() and len(bias) == n))
    for t in (codes, scales, factors):
        assert t.stride(2) == 1 and t.stride(1) == t.shape[2], "the groups of a block in one piece"
    _compiled()(
        x.dtype == torch.bfloat16,
        x.data_ptr(),
        x.stride(0),
        bits,
        codes.data_ptr(),
        scales.data_ptr(),
        factors.data_ptr(),
        codes.stride(0) // codes.shape[2],
        factors.stride(0) // factors.shape[2],
        unit,
        factors.shape[1],
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        y.stride(-2),
        y.stride(0),
        y.dtype == torch.float32,
        m,
        n,
        first,
        torch.get_num_threads(),
    )
    return y
