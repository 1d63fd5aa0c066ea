"""The pool of keys and values, and the narrow view of a step that the layers see. Who holds which page: pages.py."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llama_dist.kernels.attention import PAGE_SIZE as PAGE_SIZE
from llama_dist.kernels.told import sent


@dataclass(frozen=True)
class Span:
    """Tokens [start, start + length) of a sequence that lies in `pages`, and whose prompt has `prompt_len` tokens."""

    pages: Sequence[int]
    start: int
    length: int
    prompt_len: int

    @property
    def stop(self) -> int:
        return self.start + self.length


@dataclass(frozen=True)
class Batch:
    """The tokens of one forward pass, all spans laid end to end; all positions are below `stop`.

    Example: a prompt of 3 tokens in page 2 beside the 18th token of a sequence in pages 0 and 5: positions
    [0, 1, 2, 17], slots [32, 33, 34, 81]. `lengths` is what rotary scaling may depend on, see rope.py.
    `places[i]` is where span i reads: the first slot if its sequence lies in one piece, else all its slots.
    """

    tokens: torch.Tensor  # [n]
    positions: torch.Tensor  # [n]
    lengths: torch.Tensor  # [n]
    slots: torch.Tensor  # [n]
    spans: tuple[Span, ...]
    tables: torch.Tensor  # [spans, pages] int32: the pages of each span's sequence
    starts: torch.Tensor  # [spans] int32; so too how many tokens each span has
    counts: torch.Tensor
    stop: int

    @functools.cached_property
    def places(self) -> tuple[int | torch.Tensor, ...]:
        """Made when first asked for: attention in C++ and Triton reads by `tables`."""
        return tuple(_place(span, self.tokens.device) for span in self.spans)


def _place(span: Span, device: torch.device) -> int | torch.Tensor:
    pages = span.pages[: -(-span.stop // PAGE_SIZE)]
    if all(b == a + 1 for a, b in itertools.pairwise(pages)):
        return pages[0] * PAGE_SIZE
    slots = torch.tensor(pages)[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE)
    return slots.flatten()[: span.stop].to(device)


@dataclass(frozen=True)
class Laid:
    """A batch as numbers of the host, which C++ reads where they are; `batch` has them as tensors of the device."""

    of_tokens: array[int]  # int64: n tokens, n positions, n lengths, n slots
    of_spans: array[int]  # int32: tables [spans, width], starts, counts
    spans: tuple[Span, ...]
    width: int
    stop: int
    device: torch.device

    @property
    def n(self) -> int:
        return len(self.of_tokens) // 4

    def of(self, tokens: torch.Tensor) -> Laid:
        """The same of other tokens [n], which are waited for."""
        numbers = array("q", tokens.tolist())
        return dataclasses.replace(self, of_tokens=numbers + self.of_tokens[self.n :])

    @functools.cached_property
    def batch(self) -> Batch:
        """Made when first asked for: a program does not need it."""
        of_tokens = sent(torch.frombuffer(self.of_tokens, dtype=torch.int64), self.device)
        of_spans = sent(torch.frombuffer(self.of_spans, dtype=torch.int32), self.device)
        n = len(self.spans)
        tables, starts, counts = of_spans.split((n * self.width, n, n))  # type: ignore[no-untyped-call]
        a, b, c, d = of_tokens.view(4, -1).unbind()
        return Batch(a, b, c, d, self.spans, tables.view(n, self.width), starts, counts, self.stop)


def lay(rows: Sequence[tuple[Span, Sequence[int]]], device: torch.device, ahead: int = 0) -> Laid:
    """Lay spans with their tokens end to end; with the pages of `ahead` tokens more each, and their positions known."""
    tokens: list[int] = []
    positions: list[int] = []
    lengths: list[int] = []
    slots: list[int] = []
    for span, ids in rows:
        assert len(ids) == span.length, f"span of {span.length} tokens came with {len(ids)}"
        tokens += ids
        places = range(span.start, span.stop)
        positions += places
        lengths += [max(p + 1, span.prompt_len) for p in places]
        slots += [span.pages[p // PAGE_SIZE] * PAGE_SIZE + p % PAGE_SIZE for p in places]
    spans = tuple(span for span, _ in rows)
    stop = max(span.stop for span in spans) + ahead
    width = -(-stop // PAGE_SIZE)
    numbers: list[int] = []
    for span in spans:
        n_pages = -(-(span.stop + ahead) // PAGE_SIZE)
        held = span.pages[:n_pages]
        assert len(held) == n_pages, f"{len(held)} pages for {span.stop} tokens and {ahead} more"
        numbers += held
        numbers += [0] * (width - len(held))
    numbers += [span.start for span in spans]
    numbers += [span.length for span in spans]
    of_tokens = array("q", tokens + positions + lengths + slots)
    return Laid(of_tokens, array("i", numbers), spans, width, stop, device)


class KVCache:
    """`n_pages` pages of keys and values for this rank's KV heads, a tensor a layer.

    Where attention is C++'s keys lie in its order (`laid_out` in kernels/attention.py), and nothing else reads them.
    """

    def __init__(
        self,
        n_layers: int,
        n_pages: int,
        n_kv_heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.n_pages = n_pages
        shape = (2, n_kv_heads, n_pages * PAGE_SIZE, head_dim)
        self.layers = [torch.empty(shape, dtype=dtype, device=device) for _ in range(n_layers)]

    @property
    def n_bytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    def read(self, layer: int, batch: Batch, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values [n_kv_heads, stop, head_dim] of span i's sequence: a view where it lies in one piece."""
        keys, values = self.layers[layer]
        place = batch.places[i]
        if isinstance(place, int):
            stop = place + batch.spans[i].stop
            return keys[:, place:stop], values[:, place:stop]
        return keys[:, place], values[:, place]
