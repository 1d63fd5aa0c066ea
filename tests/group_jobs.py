"""What test_groups.py runs on every rank: groups over gloo that nobody connects before they are used."""

from __future__ import annotations

import contextlib
import datetime
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llama_dist.errors import PeerLost
from llama_dist.parallel import groups
from llama_dist.parallel.world import leave
from tests.shared_jobs import meet


def gloo_threads() -> int:
    """Those that serve gloo's sockets."""
    names = []
    for task in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            names.append(task.read_text())
    return sum(name.startswith("gloo") for name in names)


def connected(group: dist.ProcessGroup | None) -> bool:
    assert isinstance(group, groups.LazyGroup)
    return group._connected is not None


def joined(mp_size: int | None) -> tuple[int, bool, bool]:
    """gloo's threads, and whether the world's and the replica's ranks are connected, once they have joined."""
    world = meet(mp_size=mp_size)
    found = gloo_threads(), connected(world.everyone.group), connected(world.replica_channel.group)
    leave(world)
    return found


def joined_twice(other_port: int) -> int:
    leave(meet())
    os.environ["MASTER_PORT"] = str(other_port)  # the first store may still be there
    leave(meet())
    return gloo_threads()


def collectives() -> list[Any]:
    """Collectives of torch's that a script may call, in the groups of a world; what is wrong with them."""
    world = meet()
    wrong: list[Any] = []
    another = dist.new_group(list(range(world.size)))
    for name, group in (("world", dist.group.WORLD), ("another", another)):
        try:
            group._get_backend(torch.device("cpu"))  # type: ignore[union-attr]
            wrong.append(f"{name}: it has a backend already")
        except RuntimeError:
            assert not connected(group)
        wrong += [f"{name}: {what}" for what, right in _results(world.rank, world.size, group).items() if not right]
        assert connected(group)
        if not isinstance(group._get_backend(torch.device("cpu")), dist.ProcessGroupGloo):  # type: ignore[union-attr]
            wrong.append(f"{name}: it has no backend of gloo's")
    if gloo_threads() != 1:
        wrong.append(f"{gloo_threads()} threads")
    if not another.group_name or another.group_name == dist.group.WORLD.group_name:  # type: ignore[union-attr]
        wrong.append(f"a group is called {another.group_name!r}")
    dist.destroy_process_group(another)
    leave(world)
    return wrong


def _results(rank: int, size: int, group: dist.ProcessGroup | None) -> dict[str, bool]:
    """Each collective's name, and whether it gave what it should; ranks bring their number, and one more."""
    mine, total = torch.full((2,), float(rank + 1)), float(size * (size + 1) // 2)
    all_of = [torch.full((2,), float(r + 1)) for r in range(size)]
    right: dict[str, bool] = {}

    def check(name: str, to: torch.Tensor, call: Callable[[torch.Tensor], Any], expected: torch.Tensor | None) -> None:
        call(to)
        right[name] = expected is None or torch.equal(to, expected)

    def rows() -> list[torch.Tensor]:
        return [torch.zeros(2) for _ in range(size)]

    first = rank == 0
    check("all_reduce", mine.clone(), lambda x: dist.all_reduce(x, group=group), torch.full((2,), total))
    later = mine.clone()
    check("async", later, lambda x: dist.all_reduce(x, group=group, async_op=True).wait(), torch.full((2,), total))
    check("broadcast", mine.clone(), lambda x: dist.broadcast(x, 0, group=group), all_of[0])
    summed = torch.full((2,), total) if first else None
    check("reduce", mine.clone(), lambda x: dist.reduce(x, 0, group=group), summed)
    got = rows()
    dist.all_gather(got, mine, group=group)
    right["all_gather"] = all(map(torch.equal, got, all_of))
    got = rows()
    dist.gather(mine, got if first else None, group=group)
    right["gather"] = not first or all(map(torch.equal, got, all_of))
    check("scatter", torch.zeros(2), lambda x: dist.scatter(x, all_of if first else None, group=group), all_of[rank])
    whole = torch.zeros(2 * size)
    check(
        "all_gather_into_tensor", whole, lambda x: dist.all_gather_into_tensor(x, mine, group=group), torch.cat(all_of)
    )
    summed = torch.full((2,), total)
    source = mine.repeat(size)
    check("reduce_scatter", torch.zeros(2), lambda x: dist.reduce_scatter_tensor(x, source, group=group), summed)
    spread = torch.zeros(2 * size)
    check("all_to_all", spread, lambda x: dist.all_to_all_single(x, source, group=group), torch.cat(all_of))
    dist.reduce_scatter(to := torch.zeros(2), [mine] * size, group=group)
    right["reduce_scatter of a list"] = torch.equal(to, summed)
    got = rows()
    dist.all_to_all(got, [mine] * size, group=group)
    right["all_to_all of lists"] = all(map(torch.equal, got, all_of))
    said: list[Any] = [None] * size
    dist.all_gather_object(said, {"rank": rank}, group=group)
    right["all_gather_object"] = said == [{"rank": r} for r in range(size)]
    told = [f"from {rank}"]
    dist.broadcast_object_list(told, 0, group=group)
    right["broadcast_object_list"] = told == ["from 0"]
    gathered: list[Any] = [None] * size
    dist.gather_object(rank, gathered if first else None, group=group)
    right["gather_object"] = not first or gathered == [*range(size)]
    dist.barrier(group=group)
    if size > 1 and rank < 2:
        pair = mine.clone()
        dist.send(pair, 1, group=group) if first else dist.recv(pair, 0, group=group)
        right["send"] = torch.equal(pair, all_of[0])
        back = mine.clone()
        operation = dist.P2POp(dist.irecv if first else dist.isend, back, 1 - rank, group)
        for work in dist.batch_isend_irecv([operation]):
            work.wait()
        right["isend"] = torch.equal(back, all_of[1])
    return right


def alone(seconds: float) -> float:
    """How long rank 0 waits in a collective of a group to which the others never come; 0 for these."""
    world = meet()
    group = dist.new_group(list(range(world.size)))
    groups.set_timeout(group, datetime.timedelta(seconds=seconds))
    world.watch.detach()  # that one ends before another means nothing here
    began = time.monotonic()
    if world.rank == 0:
        try:
            dist.barrier(group=group)
        except RuntimeError:
            return time.monotonic() - began
    else:
        time.sleep(seconds + 2)
    return 0.0


def joined_without_another() -> tuple[str, bool]:
    """What a rank says that is the only one of two to come, and whether it is in a world then."""
    os.environ.update(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    try:
        meet(timeout=2.0)
    except PeerLost as err:
        return str(err), dist.is_initialized()
    return "joined", True
