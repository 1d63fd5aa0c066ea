"""The small operations between the matrix products, C++ or Triton a row at a time, and their twins in torch's own."""

from __future__ import annotations

import functools
from ctypes import c_float, c_int, c_long, c_void_p
from typing import Any

import torch
import torch.nn.functional as F

from llama_dist.kernels import attention, build, triton_here
from llama_dist.kernels.steady import steady

DTYPES = (torch.bfloat16, torch.float32)


@functools.cache
def _norm() -> Any:
    rows = (c_void_p, c_long, c_void_p, c_long, c_void_p)
    return build.function("rms_norm", c_int, *rows, c_void_p, c_void_p, c_long, c_long, c_float, c_int)


@functools.cache
def _rope() -> Any:
    rows, cache = (c_void_p, c_long) * 3, (c_void_p, c_void_p, c_void_p, c_void_p, c_long, c_void_p)
    return build.function("rope_write", c_int, *rows, *cache, c_long, c_long, c_long, c_long, c_int)


@functools.cache
def _silu() -> Any:
    return build.function("silu_mul", c_int, c_void_p, c_long, c_void_p, c_long, c_void_p, c_long, c_long, c_int)


def compiled_for(x: torch.Tensor) -> bool:
    """Whether C++ computes such rows."""
    return x.device.type == "cpu" and x.dtype in DTYPES and _norm() is not None


def _rows(*tensors: torch.Tensor) -> None:
    first = tensors[0]
    for t in tensors:
        assert t.ndim == 2 and t.stride(1) == 1 and t.dtype == first.dtype, "rows in one piece, of one type"
        assert t.shape == first.shape, f"rows of {tuple(t.shape)} beside {tuple(first.shape)}"


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [n, dim], of any row stride, over the root of its mean square, rounded, times weight [dim]."""
    if not compiled_for(x):
        if triton_here.serves(x):
            from llama_dist.kernels import triton_rows

            return triton_rows.rms_norm(x, weight, eps)
        return rms_norm_twin(x, weight, eps)
    _rows(x)
    assert weight.dtype == x.dtype and weight.is_contiguous(), "a weight like the rows"
    n, dim = x.shape
    out = torch.empty((n, dim), dtype=x.dtype)
    where = (x.data_ptr(), x.stride(0), None, 0, None, weight.data_ptr(), out.data_ptr())
    _norm()(x.dtype == torch.bfloat16, *where, n, dim, eps, torch.get_num_threads())
    return out


def rms_norm_twin(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return wide.type_as(x) * weight


def add_rms_norm(
    x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + y, both [n, dim], in their type, and the `rms_norm` of that sum."""
    if not compiled_for(x):
        if triton_here.serves(x):
            from llama_dist.kernels import triton_rows

            return triton_rows.add_rms_norm(x, y, weight, eps)
        total = x + y
        return total, rms_norm_twin(total, weight, eps)
    _rows(x, y)
    assert weight.dtype == x.dtype and weight.is_contiguous(), "a weight like the rows"
    n, dim = x.shape
    total, out = torch.empty((2, n, dim), dtype=x.dtype)
    rows = (x.data_ptr(), x.stride(0), y.data_ptr(), y.stride(0), total.data_ptr())
    where = (*rows, weight.data_ptr(), out.data_ptr())
    _norm()(x.dtype == torch.bfloat16, *where, n, dim, eps, torch.get_num_threads())
    return total, out


def rope_write(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """Rotate q in place; write k, rotated, and v to their slots [n] (int64) of the cache.

    q [n, heads, head_dim]; k, v [n, kv_heads, head_dim]; all of any row stride, such as columns of one fused product.
    cos, sin float32 [n, head_dim / 2] (half-rotated order); keys, values [kv_heads, n_slots, head_dim], keys
    `attention.laid_out` where attention is `attention.compiled_for` q. All ways give the same bits. Of a slot that is
    not in the cache: IndexError on a CPU; Triton passes it over.
    """
    if not attention.compiled_for(q):
        if triton_here.serves(q):
            from llama_dist.kernels import triton_rope

            return triton_rope.rope_write(q, k, v, cos, sin, keys, values, slots)
        return rope_write_twin(q, k, v, cos, sin, keys, values, slots)
    n, heads, dim = q.shape
    for t in (q, k, v, keys, values):
        assert t.stride()[1:] == (dim, 1) and t.dtype == q.dtype, "heads side by side, of one type"
    assert k.shape == v.shape == (n, keys.shape[0], dim) and keys.shape == values.shape, "a cache like the heads"
    assert keys.is_contiguous() and values.is_contiguous() and keys.shape[1] % attention.PAGE_SIZE == 0, "whole pages"
    for t in (cos, sin):
        assert t.dtype == torch.float32 and t.is_contiguous() and t.numel() == n * dim // 2, "float32 [n, head_dim / 2]"
    assert slots.dtype == torch.int64 and slots.is_contiguous() and len(slots) == n, "int64 [n]"
    rows = (q.data_ptr(), q.stride(0), k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0))
    cache = (keys.data_ptr(), values.data_ptr(), keys.shape[1], slots.data_ptr())
    sizes = (n, heads, keys.shape[0], dim, torch.get_num_threads())
    fault = _rope()(q.dtype == torch.bfloat16, *rows, cos.data_ptr(), sin.data_ptr(), *cache, *sizes)
    if fault:
        raise IndexError(f"slot {int(slots[fault - 1])} of token {fault - 1}: the cache has {keys.shape[1]}")


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x)


def rope_write_twin(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    n, _, dim = q.shape
    angles = cos.view(n, 1, dim // 2), sin.view(n, 1, dim // 2)
    keys[:, slots] = _rotated(k, *angles).transpose(0, 1)
    values[:, slots] = v.transpose(0, 1)
    q.copy_(_rotated(q, *angles))


def silu_mul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """silu(a) * b, both [n, dim] of any row stride, such as halves of one fused product; silu(a) is rounded first.

    Where a is below -88.37 silu(a) is -0 (its true value lies above -4e-37), in bfloat16 where a processor has
    instructions for it below -87.33 (above -1.1e-36); elsewhere, in float32, at most 3 ulp (units in the last place)
    from it.
    """
    if not compiled_for(a):
        if triton_here.serves(a):
            from llama_dist.kernels import triton_rows

            return triton_rows.silu_mul(a, b)
        return silu_mul_twin(a, b)
    _rows(a, b)
    n, dim = a.shape
    out = torch.empty((n, dim), dtype=a.dtype)
    rows = (a.data_ptr(), a.stride(0), b.data_ptr(), b.stride(0))
    _silu()(a.dtype == torch.bfloat16, *rows, out.data_ptr(), n, dim, torch.get_num_threads())
    return out


def silu_mul_twin(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return steady(F.silu, a) * b
