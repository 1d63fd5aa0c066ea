"""Groups over gloo that have no thread until they are used, and then one for all of them.

Each of gloo's own groups has a thread that wakes up a hundred times a second, whether there is something to do or not:
four groups on each of two ranks took some 5 % of what these could compute. Ranks that share memory never use theirs.
"""

from __future__ import annotations

import datetime
import functools
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]

NAME = "lazy_gloo"
# fmt: off
COLLECTIVES = (
    "allreduce", "allreduce_coalesced", "broadcast", "reduce", "gather", "scatter", "barrier", "send", "recv",
    "recv_anysource", "allgather", "_allgather_base", "allgather_coalesced", "allgather_into_tensor_coalesced",
    "reduce_scatter", "_reduce_scatter_base", "reduce_scatter_tensor_coalesced", "alltoall", "alltoall_base",
    "all_gather_single", "all_gather_single_coalesced", "reduce_scatter_single", "reduce_scatter_single_coalesced",
    "all_to_all_single",
)
# fmt: on


@functools.cache
def _listening() -> list[Any]:
    """gloo's devices, each an address to listen at and the thread that serves it: those that gloo itself would take."""
    gloo = dist.ProcessGroupGloo
    names = os.environ.get("GLOO_SOCKET_IFNAME")
    if not names:
        return [gloo.create_default_device()]
    return [gloo.create_device(interface=name) for name in names.split(",")]


class LazyGroup(dist.ProcessGroup):
    """A group of `size` ranks that meet in `store` at their first collective, or when all of them `connect`."""

    def __init__(self, store: Store, rank: int, size: int, timeout: datetime.timedelta) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]  # as a group written in Python does
        self.timeout = timeout
        self._store = store
        self._connected: dist.ProcessGroup | None = None

    def connect(self) -> dist.ProcessGroup:
        """The same group over gloo. RuntimeError: the others did not come within the timeout."""
        if self._connected is None:
            gloo = dist.ProcessGroupGloo
            options = gloo._Options()  # type: ignore[attr-defined]
            options._devices, options._timeout = _listening(), self.timeout
            group = dist.ProcessGroup(self._store, self.rank(), self.size())
            group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
            backend = gloo(self._store, self.rank(), self.size(), options)
            group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, backend)
            self._connected = group
        return self._connected

    def getBackendName(self) -> str:
        return NAME

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device("cpu")]


def _forwarded(name: str) -> Callable[..., Any]:
    def collective(self: LazyGroup, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.connect(), name)(*args, **kwargs)

    return collective


for _name in COLLECTIVES:
    if hasattr(dist.ProcessGroup, _name):  # some are of later versions of torch
        setattr(LazyGroup, _name, _forwarded(_name))


def backend() -> str:
    """The backend for groups on CPUs."""
    if not hasattr(dist.Backend, NAME.upper()):
        dist.Backend.register_backend(NAME, LazyGroup, devices=["cpu"])
    return NAME


def connect(group: dist.ProcessGroup | None) -> None:
    """Have the ranks of a group meet now, all of them. RuntimeError: the others did not come within its timeout."""
    if isinstance(group, LazyGroup):
        group.connect()


def set_timeout(group: dist.ProcessGroup, timeout: datetime.timedelta) -> None:
    """Let collectives of the group wait that long; fairscale makes its groups with torch's 30 minutes."""
    if not isinstance(group, LazyGroup):
        return dist.distributed_c10d._set_pg_timeout(timeout, group)
    group.timeout = timeout
    if group._connected is not None:
        dist.distributed_c10d._set_pg_timeout(timeout, group._connected)
