"""Attention over the pages of the cache: C++ and Triton, whose rows do not depend on the batch, and their twin.

C++ has the keys in an order of its own, `laid_out`: one load takes a number or two of each key of a page.
"""

from __future__ import annotations

import functools
from ctypes import c_int, c_long, c_void_p

import torch
import torch.nn.functional as F

from llama_dist.kernels import build, triton_here

PAGE_SIZE = 16  # tokens
MAX_HEAD_DIM = 256
DTYPES = (torch.bfloat16, torch.float32)


@functools.cache
def _compiled() -> object:
    q, cache, spans = (c_void_p, c_long), (c_void_p, c_void_p, c_long), (c_void_p, c_int, c_void_p, c_void_p)
    rest = (c_int, c_void_p, c_int, c_int, c_int, c_int, c_void_p, c_int)
    return build.function("attend", c_int, *q, *cache, *spans, *rest)


def compiled_for(q: torch.Tensor) -> bool:
    """Whether C++ computes the attention of such queries [n, heads, head_dim]."""
    fits = q.device.type == "cpu" and q.dtype in DTYPES and q.shape[-1] <= MAX_HEAD_DIM
    return fits and _compiled() is not None


def laid_out(keys: torch.Tensor) -> torch.Tensor:
    """Keys [kv_heads, slots, head_dim] in the order that C++ has them in, of the same shape.

    Page by page [head_dim / 2, PAGE_SIZE, 2] of bfloat16, or [head_dim, PAGE_SIZE] of float32.
    """
    together = 2 if keys.dtype == torch.bfloat16 else 1
    heads, slots, head_dim = keys.shape
    pages = keys.view(heads, slots // PAGE_SIZE, PAGE_SIZE, head_dim // together, together)
    return pages.transpose(2, 3).reshape(keys.shape)


def _triton_for(q: torch.Tensor) -> bool:
    return q.shape[-1] <= MAX_HEAD_DIM and triton_here.serves(q)


def paged(q: torch.Tensor) -> bool:
    """Whether a kernel of either kind computes the attention of such queries: all spans at once, by their pages."""
    return compiled_for(q) or _triton_for(q)


def _check(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
    head_dim = q.shape[2]
    assert q.stride()[1:] == (head_dim, 1) and keys.stride() == values.stride(), "rows of heads in one piece"
    assert keys.stride()[1:] == (head_dim, 1) and keys.dtype == values.dtype == q.dtype, "keys like the queries"


def attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    of_query: torch.Tensor,
    window: int = 0,
) -> torch.Tensor:
    """Causal attention of the newest queries of some sequences over all their keys -> [n, heads * head_dim].

    q [n, heads, head_dim], of any row stride: the lengths[i] tokens of span i from position starts[i] on, spans laid
    end to end; keys, values [kv_heads, slots, head_dim], the tokens' own included, keys `laid_out` where it is
    `compiled_for` such queries; tables [spans, pages] the pages of PAGE_SIZE slots in which each span's sequence lies;
    of_query [heads] the KV head that a head reads, rising. These four are int32; tables, starts and lengths lie where
    the queries do, of_query on the CPU. With a window a query sees that many keys, itself the last.

    In C++ and Triton a row's bits depend on its query, its keys and their number alone, while all values are
    finite. If a page is not in the cache: IndexError on a CPU, rows of NaN on a GPU, for which nobody waits here.
    """
    if not compiled_for(q):
        if _triton_for(q):
            from llama_dist.kernels import triton_attention

            _check(q, keys, values)
            return triton_attention.attend(q, keys, values, tables, starts, lengths, of_query, window, PAGE_SIZE)
        return attend_twin(q, keys, values, tables, starts, lengths, of_query, window)
    n, heads, head_dim = q.shape
    _check(q, keys, values)
    assert keys.is_contiguous() and values.is_contiguous() and keys.shape[1] % PAGE_SIZE == 0, "whole pages"
    small = (tables, starts, lengths, of_query)
    assert all(t.dtype == torch.int32 and t.is_contiguous() and t.device.type == "cpu" for t in small), "int32, packed"
    out = torch.empty((n, heads * head_dim), dtype=q.dtype)
    fault = _compiled()(  # type: ignore[operator]
        q.dtype == torch.bfloat16,
        q.data_ptr(),
        q.stride(0),
        keys.data_ptr(),
        values.data_ptr(),
        keys.shape[1],
        tables.data_ptr(),
        tables.shape[1],
        starts.data_ptr(),
        lengths.data_ptr(),
        len(starts),
        of_query.data_ptr(),
        heads,
        keys.shape[0],
        head_dim,
        window,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    if fault:
        raise IndexError(f"span {fault - 1} has pages outside the cache, which has {keys.shape[1] // PAGE_SIZE}")
    return out


def attend_twin(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    of_query: torch.Tensor,
    window: int = 0,
) -> torch.Tensor:
    """`attend` a span at a time, in torch's operations and their summation order."""
    parts = []
    of_head = of_query.long().to(keys.device)
    spans = zip(tables.long().cpu(), starts.tolist(), torch.split(q, lengths.tolist()), strict=True)
    for table, start, rows in spans:
        stop = start + len(rows)
        first = max(0, start - window + 1) if window else 0  # the first key any of the queries sees
        at = torch.arange(first, stop)
        slots = (table[at // PAGE_SIZE] * PAGE_SIZE + at % PAGE_SIZE).to(keys.device)
        places = torch.arange(start, stop)[:, None]
        seen = (at <= places) & (at > places - window) if window else at <= places
        k, v = keys[:, slots][of_head], values[:, slots][of_head]
        out = F.scaled_dot_product_attention(rows.transpose(0, 1)[None], k[None], v[None], seen.to(keys.device))
        parts.append(out[0].transpose(0, 1).flatten(1))
    return torch.cat(parts)
