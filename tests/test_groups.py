"""Groups take no thread while ranks talk in shared memory, and are gloo's when a script uses them."""

from __future__ import annotations

import pytest

from tests import group_jobs as jobs
from tests.kernel_cases import need_kernels
from tests.spmd import free_port, run_ranks

pytestmark = pytest.mark.spmd


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_of_a_host_keep_no_thread_for_gloo(world: int) -> None:
    need_kernels()
    assert run_ranks(world, jobs.joined, None) == [(0, False, False)] * world


def test_replicas_are_connected_and_their_ranks_are_not() -> None:
    need_kernels()
    assert run_ranks(4, jobs.joined, 2) == [(1, True, False)] * 4


def test_without_shared_memory_they_are_connected_at_once() -> None:
    assert run_ranks(2, jobs.joined, None, env={"CXX": "/none"}) == [(1, True, True)] * 2


def test_a_process_may_leave_and_join_again() -> None:
    need_kernels()
    assert run_ranks(2, jobs.joined_twice, free_port()) == [0, 0]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_collectives_of_a_script_are_gloo_s(world: int) -> None:
    assert run_ranks(world, jobs.collectives) == [[]] * world


def test_a_group_waits_as_long_as_it_was_told() -> None:
    waited, other = run_ranks(2, jobs.alone, 1.5)
    assert 1.4 < waited < 10 and other == 0


def test_who_waited_in_vain_may_try_again() -> None:
    ((said, joined),) = run_ranks(1, jobs.joined_without_another)
    assert said == "rank 0: the 2 ranks did not meet within 2 s; never heard of rank 1" and not joined
