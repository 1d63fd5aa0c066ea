"""What the tests of the C++ kernels share: whether they compiled, tensors laid askew, sequences in scattered pages."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_dist.kernels import build
from llama_dist.kernels.attention import PAGE_SIZE, attend, compiled_for, laid_out
from llama_dist.kernels.tree import roots, total

DTYPES = (torch.float32, torch.bfloat16)


def need_kernels() -> None:
    """End the calling test where the kernels could not be compiled: skipped, or failed under CI=true."""
    if build.library() is None:
        reason = "no C++ kernels: no compiler, or it failed"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)


def instructions() -> str:
    """What sums of bfloat16 depend on."""
    return build.INSTRUCTIONS[build.function("instructions")()]


def compiled_apart(path: Path, usual: Any, names: Sequence[str], *flags: str) -> Callable[[], Any]:
    """In place of the function `usual` the same of sources of these names, compiled to `path` with `flags`."""
    cxx = build.compiler()
    assert cxx is not None
    build.compile_to(path, cxx, [build.SOURCES / f"{name}.cpp" for name in names], *flags)
    found = getattr(build.open_library(path), usual.__name__)
    found.argtypes, found.restype = usual.argtypes, usual.restype
    return lambda: found


@contextmanager
def threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def askew(x: torch.Tensor, offset: int) -> torch.Tensor:
    """x again, `offset` numbers into its storage."""
    return torch.cat([x.new_zeros(offset), x.flatten()])[offset:].view(x.shape)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    kind = torch.int16 if a.element_size() == 2 else torch.int32
    return (
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))
    )


@dataclass(frozen=True)
class Text:
    """Queries [length, heads, head_dim], keys and values [kv_heads, length, head_dim] of one sequence."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


def text(length: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, seed: int = 0) -> Text:
    draw = torch.Generator().manual_seed(seed)
    shapes = ((length, heads, head_dim), (kv_heads, length, head_dim), (kv_heads, length, head_dim))
    return Text(*(torch.randn(shape, generator=draw).to(dtype) for shape in shapes))


Part = tuple[Text, int, int]
"""The tokens of a text from ... to before ..."""


def arguments(
    parts: Sequence[Part], of_query: Sequence[int], *, seed: int = 0, offset: int = 0, compiled: bool = False
) -> list[torch.Tensor]:
    """What `attend` takes, the parts as spans in random pages. All else in the cache is NaN, later keys too.

    For the compiled `attend` the cache is laid out as it has it.
    """
    counts = [-(-stop // PAGE_SIZE) for _, _, stop in parts]
    order = torch.randperm(sum(counts) + 3, generator=torch.Generator().manual_seed(seed))
    tables = torch.full((len(parts), max(counts)), -1, dtype=torch.int32)
    first = parts[0][0]
    keys, values = (
        askew(t.new_full((len(t), len(order) * PAGE_SIZE, t.shape[2]), float("nan")), offset)
        for t in (first.k, first.v)
    )
    used = 0
    for i, (it, _, stop) in enumerate(parts):
        pages = order[used : used + counts[i]]
        used += counts[i]
        tables[i, : counts[i]] = pages
        slots = (pages[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE)).flatten()[:stop]
        keys[:, slots], values[:, slots] = it.k[:, :stop], it.v[:, :stop]
    if compiled:
        assert compiled_for(first.q)
        keys, values = askew(laid_out(keys.contiguous()), offset), askew(values.contiguous(), offset)
    q = askew(torch.cat([it.q[start:stop] for it, start, stop in parts]), offset)
    numbers = ([start for _, start, _ in parts], [stop - start for _, start, stop in parts], list(of_query))
    return [q, keys, values, tables, *(torch.tensor(row, dtype=torch.int32) for row in numbers)]


def attended(
    parts: Sequence[Part], of_query: Sequence[int], window: int = 0, *, seed: int = 0, offset: int = 0
) -> list[torch.Tensor]:
    """`attend` over the parts as one batch -> [length, heads * head_dim] of each."""
    out = attend(*arguments(parts, of_query, seed=seed, offset=offset, compiled=True), window)
    return list(torch.split(out, [stop - start for _, start, stop in parts]))


def totals_of_runs(n_units: int, sums: Callable[[int, int], torch.Tensor]) -> Iterator[tuple[int, torch.Tensor]]:
    """The whole sum over the units, dealt to 1, 2, 3 and n_units ranks: how many, and what `total` makes of their sums.

    `sums` has the roots of a run of units, from the first up to the last but one.
    """
    for parts in (1, 2, 3, n_units):
        cuts = [part * n_units // parts for part in range(parts + 1)]
        runs = list(itertools.pairwise(cuts))
        held = [value for run in runs for value in sums(*run)]
        nodes = [node for first, stop in runs for node in roots(first, stop - first)]
        yield parts, total(nodes, held)
