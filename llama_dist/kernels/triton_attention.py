"""Attention over the pages of the cache in Triton: prompts and single tokens in tiles of one size.

A program holds some pairs of a token and a head, all of one span and one KV head, and goes through the keys in blocks
that begin at position 0, whatever chunk or page they lie in, with a running maximum and sum. Sums begin anew every
SECTION keys and are put together in order; so where each span is one token, a program can have one section alone. A
block or section that a row does not see leaves its numbers as they are, to the bit: its result depends on its query,
its keys and how many they are. The compiler is shown no number that may differ between calls, and tensors that are
always aligned.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from llama_dist.kernels.triton_ahead import ahead, follow

SECTION = 512  # keys, whole blocks of them
FEW = 128  # single tokens times KV heads, whose sections are computed side by side
KEPT = 40  # keys beyond a section, where it is looked whether bits are kept
LISTED = 128  # spans looked through at a time
ALIGNED = 16  # bytes
FAR = 2**30  # tokens: the window where there is none


class Tile(NamedTuple):
    """Pairs of a token and a head, and keys, at a time; and how Triton is told to compute them."""

    rows: int
    keys: int
    warps: int
    stages: int


def tile_for(dtype: torch.dtype, head_dim: int) -> Tile:
    """As many rows as registers hold."""
    if dtype == torch.float32:
        return Tile(32, 32, 4 if head_dim <= 64 else 8, 1)
    return Tile(64, 64 if head_dim <= 128 else 32, 4, 1)


@triton.jit  # type: ignore[untyped-decorator]
def _section(
    query: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    table: tl.tensor,
    place: tl.tensor,
    begin: tl.tensor,
    stop: tl.tensor,
    table_width: tl.tensor,
    pages: tl.tensor,
    window: tl.tensor,
    scale: tl.tensor,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Of the keys from `begin` up to `stop`: each row's greatest score, the sum of its weights, and the values' sum."""
    number = tl.arange(0, WIDTH)
    inside = number < SIZE
    greatest = tl.full((ROWS,), float("-inf"), tl.float32)
    weight = tl.zeros((ROWS,), tl.float32)
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    at = begin + tl.arange(0, KEYS)
    next_page = tl.load(table + at // PAGE, mask=(at < stop) & (at // PAGE < table_width), other=-1)
    for block in range(begin, stop, KEYS):
        at = block + tl.arange(0, KEYS)
        there = at < stop
        page, after = next_page, at + KEYS  # known before the keys behind it are wanted
        next_page = tl.load(table + after // PAGE, mask=(after < stop) & (after // PAGE < table_width), other=-1)
        held = (page >= 0) & (page < pages)
        slot = (page.to(tl.int64) * PAGE + at % PAGE) * SIZE
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
    return greatest, weight, total


@triton.jit  # type: ignore[untyped-decorator]
def _shares(greatest: tl.tensor, other: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The greater one, and by how much what belongs to each shrinks beside it."""
    now = tl.maximum(greatest, other)
    base = tl.where(now == float("-inf"), 0.0, now)
    return now, tl.exp2(greatest - base), tl.exp2(other - base)


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=(
        *("tables", "starts", "lengths", "readers", "spans", "table_width", "pages"),
        *("q_heads", "out_heads", "window", "tokens"),
    )
)
def _spans(
    q: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    out: tl.tensor,
    sums: tl.tensor,
    tables: tl.tensor,
    starts: tl.tensor,
    lengths: tl.tensor,
    readers: tl.tensor,
    spans: tl.tensor,
    table_width: tl.tensor,
    pages: tl.tensor,
    tokens: tl.tensor,
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
    SECTION: tl.constexpr,
    LISTED: tl.constexpr,
    ALONE: tl.constexpr,
    TILES: tl.constexpr,
    PARTS: tl.constexpr,
    AHEAD: tl.constexpr,
) -> None:
    """ALONE: every span is one token, of up to TILES tiles. PARTS: of it a section a program, for `_together`.

    Then into sums [sections, tokens, heads, WIDTH + 2], else into out.
    """
    head = tl.load(readers + 2 * tl.program_id(1))  # the first that reads this KV head
    n_heads = tl.load(readers + 2 * tl.program_id(1) + 1)
    follow(AHEAD)
    if n_heads == 0:
        return
    # Which span this tile is of, its first row of q and its first tile: each has as many as its pairs fill.
    tile = tl.program_id(0)
    if ALONE:
        span = tile // TILES
        first, passed, length = span, span * TILES, 1
        if (tile - passed) * ROWS >= n_heads:
            return
    else:
        span, first, passed, before = 0, 0, 0, 0
        for some in range(0, spans, LISTED):
            listed = some + tl.arange(0, LISTED)
            n_tokens = tl.load(lengths + listed, mask=listed < spans, other=0)
            n_tiles = (n_tokens * n_heads + ROWS - 1) // ROWS
            gone = before + tl.cumsum(n_tiles, 0) <= tile
            span += tl.sum(gone.to(tl.int32), 0)
            first += tl.sum(tl.where(gone, n_tokens, 0), 0)
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
    begin = tl.maximum(lowest - window + 1, 0) // KEYS * KEYS
    at_head = (head + pair % n_heads).to(tl.int64)
    number = tl.arange(0, WIDTH)
    row = (first + token).to(tl.int64)
    mine = real[:, None] & (number < SIZE)[None, :]
    query = tl.load(q + ((row * q_heads + at_head) * SIZE)[:, None] + number[None, :], mask=mine, other=0.0)
    cache = tl.program_id(1).to(tl.int64) * cache_stride
    table = tables + span * table_width

    if PARTS:
        here = tl.program_id(2) * SECTION
        if here < stop and here + SECTION > begin:
            greatest, weight, total = _section(
                query, keys + cache, values + cache, table, place, tl.maximum(begin, here),
                tl.minimum(stop, here + SECTION), table_width, pages, window, scale, SIZE, WIDTH, PAGE, ROWS, KEYS,
            )  # fmt: skip
            to = sums + ((tl.program_id(2).to(tl.int64) * tokens + row) * out_heads + at_head) * (WIDTH + 2)
            tl.store(to[:, None] + number[None, :], total, mask=mine)
            tl.store(to + WIDTH, greatest, mask=real)
            tl.store(to + WIDTH + 1, weight, mask=real)
    else:
        greatest, weight, total = _section(
            query, keys + cache, values + cache, table, place, begin,
            tl.minimum(stop, begin // SECTION * SECTION + SECTION), table_width, pages, window, scale,
            SIZE, WIDTH, PAGE, ROWS, KEYS,
        )  # fmt: skip
        for here in range(begin // SECTION * SECTION + SECTION, stop, SECTION):
            other, more, added = _section(
                query, keys + cache, values + cache, table, place, here, tl.minimum(stop, here + SECTION),
                table_width, pages, window, scale, SIZE, WIDTH, PAGE, ROWS, KEYS,
            )  # fmt: skip
            greatest, by, by_other = _shares(greatest, other)
            weight = tl.fma(weight, by, more * by_other)
            total = tl.fma(total, tl.broadcast_to(by[:, None], total.shape), added * by_other[:, None])
        result = total / tl.where(real, weight, 1.0)[:, None]
        place_out = ((row * out_heads + at_head) * SIZE)[:, None] + number[None, :]
        tl.store(out + place_out, result.to(out.dtype.element_ty), mask=mine)


@triton.jit(do_not_specialize=("starts", "tokens", "sections", "out_heads", "window"))  # type: ignore[untyped-decorator]
def _together(
    sums: tl.tensor,
    out: tl.tensor,
    starts: tl.tensor,
    tokens: tl.tensor,
    sections: tl.tensor,
    out_heads: tl.tensor,
    window: tl.tensor,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    SECTION: tl.constexpr,
    AHEAD: tl.constexpr,
) -> None:
    """One head of one token, each a span of its own, from the sums of its sections: as `_spans` does it."""
    follow(AHEAD)
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = tl.load(starts + row)
    number = tl.arange(0, WIDTH)
    last = place // SECTION
    first = tl.minimum(tl.maximum(place - window + 1, 0) // SECTION, sections - 1)
    at = sums + ((first.to(tl.int64) * tokens + row) * out_heads + head) * (WIDTH + 2)
    step = tokens.to(tl.int64) * out_heads * (WIDTH + 2)
    greatest, weight, total = tl.load(at + WIDTH), tl.load(at + WIDTH + 1), tl.load(at + number)
    for _ in range(first + 1, tl.minimum(last + 1, sections)):
        at += step
        greatest, by, by_other = _shares(greatest, tl.load(at + WIDTH))
        weight = tl.fma(weight, by, tl.load(at + WIDTH + 1) * by_other)
        total = tl.fma(total, tl.broadcast_to(by, total.shape), tl.load(at + number) * by_other)
    weight = tl.where(last < sections, weight, float("nan"))  # its table ends before it does
    to = out + (row * out_heads + head) * SIZE + number
    tl.store(to, (total / weight).to(out.dtype.element_ty), mask=number < SIZE)


@functools.cache
def _readers(of_query: tuple[int, ...], kv_heads: int, device: torch.device) -> tuple[torch.Tensor, int]:
    """The first query head and the number of those that read each KV head, int32 [kv_heads, 2]; the greatest number."""
    assert list(of_query) == sorted(of_query), "the readers of a KV head lie side by side"
    counts = [of_query.count(i) for i in range(kv_heads)]
    firsts = [sum(counts[:i]) for i in range(kv_heads)]
    pairs = torch.tensor(list(zip(firsts, counts, strict=True)), dtype=torch.int32)
    return pairs.to(device), max(counts)


def sections_agree(like: torch.Tensor, heads: int, of_query: torch.Tensor, page_size: int) -> bool:
    """Whether a token over more than one section of keys gets the same bits in a prompt, alone, and among many.

    like [kv_heads, ...]: of the cache's type and head_dim, on its device.
    """
    kv_heads, size, rows = like.shape[0], like.shape[-1], 5
    stop = SECTION + KEPT
    n_pages = -(-stop // page_size)
    generator = torch.Generator().manual_seed(7)
    keys, q = (
        torch.randn(*shape, generator=generator).to(like.dtype).to(like.device)
        for shape in ((kv_heads, n_pages * page_size, size), (rows, heads, size))
    )
    table = torch.arange(n_pages, dtype=torch.int32, device=like.device)[None]

    def tokens(some: torch.Tensor, n: int, start: int, count: int) -> torch.Tensor:
        starts, counts = (torch.full((n,), x, dtype=torch.int32, device=like.device) for x in (start, count))
        tables = table.expand(n, -1).contiguous()
        return attend(some, keys, keys, tables, starts, counts, of_query, 0, page_size)

    whole = tokens(q, 1, stop - rows, rows)[-1]
    last, many = q[-1:], FEW // kv_heads + 1
    alone, among = tokens(last, 1, stop - 1, 1), tokens(last.expand(many, -1, -1).contiguous(), many, stop - 1, 1)
    return torch.equal(alone[0], whole) and torch.equal(among[0], whole)


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
    tile = tile_for(q.dtype, size)
    alone, each = n == spans, triton.cdiv(most, tile.rows)
    tiles = n * each if alone else n * most // tile.rows + spans  # no KV head has more
    # Many fill a GPU without sections of their own.
    sections = -(-table_width * page_size // SECTION) if alone and n * kv_heads <= FEW else 1
    width = max(16, triton.next_power_of_2(size))
    parts = (sections, n, heads, width + 2) if sections > 1 else (1,)
    sums = torch.empty(parts, dtype=torch.float32, device=q.device)
    if q.stride(0) % size or q.data_ptr() % ALIGNED:
        q = q.contiguous().clone()
    if not n:
        return out
    _spans[(tiles, kv_heads, sections)](
        q,
        keys,
        values,
        out,
        sums,
        tables,
        starts,
        lengths,
        readers,
        spans,
        table_width,
        slots // page_size,
        n,
        q.stride(0) // size,
        heads,
        keys.stride(0),
        window or FAR,
        size**-0.5 * math.log2(math.e),
        SIZE=size,
        WIDTH=width,
        PAGE=page_size,
        ROWS=tile.rows,
        KEYS=tile.keys,
        SECTION=SECTION,
        LISTED=LISTED,
        ALONE=alone,
        TILES=each,
        PARTS=sections > 1,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
        **ahead(q.device),
    )
    if sections > 1:
        _together[(n, heads)](
            sums,
            out,
            starts,
            n,
            sections,
            heads,
            window or FAR,
            SIZE=size,
            WIDTH=width,
            SECTION=SECTION,
            num_warps=2,
            enable_fp_fusion=True,
            **ahead(q.device),
        )
    return out
