"""What test_shared.py runs on every rank: sums, gathers and messages in shared memory."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

import torch

from llama_dist.config import RunConfig
from llama_dist.kernels.tree import roots, total
from llama_dist.parallel import control, layers, shared
from llama_dist.parallel.world import World, join, leave

DTYPES = (torch.float32, torch.bfloat16)


def meet(timeout: float = 60.0, mp_size: int | None = None) -> World:
    return join(RunConfig("none", device="cpu", timeout=timeout, model_parallel_size=mp_size))


def memory_of(world: World) -> shared.Shared:
    memory = shared.of(world.replica_channel.group)
    assert memory is not None, "the ranks have no shared memory"
    return memory


def part_of(rank: int, n: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """What a rank brings; every rank can say what each of them does."""
    return torch.randn(n, generator=torch.Generator().manual_seed(1000 * seed + rank)).to(dtype)


def summed(n_ranks: int, n: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """The sum in the order of ranks, in float32, rounded once."""
    total = part_of(0, n, dtype, seed).float()
    for rank in range(1, n_ranks):
        total = total + part_of(rank, n, dtype, seed).float()
    return total.to(dtype)


def sums_and_gathers(sizes: Sequence[int]) -> None:
    """Both of each size and dtype, with messages between them; every rank compares all bits."""
    world = meet()
    memory_of(world)
    me, n_ranks = world.mp_rank, world.mp_size
    for seed, n in enumerate(sizes):
        for dtype in DTYPES:
            x = part_of(me, n, dtype, seed)
            assert layers.reduce(x) is x and torch.equal(x, summed(n_ranks, n, dtype, seed)), (n, dtype)
            parts = [part_of(rank, 3 * n, dtype, seed).view(3, n) for rank in range(n_ranks)]
            assert torch.equal(layers.gather(parts[me]), torch.cat(parts, 1)), (n, dtype)
        nodes = tuple(tuple(roots(rank * 3, 3 - rank // (n_ranks - 1))) for rank in range(n_ranks))
        planes = [part_of(rank, len(mine) * n, torch.float32, seed).view(-1, 1, n) for rank, mine in enumerate(nodes)]
        whole = total([node for mine in nodes for node in mine], [*torch.cat(planes)])
        assert torch.equal(layers.total_of_ranks(planes[me], nodes), whole), n
        said = control.share(world, ["x" * n] if world.rank == 0 else None, world.replica_channel)
        assert said == ["x" * n]
        assert control.collect(world, [me, "y" * n * me]) == [[r, "y" * n * r] for r in range(n_ranks)]
    leave(world)


def stress(rounds: int, most: int, seed: int) -> None:
    """Sums of random sizes, with random delays before and after them."""
    world = meet()
    memory = memory_of(world)
    same, own = random.Random(seed), random.Random(f"{seed}/{world.rank}")
    for _ in range(rounds):
        n = same.choice([same.randint(1, 40), same.randint(1, most)])
        values = [same.randint(-50, 50) for _ in range(world.mp_size)]
        x = torch.full((n,), values[world.mp_rank], dtype=same.choice(DTYPES))
        if own.random() < 0.02:
            time.sleep(own.random() * 2e-3)
        memory.sum(x)
        assert bool((x == sum(values)).all()), (n, values, x)
    leave(world)
