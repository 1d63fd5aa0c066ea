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


def running_on(device: str) -> Iterator[str]:
    """What a fixture of DEVICES yields from: the device, with its way of running the kernels around the test."""
    need_triton(device)
    if device == "cuda":
        yield device
        return
    with like_a_gpu():
        yield device


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


class _Memory:
    """Sees to it that a kernel reads and writes what it was given, and nothing beside it."""

    def __init__(self, load: Callable[..., Any], store: Callable[..., Any], arguments: Callable[..., Any]) -> None:
        self.theirs = load, store, arguments
        self.given: list[tuple[int, int]] = []

    def arguments(self, executor: Any, args: Any, options: Any) -> Any:
        tensors = [t for t in (*args, *options.values()) if isinstance(t, torch.Tensor)]
        self.given = [(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in tensors]
        return self.theirs[2](executor, args, options)

    def _check(self, where: Any, mask: Any, size: int) -> None:
        at = where.data[mask.data.astype(bool)]
        inside = sum((at >= start) & (at + size <= start + length) for start, length in self.given)
        assert (inside > 0).all(), f"{(inside == 0).sum()} of {at.size} numbers lie outside the tensors"

    def load(self, builder: Any, where: Any, mask: Any, *rest: Any) -> Any:
        self._check(where, mask, where.get_element_ty().primitive_bitwidth // 8)
        return self.theirs[0](builder, where, mask, *rest)

    def store(self, builder: Any, where: Any, value: Any, mask: Any, *rest: Any) -> Any:
        size = where.get_element_ty().primitive_bitwidth // 8
        assert value.data.itemsize == size, f"numbers of {value.data.itemsize} bytes where {size} belong"
        self._check(where, mask, size)
        return self.theirs[1](builder, where, value, mask, *rest)


@contextmanager
def like_a_gpu() -> Iterator[None]:
    """The interpreter with a product whose rows are alike, with a GPU's rounding, and as silent; and its memory looked
    after."""
    import numpy as np
    from triton.runtime.interpreter import GridExecutor
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    memory = _Memory(Builder.create_masked_load, Builder.create_masked_store, GridExecutor._init_args_hst)
    changed = {
        "create_dot": _dot,
        "cast_impl": _caster(Builder.cast_impl),
        "create_masked_load": lambda *args: memory.load(*args),
        "create_masked_store": lambda *args: memory.store(*args),
    }
    seen = mock.patch.object(GridExecutor, "_init_args_hst", lambda *args: memory.arguments(*args))
    with mock.patch.multiple(Builder, **changed), seen, np.errstate(all="ignore"):
        yield
