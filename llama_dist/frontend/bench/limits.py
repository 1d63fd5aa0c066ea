"""What the hardware allows, measured: memory read, matrix products, reductions; by all ranks at once.

One reading of one pattern is often too low, so there are several of each, and the best one counts.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from llama_dist.config import ModelConfig
from llama_dist.frontend.bench.figures import Limits
from llama_dist.kernels import read as reading
from llama_dist.model.host_memory import host_memory
from llama_dist.model.room import large_pages
from llama_dist.parallel.control import collect
from llama_dist.parallel.layers import reduce
from llama_dist.parallel.world import World
from llama_dist.quant.pack import pack
from llama_dist.quant.packed import empty
from llama_dist.quant.product import linear as packed_linear
from llama_dist.quant.product import panels

READ_BYTES = 2**30  # of a host or a GPU; beyond any cache
READINGS = 5
SLOW = 0.3  # seconds of a reading that is not repeated
REDUCTIONS = 100  # in a row
ROWS = 512  # of a product as large as the model's
SIDES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}  # of square ones


def _seconds(device: torch.device, work: Callable[[], Any]) -> float:
    """How long the device takes for it."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize(device)
        start.record()
        work()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _rate(world: World, amount: float, work: Callable[[], Any]) -> float:
    """The best rate, a second, at which all ranks together do it, each `amount` at a time; the slowest one counts."""
    best = float("inf")
    for reading_number in range(1 + READINGS):
        slowest = max(collect(world, _seconds(world.device, work)))
        if reading_number or slowest > SLOW:  # the first is to warm up
            best = min(best, slowest)
        if slowest > SLOW:
            break
    return world.size * amount / best


def _fastest(world: World, candidates: Iterator[tuple[str, float, Callable[[], Any]]]) -> tuple[float, str]:
    """The best rate of (name, amount, work), and whose it is."""
    return max((_rate(world, amount, work), name) for name, amount, work in candidates)


def memory_to_read(world: World) -> torch.Tensor:
    """Numbers to read, float32, beyond the caches and within what memory is left; in large pages where there are."""
    cuda = world.device.type == "cuda"
    free = torch.cuda.mem_get_info(world.device)[0] if cuda else host_memory()
    share = min(collect(world, min(READ_BYTES, free // 4) // (1 if cuda else world.local_size)))
    if cuda:
        return torch.ones(share // 4, device=world.device)
    room = large_pages(share // 4 * 4)
    return torch.ones(share // 4) if room is None else room.view(torch.float32).fill_(1)


def _reads(world: World, memory: torch.Tensor) -> Iterator[tuple[str, float, Callable[[], Any]]]:
    if memory.device.type == "cpu":
        for way in range(min(collect(world, reading.n_ways()))):
            yield f"C++ loop {way}", memory.nbytes, functools.partial(reading.read, memory, way)
    yield "torch's sum", memory.nbytes, memory.sum
    half = len(memory) // 2
    yield "torch's copy", 2 * half * 4, lambda: memory[:half].copy_(memory[half : 2 * half])


def best_read(world: World, memory: torch.Tensor) -> tuple[float, str]:
    """The best of several readings of `memory`, bytes/s, all ranks at once; and in which way."""
    return _fastest(world, _reads(world, memory))


def read_once(world: World, memory: torch.Tensor) -> float:
    """The best rate, bytes/s, of reading `memory` once in each way, all ranks at once."""
    rates: list[float] = [
        world.size * amount / max(collect(world, _seconds(world.device, work)))
        for _, amount, work in _reads(world, memory)
    ]
    return max(rates)


def _products(world: World, config: ModelConfig, dtype: torch.dtype) -> Iterator[tuple[str, float, Callable[[], Any]]]:
    device = world.device
    scheme = panels(dtype, device)
    # Every rank measures the same ones, whatever its processor.
    laid_out = all(collect(world, scheme is not None))
    sizes = [(ROWS, config.dim, config.hidden_dim), *((n, n, n) for n in SIDES[device.type])]
    for m, k, n in sizes:
        x = torch.full((m, k), 0.5, dtype=dtype, device=device)
        w = torch.full((n, k), 0.5, dtype=dtype, device=device)
        amount = 2.0 * m * k * n
        yield f"torch's product of {m} x {k} x {n}", amount, functools.partial(F.linear, x, w)
        if scheme is not None and laid_out:
            laid = empty(scheme, n, k, 1, device)
            pack(laid, w)
            yield f"layers' product of {m} x {k} x {n}", amount, functools.partial(packed_linear, x, laid)
        if laid_out and dtype != torch.float32:
            yield (
                f"torch's float32 product of {m} x {k} x {n}",
                amount,
                functools.partial(F.linear, x.float(), w.float()),
            )


@torch.inference_mode()
def measure(world: World, config: ModelConfig, dtype: torch.dtype, read: tuple[float, str]) -> Limits:
    """One round of limits beside the rate of reading memory. Every rank calls it alike; all get the same."""
    read_rate, read_how = read
    product, product_how = _fastest(world, _products(world, config, dtype))
    reduction = None
    if world.mp_size > 1:
        x = torch.zeros(1, config.dim, dtype=dtype, device=world.device)

        def row() -> None:
            for _ in range(REDUCTIONS):
                reduce(x)

        reduction = world.size / _rate(world, REDUCTIONS, row)
    return Limits(read_rate, product, reduction, {"read": read_how, "product": product_how})
