"""The likeliest token of each row in Triton, without waiting for it: chunks side by side, and then their greatest."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from llama_dist.kernels.triton_ahead import ahead, follow

CHUNK = 2048


@triton.jit(do_not_specialize=("logits", "vocab", "stride", "chunks"))  # type: ignore[untyped-decorator]
def _chunks(
    logits: tl.tensor,
    greatest: tl.tensor,
    places: tl.tensor,
    vocab: tl.tensor,
    stride: tl.tensor,
    chunks: tl.tensor,
    CHUNK: tl.constexpr,
    AHEAD: tl.constexpr,
) -> None:
    """Of each chunk of a row its greatest and where that is first; -1 where one is no finite number."""
    follow(AHEAD)
    row, chunk = tl.program_id(1).to(tl.int64), tl.program_id(0)
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = at < vocab
    numbers = tl.load(logits + row * stride + at, mask=inside, other=float("-inf")).to(tl.float32)
    broken = tl.max((inside & ((tl.abs(numbers) < float("inf")) == 0)).to(tl.int32), 0)
    most = tl.max(numbers, 0)
    place = tl.min(tl.where(numbers == most, at, vocab), 0)
    tl.store(greatest + row * chunks + chunk, most)
    tl.store(places + row * chunks + chunk, tl.where(broken != 0, -1, place))


@triton.jit(do_not_specialize=("chunks",))  # type: ignore[untyped-decorator]
def _rows(
    greatest: tl.tensor,
    places: tl.tensor,
    found: tl.tensor,
    chunks: tl.tensor,
    CHUNKS: tl.constexpr,
    AHEAD: tl.constexpr,
) -> None:
    follow(AHEAD)
    row = tl.program_id(0)
    at = tl.arange(0, CHUNKS)
    each = tl.load(greatest + row * chunks + at, mask=at < chunks, other=float("-inf"))
    place = tl.load(places + row * chunks + at, mask=at < chunks, other=2147483647)
    first = tl.min(tl.where(each == tl.max(each, 0), place, 2147483647), 0)
    tl.store(found + row, tl.where(tl.min(place, 0) < 0, -1, first).to(tl.int64))


def likeliest(logits: torch.Tensor) -> torch.Tensor:
    """As `kernels.single.found_of`: of rows [m, n] the number of the greatest entry, int64 [m], or -1."""
    m, n = logits.shape
    assert logits.stride(1) == 1 and n, "rows in one piece"
    chunks = triton.cdiv(n, CHUNK)
    greatest = torch.empty(m, chunks, dtype=torch.float32, device=logits.device)
    places = torch.empty(m, chunks, dtype=torch.int32, device=logits.device)
    found = torch.empty(m, dtype=torch.int64, device=logits.device)
    if m:
        how = ahead(logits.device)
        _chunks[(chunks, m)](logits, greatest, places, n, logits.stride(0), chunks, CHUNK=CHUNK, num_warps=4, **how)
        _rows[(m,)](greatest, places, found, chunks, CHUNKS=triton.next_power_of_2(chunks), num_warps=1, **how)
    return found
