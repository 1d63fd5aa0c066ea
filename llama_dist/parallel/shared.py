"""Sums, gathers and messages among the ranks of one host, in memory that all of them have mapped.

A collective over gloo's loopback sockets takes a fraction of a millisecond, here it takes microseconds. The C++ does it
all (kernels/src/shared.h says how). The memory has no name in any file system: it goes with the last of its ranks,
however they end. Ranks of several hosts, on CUDA or without a compiler stay with torch.distributed.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import mmap
import os
import secrets
from collections.abc import Callable, Sequence
from ctypes import c_char_p, c_double, c_int, c_long, c_void_p
from typing import Any

import torch
from torch.distributed import ProcessGroup

from llama_dist.errors import DesyncError, PeerLost
from llama_dist.kernels import build
from llama_dist.kernels.program import pack
from llama_dist.kernels.tree import Node

log = logging.getLogger("llama_dist")

SLOT = 1 << 18  # bytes of a rank's piece in one round; what is longer goes in several
SUMMED = (torch.bfloat16, torch.float32)
BROKEN_OFF = 1 << 20  # of shared.h


@functools.cache
def _function(name: str) -> Any:
    arguments: dict[str, tuple[Any, ...]] = {
        "size": (c_int, c_long),
        "start": (c_void_p, c_int, c_long, c_double, c_int),
        "sum": (c_void_p, c_int, c_int, c_void_p, c_long),
        "planes": (c_void_p, c_int, c_void_p, c_long, c_void_p, c_void_p, c_int, c_void_p, c_long),
        "gather": (c_void_p, c_int, c_void_p, c_long, c_long, c_void_p),
        "exchange": (c_void_p, c_int, c_char_p, c_long, c_void_p, c_void_p),
        "break": (c_void_p, c_int),
    }
    return build.function(f"shared_{name}", *arguments[name])


class Shared:
    """A segment of memory among `ranks` (their numbers in the world), of which this process is number `rank`.

    All of them must call its methods in the same order. Each raises PeerLost where one has not come within `timeout`
    seconds, naming it, and DesyncError where they came with unlike sizes; after that it is of no use any more.
    `address` and `rank` are what the C functions of shared.h want.
    """

    def __init__(self, memory: mmap.mmap, rank: int, ranks: Sequence[int], timeout: float) -> None:
        self.rank, self.ranks, self.timeout = rank, tuple(ranks), timeout
        self._memory = ctypes.c_char.from_buffer(memory)  # keeps it mapped
        self.address = ctypes.addressof(self._memory)
        self._sizes = (ctypes.c_int64 * len(ranks))()
        self._inbox = ctypes.create_string_buffer(len(ranks) * SLOT)
        self._sum, self._sum_planes = _function("sum"), _function("planes")
        self._gather, self._exchange = _function("gather"), _function("exchange")

    def sum(self, x: torch.Tensor) -> None:
        """x, packed, of a dtype in SUMMED, becomes the sum over the ranks: in rank order, in float32, rounded once."""
        assert x.is_contiguous() and x.dtype in SUMMED, f"{x.dtype} of strides {x.stride()}"
        fault = self._sum(self.address, self.rank, x.dtype == torch.bfloat16, x.data_ptr(), x.numel())
        if fault:
            raise self.lost(fault)

    def sum_planes(self, planes: torch.Tensor, nodes: tuple[tuple[Node, ...], ...]) -> torch.Tensor:
        """The sum of all ranks' float32 planes [its nodes, n, features], each rank's at its own `nodes` of the tree."""
        assert planes.is_contiguous() and planes.dtype == torch.float32 and len(planes) == len(nodes[self.rank])
        counts, packed = pack(nodes)
        y = torch.empty(planes.shape[1:])
        plane, tree = planes.stride(0), (counts.data_ptr(), packed.data_ptr())
        fault = self._sum_planes(
            self.address, self.rank, planes.data_ptr(), plane, *tree, False, y.data_ptr(), y.numel()
        )
        if fault:
            raise self.lost(fault)
        return y

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """Concatenate the rows of all ranks' x [n, width], packed: [n, width * ranks]."""
        assert x.is_contiguous(), f"strides {x.stride()}"
        rows, width = x.shape
        out = torch.empty(rows, width * len(self.ranks), dtype=x.dtype)
        fault = self._gather(self.address, self.rank, x.data_ptr(), rows, width * x.itemsize, out.data_ptr())
        if fault:
            raise self.lost(fault, "a gather")
        return out

    def exchange(self, mine: bytes, what: str) -> list[bytes]:
        """Each rank's bytes, of any length, in rank order."""
        mine = len(mine).to_bytes(8, "little") + mine
        came = self._round(mine[:SLOT], what)
        lengths = [8 + int.from_bytes(part[:8], "little") for part in came]
        for start in range(SLOT, max(lengths), SLOT):
            came = [a + b for a, b in zip(came, self._round(mine[start : start + SLOT], what), strict=True)]
        return [part[8:] for part in came]

    def _round(self, mine: bytes, what: str) -> list[bytes]:
        fault = self._exchange(self.address, self.rank, mine, len(mine), self._sizes, self._inbox)
        if fault:
            raise self.lost(fault, what)
        whole = memoryview(self._inbox)
        return [bytes(whole[i * SLOT : i * SLOT + size]) for i, size in enumerate(self._sizes)]

    def break_off(self) -> None:
        """Whoever waits in a call of this process, or will, gets PeerLost within a moment. For another thread."""
        _function("break")(self.address, self.rank)

    def lost(self, fault: int, what: str = "a reduction") -> Exception:
        """What to raise for a C function's fault."""
        if fault == BROKEN_OFF:
            return PeerLost(f"{what} was broken off")
        if fault > 0:
            return PeerLost(f"{what} failed: rank {self.ranks[fault - 1]} did not come within {self.timeout:g} s")
        mine, other = self.ranks[self.rank], self.ranks[-fault - 1]
        return DesyncError(f"rank {other} came to {what} with another size than rank {mine}")


_attached: dict[ProcessGroup, Shared] = {}


def of(group: ProcessGroup) -> Shared | None:
    """The group's shared memory, if it has any."""
    return _attached.get(group)


def detach(group: ProcessGroup) -> None:
    _attached.pop(group, None)


def attach(
    group: ProcessGroup,
    rank: int,
    ranks: Sequence[int],
    timeout: float,
    crowded: bool,
    collect: Callable[[Any], list[Any]],
) -> Shared | None:
    """Give the group shared memory, if all its ranks can have it; all of them call this, and the answer is the same.

    `collect` gives each rank's JSON value on all of them. `crowded`: there are more ranks than cores, so none spins.
    """
    size = 0 if build.library() is None else _function("size")(len(ranks), SLOT)
    name = f"llama_dist-{secrets.token_hex(8)}"
    fd = _make(size, name) if size and rank == 0 else -1
    offers = collect([size, name, os.getpid(), fd])
    memory = _map(*offers[0]) if size else None
    shared = None if memory is None else Shared(memory, rank, ranks, timeout)
    if shared is not None and rank == 0:
        _function("start")(shared.address, len(ranks), SLOT, timeout, crowded)
    everywhere = all(collect(shared is not None))
    if fd >= 0:
        os.close(fd)
    if shared is None or not everywhere:
        log.debug("ranks %s have no shared memory", ranks)
        return None
    _attached[group] = shared
    return shared


def _make(size: int, name: str) -> int:
    """The descriptor of a new segment of zeros; -1 where the system grants none: an old one, or `ulimit -f`."""
    try:
        fd = os.memfd_create(name, os.MFD_CLOEXEC)
    except OSError as err:
        log.debug("no memory to share: %s", err)
        return -1
    try:
        os.ftruncate(fd, size)
    except OSError as err:
        log.debug("no memory to share: %s", err)
        os.close(fd)
        return -1
    return fd


def _map(size: int, name: str, pid: int, fd: int) -> mmap.mmap | None:
    """The segment that process `pid` holds open as `fd`; None where it is not to be had: another host or container."""
    path = f"/proc/{pid}/fd/{fd}"
    try:
        if os.readlink(path) != f"/memfd:{name} (deleted)":
            return None
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            return mmap.mmap(fd, size)
        finally:
            os.close(fd)
    except OSError as err:
        log.debug("%s: %s", path, err)
        return None
