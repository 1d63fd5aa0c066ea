"""Where the time of a step goes on a CUDA device: its kernels, by their names, as torch's profiler has them.

A kernel may be started while the one in front of it runs, and waits for that: so a moment is the earlier one's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import torch

from llama_dist.frontend.bench.step_profile import ATTENTION, PRODUCTS, REDUCTIONS, SAMPLING, SMALL

IDLE = "waiting for the host"
COPIES = "copies"
KINDS = (
    (COPIES, r"memcpy|memset"),
    (REDUCTIONS, r"nccl|all_?reduce|all_?gather|one_shot"),
    (ATTENTION, r"^_spans$|^_together$|flash|fmha|attention|attend|sdpa|softmax"),
    (SAMPLING, r"^_chunks$|^_rows$|^_masses$|^_round$|argmax|topk|sort"),
    (
        PRODUCTS,
        r"^_row$|^_tiles$|^_blocks$|^_unpack$|gemm|gemv|cutlass|cublas|nvjet|splitk|matmul|linear|_mm|dot_kernel",
    ),
)
"""The first whose pattern is found in a kernel's name has it; what is left is SMALL."""

Span = tuple[str, float, float]
"""A kernel's name, and when it began and ended, in seconds."""


def kind_of(kernel: str) -> str:
    """What a kernel of that name does."""
    return next((label for label, names in KINDS if re.search(names, kernel, re.IGNORECASE)), SMALL)


def shares_of(kernels: Iterable[Span], whole: float) -> dict[str, float]:
    """Shares of `whole` seconds by what kernels do; what none of them took is IDLE."""
    shares: dict[str, float] = {}
    until = float("-inf")
    for name, began, ended in sorted(kernels, key=lambda kernel: kernel[1:]):
        label = kind_of(name)
        shares[label] = shares.get(label, 0.0) + max(0.0, ended - max(began, until)) / whole
        until = max(until, ended)
    return {**shares, IDLE: max(0.0, 1.0 - sum(shares.values()))}


def profile_device(work: Callable[[], float]) -> tuple[dict[str, float], float]:
    """Shares of what `work`, which returns its seconds, does on the device, and the seconds of its reductions."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        whole = work()
    on_device = [event for event in found.events() or [] if event.device_type.name == "CUDA"]
    kernels = [(event.name, event.time_range.start / 1e6, event.time_range.end / 1e6) for event in on_device]
    shares = shares_of(kernels, whole)
    return shares, shares.get(REDUCTIONS, 0.0) * whole
