"""Units deal out every head, slice and row exactly once, in runs that do not depend on the world size."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from llama_dist.parallel.units import Cut, cut_model, even_cut, head_cut, units_for

sizes = st.integers(1, 300_000)
worlds = st.integers(1, 16)
asked = st.integers(1, 64)
heads = st.tuples(st.integers(1, 24), st.integers(1, 16)).map(lambda pair: (pair[0] * pair[1], pair[0]))
"""(query heads, KV heads)."""
cuts = st.one_of(
    st.builds(even_cut, sizes, asked),
    st.builds(lambda pair, units: head_cut(*pair, units), heads, asked),
)


@given(cuts, worlds)
def test_every_entry_is_dealt_once_and_in_order(cut: Cut, world: int) -> None:
    slices = [cut.of(rank, world) for rank in range(world)]
    assert slices[0].start == 0
    assert slices[-1].stop == cut.size
    assert all(left.stop == right.start for left, right in itertools.pairwise(slices))


@given(cuts, worlds)
def test_all_ranks_hold_alike_many(cut: Cut, world: int) -> None:
    slices = [cut.of(rank, world) for rank in range(world)]
    assert {s.padded for s in slices} == {cut.units_per_rank(world) * cut.unit}
    assert all(0 <= s.size <= s.padded for s in slices)
    assert cut.padded(world) == sum(s.padded for s in slices)
    counts = [cut.held(rank, world) for rank in range(world)]
    assert counts == sorted(counts, reverse=True) and sum(counts) == cut.n_units
    assert cut.padded(world) % world == 0
    assert cut.padded(world) >= cut.size
    # No more zero units than rounding up needs: one unit fewer a rank would not hold the dimension.
    assert (cut.units_per_rank(world) - 1) * world < cut.n_units


@given(cuts, worlds)
def test_units_do_not_move_with_the_world(cut: Cut, world: int) -> None:
    """Every rank's run begins at a unit's start, wherever the world cuts, and unit u is the same entries."""
    per_rank = cut.units_per_rank(world)
    for rank in range(world):
        held = cut.of(rank, world)
        first = min(rank * per_rank, cut.n_units)
        assert held.start == min(first * cut.unit, cut.size)
        for local, unit in enumerate(range(first, min(first + per_rank, cut.n_units))):
            alone = cut.of(unit, cut.n_units)  # a world in which every rank has one unit
            assert (held.start + local * cut.unit, min(held.start + (local + 1) * cut.unit, held.stop)) == (
                alone.start,
                alone.stop,
            )


@given(sizes, asked)
def test_even_cut_makes_no_more_units_than_asked(size: int, units: int) -> None:
    cut = even_cut(size, units)
    assert 1 <= cut.n_units <= units
    assert (cut.n_units - 1) * cut.unit < size <= cut.n_units * cut.unit
    assert cut.unit == 1 or (cut.unit - 1) * units < size  # the smallest slice that fits so many units


@given(heads, asked)
def test_head_units_are_the_fewest_that_are_enough(pair: tuple[int, int], units: int) -> None:
    n_heads, n_kv = pair
    cut = head_cut(n_heads, n_kv, units)
    readers = n_heads // n_kv
    assert cut.n_units * cut.unit == n_heads
    assert cut.n_units >= min(units, n_heads)
    for head in range(0, n_heads, cut.unit):
        read = {q // readers for q in range(head, head + cut.unit)}
        assert len(read) == 1 or cut.unit == len(read) * readers
    for fewer in range(cut.unit + 1, n_heads + 1):
        divides = n_heads % fewer == 0 and (readers % fewer == 0 or fewer % readers == 0)
        assert not divides or n_heads // fewer < min(units, n_heads)


@settings(max_examples=300)
@given(heads, asked, worlds)
def test_kv_heads_cover_what_queries_read(pair: tuple[int, int], units: int, world: int) -> None:
    n_heads, n_kv = pair
    cut = cut_model(n_heads, n_kv, 100, 100, units)
    readers, held = n_heads // n_kv, [cut.kv_heads(rank, world) for rank in range(world)]
    assert len({kv.padded for kv in held}) == 1
    assert max(kv.size for kv in held) == held[0].padded
    read_by_any = set()
    for rank, kv in enumerate(held):
        mine = cut.heads.of(rank, world)
        assert 0 <= kv.start <= kv.stop <= n_kv
        assert len(kv.of_query) == mine.padded
        assert all(0 <= local < kv.padded for local in kv.of_query)
        read = [kv.start + local for local in kv.of_query[: mine.size]]
        assert read == [q // readers for q in range(mine.start, mine.stop)]
        assert set(read) == set(range(kv.start, kv.stop))  # nothing is held that no query reads
        assert set(kv.of_query[mine.size :]) <= {0}
        read_by_any |= set(read)
    assert read_by_any == set(range(n_kv))


@given(st.integers(1, 64), st.none() | st.integers(1, 64))
def test_there_are_never_fewer_units_than_ranks(world: int, units: int | None) -> None:
    assert units_for(world, units) == max(world, 8 if units is None else units)


def test_the_designs_examples() -> None:
    assert head_cut(64, 8, 8) == Cut(64, 8)
    assert head_cut(32, 32, 8) == Cut(32, 4)
    smollm2 = cut_model(9, 3, 1536, 49152, 8)
    assert (smollm2.heads.n_units, smollm2.hidden.unit) == (9, 192)
    assert [smollm2.heads.of(rank, 2).size for rank in (0, 1)] == [5, 4]
    first, second = smollm2.kv_heads(0, 2), smollm2.kv_heads(1, 2)
    assert (first.start, first.stop, second.start, second.stop) == (0, 2, 1, 3)
    assert first.of_query == (0, 0, 0, 1, 1)
    assert second.of_query == (0, 1, 1, 1, 0)
