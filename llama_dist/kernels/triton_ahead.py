"""Kernels that are started before the one in front of them has ended, and wait where they need what it wrote.

Between two kernels of a step a GPU stands idle for a microsecond or two. From Hopper on a kernel may be started
(programmatic dependent launch) once all programs of the one in front run; it takes no room that those want. Every
kernel that is started so must `follow`, all its programs, before it reads or writes what others do.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

HOPPER = 9  # compute capability


@triton.jit  # type: ignore[untyped-decorator]
def follow(AHEAD: tl.constexpr) -> None:
    """Wait until the kernel in front has ended and what it wrote is seen; let the next one start."""
    if AHEAD:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@functools.cache
def ahead(device: torch.device) -> dict[str, bool]:
    """What a kernel is started with beside its own arguments, where it has `follow`."""
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= HOPPER:
        return {"AHEAD": True, "launch_pdl": True}
    return {"AHEAD": False}
