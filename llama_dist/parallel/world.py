"""Joining and leaving: process groups, device, timeouts. One world a process, as torch.distributed has one."""

from __future__ import annotations

import contextlib
import datetime
import functools
import io
import itertools
import json
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as fs
from torch.distributed import HashStore, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from llama_dist.config import RunConfig
from llama_dist.errors import ConfigError, PeerLost
from llama_dist.parallel import groups, shared
from llama_dist.parallel.launch import Launch, check_launch, read_launch
from llama_dist.parallel.network import address_towards, interface_between
from llama_dist.parallel.watch import Watch

log = logging.getLogger("llama_dist")


@dataclass(frozen=True)
class Channel:
    """A group of ranks that exchange small messages, see control.py. `ranks` are world ranks, the first one speaks."""

    group: dist.ProcessGroup
    rank: int
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class World:
    """Where this process stands. Ranks [replica * mp_size, (replica + 1) * mp_size) hold one copy of the model."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    mp_rank: int
    mp_size: int
    device: torch.device
    everyone: Channel
    replica_channel: Channel
    watch: Watch
    store: Store

    @property
    def replica(self) -> int:
        return self.rank // self.mp_size

    @property
    def n_replicas(self) -> int:
        return self.size // self.mp_size


def model_parallel_size(run: RunConfig, launch: Launch) -> int:
    """The ranks that hold one copy of the model; a ConfigError where the world is no multiple of it."""
    size = run.model_parallel_size or launch.size
    if launch.size % size:
        fits = ", ".join(str(d) for d in range(1, launch.size + 1) if launch.size % d == 0)
        raise ConfigError(
            f"--model_parallel_size {size} does not divide the {launch.size} ranks that were started; use one of {fits}"
        )
    return size


def pick_device(run: RunConfig, launch: Launch) -> torch.device:
    """`auto`: this rank's CUDA device where there is one, else the CPU."""
    if run.device == "cpu" or (run.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count == 0:
        raise ConfigError(
            "--device cuda, but torch finds no CUDA device here; use --device cpu or install CUDA's torch"
        )
    if launch.local_rank >= count:
        raise ConfigError(
            f"rank {launch.rank} is number {launch.local_rank} on this host, which has {count} CUDA devices; "
            f"start at most {count} ranks a host or pass --device cpu"
        )
    return torch.device("cuda", launch.local_rank)


def set_threads(launch: Launch) -> None:
    """This rank's share of the host's cores, unless the user has set a number."""
    # torchrun sets OMP_NUM_THREADS=1 where several ranks share a host; any other value is the user's own.
    if launch.local_size > 1 and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // launch.local_size))


def open_store(launch: Launch, timeout: datetime.timedelta) -> Store:
    """The store that the ranks meet at; rank 0 keeps it where no torchrun does. PeerLost: it is not there."""
    if launch.size == 1 and launch.launcher == "alone":
        return HashStore()
    master = launch.rank == 0 and not launch.agent_store
    try:
        store = TCPStore(
            launch.host, launch.port, launch.size, is_master=master, timeout=timeout, wait_for_workers=False
        )
    except (dist.DistError, RuntimeError, OSError) as err:
        first = str(err).splitlines()[0][:200]
        raise PeerLost(
            f"rank {launch.rank} cannot reach the ranks' store at {launch.host}:{launch.port} ({first}); "
            "check MASTER_ADDR, MASTER_PORT and that rank 0 started"
        ) from err
    # A restarted attempt must not read what the dead one left.
    return PrefixStore(f"llama_dist/{launch.attempt}", store)


def _use_reachable_interface(store: Store, launch: Launch) -> None:
    """Let gloo listen where the other hosts can reach this one, unless the user has said where."""
    if launch.size == launch.local_size or "GLOO_SOCKET_IFNAME" in os.environ:
        return
    try:
        mine = address_towards(launch.host, launch.port)
        store.set(f"address/{launch.rank}", mine)
        others = [store.get(f"address/{rank}").decode() for rank in range(launch.size)]
        found = interface_between(mine, others, launch.port)
    except OSError as err:
        log.warning("which interface reaches the other hosts is not known (%s); gloo picks one", err)
        return
    if found is not None:
        log.debug("gloo listens on %s", found)
        os.environ["GLOO_SOCKET_IFNAME"] = found


def _missing(store: Store, launch: Launch) -> str:
    try:
        lost = [str(r) for r in range(launch.size) if not store.check([f"here/{r}"])]
    except RuntimeError:
        return ""
    if lost:
        return f"; never heard of rank {', '.join(lost)}"
    if launch.size == launch.local_size:
        return ""
    where = os.environ.get("GLOO_SOCKET_IFNAME", "not set")
    return (
        "; all of them reached the store, but not each other: "
        f"set GLOO_SOCKET_IFNAME (here {where}) to the interface between the hosts, and open their ports to each other"
    )


def join(run: RunConfig, watch: Watch | None = None) -> World:
    """Meet the other ranks and build the groups. Raises ConfigError before, PeerLost when ranks do not come.

    A second call in one process joins the same groups again; the sizes must agree.
    """
    launch = read_launch()
    check_launch(launch)
    mp_size = model_parallel_size(run, launch)
    device = pick_device(run, launch)
    timeout = datetime.timedelta(seconds=run.timeout)
    watch = watch or Watch.current() or Watch(launch.rank)
    set_threads(launch)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        store = open_store(launch, timeout)
        store.set(f"here/{launch.rank}", "")
        try:
            _use_reachable_interface(store, launch)
            dist.init_process_group(
                groups.backend(), store=store, rank=launch.rank, world_size=launch.size, timeout=timeout
            )
            if launch.size > launch.local_size:
                groups.connect(dist.group.WORLD)
            watch.attach(store, launch, run.timeout)  # waits for the others' cards
        except (dist.DistError, RuntimeError) as err:
            missing = _missing(store, launch)
            if dist.is_initialized():  # who catches this may try again
                dist.destroy_process_group()
            raise PeerLost(
                f"rank {launch.rank}: the {launch.size} ranks did not meet within {run.timeout:g} s{missing}"
            ) from err
    if not fs.model_parallel_is_initialized():
        with contextlib.redirect_stdout(sys.stderr if run.verbose else io.StringIO()):  # fairscale prints to stdout
            fs.initialize_model_parallel(
                mp_size, model_parallel_backend="nccl" if device.type == "cuda" else groups.backend()
            )
    elif fs.get_model_parallel_world_size() != mp_size:
        raise ConfigError(
            f"this process already runs model-parallel size {fs.get_model_parallel_world_size()}, asked for {mp_size}"
        )
    mp_group = fs.get_model_parallel_group()
    for group in (mp_group, fs.get_data_parallel_group(), fs.get_pipeline_parallel_group()):
        groups.set_timeout(group, timeout)
    world = _world(launch, mp_size, device, timeout, mp_group, watch)
    _share_or_connect(world, run.timeout)
    return world


def _share_or_connect(world: World, timeout: float) -> None:
    """Give a replica's ranks shared memory, where they are on CPU and may all be on this host; the rest connect."""
    from llama_dist.parallel.control import guarded

    channel = world.replica_channel
    if world.device.type == "cpu" and 1 < world.mp_size <= world.local_size and shared.of(channel.group) is None:
        crowded = world.local_size > len(os.sched_getaffinity(0))
        collect = _collect_by_store(world.store, channel, datetime.timedelta(seconds=timeout))
        memory = guarded(
            "sharing memory",
            lambda: shared.attach(channel.group, channel.rank, channel.ranks, timeout, crowded, collect),
        )
        if memory is not None:
            world.watch.at_loss(memory.break_off)
    for channel in (world.everyone, world.replica_channel):
        if len(channel.ranks) > 1 and shared.of(channel.group) is None:
            guarded("connecting the ranks", functools.partial(groups.connect, channel.group))


def _collect_by_store(store: Store, channel: Channel, timeout: datetime.timedelta) -> Callable[[Any], list[Any]]:
    """Each rank's JSON value on all ranks of the channel, which do not meet over gloo for it."""
    first, mine = channel.ranks[0], channel.ranks[channel.rank]
    rounds = itertools.count()
    joined = store.add(f"joined/{mine}", 1)  # a process may leave and join again

    def collect(value: Any) -> list[Any]:
        place = f"shared memory/{first}/{joined}/{next(rounds)}"
        store.set(f"{place}/{mine}", json.dumps(value))
        places = [f"{place}/{rank}" for rank in channel.ranks]
        store.wait(places, timeout)
        return [json.loads(value) for value in map(store.get, places)]

    return collect


def _world(
    launch: Launch,
    mp_size: int,
    device: torch.device,
    timeout: datetime.timedelta,
    mp_group: dist.ProcessGroup,
    watch: Watch,
) -> World:
    replica = launch.rank // mp_size
    everyone = tuple(range(launch.size))
    mine = everyone[replica * mp_size : (replica + 1) * mp_size]
    world_group = dist.group.WORLD
    assert world_group is not None
    replica_group = mp_group
    if device.type == "cuda":  # small messages stay on gloo; every rank takes part in making every group
        for first in range(0, launch.size, mp_size):
            ranks = list(range(first, first + mp_size))
            group = dist.new_group(ranks, timeout=timeout, backend=groups.backend())
            if first == mine[0]:
                replica_group = group
    replica_channel = Channel(replica_group, launch.rank % mp_size, mine)
    return World(
        launch.rank,
        launch.size,
        launch.local_rank,
        launch.local_size,
        launch.rank % mp_size,
        mp_size,
        device,
        replica_channel if mine == everyone else Channel(world_group, launch.rank, everyone),
        replica_channel,
        watch,
        dist.distributed_c10d._get_default_store(),
    )


def leave(world: World) -> None:
    """The orderly end: every rank calls it when its work is done, and none leaves before the last has come."""
    if not dist.is_initialized():
        return
    if world.size > 1:
        from llama_dist.parallel.control import agree

        agree(world, "done", "the end of the job")
    world.watch.detach()
    shared.detach(world.replica_channel.group)
    fs.destroy_model_parallel()
    dist.destroy_process_group()
    groups.stop_listening()
