"""Ranks of one host add up, gather and tell each other things in shared memory: the right bits, and no rank hangs."""

from __future__ import annotations

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
