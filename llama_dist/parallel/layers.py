"""Column-, row- and vocabulary-parallel layers on fairscale's classes and groups, cut by units.

They differ from fairscale's own in three ways. Only the local part of a weight is allocated (fairscale makes the full
one on every rank). Which part that is comes from units.py, with zeros where units run out. And the reduction in
forward is a plain collective, since fairscale's autograd function stops torch.compile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from fairscale.nn.model_parallel import initialize as fs
from fairscale.nn.model_parallel import layers as fs_layers
from torch import nn

from llama_dist.parallel.control import guarded
from llama_dist.parallel.units import Slice


@dataclass(frozen=True)
class Placement:
    """Which part of a logical tensor a local parameter holds: [start, stop) of `dim`, then zeros."""

    dim: int = 0
    start: int = 0
    stop: int | None = None


def _parameter(*shape: int, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, dtype=dtype, device=device), requires_grad=False)


def reduce(x: torch.Tensor) -> torch.Tensor:
    """Sum over the model-parallel ranks, in place."""
    group = fs.get_model_parallel_group()
    if fs.get_model_parallel_world_size() > 1:
        guarded("a reduction", lambda: dist.all_reduce(x, group=group))
    return x


def gather(x: torch.Tensor) -> torch.Tensor:
    """Concatenate the ranks' parts along the last dimension: [n, part] -> [n, part * ranks]."""
    n_ranks = fs.get_model_parallel_world_size()
    if n_ranks == 1:
        return x
    group = fs.get_model_parallel_group()
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(n_ranks)]
    guarded("a gather", lambda: dist.all_gather(parts, x, group=group))
    return torch.cat(parts, dim=-1)


class ColumnParallelLinear(fs_layers.ColumnParallelLinear):  # type: ignore[misc]
    """y = x W^T + b with the rows of W cut: x [..., in_features] -> [..., rows.padded], this rank's rows only.

    `rows` counts entries of the output dimension.
    """

    def __init__(self, in_features: int, rows: Slice, *, bias: bool, dtype: torch.dtype, device: torch.device) -> None:
        nn.Module.__init__(self)  # past fairscale's, which would allocate the full weight
        self.in_features = in_features
        self.out_features = rows.padded * fs.get_model_parallel_world_size()
        self.gather_output = False
        self.output_size_per_partition = rows.padded
        self.weight = _parameter(rows.padded, in_features, dtype=dtype, device=device)
        self.bias = _parameter(rows.padded, dtype=dtype, device=device) if bias else None
        self.placements = {"weight": Placement(0, rows.start, rows.stop), "bias": Placement(0, rows.start, rows.stop)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


class RowParallelLinear(fs_layers.RowParallelLinear):  # type: ignore[misc]
    """y = x W^T + b with the columns of W cut: this rank's x [..., columns.padded] -> the whole y [..., out_features].

    Partial products are summed over the ranks; the bias is whole on every rank and added once, after the sum.
    """

    def __init__(
        self, columns: Slice, out_features: int, *, bias: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        nn.Module.__init__(self)
        self.in_features = columns.padded * fs.get_model_parallel_world_size()
        self.out_features = out_features
        self.input_is_parallel = True
        self.input_size_per_partition = columns.padded
        self.weight = _parameter(out_features, columns.padded, dtype=dtype, device=device)
        self.bias = _parameter(out_features, dtype=dtype, device=device) if bias else None
        self.placements = {"weight": Placement(1, columns.start, columns.stop), "bias": Placement()}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = reduce(F.linear(x, self.weight))
        return y if self.bias is None else y + self.bias


class VocabParallelEmbedding(fs_layers.VocabParallelEmbedding):  # type: ignore[misc]
    """Token ids [n] -> [n, dim] with the vocabulary cut; a row comes from the one rank that holds it."""

    def __init__(self, rows: Slice, dim: int, *, dtype: torch.dtype, device: torch.device) -> None:
        nn.Module.__init__(self)
        self.num_embeddings = rows.padded * fs.get_model_parallel_world_size()
        self.embedding_dim = dim
        self.vocab_start_index, self.vocab_end_index = rows.start, rows.stop
        self.num_embeddings_per_partition = rows.padded
        self.weight = _parameter(rows.padded, dim, dtype=dtype, device=device)
        self.placements = {"weight": Placement(0, rows.start, rows.stop)}

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if fs.get_model_parallel_world_size() == 1:
            return F.embedding(ids, self.weight)
        outside = (ids < self.vocab_start_index) | (ids >= self.vocab_end_index)
        local = (ids - self.vocab_start_index).masked_fill(outside, 0)
        return reduce(F.embedding(local, self.weight).masked_fill(outside[:, None], 0))
