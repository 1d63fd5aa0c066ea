"""Attention in Triton: right against float64 and torch's own, and each row's bits its own, whatever is beside it."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from llama_dist.kernels import attention
from llama_dist.kernels.attention import PAGE_SIZE, attend_twin
from tests.kernel_cases import Part, Text, arguments, askew, same_bits, text
from tests.triton_cases import DEVICES, DTYPES, running_on

pytestmark = pytest.mark.filterwarnings("ignore:All-NaN slice")  # of the interpreter
MAPS = ((0, 1, 2), (0, 0, 0, 0), (0, 1, 1, 2, 2, 2))
"""One head a KV head; one KV head for all, others without readers; runs that begin amid a KV head's readers."""
ROUNDING = {torch.float32: 4e-6, torch.bfloat16: 0.03, torch.float16: 4e-3}


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from running_on(request.param)


def attend(device: str, args: Sequence[torch.Tensor], window: int = 0) -> torch.Tensor:
    from llama_dist.kernels import triton_attention

    *tensors, of_query = args
    out: torch.Tensor = triton_attention.attend(*(t.to(device) for t in tensors), of_query, window, PAGE_SIZE)
    return out.cpu()


def attended(device: str, parts: Sequence[Part], of_query: Sequence[int], window: int = 0, **how: Any) -> Any:
    """Over the parts as one batch -> [length, heads * head_dim] of each."""
    out = attend(device, arguments(parts, of_query, **how), window)
    return torch.split(out, [stop - start for _, start, stop in parts])


def plain(part: Part, of_query: Sequence[int], window: int) -> torch.Tensor:
    """The definition, in float64, a query at a time."""
    it, start, stop = part
    rows = []
    for place in range(start, stop):
        first = max(0, place - window + 1) if window else 0
        k, v = (x[list(of_query), first : place + 1].double() for x in (it.k, it.v))
        scores = torch.einsum("hd,htd->ht", it.q[place].double(), k) / it.q.shape[2] ** 0.5
        rows.append(torch.einsum("ht,htd->hd", scores.softmax(-1), v).flatten())
    return torch.stack(rows)


@pytest.mark.parametrize(("head_dim", "window"), [(6, 0), (16, 7), (64, 40), (80, 1), (256, 0)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_attention(device: str, dtype: torch.dtype, head_dim: int, window: int) -> None:
    of_query = MAPS[(head_dim + window) % len(MAPS)]
    bounds = ((0, 21), (100, 101), (3, 4), (60, 70))
    parts = [(text(stop, len(of_query), 3, head_dim, dtype, seed=stop), *ends) for ends in bounds for stop in ends[1:]]
    args = arguments(parts, of_query)
    found = attend(device, args, window)
    true = torch.cat([plain(part, of_query, window) for part in parts])
    torch.testing.assert_close(found.double(), true, rtol=0, atol=ROUNDING[dtype])
    twin = attend_twin(*(torch.nan_to_num(x) for x in args), window)
    torch.testing.assert_close(found, twin, rtol=0, atol=ROUNDING[dtype])


def cuts(length: int, draw: random.Random) -> list[int]:
    return [0, *sorted(draw.sample(range(1, length), min(length - 1, draw.choice([1, 3, 9])))), length]


def check_rows(device: str, dtype: torch.dtype, of_query: tuple[int, ...], window: int, trials: int) -> None:
    draw = random.Random(f"{dtype} {of_query} {window}")
    texts = [text(length, len(of_query), 3, 20, dtype, seed=length) for length in (110, 47, 5)]
    alone = [attended(device, [(it, 0, len(it.q))], of_query, window)[0] for it in texts]
    for trial in range(trials):
        parts: list[Part] = []
        for i in draw.choices(range(len(texts)), k=draw.choice([1, 3, 6])):
            ends = cuts(len(texts[i].q), draw)
            at = draw.randrange(len(ends) - 1)
            lone = draw.random() < 0.4
            parts.append((texts[i], ends[at + 1] - 1 if lone else ends[at], ends[at + 1]))
        found = attended(device, parts, of_query, window, seed=trial)
        for (it, start, stop), rows in zip(parts, found, strict=True):
            whole = alone[next(i for i, other in enumerate(texts) if other is it)]
            assert same_bits(rows, whole[start:stop]), f"tokens {start} to {stop} of {len(it.q)}, in trial {trial}"


@pytest.mark.parametrize(("of_query", "window"), [(MAPS[0], 0), (MAPS[1], 30), (MAPS[2], 0), (MAPS[2], 70)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_neighbours_chunks_or_pages(
    device: str, dtype: torch.dtype, of_query: tuple[int, ...], window: int
) -> None:
    check_rows(device, dtype, of_query, window, trials=2)


@pytest.mark.parametrize("few", [0, 512], ids=["in one program", "side by side"])
@pytest.mark.parametrize(("of_query", "window"), [(MAPS[0], 0), (MAPS[2], 70)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_who_has_a_section(
    device: str, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, of_query: tuple[int, ...], window: int, few: int
) -> None:
    from llama_dist.kernels import triton_attention

    monkeypatch.setattr(triton_attention, "SECTION", 64)
    monkeypatch.setattr(triton_attention, "FEW", few)
    texts = [text(length, len(of_query), 3, 20, dtype, seed=length) for length in (200, 129, 9)]
    alone = [attended(device, [(it, 0, len(it.q))], of_query, window)[0] for it in texts]
    true = plain((texts[0], 0, 200), of_query, window)
    torch.testing.assert_close(alone[0].double(), true, rtol=0, atol=ROUNDING[dtype])
    for places in ((199, 128, 8), (63, 64, 0), (191, 65, 5)):
        parts = [(it, place, place + 1) for it, place in zip(texts, places, strict=True)]
        for whole, rows, place in zip(alone, attended(device, parts, of_query, window), places, strict=True):
            assert same_bits(rows, whole[place : place + 1]), place


def test_whether_sections_agree_is_seen(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from llama_dist.kernels import triton_attention

    monkeypatch.setattr(triton_attention, "SECTION", 64)
    monkeypatch.setattr(triton_attention, "FEW", 5)
    like, reads = torch.empty(3, 1, 20, dtype=torch.bfloat16, device=device), torch.tensor(MAPS[2], dtype=torch.int32)
    assert triton_attention.sections_agree(like, 6, reads, PAGE_SIZE)
    real = triton_attention.attend

    def shifted(q: torch.Tensor, *rest: Any) -> torch.Tensor:
        with pytest.MonkeyPatch.context() as m:
            m.setattr(triton_attention, "SECTION", 64 if len(q) == 5 else 128)
            return real(q, *rest)

    monkeypatch.setattr(triton_attention, "attend", shifted)
    assert not triton_attention.sections_agree(like, 6, reads, PAGE_SIZE)


@pytest.mark.parametrize("what", ["keys from the chunk's first on", "larger blocks for single tokens"])
def test_what_is_broken_is_found(device: str, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    from llama_dist.kernels import triton_attention

    real, tile_for = triton_attention.attend, triton_attention.tile_for

    def from_the_window(*args: Any) -> torch.Tensor:
        q, keys, values, tables, starts, lengths, of_query, window, page = args
        short = torch.clamp((starts - window + 1) // page, min=0)  # pages before the window are left away
        if bool(short.any()):
            tables = torch.stack([row.roll(-int(n)) for row, n in zip(tables, short, strict=True)])
        return real(q, keys, values, tables, starts - short * page, lengths, of_query, window, page)

    def larger(*args: Any) -> torch.Tensor:
        single = args[5].max() == 1
        with pytest.MonkeyPatch.context() as m:
            m.setattr(triton_attention, "tile_for", lambda *how: tile_for(*how)._replace(keys=64 if single else 32))
            return real(*args)

    monkeypatch.setattr(triton_attention, "attend", from_the_window if what.startswith("keys") else larger)
    it = text(150, 3, 3, 20, torch.float32)
    whole = attended(device, [(it, 0, 150)], MAPS[0], 50)[0]
    with pytest.raises(AssertionError):
        for place in (70, 90, 111, 149):
            assert same_bits(attended(device, [(it, place, place + 1)], MAPS[0], 50)[0], whole[place : place + 1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_which_heads_a_rank_holds(device: str, dtype: torch.dtype) -> None:
    of_query = (0, 0, 0, 1, 1, 1, 2, 2, 2)
    it = text(60, 9, 3, 64, dtype)
    whole = attended(device, [(it, 0, 60)], of_query)[0].unflatten(1, (9, 64))
    for first, last in ((0, 1), (2, 5), (4, 9)):
        held = range(of_query[first], of_query[last - 1] + 1)
        mine = Text(it.q[:, first:last].contiguous(), it.k[held.start : held.stop], it.v[held.start : held.stop])
        local = [of_query[i] - held.start for i in range(first, last)]
        found = attended(device, [(mine, 55, 60)], local)[0].unflatten(1, (-1, 64))
        assert same_bits(found, whole[55:, first:last])


def test_many_readers_of_one_head_are_more_than_a_tile(device: str) -> None:
    it = text(9, 71, 1, 16, torch.float32)
    whole = attended(device, [(it, 0, 9)], [0] * 71)[0]
    torch.testing.assert_close(whole.double(), plain((it, 0, 9), [0] * 71, 0), rtol=0, atol=4e-6)
    assert same_bits(attended(device, [(it, 8, 9)], [0] * 71)[0], whole[8:])


def test_many_spans_are_looked_through_in_parts(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from llama_dist.kernels import triton_attention

    monkeypatch.setattr(triton_attention, "LISTED", 4)
    texts = [text(4 + i, 2, 1, 16, torch.float32, seed=i) for i in range(9)]
    for it, rows in zip(texts, attended(device, [(it, 2, len(it.q)) for it in texts], [0, 0]), strict=True):
        assert same_bits(rows, attended(device, [(it, 0, len(it.q))], [0, 0])[0][2:])


def test_queries_may_lie_anywhere(device: str) -> None:
    args = arguments([(text(40, 6, 3, 20, torch.bfloat16), 0, 40)], MAPS[2])
    whole, q = attend(device, args), args[0].flatten(1)
    for width in (7, 40):  # columns of a wider product, whole heads of it or not
        wide = torch.cat([q, torch.full((40, width), float("nan"), dtype=torch.bfloat16)], dim=1).to(device)
        assert same_bits(attend(device, [wide[:, :120].unflatten(1, (6, 20)), *args[1:]]), whole)
    assert same_bits(attend(device, [askew(args[0].to(device), 3), *args[1:]]), whole)


def test_what_is_not_a_number_stays_in_its_row(device: str) -> None:
    it = text(60, 6, 3, 20, torch.float32)
    whole = attended(device, [(it, 0, 60)], MAPS[2])[0]
    it.q[30, 2] = float("nan")
    found = attended(device, [(it, 0, 60)], MAPS[2])[0]
    hurt = torch.zeros(60, 6, 20, dtype=torch.bool)
    hurt[30, 2] = True
    assert torch.equal(found.isnan(), hurt.flatten(1))
    assert torch.equal(found[~hurt.flatten(1)], whole[~hurt.flatten(1)])


@pytest.mark.parametrize("page", [-1, 6, 2**31 - 1])
def test_a_page_outside_the_cache_makes_rows_of_nan(device: str, page: int) -> None:
    args = arguments([(text(40, 3, 3, 16, torch.float32), 0, 40)], MAPS[0])
    assert args[1].shape[1] == 6 * PAGE_SIZE
    whole = attend(device, args)
    args[3][0, 1] = page
    found = attend(device, args)
    assert found[16:].isnan().all() and same_bits(found[:16], whole[:16])
    short = [*args[:3], args[3][:, :1].contiguous(), *args[4:]]  # a table that ends before its span
    found = attend(device, short)
    assert found[16:].isnan().all() and same_bits(found[:16], whole[:16])


def test_a_table_that_ends_before_a_single_token_makes_it_nan(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from llama_dist.kernels import triton_attention

    monkeypatch.setattr(triton_attention, "SECTION", 32)
    args = arguments([(text(100, 3, 3, 16, torch.float32), 99, 100)], MAPS[0])
    assert not attend(device, args).isnan().any()
    for pages in (4, 6):
        assert attend(device, [*args[:3], args[3][:, :pages].contiguous(), *args[4:]]).isnan().all()


@pytest.mark.gpu
def test_a_gpu_is_served() -> None:
    args = arguments([(text(40, 3, 3, 16, torch.bfloat16), 0, 40)], MAPS[0])
    on_gpu = [*(t.to("cuda") for t in args[:-1]), args[-1]]
    assert attention.paged(on_gpu[0])
    assert same_bits(attention.attend(*on_gpu).cpu(), attend("cuda", args))
