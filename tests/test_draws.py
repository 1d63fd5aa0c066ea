"""Tokens of several rows at once, in C++ and in torch's operations: the sampler's own, or left to it."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_dist.engine.device_draws import draw_rows
from llama_dist.engine.draws import compiled_draw, draw_all
from llama_dist.engine.sampler import Wanted, sample
from llama_dist.kernels.draw import UNSURE
from llama_dist.request import SamplingParams
from tests.kernel_cases import need_kernels

Draws = Callable[[Sequence[Wanted]], list[int]]


def torch_draw(wanted: Sequence[Wanted]) -> list[int]:
    found: list[int] = draw_rows(wanted).tolist()
    return found


@pytest.fixture(params=[compiled_draw, torch_draw], ids=["C++", "torch"])
def draws(request: pytest.FixtureRequest) -> Draws:
    if request.param is compiled_draw:
        need_kernels()
    way: Draws = request.param
    return way


def defined(wanted: Sequence[Wanted]) -> list[int]:
    return [sample(w.row.float(), w.params, w.seed, w.position) for w in wanted]


def check(draws: Draws, wanted: Sequence[Wanted]) -> int:
    """All tokens are the sampler's or left to it; how many are left."""
    found = draws(wanted)
    for w, token, right in zip(wanted, found, defined(wanted), strict=True):
        assert token in (right, UNSURE), f"{token}, the sampler draws {right}: {w.params}, {len(w.row)} logits"
    return found.count(UNSURE)


CUTS = [
    {"temperature": 1.0, "top_p": 1.0},
    {"temperature": 0.6, "top_p": 0.9},
    {"temperature": 0.7, "top_p": 0.8, "top_k": 20},
    {"temperature": 1.0, "top_p": 1.0, "min_p": 0.05},
    {"temperature": 1.5, "top_p": 1.0, "top_k": 40, "min_p": 0.02},
    {"temperature": 2.0, "top_p": 0.3},
    {"temperature": 1.0, "top_p": 0.95, "min_p": 0.1},
    {"temperature": 0.9, "top_p": 1.0, "top_k": 1},
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_they_are_the_samplers(draws: Draws, dtype: torch.dtype, spread: float) -> None:
    torch.manual_seed(0)
    for vocab in (32003, 4096):
        rows = (torch.randn(len(CUTS), vocab) * spread).to(dtype)
        wanted = [
            Wanted(row, SamplingParams(**cut), seed, 5 + seed)  # type: ignore[arg-type]
            for seed in range(4)
            for row, cut in zip(rows, CUTS, strict=True)
        ]
        assert check(draws, wanted) <= 1, "what is close should be rare"


@given(
    seed=st.integers(0, 2**32),
    vocab=st.sampled_from([1, 2, 7, 15, 16, 17, 300, 1500]),
    spread=st.sampled_from([0.0, 0.1, 2.0, 9.0]),
    digits=st.sampled_from([0, 1, 8]),
    temperature=st.sampled_from([0.05, 0.7, 1.0, 2.0, 50.0]),
    top_p=st.sampled_from([0.0, 0.1, 0.5, 0.95, 1.0]),
    top_k=st.sampled_from([0, 1, 5, 200, 400]),
    min_p=st.sampled_from([0.0, 0.01, 0.5, 1.0]),
    banned=st.sampled_from([0.0, 0.5, 0.98]),
)
@settings(max_examples=300)
def test_so_they_are_with_ties_and_bans(
    seed: int,
    vocab: int,
    spread: float,
    digits: int,
    temperature: float,
    top_p: float,
    top_k: int,
    min_p: float,
    banned: float,
) -> None:
    rng = torch.Generator().manual_seed(seed)
    row = (torch.randn(vocab, generator=rng) * spread).round(decimals=digits)
    gone = torch.rand(vocab, generator=rng) < banned
    gone[random.Random(seed).randrange(vocab)] = False
    row[gone] = float("-inf")
    params = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)
    wanted = [Wanted(row, params, seed, position) for position in range(3)]
    for way in (compiled_draw, torch_draw):
        check(way, wanted)


def test_a_border_that_rounding_decides_is_left_to_the_sampler(draws: Draws) -> None:
    row, everything = torch.full((4,), 3.0), SamplingParams(temperature=1.0, top_p=1.0)
    wanted = [Wanted(row, SamplingParams(temperature=1.0, top_p=0.5), seed, 1) for seed in range(60)]
    third = [w for w in wanted if sample(row, everything, w.seed, 1) == 2]  # half the mass is before it
    assert third and draws(third) == [UNSURE] * len(third)
    steps = torch.tensor([3.0, 2.0])
    edge = [Wanted(steps, SamplingParams(temperature=1.0, top_p=1.0, min_p=math.exp(-1)), i, 1) for i in range(20)]
    assert {*draws(edge)} == {0, UNSURE}
    assert draw_all(wanted) == defined(wanted) and draw_all(edge) == defined(edge)


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1e-5},
        {"temperature": 1e9, "top_p": 0.5},
        {"temperature": 1.0, "top_k": 1000, "top_p": 0.5},
    ],
)
def test_extremes_give_the_samplers_tokens(params: dict[str, float]) -> None:
    torch.manual_seed(1)
    wanted = [Wanted(torch.randn(3000), SamplingParams(**params), seed, 9) for seed in range(5)]  # type: ignore[arg-type]
    check(compiled_draw, wanted)
    check(torch_draw, wanted)
    assert draw_all(wanted) == defined(wanted)


def test_rows_of_both_types_and_greedy_ones_come_together() -> None:
    torch.manual_seed(2)
    logits = torch.randn(6, 500) * 3
    wanted = [
        Wanted(row.bfloat16() if i % 2 else row, SamplingParams(temperature=float(i % 3)), 3, i)
        for i, row in enumerate(logits)
    ]
    assert draw_all(wanted) == defined(wanted)
    assert draw_all([]) == []


def test_without_temperature_the_first_of_the_greatest_is_drawn() -> None:
    need_kernels()
    rows = torch.full((3, 100), float("-inf"))
    rows[0, [7, 50]] = rows[1, 99] = rows[2, :] = 2.0
    greedy = SamplingParams(temperature=0.0)
    assert compiled_draw([Wanted(row, greedy, 1, 1) for row in rows]) == [7, 99, 0]


def test_a_token_does_not_depend_on_its_neighbours(draws: Draws) -> None:
    torch.manual_seed(3)
    rows = torch.randn(40, 40_000) * 2  # more than are drawn of at once
    wanted = [
        Wanted(row, SamplingParams(**cut), i, i)  # type: ignore[arg-type]
        for i, (row, cut) in enumerate(zip(rows, itertools.cycle(CUTS), strict=False))
    ]
    together = draws(wanted)
    assert together == [draws([w])[0] for w in wanted]
    assert draws(wanted[::-1]) == together[::-1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_gpu_draws_what_the_sampler_draws_there(dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    rows = (torch.randn(len(CUTS), 128_256) * 3).to("cuda", dtype)
    wanted = [
        Wanted(row, SamplingParams(**cut), seed, seed)  # type: ignore[arg-type]
        for seed in range(8)
        for row, cut in zip(rows, CUTS, strict=True)
    ]
    assert check(torch_draw, wanted) <= 3
