"""Attention over the pages of the cache in Triton: prompts and single tokens by one kernel, in tiles of one size.

A program holds ROWS pairs of a token and a head, all of one span and one KV head, and goes through the keys in blocks
of KEYS that begin at position 0, whatever chunk or page they lie in, with a running maximum and sum. A block that a
row does not see leaves its numbers as they are, to the bit: its result depends on its query, its keys and how many
they are. The compiler is shown no number that may differ between calls, and tensors that are always aligned.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl

from llama_dist.kernels.triton_ahead import ahead, follow

ROWS = {torch.bfloat16: 64, torch.float16: 64, torch.float32: 32}  # as many as registers hold
KEYS = 32
LISTED = 128  # spans looked through at a time
ALIGNED = 16  # bytes
FAR = 2**30  # tokens: the window where there is none


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=(
        *("tables", "starts", "lengths", "readers", "spans", "table_width", "pages"),
        *("q_heads", "out_heads", "window"),
    )
)
def _spans(
    q: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    out: tl.tensor,
    tables: tl.tensor,
    starts: tl.tensor,
    lengths: tl.tensor,
    readers: tl.tensor,
    spans: tl.tensor,
    table_width: tl.tensor,
    pages: tl.tensor,
    q_heads: tl.tensor,
    out_heads: tl.tensor,
    cache_stride: tl.tensor,
    window: tl.tensor,
    scale: tl.tensor,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    LISTED: tl.constexpr,
    AHEAD: tl.constexpr,
) -> None:
    follow(AHEAD)
    head = tl.load(readers + 2 * tl.program_id(1))  # the first that reads this KV head
    n_heads = tl.load(readers + 2 * tl.program_id(1) + 1)
    if n_heads == 0:
        return
    # Which span this tile is of: each has as many as its pairs fill.
    tile = tl.program_id(0)
    span, first, passed, before = 0, 0, 0, 0
    for some in range(0, spans, LISTED):
        listed = some + tl.arange(0, LISTED)
        length = tl.load(lengths + listed, mask=listed < spans, other=0)
        n_tiles = (length * n_heads + ROWS - 1) // ROWS
        gone = before + tl.cumsum(n_tiles, 0) <= tile
        span += tl.sum(gone.to(tl.int32), 0)
        first += tl.sum(tl.where(gone, length, 0), 0)  # of the rows of q
        passed += tl.sum(tl.where(gone, n_tiles, 0), 0)
        before += tl.sum(n_tiles, 0)
    if tile >= before:
        return
    length = tl.load(lengths + span)
    start = tl.load(starts + span)

    pair = (tile - passed) * ROWS + tl.arange(0, ROWS)
    token = pair // n_heads
    real = token < length
    place = start + token
    lowest = start + (tile - passed) * ROWS // n_heads
    stop = start + tl.minimum(length, ((tile - passed) * ROWS + ROWS - 1) // n_heads + 1)
    at_head = (head + pair % n_heads).to(tl.int64)
    number = tl.arange(0, WIDTH)
    inside = number < SIZE
    row = (first + token).to(tl.int64)
    mine = real[:, None] & inside[None, :]
    query = tl.load(q + ((row * q_heads + at_head) * SIZE)[:, None] + number[None, :], mask=mine, other=0.0)

    greatest = tl.full((ROWS,), float("-inf"), tl.float32)
    weight = tl.zeros((ROWS,), tl.float32)
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    cache = tl.program_id(1).to(tl.int64) * cache_stride
    table = tables + span * table_width
    for block in range(tl.maximum(lowest - window + 1, 0) // KEYS * KEYS, stop, KEYS):
        at = block + tl.arange(0, KEYS)
        there = at < stop
        page = tl.load(table + at // PAGE, mask=there & (at // PAGE < table_width), other=-1)
        held = (page >= 0) & (page < pages)
        slot = cache + (page.to(tl.int64) * PAGE + at % PAGE) * SIZE
        whole = (there & held)[:, None] & inside[None, :]
        k = tl.load(keys + slot[:, None] + number[None, :], mask=whole, other=0.0)
        v = tl.load(values + slot[:, None] + number[None, :], mask=whole, other=0.0)
        score = tl.dot(query, tl.trans(k), input_precision="ieee") * scale
        score = tl.where(held[None, :], score, float("nan"))  # a page outside the cache: the row says so
        seen = (at[None, :] <= place[:, None]) & (at[None, :] > place[:, None] - window)
        score = tl.where(seen, score, float("-inf"))
        now = tl.maximum(greatest, tl.max(score, 1))
        base = tl.where(now == float("-inf"), 0.0, now)  # nothing seen so far
        shrink = tl.exp2(greatest - base)
        part = tl.exp2(score - base[:, None])
        weight = weight * shrink + tl.sum(part, 1)
        total = tl.dot(part.to(v.dtype), v, total * shrink[:, None], input_precision="ieee")
        greatest = now
    result = total / tl.where(real, weight, 1.0)[:, None]
    place_out = ((row * out_heads + at_head) * SIZE)[:, None] + number[None, :]
    tl.store(out + place_out, result.to(out.dtype.element_ty), mask=mine)


@functools.cache
def _readers(of_query: tuple[int, ...], kv_heads: int, device: torch.device) -> tuple[torch.Tensor, int]:
    """The first query head and the number of those that read each KV head, int32 [kv_heads, 2]; the greatest number."""
    assert list(of_query) == sorted(of_query), "the readers of a KV head lie side by side"
    counts = [of_query.count(i) for i in range(kv_heads)]
    firsts = [sum(counts[:i]) for i in range(kv_heads)]
    pairs = torch.tensor(list(zip(firsts, counts, strict=True)), dtype=torch.int32)
    return pairs.to(device), max(counts)


def attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    of_query: torch.Tensor,
    window: int,
    page_size: int,
) -> torch.Tensor:
    """As `kernels.attention.attend`, with head_dim at most 256."""
    n, heads, size = q.shape
    kv_heads, slots, _ = keys.shape
    readers, most = _readers(tuple(of_query.tolist()), kv_heads, q.device)
    out = torch.empty((n, heads * size), dtype=q.dtype, device=q.device)
    spans, table_width = tables.shape
    rows = ROWS[q.dtype]
    tiles = n * most // rows + spans  # no KV head has more
    if q.stride(0) % size or q.data_ptr() % ALIGNED:
        q = q.contiguous().clone()
    if n:
        _spans[(tiles, kv_heads)](
            q,
            keys,
            values,
            out,
            tables,
            starts,
            lengths,
            readers,
            spans,
            table_width,
            slots // page_size,
            q.stride(0) // size,
            heads,
            keys.stride(0),
            window or FAR,
            size**-0.5 * math.log2(math.e),
            SIZE=size,
            WIDTH=max(16, triton.next_power_of_2(size)),
            PAGE=page_size,
            ROWS=rows,
            KEYS=KEYS,
            LISTED=LISTED,
            num_warps=4 if size <= 64 else 8,
            num_stages=1 if q.dtype == torch.float32 else 2,
            enable_fp_fusion=True,
            **ahead(q.device),
        )
    return out
