"""Getting memory from the operating system on all threads, before it is filled piece by piece."""

from __future__ import annotations

import functools
from ctypes import c_int, c_int64, c_void_p
from typing import Any

import torch

from llama_dist.kernels import build

LEAST = 2**22  # bytes; below them waking the threads costs more than they save


@functools.cache
def _compiled() -> Any:
    return build.function("touch", c_void_p, c_int64, c_int)


def touch(memory: torch.Tensor) -> None:
    """Have every page of a contiguous CPU tensor be there. What it holds stays.

    Does nothing without the C++ kernels, or on Linux before 5.14: then a page comes when it is first written to.
    """
    if memory.device.type == "cpu" and memory.nbytes >= LEAST and memory.is_contiguous() and _compiled() is not None:
        _compiled()(memory.data_ptr(), memory.nbytes, torch.get_num_threads())
