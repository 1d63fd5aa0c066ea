"""Rotation and the writing of keys and values to their slots in Triton: one launch for a layer's queries and keys."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llama_dist.kernels.triton_ahead import ahead, follow

HEADS = 8  # that a program rotates


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=("q_stride", "k_stride", "v_stride", "slots_there", "heads", "kv_heads", "q_parts")
)
def _rotate(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    slots: tl.tensor,
    q_stride: tl.tensor,
    k_stride: tl.tensor,
    v_stride: tl.tensor,
    cache_stride: tl.tensor,
    slots_there: tl.tensor,
    heads: tl.tensor,
    kv_heads: tl.tensor,
    q_parts: tl.tensor,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    AHEAD: tl.constexpr,
) -> None:
    """Some heads of one token: of q for the first `q_parts` programs of it, of k and v for the others."""
    follow(AHEAD)
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    at = tl.arange(0, WIDTH)
    inside = (at < HALF)[None, :]
    c = tl.load(cos + row * HALF + at, mask=at < HALF, other=0.0)[None, :]
    s = tl.load(sin + row * HALF + at, mask=at < HALF, other=0.0)[None, :]
    if part < q_parts:
        head = part * HEADS + tl.arange(0, HEADS)
        mine = (head < heads)[:, None] & inside
        place = q + row * q_stride + head[:, None] * (2 * HALF) + at[None, :]
        a = tl.load(place, mask=mine, other=0.0).to(tl.float32)
        b = tl.load(place + HALF, mask=mine, other=0.0).to(tl.float32)
        tl.store(place, (a * c - b * s).to(q.dtype.element_ty), mask=mine)
        tl.store(place + HALF, (b * c + a * s).to(q.dtype.element_ty), mask=mine)
    else:
        head = (part - q_parts) * HEADS + tl.arange(0, HEADS)
        slot = tl.load(slots + row)
        there = tl.where((slot >= 0) & (slot < slots_there), kv_heads, 0)
        mine = (head < there)[:, None] & inside
        column = head[:, None] * (2 * HALF) + at[None, :]
        a = tl.load(k + row * k_stride + column, mask=mine, other=0.0).to(tl.float32)
        b = tl.load(k + row * k_stride + column + HALF, mask=mine, other=0.0).to(tl.float32)
        to = head.to(tl.int64)[:, None] * cache_stride + slot * (2 * HALF) + at[None, :]
        tl.store(keys + to, (a * c - b * s).to(keys.dtype.element_ty), mask=mine)
        tl.store(keys + to + HALF, (b * c + a * s).to(keys.dtype.element_ty), mask=mine)
        first = tl.load(v + row * v_stride + column, mask=mine, other=0.0)
        second = tl.load(v + row * v_stride + column + HALF, mask=mine, other=0.0)
        tl.store(values + to, first, mask=mine)
        tl.store(values + to + HALF, second, mask=mine)


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
    """As `kernels.small.rope_write`, but that a slot outside the cache is passed over: nobody waits here to be told."""
    n, heads, size = q.shape
    kv_heads = keys.shape[0]
    for t in (q, k, v, keys, values):
        assert t.stride()[1:] == (size, 1) and t.dtype == q.dtype, "heads side by side, of one type"
    assert k.shape == v.shape == (n, kv_heads, size) and keys.stride() == values.stride(), "a cache like the heads"
    assert cos.is_contiguous() and sin.is_contiguous() and cos.dtype == sin.dtype == torch.float32
    assert cos.numel() == sin.numel() == n * size // 2 and len(slots) == n, (cos.shape, sin.shape, slots.shape)
    if not n:
        return
    q_parts = triton.cdiv(heads, HEADS)
    _rotate[(n, q_parts + triton.cdiv(kv_heads, HEADS))](
        q,
        k,
        v,
        cos,
        sin,
        keys,
        values,
        slots,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        keys.stride(0),
        keys.shape[1],
        heads,
        kv_heads,
        q_parts,
        HALF=size // 2,
        WIDTH=triton.next_power_of_2(size // 2),
        HEADS=HEADS,
        num_warps=4,
        enable_fp_fusion=False,  # products are rounded before they are added, as torch's twin does
        **ahead(q.device),
    )
