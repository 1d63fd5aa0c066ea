"""Where the tests of the Triton kernels run them: compiled on a GPU, or by Triton's interpreter on the CPU.

Import this before anything that imports Triton: what is interpreted is settled when a kernel is defined.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Iterator
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
    version = importlib.metadata.version("triton")
    if device == "cpu" and tuple(map(int, version.split(".")[:2])) < (3, 8):
        pytest.skip(f"the interpreter of triton {version} fails with numpy 2.4")


def _dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    """d + a b: sums of 16 products in order, added in order; about what tensor cores do.

    Triton's interpreter multiplies bfloat16 as if they were integers, and leaves the rest to BLAS, where a row's bits
    depend on which row it is.
    """
    from triton.runtime.interpreter import TensorHandle

    x, y = _wide(a), _wide(b)
    total = d.data.copy()
    for start in range(0, x.shape[1], 16):
        part = slice(start, start + 16)
        total += (x[:, part, None] * y[None, part]).sum(1)
    return TensorHandle(total, d.dtype.scalar)


def _wide(handle: Any) -> Any:
    import triton.language as tl

    if handle.dtype.scalar != tl.bfloat16:
        return handle.data.astype("float32")
    return torch.from_numpy(handle.data.copy()).view(torch.bfloat16).float().numpy()


def _caster(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """Numbers of another type: to bfloat16 rounded to the nearest, as on a GPU, where the interpreter cuts off."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    def cast(self: Any, handle: Any, kind: Any) -> Any:
        if (handle.dtype.scalar, kind.scalar) != (tl.float32, tl.bfloat16):
            return theirs(self, handle, kind)
        return TensorHandle(torch.from_numpy(handle.data.copy()).bfloat16().view(torch.uint16).numpy(), tl.bfloat16)

    return cast


@contextmanager
def like_a_gpu() -> Iterator[None]:
    """The interpreter with a product whose rows are alike, with a GPU's rounding, and as silent."""
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    changed = {"create_dot": _dot, "cast_impl": _caster(Builder.cast_impl)}
    with mock.patch.multiple(Builder, **changed), np.errstate(all="ignore"):
        yield
