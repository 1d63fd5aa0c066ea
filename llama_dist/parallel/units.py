"""How a parallel dimension is cut into units and dealt to ranks. No torch: the planner and the tests use it too.

The units of a dimension are the same whatever the number of ranks, so a sum taken unit by unit can keep one order on
any world size. Every rank holds the same number of units; where the last ranks run out they hold zero units, which
keeps fairscale's divisibility and adds nothing to any sum. Weights that are packed or in panels leave these out of wo
and w2.

Example: 9 query heads that read 3 KV heads, 1536 hidden, 49152 words, 8 units asked, 2 ranks. Attention has 9 units
of one head; each rank holds 5, the last one of rank 1 is zero. Rank 0's heads 0-4 read KV heads 0-1, rank 1's heads
5-8 read KV heads 1-2: KV head 1 is held twice. Feed-forward has 8 units of 192, four a rank.
"""

from __future__ import annotations

from dataclasses import dataclass

DEFAULT_UNITS = 8


@dataclass(frozen=True)
class Slice:
    """What one rank holds of a dimension: [start, stop) of the real thing, then zeros up to `padded` entries."""

    start: int
    stop: int
    padded: int

    @property
    def size(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Cut:
    """A dimension of `size` entries as `n_units` units of `unit` entries each, the last one filled up with zeros."""

    size: int
    unit: int

    @property
    def n_units(self) -> int:
        return -(-self.size // self.unit)

    def units_per_rank(self, n_ranks: int) -> int:
        return -(-self.n_units // n_ranks)

    def held(self, rank: int, n_ranks: int) -> int:
        """Units of `rank` that are not zero units."""
        return -(-self.of(rank, n_ranks).size // self.unit)

    def padded(self, n_ranks: int) -> int:
        """Entries all ranks hold together, zeros included."""
        return self.units_per_rank(n_ranks) * n_ranks * self.unit

    def of(self, rank: int, n_ranks: int) -> Slice:
        """The contiguous run of units that `rank` of `n_ranks` holds."""
        width = self.units_per_rank(n_ranks) * self.unit
        start = min(rank * width, self.size)
        return Slice(start, min(start + width, self.size), width)


def even_cut(size: int, units: int) -> Cut:
    """`units` equal slices of a dimension, each rounded up: the feed-forward and the vocabulary."""
    return Cut(size, -(-size // units))


def head_cut(n_heads: int, n_kv_heads: int, units: int) -> Cut:
    """Query heads in the fewest equal groups that make `units` without straddling a KV head's readers.

    A group lies within the readers of one KV head or takes whole KV heads. Fewer heads than units: one head a unit.
    """
    readers = n_heads // n_kv_heads
    fits = [
        g
        for g in range(1, n_heads + 1)
        if n_heads % g == 0 and n_heads // g >= min(units, n_heads) and (readers % g == 0 or g % readers == 0)
    ]
    return Cut(n_heads, max(fits))


@dataclass(frozen=True)
class KVHeads:
    """The KV heads a rank holds: [start, stop) of the model's, zeros up to `padded`, alike on all ranks.

    `of_query[i]` is the local KV head that local query head i reads; zero query heads read local head 0.
    """

    start: int
    stop: int
    padded: int
    of_query: tuple[int, ...]

    @property
    def size(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Units:
    """How one model is cut: the single definition for loader, layers, planner, cache and tests."""

    heads: Cut
    hidden: Cut
    vocab: Cut
    n_kv_heads: int

    def _kv_range(self, rank: int, n_ranks: int) -> tuple[int, int]:
        readers = self.heads.size // self.n_kv_heads
        mine = self.heads.of(rank, n_ranks)
        if mine.size == 0:
            return self.n_kv_heads, self.n_kv_heads
        return mine.start // readers, (mine.stop - 1) // readers + 1

    def kv_heads(self, rank: int, n_ranks: int) -> KVHeads:
        readers = self.heads.size // self.n_kv_heads
        mine = self.heads.of(rank, n_ranks)
        start, stop = self._kv_range(rank, n_ranks)
        ranges = [self._kv_range(r, n_ranks) for r in range(n_ranks)]
        padded = max(b - a for a, b in ranges)
        reads = [q // readers - start for q in range(mine.start, mine.stop)]
        return KVHeads(start, stop, padded, tuple(reads + [0] * (mine.padded - mine.size)))


def cut_model(n_heads: int, n_kv_heads: int, hidden_dim: int, vocab_size: int, units: int) -> Units:
    """Cut every parallel dimension of a model into (at least, where it has as many) `units` units."""
    return Units(
        head_cut(n_heads, n_kv_heads, units),
        even_cut(hidden_dim, units),
        even_cut(vocab_size, units),
        n_kv_heads,
    )


def units_for(model_parallel_size: int, asked: int | None) -> int:
    """The number of units of a run: `asked`, else 8, and never fewer than ranks."""
    return max(asked or DEFAULT_UNITS, model_parallel_size)
