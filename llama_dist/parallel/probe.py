"""How fast ranks exchange messages: every pair of them, and the all-reduce that the model's layers use.

Every rank of a mesh calls the same functions in the same order. How long to go on is decided from the slowest rank's
clock, which all of them are told.
"""

from __future__ import annotations

import datetime
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from llama_dist.parallel.control import guarded
from llama_dist.parallel.network import interface_of, is_loopback

SMALL, LARGE = 8, 2 * 2**20  # bytes of the two messages of a pair
SMALL_TRIPS, LARGE_TRIPS = 20, 3
SIZES = tuple(1024 * 4**i for i in range(9))
"""Bytes of the all-reduces: 1 KB to 64 MB, in steps of four."""
MOST_TIMES = 20  # that one size is reduced
SHARE = 0.1  # of the seconds allowed, for one size


@dataclass(frozen=True)
class Mesh:
    """Ranks that exchange messages: `ranks` are world ranks, `me` is this one's place among them.

    `control` is gloo; `data` is what weights' partial sums go through, the same or NCCL. `part`: the ranks that hold a
    copy of the model together with this one, None where some of them are missing.
    """

    ranks: tuple[int, ...]
    me: int
    device: torch.device
    seconds: float
    control: dist.ProcessGroup
    data: dist.ProcessGroup
    part: dist.ProcessGroup | None


@dataclass(frozen=True)
class Pair:
    """Two world ranks. `latency`: seconds one way of a message of 8 bytes; `bandwidth`: bytes a second of one of 2 MiB.

    Both are what the fastest quarter of the messages reaches: a busy processor delays some, a bad link all.
    """

    a: int
    b: int
    latency: float
    bandwidth: float


def build(
    store: Store,
    ranks: Sequence[int],
    rank: int,
    parts: Sequence[Sequence[int]],
    device: torch.device,
    address: str,
    seconds: float,
) -> Mesh:
    """Connect `ranks` with each other, and each of `parts` (ranks of one copy of the model) as a run would.

    `address` is this rank's own, that the others reach. Raises PeerLost where an answer takes more than `seconds`.
    """
    timeout = datetime.timedelta(seconds=seconds)
    name = interface_of(address)
    if name is not None and not is_loopback(address):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    me, size = list(ranks).index(rank), len(ranks)
    guarded(
        "connecting the ranks over gloo",
        lambda: dist.init_process_group(
            "gloo", store=PrefixStore("mesh", store), rank=me, world_size=size, timeout=timeout
        ),
    )
    control = dist.group.WORLD
    assert control is not None
    # NCCL's own watch would abort this process after its timeout; here `_settle` bounds each wait.
    kind, patience = ("nccl", datetime.timedelta(minutes=10)) if device.type == "cuda" else ("gloo", timeout)
    places = {world_rank: place for place, world_rank in enumerate(ranks)}

    def group(members: Sequence[int]) -> dist.ProcessGroup:
        def make() -> Any:
            return dist.new_group([places[member] for member in members], timeout=patience, backend=kind)

        found: dist.ProcessGroup = guarded("making a group", make)
        return found

    data = group(ranks) if kind == "nccl" else control
    part = None
    for members in parts:  # every rank takes part in making every group
        made = data if list(members) == list(ranks) else group(members)
        part = made if rank in members else part
    return Mesh(tuple(ranks), me, device, seconds, control, data, part)


def leave(mesh: Mesh) -> None:
    """The orderly end, after the last exchange."""
    guarded("the end of the exchanges", lambda: dist.barrier(group=mesh.control))
    dist.destroy_process_group()


def rounds(n: int) -> Iterator[list[tuple[int, int]]]:
    """Every pair of n places once, in rounds in which each place is in one pair at most: 4 places, 3 rounds of 2.

    The circle method: one place stands still and the others move on by one.
    """
    m = n + n % 2  # with an odd number one place rests each round
    circle = list(range(m))
    for _ in range(m - 1):
        pairs = [tuple(sorted((circle[i], circle[m - 1 - i]))) for i in range(m // 2)]
        yield [(a, b) for a, b in pairs if b < n]
        circle = [circle[0], circle[-1], *circle[1:-1]]


def _settle(mesh: Mesh) -> None:
    """Until the device has done what was asked of it. A hanging exchange is an error here, not a wait without end."""
    if mesh.device.type != "cuda":
        return
    stream, deadline = torch.cuda.current_stream(mesh.device), time.monotonic() + mesh.seconds
    while not stream.query():
        if time.monotonic() > deadline:
            raise RuntimeError(f"no answer in {mesh.seconds:g} s")


def _slowest(mesh: Mesh, seconds: float) -> float:
    """The largest of the ranks' times, on every rank."""
    value = torch.tensor([seconds], dtype=torch.float64)
    guarded("comparing times", lambda: dist.all_reduce(value, dist.ReduceOp.MAX, group=mesh.control))
    return float(value)


def _pass(mesh: Mesh, x: torch.Tensor, peer: int, sends: bool) -> None:
    operation = dist.P2POp(dist.isend if sends else dist.irecv, x, peer, mesh.data)
    for work in dist.batch_isend_irecv([operation]):
        work.wait()


def _trip(mesh: Mesh, x: torch.Tensor, peer: int) -> float:
    """Seconds of a message there and back."""
    began = time.perf_counter()
    for sends in (mesh.me < peer, mesh.me > peer):
        _pass(mesh, x, peer, sends)
    _settle(mesh)
    return time.perf_counter() - began


def _time_pair(mesh: Mesh, peer: int, small: torch.Tensor, large: torch.Tensor) -> Pair:
    def trips(x: torch.Tensor, n: int) -> float:
        _trip(mesh, x, peer)  # it may have to connect
        return sorted(_trip(mesh, x, peer) for _ in range(n))[n // 4]

    a, b = mesh.ranks[mesh.me], mesh.ranks[peer]
    what = f"the exchange of ranks {min(a, b)} and {max(a, b)}"
    latency = guarded(what, lambda: trips(small, SMALL_TRIPS)) / 2
    return Pair(a, b, latency, 2 * large.nbytes / guarded(what, lambda: trips(large, LARGE_TRIPS)))


def time_pairs(mesh: Mesh, seconds: float) -> list[Pair]:
    """Time every pair, as far as `seconds` last; each pair is in the list of its lower rank."""
    began = time.monotonic()
    small, large = (torch.zeros(n, dtype=torch.uint8, device=mesh.device) for n in (SMALL, LARGE))
    if mesh.device.type == "cuda":  # a group of NCCL begins with all its ranks
        reduce_once(mesh, small, mesh.data)
    found: list[Pair] = []
    for pairs in rounds(len(mesh.ranks)):
        for a, b in pairs:
            if mesh.me in (a, b):
                pair = _time_pair(mesh, a + b - mesh.me, small, large)
                found += [pair] if mesh.me == a else []
        if _slowest(mesh, time.monotonic() - began) > seconds:
            break
    return found


def reduce_once(mesh: Mesh, x: torch.Tensor, group: dist.ProcessGroup) -> float:
    """Seconds of one all-reduce of `x` in place."""
    began = time.perf_counter()
    what = f"an all-reduce of {x.nbytes} bytes"

    def run() -> None:
        dist.all_reduce(x, group=group)
        _settle(mesh)

    guarded(what, run)
    return time.perf_counter() - began


def time_reductions(mesh: Mesh, seconds: float, sizes: Sequence[int] = SIZES) -> list[tuple[int, float]]:
    """Bytes and median seconds of an all-reduce in this rank's part, for the sizes that `seconds` last for."""
    began, part, found = time.monotonic(), mesh.part, list[tuple[int, float]]()

    def measure(x: torch.Tensor) -> float:
        return 0.0 if part is None else reduce_once(mesh, x, part)

    for size in sizes:
        x = torch.zeros(size // 4, dtype=torch.float32, device=mesh.device)
        measure(x)
        once = _slowest(mesh, measure(x))
        n_times = min(MOST_TIMES, max(1, int(seconds * SHARE / max(once, 1e-9))))
        found.append((size, statistics.median(measure(x) for _ in range(n_times))))
        spent = _slowest(mesh, time.monotonic() - began)
        if spent + 12 * once > seconds:  # the next size takes four times as long, and is done three times at least
            break
    return [] if part is None else found
