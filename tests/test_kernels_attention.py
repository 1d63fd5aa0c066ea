"""Attention in C++: right against float64, and each row's bits its own, whatever is computed beside it."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from llama_dist.kernels import attention
from llama_dist.kernels.attention import PAGE_SIZE, attend, attend_twin
from tests.kernel_cases import (
    DTYPES,
    Part,
    Text,
    arguments,
    attended,
    compiled_apart,
    instructions,
    need_kernels,
    same_bits,
    text,
    threads,
)

MAPS = ((0, 1, 2), (0, 0, 0, 0), (0, 0, 1, 1, 1, 1, 2, 2), (0, 1, 1, 2, 2, 2))
"""One head a KV head; one KV head for all; runs of heads that begin and end amid a KV head's readers."""


@pytest.fixture(autouse=True)
def _kernels() -> None:
    need_kernels()


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


def within(found: torch.Tensor, true: torch.Tensor, rounding: float, slack: float = 2e-6) -> bool:
    return bool(((found.double() - true).abs() <= rounding * true.abs() + slack).all())


@pytest.mark.parametrize("window", [0, 1, 7, 40])
@pytest.mark.parametrize("head_dim", [6, 16, 20, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_attention(dtype: torch.dtype, head_dim: int, window: int) -> None:
    of_query = MAPS[(head_dim + window) % len(MAPS)]
    bounds = ((0, 37), (100, 101), (540, 561), (505, 519), (3, 4), (15, 17))
    whole = [text(stop, len(of_query), 3, head_dim, dtype, seed=stop) for _, stop in bounds]
    parts = [(it, *ends) for it, ends in zip(whole, bounds, strict=True)]
    true = torch.cat([plain(part, of_query, window) for part in parts])
    # The only rounding to bfloat16 is the last one: half a unit in its eighth binary digit.
    assert within(torch.cat(attended(parts, of_query, window)), true, 2**-8 if dtype == torch.bfloat16 else 0)
    twin = attend_twin(*(torch.nan_to_num(x) for x in arguments(parts, of_query)), window)
    assert within(twin, true, 0, 0.03 if dtype == torch.bfloat16 else 4e-6)  # torch's weights are bfloat16 too


def cuts(length: int, draw: random.Random) -> list[int]:
    return [0, *sorted(draw.sample(range(1, length), min(length - 1, draw.choice([1, 3, 9])))), length]


@pytest.mark.parametrize(("window", "head_dim"), [(0, 20), (0, 32), (600, 64), (30, 16), (600, 160)])
@pytest.mark.parametrize("of_query", MAPS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_neighbours_chunks_pages_threads_or_alignment(
    dtype: torch.dtype, of_query: tuple[int, ...], window: int, head_dim: int
) -> None:
    draw = random.Random(f"{dtype} {of_query} {window}")
    texts = [text(length, len(of_query), 3, head_dim, dtype, seed=length) for length in (1100, 530, 90, 17, 5)]
    alone = [attended([(it, 0, len(it.q))], of_query, window)[0] for it in texts]
    for trial in range(8):
        parts: list[Part] = []
        for i in draw.choices(range(len(texts)), k=draw.choice([1, 2, 5, 12])):
            ends = cuts(len(texts[i].q), draw)
            at = draw.randrange(len(ends) - 1)
            lone = draw.random() < 0.4
            parts.append((texts[i], ends[at + 1] - 1 if lone else ends[at], ends[at + 1]))
        with threads(draw.choice([1, 2, 3])):
            found = attended(parts, of_query, window, seed=trial, offset=draw.choice([0, 1, 3, 8]))
        for (it, start, stop), rows in zip(parts, found, strict=True):
            whole = alone[next(i for i, other in enumerate(texts) if other is it)]
            assert same_bits(rows, whole[start:stop]), f"tokens {start} to {stop} of {len(it.q)}, in trial {trial}"


@pytest.mark.parametrize(("head_dim", "window"), [(20, 0), (64, 0), (64, 600), (96, 0)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_share_a_long_sequence(dtype: torch.dtype, head_dim: int, window: int) -> None:
    of_query = (0, 0, 0, 1, 1, 1, 2, 2, 2)
    it = text(1100, 9, 3, head_dim, dtype)
    for start in (1099, 1090):
        with threads(1):
            alone = attended([(it, start, 1100)], of_query, window)[0]
        for n_threads in (2, 3, 7):
            with threads(n_threads):
                for seed in range(2):
                    found = attended([(it, start, 1100)], of_query, window, seed=seed)[0]
                    assert same_bits(found, alone), (start, n_threads, seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_which_heads_a_rank_holds(dtype: torch.dtype) -> None:
    of_query = (0, 0, 0, 1, 1, 1, 2, 2, 2)
    it = text(200, 9, 3, 64, dtype)
    whole = attended([(it, 0, 200)], of_query)[0].unflatten(1, (9, 64))
    for first, last in ((0, 1), (2, 5), (4, 9), (8, 9)):
        held = range(of_query[first], of_query[last - 1] + 1)
        mine = Text(it.q[:, first:last].contiguous(), it.k[held.start : held.stop], it.v[held.start : held.stop])
        local = [of_query[i] - held.start for i in range(first, last)]
        found = attended([(mine, 190, 200)], local)[0].unflatten(1, (-1, 64))
        assert same_bits(found, whole[190:, first:last])


@pytest.mark.parametrize("readers", [1, 2, 5, 6, 7, 8, 13, 16, 17])
@pytest.mark.parametrize(("head_dim", "window"), [(64, 0), (96, 50)])
def test_bits_of_a_token_alone_are_its_bits_among_others(head_dim: int, window: int, readers: int) -> None:
    """However many heads read one: few rows and many go ways of their own."""
    it, of_query = text(560, readers, 1, head_dim, torch.bfloat16), [0] * readers
    whole = attended([(it, 0, 560)], of_query, window)[0]
    for place in (0, 15, 16, 40, 511, 530, 559):  # odd and even pages, whole and begun ones, of two segments
        assert same_bits(attended([(it, place, place + 1)], of_query, window)[0], whole[place : place + 1]), place


@pytest.mark.parametrize(("head_dim", "window"), [(64, 0), (32, 30), (80, 0), (96, 0), (256, 0), (64, 600)])
def test_amx_has_its_bits_without_its_tiles(
    head_dim: int, window: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As AVX-512 gives them where a process may not use AMX."""
    if instructions() != "amx":
        pytest.skip("needs a processor with AMX")
    it, of_query = text(1100, 9, 3, head_dim, torch.bfloat16), (0, 0, 0, 1, 1, 1, 2, 2, 2)
    parts = [(it, 0, 1100), (it, 77, 78), (it, 505, 519), (it, 1099, 1100)]

    def found() -> list[torch.Tensor]:
        with threads(3):  # which share the one sequence
            return [*attended(parts, of_query, window), *attended(parts[-1:], of_query, window)]

    usual = found()
    apart = compiled_apart(tmp_path / "pairs.so", attention._compiled(), ["attention"], "-DTILES=0")
    monkeypatch.setattr(attention, "_compiled", apart)
    assert all(map(same_bits, found(), usual))


@pytest.mark.parametrize("readers", [7, 12, 13, 71])
def test_many_readers_of_one_head_are_more_than_a_group_or_a_tile(readers: int) -> None:
    it = text(70, readers, 1, 16, torch.float32)
    whole = attended([(it, 0, 70)], [0] * readers)[0]
    assert within(whole, plain((it, 0, 70), [0] * readers, 0), 0)
    for place in (0, 14, 15, 16, 69):
        assert same_bits(attended([(it, place, place + 1)], [0] * readers)[0], whole[place : place + 1])


def test_queries_may_be_columns_of_a_wider_product() -> None:
    args = arguments([(text(40, 6, 3, 20, torch.bfloat16), 0, 40)], MAPS[3], compiled=True)
    wide = torch.cat([args[0].flatten(1), torch.full((40, 7), float("nan"), dtype=torch.bfloat16)], dim=1)
    columns = wide[:, :120].unflatten(1, (6, 20))
    assert not columns.is_contiguous()
    assert same_bits(attend(columns, *args[1:]), attend(*args))


def test_what_is_not_a_number_stays_in_its_row() -> None:
    it = text(60, 6, 3, 20, torch.float32)
    whole = attended([(it, 0, 60)], MAPS[3])[0]
    it.q[30, 2] = float("nan")
    found = attended([(it, 0, 60)], MAPS[3])[0]
    hurt = torch.zeros(60, 6, 20, dtype=torch.bool)
    hurt[30, 2] = True
    assert torch.equal(found.isnan(), hurt.flatten(1))
    assert torch.equal(found[~hurt.flatten(1)], whole[~hurt.flatten(1)])


def test_great_scores_do_not_overflow() -> None:
    it = text(600, 6, 3, 64, torch.float32)
    loud = Text(it.q * 300, it.k, it.v)
    # A score near 2000 is known to a few ten-thousandths, and so is the weight.
    assert within(attended([(loud, 0, 600)], MAPS[3])[0], plain((loud, 0, 600), MAPS[3], 0), 0, 5e-3)


@pytest.mark.parametrize("page", [-1, 6, 2**31 - 1])
def test_a_page_outside_the_cache_is_an_error(page: int) -> None:
    args = arguments([(text(40, 3, 3, 16, torch.float32), 0, 40)], MAPS[0])
    assert args[1].shape[1] == 6 * PAGE_SIZE
    args[3][0, 1] = page
    with pytest.raises(IndexError, match="span 0 has pages outside the cache, which has 6"):
        attend(*args)


def test_a_table_that_ends_before_its_span_is_an_error() -> None:
    args = arguments([(text(40, 3, 3, 16, torch.float32), 0, 40)], MAPS[0])
    args[3] = args[3][:, :2].contiguous()
    with pytest.raises(IndexError, match="span 0"):
        attend(*args)


def test_half_precision_is_the_twins() -> None:
    args = arguments([(text(40, 3, 3, 16, torch.float16), 0, 40)], MAPS[0])
    args = [torch.nan_to_num(x) for x in args]
    assert not attention.compiled_for(args[0])
    assert torch.equal(attend(*args), attend_twin(*args))


ONE_POOL = """
import torch
def pools():
    return {line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.split("/")[-1]}
torch.set_num_threads(2)
torch.ones(1000, 1000) @ torch.ones(1000, 1000)
before = pools()
from tests.kernel_cases import *
need_kernels()
attended([(text(300, 6, 3, 64, torch.float32), 0, 300)], (0, 0, 1, 1, 2, 2))
assert pools() == before, (before, pools())
print(len(before))
"""

NO_COMPILER = """
import logging
logging.basicConfig(level=logging.INFO)
from tests.kernel_cases import *
from llama_dist.kernels.attention import attend_twin
args = [torch.nan_to_num(x) for x in arguments([(text(30, 6, 3, 64, torch.float32), 0, 30)], (0, 0, 1, 1, 2, 2))]
assert torch.equal(attend(*args), attend_twin(*args))
assert attend(*args).abs().sum() > 0
print(build.library())
"""


def _python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=root, env={**os.environ, **env}, capture_output=True, text=True, timeout=120)


def test_the_kernels_use_the_threads_that_torch_has() -> None:
    done = _python(ONE_POOL)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


def test_without_a_compiler_the_twin_serves_and_it_is_said(tmp_path: Path) -> None:
    done = _python(NO_COMPILER, CXX="/nonexistent", XDG_CACHE_HOME=str(tmp_path))
    assert (done.returncode, done.stdout) == (0, "None\n"), done.stderr
    assert done.stderr.count("computing with torch's own operations: there is no C++ compiler; install g++") == 1


def test_a_compiler_that_fails_is_said_and_the_twin_serves(tmp_path: Path) -> None:
    done = _python(NO_COMPILER, CXX="/bin/false", XDG_CACHE_HOME=str(tmp_path))
    assert (done.returncode, done.stdout) == (0, "None\n"), done.stderr
    assert done.stderr.count("computing with torch's own operations: /bin/false failed") == 1
    assert not list((tmp_path / "llama_dist").glob("*.so"))
