"""What memory this host has for a process. No torch."""

from __future__ import annotations

import os
from pathlib import Path


def host_memory() -> int:
    """Bytes this process may still take: the host's, or its cgroup's where that is less."""
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    for line in meminfo.read_text().splitlines() if meminfo.exists() else ():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return available
    return min(available, max(0, int(limit) - used)) if limit.isdigit() else available


def one_node() -> bool:
    """Whether all memory is as near to all cores: then it does not matter which thread touches a page first."""
    try:
        return Path("/sys/devices/system/node/has_memory").read_text().strip().isdigit()
    except OSError:  # a kernel that knows no nodes
        return True
