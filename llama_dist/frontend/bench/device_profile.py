"""Where the time of a step goes on a CUDA device: its kernels, by their names, as torch's profiler has them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import torch

from llama_dist.frontend.bench.step_profile import ATTENTION, PRODUCTS, REDUCTIONS, SMALL

IDLE = "waiting for the host"
COPIES = "copies"
KINDS = (
    (COPIES, r"memcpy|memset"),
    (REDUCTIONS, r"nccl|all_?reduce|all_?gather|one_shot"),
    (ATTENTION, r"flash|fmha|attention|attend|sdpa|softmax"),
    (PRODUCTS, r"gemm|gemv|cutlass|cublas|nvjet|splitk|matmul|linear|_mm|dot_kernel"),
)
"""The first whose pattern is found in a kernel's name has it; what is left is SMALL."""


def kind_of(kernel: str) -> str:
    """What a kernel of that name does."""
    return next((label for label, names in KINDS if re.search(names, kernel, re.IGNORECASE)), SMALL)


def shares_of(kernels: Iterable[tuple[str, float]], whole: float) -> dict[str, float]:
    """Shares of `whole` seconds from (name, seconds) of kernels; what none of them took is IDLE."""
    shares: dict[str, float] = {}
    for name, seconds in kernels:
        label = kind_of(name)
        shares[label] = shares.get(label, 0.0) + seconds / whole
    return {**shares, IDLE: max(0.0, 1.0 - sum(shares.values()))}


def profile_device(work: Callable[[], float]) -> tuple[dict[str, float], float]:
    """Shares of what `work`, which returns its seconds, does on the device, and the seconds of its reductions."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        whole = work()
    kernels = [(event.key, event.self_device_time_total / 1e6) for event in found.key_averages()]
    shares = shares_of(kernels, whole)
    return shares, shares.get(REDUCTIONS, 0.0) * whole
