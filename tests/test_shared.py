"""Ranks of one host add up, gather and tell each other things in shared memory: the right bits, and no rank hangs."""

from __future__ import annotations

import os

import pytest

from llama_dist.parallel.shared import SLOT
from tests import shared_jobs as jobs
from tests.kernel_cases import need_kernels
from tests.spmd import run_ranks

pytestmark = pytest.mark.spmd
SIZES = (1, 7, 16, 17, 576, 4097, SLOT // 4, SLOT // 2 + 5, SLOT + 3)
"""Numbers: odd ones, whole slots, several of them."""


@pytest.fixture(autouse=True)
def _kernels() -> None:
    need_kernels()


@pytest.mark.parametrize("world", [2, 3, 5, 8])
def test_sums_are_those_in_the_order_of_ranks(world: int) -> None:
    run_ranks(world, jobs.sums_and_gathers, SIZES)


def test_many_sums_of_ranks_out_of_step() -> None:
    run_ranks(3, jobs.stress, 20_000, 3000, 5, timeout=250)


@pytest.mark.parametrize(("world", "threads"), [(2, 1), (2, 2), (3, 2)])
def test_programs_reduce_by_themselves(world: int, threads: int) -> None:
    run_ranks(world, jobs.programs, threads)


@pytest.mark.parametrize(("world", "threads"), [(2, 1), (3, 2)])
def test_the_likeliest_of_all_ranks(world: int, threads: int) -> None:
    run_ranks(world, jobs.likeliest, threads)


@pytest.mark.parametrize("how", ["sum", "gather", "message", "program"])
def test_a_rank_that_never_comes_is_named(how: str) -> None:
    first, late, last = run_ranks(3, jobs.missing, how, 6.0, 1)
    assert late[0] == ""
    for kind, said, took in (first, last):
        assert kind == "PeerLost" and "rank 1 did not come within 6 s" in said
        assert 5.9 < took < 9.5


def test_unlike_sizes_are_no_sum() -> None:
    assert run_ranks(3, jobs.unlike) == [
        "DesyncError: rank 1 came to a reduction with another size than rank 0",
        "DesyncError: rank 0 came to a reduction with another size than rank 1",
        "DesyncError: rank 1 came to a reduction with another size than rank 2",
    ]


def test_replicas_have_segments_of_their_own_and_no_file_of_any() -> None:
    (a,), (b,), (c,), (d,) = run_ranks(4, jobs.segments, 2)
    assert a == b and c == d and a != c
    assert not [name for name in os.listdir("/dev/shm") if "llama_dist" in name]


@pytest.mark.parametrize("what", ["one host", "a compiler on rank 1", "memory on rank 0", "access on rank 1"])
def test_without_it_the_ranks_talk_as_they_did(what: str) -> None:
    assert run_ranks(3, jobs.without, what) == [False] * 3


def test_with_everything_there_is_shared_memory() -> None:
    assert run_ranks(3, jobs.without, "nothing") == [True] * 3


def test_who_waits_long_takes_no_processor() -> None:
    assert max(run_ranks(3, jobs.idle, 2.0)) < 0.5


def test_a_second_join_finds_the_same_memory() -> None:
    assert run_ranks(2, jobs.joined_again) == [True] * 2
