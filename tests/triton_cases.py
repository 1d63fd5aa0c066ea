"""Where the tests of the Triton kernels run them: compiled on a GPU, or by Triton's interpreter on the CPU.

Import this before anything that imports Triton: what is interpreted is settled when a kernel is defined.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICES = (pytest.param("cpu", id="interpreted"), pytest.param("cuda", id="compiled", marks=pytest.mark.gpu))


def need_triton(device: str) -> None:
    """End the calling test where there is no Triton, or where its kernels were defined for the other device."""
    if importlib.util.find_spec("triton") is None:
        reason = "no Triton: it is for Linux on x86-64, and in the extra `test` there"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("the kernels are compiled for the GPU in this process")


def _dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    """d + a b: sums of 16 products in order, added in order, as tensor cores have them to the eye of a row.

    Triton's interpreter multiplies bfloat16 as if they were integers, and leaves the rest to BLAS, where a row's bits
    depend on which row it is.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    x, y = (self.cast_impl(t, tl.float32).data if t.dtype.scalar == tl.bfloat16 else t.data for t in (a, b))
    x, y = x.astype(np.float32), y.astype(np.float32)
    total = d.data.copy()
    for start in range(0, x.shape[1], 16):
        part = np.zeros_like(total)
        for k in range(start, start + 16):
            part += x[:, k, None] * y[None, k]
        total += part
    return TensorHandle(total, d.dtype.scalar)


@contextmanager
def in_order() -> Iterator[None]:
    """The interpreter with a product whose rows are alike."""
    from triton.runtime.interpreter import InterpreterBuilder

    with mock.patch.object(InterpreterBuilder, "create_dot", _dot):
        yield
