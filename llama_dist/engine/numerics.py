"""The numeric mode of a run, and the check that this machine keeps the promise of a reproducible one.

The check runs products of the loaded model, its attention and the functions between them at a few shapes, and looks
whether a row's bits depend on the rows, columns, units and threads beside it. It takes a fraction of a second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from llama_dist.engine.scores import scores_of
from llama_dist.kernels import attention as pages
from llama_dist.kernels import triton_here
from llama_dist.kernels.build import build_name
from llama_dist.kernels.quantized import compiled
from llama_dist.kernels.steady import steady
from llama_dist.kernels.tree import roots, total
from llama_dist.model.transformer import Transformer
from llama_dist.parallel import layers
from llama_dist.parallel.layers import ColumnParallelLinear, RowParallelLinear
from llama_dist.quant.packed import Packed
from llama_dist.quant.scheme import BLOCK

COLUMNS = 1024  # of a weight, so that a large one takes no longer
LOGITS = 5003  # odd, so that rows begin anywhere
ROWS = 40
CUTS = ((0, 1), (39, 40), (5, 7), (2, 5), (7, 14), (8, 24))
"""Rows that are computed by themselves as well."""


def numeric_mode(dtype: torch.dtype, quantization: str | None, device: torch.device, n_units: int) -> str:
    """What the bits of a reproducible result depend on, beside the weights: one line."""
    numbers = str(dtype).removeprefix("torch.") + (f" with {quantization} weights" if quantization else "")
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    like, kernels = torch.empty(0, dtype=dtype, device=device), "torch's kernels"
    if compiled(like):
        kernels = build_name()
    elif triton_here.serves(like):
        kernels = triton_here.build_name()
    return f"{numbers} on {where}, {kernels}, {n_units} units, torch {torch.__version__}"


def _numbers(*shape: int, like: torch.Tensor) -> torch.Tensor:
    """Some numbers around 0, the same every time."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(*shape, generator=generator).to(like.dtype).to(like.device)


def _alike(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> bool:
    """Whether rows of x [ROWS, ...] give the same bits alone, and on one thread."""
    y = function(x)
    if any(not torch.equal(function(x[start:stop]), y[start:stop]) for start, stop in CUTS):
        return False
    n_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if n_threads > 1 else 2)
        return torch.equal(function(x), y)
    finally:
        torch.set_num_threads(n_threads)


def _products(model: Transformer) -> Iterator[tuple[str, Any]]:
    """One product of each shape in the model."""
    seen = set()
    for name, module in model.named_modules():
        if isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
            shape = tuple(module.weight.shape)
            if shape not in seen:
                seen.add(shape)
                yield name, module


def _column_fault(module: Any, like: torch.Tensor) -> bool:
    weight = layers.rows_of(module.weight, 0, COLUMNS)
    x = _numbers(ROWS, weight.shape[1], like=like)
    part = weight.shape[0] // 3
    part -= part % BLOCK if isinstance(weight, Packed) else 0

    def whole(rows: torch.Tensor) -> torch.Tensor:
        return layers.product(rows, weight, None, reproducible=True)

    rest = layers.product(x, layers.rows_of(weight, part, COLUMNS), None, reproducible=True)
    return not (torch.equal(whole(x)[:, part:], rest) and _alike(whole, x))


def _row_fault(module: Any, like: torch.Tensor) -> bool:
    unit, n = module.unit, module.n_units
    weight = layers.rows_of(module.units, 0, COLUMNS)
    x = _numbers(ROWS, n * unit, like=like)

    def sums(rows: torch.Tensor, start: int, stop: int) -> list[torch.Tensor]:
        part = layers.units_of(weight, unit, start, stop)
        return list(layers.partial_sums(rows[:, start * unit : stop * unit], part, unit, start))

    def whole(rows: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = total(roots(0, n), sums(rows, 0, n))
        return y

    at = n // 2
    cut: torch.Tensor = total(roots(0, at) + roots(at, n - at), [*sums(x, 0, at), *sums(x, at, n)])
    return not (torch.equal(whole(x), cut) and _alike(whole, x))


def _attention_fault(model: Transformer) -> bool:
    layer: Any = model.layers[0].attention
    heads, size, page = len(layer.of_query), layer.head_dim, pages.PAGE_SIZE
    n_pages = -(-ROWS // page)
    keys = _numbers(model.n_local_kv_heads, n_pages * page, size, like=model.norm.weight)
    q = _numbers(ROWS, heads, size, like=keys)
    tables = torch.arange(n_pages, dtype=torch.int32, device=q.device)[None]

    def rows(start: int, stop: int) -> torch.Tensor:
        first, count = (torch.tensor([n], dtype=torch.int32, device=q.device) for n in (start, stop - start))
        return pages.attend(q[start:stop], keys, keys, tables, first, count, layer.reads)

    if q.device.type == "cuda" and pages.paged(q):
        from llama_dist.kernels import triton_attention

        if not triton_attention.sections_agree(keys[:, :1], heads, layer.reads, page):
            return True
    return any(not torch.equal(rows(start, stop), rows(0, ROWS)[start:stop]) for start, stop in CUTS)


def find_unsteady(model: Transformer) -> str | None:
    """What on this machine gives a row other bits beside other rows; None where the promise holds."""
    weight = model.norm.weight
    if weight.device.type == "cuda" and not triton_here.serves(weight):
        return "cuBLAS, which serves without Triton,"  # its kernels vary with shapes; a few that agree prove nothing
    for name, module in _products(model):
        fault = _column_fault if isinstance(module, ColumnParallelLinear) else _row_fault
        # A rank past the last unit has no columns to sum.
        if module.weight.shape[1] and getattr(module, "n_units", 1) and fault(module, weight):
            return f"the product of {name}"
    if _attention_fault(model):
        return "attention"
    wide = _numbers(ROWS, 37, like=weight)
    logits = _numbers(ROWS, min(model.config.vocab_size, LOGITS), like=weight)
    checks: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]] = {
        "silu": (lambda x: steady(F.silu, x), wide),
        "the norm": (model.norm, _numbers(ROWS, weight.shape[0], like=weight)),
        "the angles' cosine": (lambda x: steady(torch.cos, x), wide.float()),
        "logprobs": (lambda x: torch.tensor([own for own, _ in scores_of(x, [0] * len(x), [0] * len(x))]), logits),
    }
    return next((name for name, (function, x) in checks.items() if not _alike(function, x)), None)
