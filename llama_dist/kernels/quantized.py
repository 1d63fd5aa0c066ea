"""The product with packed weights in C++. What is packed how is said in the room quant/."""

from __future__ import annotations

import functools
import struct
from ctypes import c_char_p, c_int, c_int64, c_void_p
from typing import Any

import torch

from llama_dist.kernels import build
from llama_dist.quant.packed import EXACT, Packed

WHOLE = -1  # in place of the first unit's number: one sum over all units
PACKED = struct.Struct("=8q")


@functools.cache
def _compiled() -> Any:
    rest = (c_void_p, c_void_p, c_int64, c_int64, c_int, *[c_int64] * 3, c_int)
    return build.function("quantized", c_int, c_void_p, c_int64, c_char_p, *rest)


def compiled(x: torch.Tensor) -> bool:
    """Whether the C++ kernel serves x."""
    return x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float32) and _compiled() is not None


def describe(w: Packed) -> bytes:
    """Where a packed weight lies, for C++."""
    for t in w.parts:
        assert not t.numel() or (t.stride(2) == 1 and t.stride(1) == t.shape[2]), "the groups of a block in one piece"
    strides = (w.codes.stride(0) // w.codes.shape[2], w.factors.stride(0) // max(1, w.factors.shape[2]))
    return PACKED.pack(w.scheme.kind, *(t.data_ptr() for t in w.parts), *strides, w.unit, w.n_units)


def product(x: torch.Tensor, w: Packed, bias: torch.Tensor | None, y: torch.Tensor, first: int) -> torch.Tensor:
    """x [m, k] times w [n, k] transposed, plus bias [n] -> y [..., m, n], in x's dtype or float32.

    y's planes are the roots of the tree over w's units, number `first` and on; `first` WHOLE: one sum over all units,
    one plane. Unless weights are floats, each group of 32 numbers of x is rounded to multiples of a power of two, up
    to 4,096 of it, or 2,048 for weights of four bits; the sum over a group is exact.
    """
    assert x.stride(1) == y.stride(-1) == 1 and (len(x), *w.shape) == (*y.shape[-2:], x.shape[1]), (x.shape, y.shape)
    assert not w.scheme.exact or EXACT[x.dtype] == w.scheme, (x.dtype, w.scheme)
    assert bias is None or (bias.dtype == x.dtype and bias.is_contiguous() and len(bias) == w.rows)
    _compiled()(
        x.dtype == torch.bfloat16,
        x.data_ptr(),
        x.stride(0),
        describe(w),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        y.stride(-2),
        y.stride(0),
        y.dtype == torch.float32,
        len(x),
        w.rows,
        first,
        torch.get_num_threads(),
    )
    return y
