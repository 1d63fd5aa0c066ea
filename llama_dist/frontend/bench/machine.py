"""What this process is, since when it runs, what memory it has taken, and on what machine."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from llama_dist import __version__
from llama_dist.parallel.launch import read_launch
from llama_dist.parallel.world import World


def since_start() -> float:
    """Seconds since the kernel started this process, before any Python ran; to a hundredth."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def peak_host() -> int:
    """The most bytes of memory this process has had resident."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("Linux has VmHWM")


def peak_device(device: torch.device) -> int | None:
    """The most bytes that torch has taken of the device; None on a CPU."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None


def processor() -> str:
    """The processor's own name, and which of the instructions that matter here it has."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))]
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    known = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return f"{next(iter(names), platform.machine())} ({', '.join(known) or platform.machine()})"


@dataclass(frozen=True)
class About:
    """All that a figure needs to stand by itself. `cores` are those this process may use, `threads` a rank's."""

    model: str
    dtype: str
    device: str
    processor: str
    cores: int
    threads: int
    ranks: int
    hosts: int
    torch: str
    llama_dist: str
    date: str
    command: str


def command_line() -> str:
    """The command as it was given, with its launcher."""
    launch = read_launch()
    words = [Path(sys.argv[0]).name if sys.argv[0].endswith("llama_dist") else "python -m llama_dist"]
    if launch.launcher == "torchrun":
        nodes = launch.size // launch.local_size
        where = "--standalone" if nodes == 1 else f"--nnodes {nodes}"
        words = [f"torchrun {where} --nproc_per_node {launch.local_size} -m llama_dist"]
    elif launch.launcher == "srun":
        words = [f"srun --ntasks={launch.size} python -m llama_dist"]
    return " ".join([*words, shlex.join(sys.argv[1:])])


def about(model: str, dtype: str, world: World) -> About:
    """Of this rank; rank 0's is reported."""
    device = "cpu" if world.device.type == "cpu" else torch.cuda.get_device_name(world.device)
    return About(
        model,
        dtype,
        device,
        processor(),
        len(os.sched_getaffinity(0)),
        torch.get_num_threads(),
        world.size,
        world.size // world.local_size,
        torch.__version__,
        __version__,
        datetime.datetime.now().astimezone().isoformat(" ", "minutes"),
        command_line(),
    )
