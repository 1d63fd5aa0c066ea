"""What is done with single rows, in C++ or torch's operations: the likeliest token of a row of logits."""

from __future__ import annotations

import functools
from ctypes import c_int, c_int64, c_void_p
from typing import Any

import torch

from llama_dist.kernels import build, triton_here

DTYPES = (torch.bfloat16, torch.float32)


@functools.cache
def _compiled() -> Any:
    return build.function("likeliest", c_int, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int)


def likeliest(logits: torch.Tensor) -> list[int]:
    """Of each row [m, n] the number of its greatest entry, the first of equals; -1 where one is NaN or infinite."""
    if logits.device.type != "cpu" or logits.dtype not in DTYPES or _compiled() is None:
        return likeliest_twin(logits)
    assert logits.stride(1) == 1 and logits.shape[1], "rows in one piece"
    found = (c_int64 * logits.shape[0])()
    bf16 = logits.dtype == torch.bfloat16
    _compiled()(bf16, logits.data_ptr(), logits.stride(0), *logits.shape, found, torch.get_num_threads())
    return list(found)


def likeliest_twin(logits: torch.Tensor) -> list[int]:
    return found_of(logits).tolist()


def found_of(logits: torch.Tensor) -> torch.Tensor:
    """`likeliest` as int64 [m] on the rows' device, which is not waited for."""
    if triton_here.serves(logits):
        from llama_dist.kernels import triton_likeliest

        return triton_likeliest.likeliest(logits)
    return torch.where(logits.isfinite().all(1), logits.argmax(1), -1)
