"""Groups over gloo that are not connected until they are used, and then share a thread that serves their sockets.

Each of gloo's own groups has such a thread, which wakes up a hundred times a second, whether there is something to do
or not: four groups on each of two ranks took some 5 % of what these could compute. Ranks that share memory never use
theirs.
"""

from __future__ import annotations

import datetime
import functools
import os
import threading
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
    """gloo's devices, each an address to listen at and the thread that serves it: at the addresses gloo would take."""
    gloo = dist.ProcessGroupGloo
    names = os.environ.get("GLOO_SOCKET_IFNAME")
    if not names:
        return [gloo.create_default_device()]
    return [gloo.create_device(interface=name) for name in names.split(",")]


def stop_listening() -> None:
    """The groups are destroyed; those of a later world listen anew."""
    _listening.cache_clear()


class LazyGroup(dist.ProcessGroup):
    """A group of `size` ranks that meet in `store` at their first collective, or when all of them `connect`.

    The first call waits for all ranks, whatever it is: also one that two of them have for each other, or an async one.
    """

    def __init__(self, store: Store, rank: int, size: int, timeout: datetime.timedelta) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]  # as a group written in Python does
        self.timeout = timeout
        self._store, self._name = store, ""
        self._lock = threading.Lock()
        self._connected: dist.ProcessGroup | None = None

    def connect(self) -> dist.ProcessGroup:
        """The same group over gloo. RuntimeError: the others did not come within the timeout."""
        with self._lock:
            if self._connected is None:
                self._connected = self._connect()
        return self._connected

    def _connect(self) -> dist.ProcessGroup:
        gloo, kind = dist.ProcessGroupGloo, dist.ProcessGroup.BackendType.GLOO
        options = gloo._Options()  # type: ignore[attr-defined]
        options._devices, options._timeout = _listening(), self.timeout
        options._threads = 2 * len(options._devices)
        group = dist.ProcessGroup(self._store, self.rank(), self.size())
        group._set_default_backend(kind)
        backend = gloo(self._store, self.rank(), self.size(), options)
        for device in self._device_types:
            group._register_backend(device, kind, backend)
        return group

    def set_timeout(self, timeout: datetime.timedelta) -> None:
        self.timeout = timeout
        if self._connected is not None:
            dist.distributed_c10d._set_pg_timeout(timeout, self._connected)

    def getBackendName(self) -> str:
        return NAME

    def _get_backend(self, device: torch.device) -> Any:
        # torch asks for it to abort a group too, where nobody may wait for the others.
        if self._connected is None:
            raise RuntimeError(f"group {self._name} has no backend before its first collective")
        return self._connected._get_backend(device)

    # A group has its name from its backends, and this one has none.
    def _set_group_name(self, name: str) -> None:
        self._name = name

    @property
    def group_name(self) -> Any:
        return self._name

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device(kind) for kind in dist.Backend.backend_capability["gloo"]]


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
        dist.Backend.register_backend(NAME, LazyGroup, devices=dist.Backend.backend_capability["gloo"])
    return NAME


def connect(group: dist.ProcessGroup | None) -> None:
    """Have the ranks of a group meet now, all of them. RuntimeError: the others did not come within its timeout."""
    if isinstance(group, LazyGroup):
        group.connect()


def set_timeout(group: dist.ProcessGroup, timeout: datetime.timedelta) -> None:
    """Let collectives of the group wait that long; fairscale makes its groups with torch's 30 minutes."""
    if isinstance(group, LazyGroup):
        group.set_timeout(timeout)
    else:
        dist.distributed_c10d._set_pg_timeout(timeout, group)
