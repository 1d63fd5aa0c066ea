"""What one rank finds out by itself: who it is, how fast it computes; and the bound on whatever may hang."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import llama_dist
from llama_dist.errors import ConfigError, LlamaDistError
from llama_dist.frontend.doctor.facts import Identity, Speed
from llama_dist.kernels.build import build_name, library
from llama_dist.parallel.launch import Launch
from llama_dist.parallel.network import address_towards
from llama_dist.parallel.watch import my_card

Outcome = dict[str, Any]
SIDE = {"cpu": 512, "cuda": 8192}  # of the matrices of the fixed product
COPY = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}  # bytes of the fixed copy
TIMES, LEAST, MOST = 9, 0.5, 3.0  # times and seconds that either is done at least, seconds at most; the median counts


def attempt(
    work: Callable[[], Any], seconds: float | None = None, why: str = "a disk or file server may hang"
) -> Outcome:
    """{"value": what `work` gives} or {"error": one line}. With `seconds`, in a thread that is not waited for longer,
    which `why` may explain; no collective belongs there.
    """
    outcome: Outcome = {}

    def run() -> None:
        try:
            outcome["value"] = work()
        except Exception as err:
            own = isinstance(err, (LlamaDistError, OSError))
            text = " ".join(str(err).split())[:400]
            outcome["error"] = text if own else f"{type(err).__name__}: {text}"

    if seconds is None:
        run()
        return outcome
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return dict(outcome) or {"error": f"no end of it in {seconds:g} s: {why}"}


def identify(launch: Launch, pick: Callable[[], torch.device]) -> tuple[Identity, torch.device]:
    """Who this rank is, and the device it computes on; `pick` may raise ConfigError, and then it is the CPU."""
    error = None
    try:
        device = pick()
    except ConfigError as err:
        device, error = torch.device("cpu"), str(err)
    versions = {
        "llama_dist": f"{llama_dist.__version__} ({_digest()})",
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "CUDA": torch.version.cuda or "none",
    }
    name, device_id = _processor(), None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name = f"{properties.name}, {properties.total_memory / 1e9:.0f} GB"
        device_id = str(properties.uuid)
        versions["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    try:
        towards = address_towards(launch.host, launch.port)
    except OSError:
        towards = None
    card = my_card(launch.rank)
    return (
        Identity(
            card.host,
            card.pid,
            card.space,
            launch.size,
            towards,
            versions,
            device.type,
            name,
            device_id,
            error,
            len(os.sched_getaffinity(0)),
            torch.get_num_threads(),
        ),
        device,
    )


@functools.cache
def _digest() -> str:
    """Of the package's own source files: two checkouts of one version may differ."""
    root = Path(llama_dist.__file__).parent
    digest = hashlib.blake2b(digest_size=4)
    for path in sorted(p for p in root.rglob("*") if p.suffix in (".py", ".cpp", ".h")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()


def kernels() -> str:
    """The kernels that compute on a CPU here, compiled now where they are not yet."""
    return build_name() if library() is not None else "torch's own kernels"


def _median(work: Callable[[], Any], device: torch.device) -> float:
    times: list[float] = []
    began = time.perf_counter()
    while (spent := (start := time.perf_counter()) - began) < MOST and (len(times) < TIMES or spent < LEAST):
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:] or times)  # the first one warms up


def time_product(device: torch.device) -> float:
    """Seconds of a product of two matrices, float32 on a CPU and bfloat16 on a GPU."""
    side, dtype = SIDE[device.type], torch.float32 if device.type == "cpu" else torch.bfloat16
    x = torch.ones(side, side, dtype=dtype, device=device)
    return _median(lambda: x @ x, device)


def time_copy(device: torch.device) -> float:
    """Seconds of a copy within the device's memory."""
    x = torch.zeros(COPY[device.type] // 8, dtype=torch.float64, device=device)
    y = torch.empty_like(x)
    return _median(lambda: y.copy_(x), device)


def time_device(device: torch.device) -> Speed:
    """The fixed pieces of work, at the same time on every rank of a host, as in a run."""
    return Speed(time_product(device), time_copy(device))


def show_speeds(device: str, speed: Speed) -> tuple[float, float]:
    """Operations and bytes a second of the two pieces; a copy reads and writes."""
    return 2 * SIDE[device] ** 3 / speed.product, 2 * COPY[device] / speed.copy
