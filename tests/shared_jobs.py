"""What test_shared.py runs on every rank: sums, gathers and messages in shared memory."""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from llama_dist.config import RunConfig
from llama_dist.errors import LlamaDistError
from llama_dist.kernels import build, single
from llama_dist.kernels.program import Call, Program
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


def run(program: Program, n: int) -> None:
    """A program without attention, for n rows."""
    angles, rows = torch.zeros(1, 1), torch.zeros(n, dtype=torch.int64)
    zero, one = torch.zeros(1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    where = [t.data_ptr() for t in (rows, rows, rows, zero, zero, one, angles, angles)]
    program.run(Call(n, 1, 1, 16, 1, 1, *where))


def programs(n_threads: int) -> None:
    """Sums and reproducible sums inside programs, of all rows they have room for and of fewer."""
    world = meet()
    memory = memory_of(world)
    me, n_ranks, width, most = world.mp_rank, world.mp_size, 577, 70
    torch.set_num_threads(n_threads)
    for dtype in DTYPES:
        nodes = tuple(tuple(roots(rank * 5, 5)) for rank in range(n_ranks))
        planes = [part_of(rank, len(mine) * most * width, torch.float32, 3) for rank, mine in enumerate(nodes)]
        planes = [part.view(-1, most, width) for part in planes]
        program = Program(most, dtype)
        x, twice = program.rows("x", width), program.rows("twice", width)
        mine, y = program.rows("planes", width, len(nodes[me])), program.rows("y", width)
        program.shared_sum(x, memory.address, me, memory.lost)
        program.add(x, x, twice)
        program.shared_planes(mine, nodes, y, memory.address, me, memory.lost)
        mine.copy_(planes[me])
        for n in (most, 1, 3, 41):
            x[:n] = part_of(me, n * width, dtype, n).view(n, width)
            run(program, n)
            expected = summed(n_ranks, n * width, dtype, n).view(n, width)
            assert torch.equal(x[:n], expected) and torch.equal(twice[:n], expected + expected), (dtype, n)
            whole: torch.Tensor = total([node for part in nodes for node in part], [*torch.cat(planes)])
            assert torch.equal(y[:n], whole[:n].to(dtype)), (dtype, n)
    leave(world)


def likeliest(n_threads: int) -> None:
    """The likeliest of all ranks' entries: equals, infinite numbers and NaNs on any rank, and one that has none."""
    world = meet()
    memory = memory_of(world)
    me, n_ranks, width, rows = world.mp_rank, world.mp_size, 37, 70
    torch.set_num_threads(n_threads)
    for dtype in DTYPES:
        whole = part_of(0, rows * width * n_ranks, dtype, 4).view(rows, -1)
        held = width * (n_ranks - 1) - 5  # the last rank has none, and the one before it fewer
        whole[:9] = 1
        for row, (at, value) in enumerate([(3, 2), (held - 1, 2), (0, 1), (2, torch.nan), (held - 1, -torch.inf)]):
            whole[row, at] = value
        whole[5, [held - 2, 1]] = 3  # equals
        whole[6, [held - 1, 0]] = torch.tensor([torch.nan, torch.inf], dtype=dtype)
        whole[7, held:] = torch.nan  # what nobody has
        whole[8] = -7  # less than the zeros that fill up parts
        program = Program(rows, dtype)
        x, n = program.rows("x", width), max(0, min(width, held - me * width))
        x.copy_(whole[:, me * width : (me + 1) * width])
        found = program.likeliest(x, n)
        program.shared_likeliest(x, n, me * width, found, torch.empty(0, x.shape[1]), memory.address, me, memory.lost)
        for m in (rows, 1, 9):
            run(program, m)
            assert found[:m].tolist() == single.likeliest_twin(whole[:m, :held]), (dtype, m)
    leave(world)


def failing(memory: shared.Shared, how: str) -> Callable[[], Any]:
    """A call in which all ranks must take part."""
    x = torch.ones(3, 5)
    if how == "program":
        program = Program(3, torch.float32)
        program.shared_sum(program.rows("x", 5).fill_(1), memory.address, memory.rank, memory.lost)
        program.shared_sum(program.rows("x", 5), memory.address, memory.rank, memory.lost)
        return lambda: run(program, 3)
    calls: dict[str, Callable[[], Any]] = {
        "sum": lambda: memory.sum(x),
        "gather": lambda: memory.gather(x),
        "message": lambda: memory.exchange(b"hello", "sharing a message"),
    }
    return calls[how]


def missing(how: str, timeout: float, late: int) -> tuple[str, str, float]:
    """What the others raise where rank `late` does not come, and how long that takes."""
    world = meet(timeout)
    call = failing(memory_of(world), how)
    call()
    control.collect(world, "now")
    world.watch.detach()  # that one ends before another means nothing here
    began = time.monotonic()
    if world.rank == late:
        time.sleep(timeout + 1)
        return "", "", 0
    try:
        call()
    except LlamaDistError as err:
        took = time.monotonic() - began
        return type(err).__name__, str(err), took
    raise AssertionError("it came back")


def unlike() -> str:
    """What is raised where rank 1 brings one number more."""
    world = meet()
    try:
        memory_of(world).sum(torch.ones(8 + (world.rank == 1)))
    except LlamaDistError as err:
        world.watch.detach()  # that one ends before another means nothing here
        return f"{type(err).__name__}: {err}"
    return ""


def segments(mp_size: int) -> list[str]:
    """The names of the shared segments this rank has mapped. They are no names of files."""
    world = meet(mp_size=mp_size)
    x = torch.full((5,), float(world.rank))
    assert layers.reduce(x)[0] == sum(world.replica_channel.ranks)
    names = re.findall(r"/memfd:(llama_dist\S+) \(deleted\)", Path("/proc/self/maps").read_text())
    leave(world)
    return sorted(set(names))


def without(what: str) -> bool:
    """Whether there is shared memory where something is amiss; sums and messages are right all the same."""
    if what == "one host":
        os.environ["LOCAL_WORLD_SIZE"] = "1"
    elif what == "a compiler on rank 1" and os.environ["RANK"] == "1":
        build.library = lambda: None  # type: ignore[assignment]
    elif what == "memory on rank 0" and os.environ["RANK"] == "0":
        shared._make = lambda size, name: -1
    elif what == "access on rank 1" and os.environ["RANK"] == "1":
        shared._map = lambda *offer: None
    world = meet()
    x = layers.reduce(torch.full((5,), world.rank + 1.0))
    assert bool((x == world.size * (world.size + 1) / 2).all())
    assert layers.gather(x[None] + world.rank).shape == (1, 5 * world.size)
    assert control.collect(world, world.rank, world.replica_channel) == list(range(world.size))
    control.check(world, 7, "nothing")
    found = shared.of(world.replica_channel.group) is not None
    leave(world)
    return found


def idle(seconds: float) -> float:
    """Seconds of processor time this rank takes while rank 0 sleeps."""
    world = meet()
    control.share(world, [] if world.rank == 0 else None, world.replica_channel)
    before = time.process_time()
    if world.rank == 0:
        time.sleep(seconds)
    control.share(world, [] if world.rank == 0 else None, world.replica_channel)
    taken = time.process_time() - before
    leave(world)
    return taken


def joined_again() -> bool:
    """A second join, as by a second Llama.build, finds the same memory; after leaving there is none."""
    world = meet()
    first = memory_of(world)
    same = memory_of(meet()) is first
    group = world.replica_channel.group
    leave(world)
    return same and shared.of(group) is None
