"""The same bits on any number of ranks and threads, alone or in any batch, in any chunks, preempted or not."""

from __future__ import annotations

import pytest

from tests import tiny
from tests.conftest import Saver
from tests.reproducible_jobs import WAYS, every_way
from tests.spmd import run_ranks

pytestmark = pytest.mark.spmd
N = 12
WORLDS = (1, 2, 3, 4, 5, 7, 8)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", ["llama-gqa", "llama-9-3"])
def test_any_world_and_any_batch(checkpoint: Saver, case: str, dtype: str) -> None:
    folder, vocab = str(checkpoint(case, "hf")), tiny.VOCAB
    expected = None
    for world in WORLDS:
        ways = list(WAYS) if world in (1, 3) else ["in chunks"]
        threads = 3 - world if world < 3 else 1
        for rank, found in enumerate(run_ranks(world, every_way, folder, dtype, ways, N, vocab, threads)):
            for way, (rows, preemptions) in found.items():
                expected = expected or rows
                assert rows == expected, f"rank {rank} of {world}, {way}"
                assert (preemptions > 0) == (way == "preempted"), way
    assert expected is not None and len({row[0] for row in expected}) == N
