"""Column-, row- and vocabulary-parallel layers on fairscale's classes and groups, cut by units.

They differ from fairscale's own in four ways. Only the local part of a weight is allocated (fairscale makes the full
one on every rank). Which part that is comes from units.py, with zeros where units run out. The reduction in forward is
a plain collective, since fairscale's autograd function stops torch.compile. And a reproducible sum is taken by unit, in
the tree that is the same on any number of ranks.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from fairscale.nn.model_parallel import initialize as fs
from fairscale.nn.model_parallel import layers as fs_layers
from torch import nn

from llama_dist.kernels.linear import fastest, linear, single, unit_sums
from llama_dist.kernels.program import MOST_ON, Program
from llama_dist.kernels.small import silu_mul
from llama_dist.kernels.tree import Node, roots, total
from llama_dist.parallel import shared
from llama_dist.parallel.control import guarded
from llama_dist.parallel.units import Cut, Slice
from llama_dist.quant import product as packed_product
from llama_dist.quant.pack import rows as unpacked_rows
from llama_dist.quant.packed import Packed, empty, together
from llama_dist.quant.product import panels
from llama_dist.quant.scheme import BLOCK, Quantization, Scheme


@dataclass(frozen=True)
class Part:
    """What a rank makes of a model: part `rank` of `n_ranks`. `reproducible`: no sum depends on `n_ranks`.

    `quantization`: how the weights of products are packed; None: they are of `dtype`.
    """

    rank: int
    n_ranks: int
    dtype: torch.dtype
    device: torch.device
    reproducible: bool = False
    quantization: Quantization | None = None

    @property
    def scheme(self) -> Scheme | None:
        """How the weights of the layers lie; None: as rows."""
        return self.panels if self.quantization is None else self.quantization.layers

    @property
    def panels(self) -> Scheme | None:
        """How weights lie that are not quantised; None: as rows."""
        return panels(self.dtype, self.device)


@dataclass(frozen=True)
class Placement:
    """Which part of a logical tensor a local parameter holds: [start, stop) of `dim`, then zeros."""

    dim: int = 0
    start: int = 0
    stop: int | None = None


def _parameter(part: Part, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, dtype=part.dtype, device=part.device), requires_grad=False)


def _weight(part: Part, scheme: Scheme | None, rows: int, unit: int, n_units: int = 1) -> nn.Parameter | Packed:
    """Room for a weight [rows, n_units * unit] that is multiplied with."""
    if scheme is None:
        return _parameter(part, rows, n_units * unit)
    return empty(scheme, rows, unit, n_units, part.device)


def reduce(x: torch.Tensor) -> torch.Tensor:
    """Sum over the model-parallel ranks, in place."""
    group = fs.get_model_parallel_group()
    memory = shared.of(group)
    if memory is not None and x.dtype in shared.SUMMED:
        memory.sum(x)
    elif fs.get_model_parallel_world_size() > 1:
        guarded("a reduction", lambda: dist.all_reduce(x, group=group))
    return x


def gather(x: torch.Tensor) -> torch.Tensor:
    """Concatenate the ranks' parts along the last dimension: [n, part] -> [n, part * ranks]."""
    n_ranks = fs.get_model_parallel_world_size()
    if n_ranks == 1:
        return x
    group = fs.get_model_parallel_group()
    x = x.contiguous()
    memory = shared.of(group)
    if memory is not None:
        return memory.gather(x)
    parts = [torch.empty_like(x) for _ in range(n_ranks)]
    guarded("a gather", lambda: dist.all_gather(parts, x, group=group))
    return torch.cat(parts, dim=-1)


def total_of_ranks(sums: torch.Tensor, nodes: tuple[tuple[Node, ...], ...]) -> torch.Tensor:
    """Each rank's sums [roots, n, features] at its own `nodes` of the tree -> the whole sum [n, features], on all."""
    y: torch.Tensor
    if len(nodes) == 1:
        y = total(nodes[0], list(sums))
        return y
    group = fs.get_model_parallel_group()
    memory = shared.of(group)
    if memory is not None:
        return memory.sum_planes(sums.contiguous(), nodes)
    most = max(len(mine) for mine in nodes)
    padded = F.pad(sums, (0, 0, 0, 0, 0, most - len(sums)))
    parts = [torch.empty_like(padded) for _ in nodes]
    guarded("a reduction by unit", lambda: dist.all_gather(parts, padded, group=group))
    held = [value for part, mine in zip(parts, nodes, strict=True) for value in part[: len(mine)]]
    y = total([node for mine in nodes for node in mine], held)
    return y


def product(x: torch.Tensor, w: torch.Tensor | Packed, bias: torch.Tensor | None, reproducible: bool) -> torch.Tensor:
    """x [n, k] times w [m, k] transposed: by the kernel whose rows keep their bits where it must be, or the fastest."""
    if isinstance(w, Packed):
        return packed_product.linear(x, w, bias, reproducible)
    return linear(x, w, bias) if reproducible else fastest(x, w, bias)


def partial_sums(x: torch.Tensor, w: torch.Tensor | Packed, unit: int, first: int) -> torch.Tensor:
    """Partial products by unit, added up to the roots of this run of units, the first being number `first`."""
    return packed_product.unit_sums(x, w, first) if isinstance(w, Packed) else unit_sums(x, w, unit, first)


def rows_of(w: torch.Tensor | Packed, start: int, stop: int) -> torch.Tensor | Packed:
    """Some rows of a weight, a view; `start` and `stop` are multiples of 16, or `stop` lies past the end."""
    return w.blocks(start // BLOCK, -(-stop // BLOCK)) if isinstance(w, Packed) else w[start:stop]


def units_of(w: torch.Tensor | Packed, unit: int, start: int, stop: int) -> torch.Tensor | Packed:
    """The columns of units `start` up to `stop`, a view."""
    return w.units(start, stop) if isinstance(w, Packed) else w[:, start * unit : stop * unit]


class ColumnParallelLinear(fs_layers.ColumnParallelLinear):  # type: ignore[misc]
    """y = x W^T + b with the rows of W cut: x [n, in_features] -> [n, rows.padded], this rank's rows only.

    `rows` counts entries of the output dimension.
    """

    def __init__(self, in_features: int, rows: Slice, part: Part, *, bias: bool) -> None:
        nn.Module.__init__(self)  # past fairscale's, which would allocate the full weight
        self.in_features = in_features
        self.out_features = rows.padded * part.n_ranks
        self.gather_output = False
        self.output_size_per_partition = rows.padded
        self.reproducible = part.reproducible
        self.weight = _weight(part, self._scheme(part), rows.padded, in_features)
        self.bias = _parameter(part, rows.padded) if bias else None
        self.placements = {"weight": Placement(0, rows.start, rows.stop), "bias": Placement(0, rows.start, rows.stop)}

    def _scheme(self, part: Part) -> Scheme | None:
        return part.scheme

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return product(x, self.weight, self.bias, self.reproducible)


class OutputLinear(ColumnParallelLinear):
    """The output head: the vocabulary is cut. x [n, dim] -> this rank's logits."""

    def _scheme(self, part: Part) -> Scheme | None:
        return part.panels if part.quantization is None else part.quantization.output

    def lay_likeliest(self, program: Program, logits: torch.Tensor) -> tuple[array[int], torch.Tensor] | None:
        """Have a program find the likeliest of all ranks' logits: where it leaves them, and the rows that runs in one
        call draw from; None where it cannot.
        """
        first, stop = self.placements["weight"].start, self.placements["weight"].stop
        assert stop is not None
        if fs.get_model_parallel_world_size() == 1:
            return program.likeliest(logits, stop), logits
        memory = shared.of(fs.get_model_parallel_group())
        if memory is None:
            return None
        found = program.likeliest(logits, stop - first)
        whole = torch.empty(MOST_ON, logits.shape[1] * fs.get_model_parallel_world_size(), dtype=logits.dtype)
        program.shared_likeliest(logits, stop - first, first, found, whole, memory.address, memory.rank, memory.lost)
        return found, whole


class FusedColumns(nn.Module):
    """Several column-parallel layers of one input, whose weights lie in one tensor and are read by one product.

    It holds no parameters of its own: those of `layers` are views of its tensors. x [n, in_features] -> each one's y.
    """

    def __init__(self, *layers: ColumnParallelLinear) -> None:
        super().__init__()
        self.sizes = [layer.output_size_per_partition for layer in layers]
        self.reproducible = layers[0].reproducible
        packed = [layer.weight for layer in layers if isinstance(layer.weight, Packed)]
        parts: Sequence[nn.Parameter | Packed]
        self.weight: torch.Tensor | Packed
        if packed:
            self.weight, parts = together(packed)
            self.widths = [part.padded_rows for part in packed]
        else:
            self.weight = torch.cat([layer.weight for layer in layers if isinstance(layer.weight, nn.Parameter)])
            self.widths = self.sizes
            parts = [nn.Parameter(rows, requires_grad=False) for rows in torch.split(self.weight, self.sizes)]
        for layer, part in zip(layers, parts, strict=True):
            layer.weight = part
        self.bias = None if layers[0].bias is None else layers[0].bias.new_zeros(sum(self.widths))
        if self.bias is not None:
            for layer, entries in zip(layers, torch.split(self.bias, self.widths), strict=True):
                layer.bias = nn.Parameter(entries[: layer.output_size_per_partition], requires_grad=False)

    def _split(self, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        parts = torch.split(y, self.widths, 1)
        return tuple(part[:, :size] for part, size in zip(parts, self.sizes, strict=True))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self._split(product(x, self.weight, self.bias, self.reproducible))

    def gated(self, x: torch.Tensor) -> torch.Tensor:
        """Of two layers: silu of the first one's y times the second one's, [n, features]."""
        if isinstance(self.weight, torch.Tensor) and self.bias is None and not self.reproducible and single(x):
            from llama_dist.kernels import triton_single

            return triton_single.gated(x, self.weight)
        return silu_mul(*self.forward(x))

    def lay(self, program: Program, x: torch.Tensor, name: str) -> tuple[torch.Tensor, ...]:
        """Append it to a program; the rows it makes are called `name`."""
        assert isinstance(self.weight, Packed), "programs multiply by weights in panels"
        y = program.rows(name, sum(self.widths))
        program.linear(x, self.weight, self.bias, y)
        return self._split(y)


class RowParallelLinear(fs_layers.RowParallelLinear):  # type: ignore[misc]
    """y = x W^T + b with the columns of W cut: this rank's x [n, columns padded] -> the whole y [n, out_features].

    Partial products are summed over the ranks; the bias is whole on every rank and added once, after the sum.
    """

    def __init__(self, columns: Cut, out_features: int, part: Part, *, bias: bool) -> None:
        nn.Module.__init__(self)
        mine, per_rank = columns.of(part.rank, part.n_ranks), columns.units_per_rank(part.n_ranks)
        self.in_features = mine.padded * part.n_ranks
        self.out_features = out_features
        self.input_is_parallel = True
        self.input_size_per_partition = mine.padded
        self.reproducible, self.unit, self.first = part.reproducible, columns.unit, part.rank * per_rank
        # Zero units are left out of every sum: their number depends on that of the ranks.
        n_units = [columns.held(rank, part.n_ranks) for rank in range(part.n_ranks)]
        self.n_units = n_units[part.rank]
        self.nodes = tuple(tuple(roots(rank * per_rank, n)) for rank, n in enumerate(n_units))
        # Nor do they lie between the panels of the others: a row or two go through panel after panel without a gap.
        laid = per_rank if part.scheme is None else max(1, self.n_units)
        self.weight = _weight(part, part.scheme, out_features, columns.unit, laid)
        self.bias = _parameter(part, out_features) if bias else None
        self.placements = {"weight": Placement(1, mine.start, mine.stop), "bias": Placement()}

    @property
    def units(self) -> torch.Tensor | Packed:
        """The weight without the zero units."""
        return units_of(self.weight, self.unit, 0, self.n_units)

    def own(self, x: torch.Tensor) -> torch.Tensor:
        """x times this rank's part of the weight, [n, out_features]: what the ranks add up where no order is kept."""
        return product(x[:, : self.weight.shape[1]].contiguous(), self.weight, None, False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.reproducible:
            sums = partial_sums(x[:, : self.n_units * self.unit], self.units, self.unit, self.first)
            y = total_of_ranks(sums, self.nodes).to(x.dtype)
        else:
            y = reduce(self.own(x))
        return y if self.bias is None else y + self.bias

    def lay(self, program: Program, x: torch.Tensor, name: str) -> torch.Tensor:
        """Append it to a program, its reduction too; the rows it makes are called `name`."""
        held = self.units
        assert isinstance(self.weight, Packed) and isinstance(held, Packed), "programs multiply by weights in panels"
        y, memory = program.rows(name, self.out_features), shared.of(fs.get_model_parallel_group())
        if self.reproducible:
            width, mine = self.n_units * self.unit, roots(self.first, self.n_units)
            planes = program.rows("planes of " + name, self.out_features, max(1, len(mine)))
            if width:
                program.unit_sums(x[:, :width], held, self.first, planes)
            if len(self.nodes) == 1:
                program.add_planes(planes, mine, y)
            elif memory is not None:
                program.shared_planes(planes, self.nodes, y, memory.address, memory.rank, memory.lost)
            else:
                program.call(lambda n: _copy(y, total_of_ranks(planes[: len(mine), :n], self.nodes)))
        else:
            program.linear(x[:, : self.weight.shape[1]], self.weight, None, y)
            if memory is not None:
                program.shared_sum(y, memory.address, memory.rank, memory.lost)
            elif len(self.nodes) > 1:
                program.call(lambda n: _reduce(y[:n]))
        if self.bias is not None:
            program.add(y, self.bias, y)
        return y


def _copy(to: torch.Tensor, rows: torch.Tensor) -> None:
    to[: len(rows)] = rows


def _reduce(x: torch.Tensor) -> None:
    reduce(x)


class VocabParallelEmbedding(fs_layers.VocabParallelEmbedding):  # type: ignore[misc]
    """Token ids [n] -> [n, dim] with the vocabulary cut; a row comes from the one rank that holds it.

    `output`: the head that has the same weight, where both share one.
    """

    def __init__(self, rows: Slice, dim: int, part: Part, output: OutputLinear | None = None) -> None:
        nn.Module.__init__(self)
        self.num_embeddings = rows.padded * part.n_ranks
        self.embedding_dim = dim
        self.vocab_start_index, self.vocab_end_index = rows.start, rows.stop
        self.num_embeddings_per_partition = rows.padded
        self.reproducible = part.reproducible
        self.weight = _parameter(part, rows.padded, dim) if output is None else output.weight
        self.placements = {"weight": Placement(0, rows.start, rows.stop)}

    def held(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of this rank's own part, by their numbers in it."""
        w: torch.Tensor | Packed = self.weight
        return unpacked_rows(w, ids) if isinstance(w, Packed) else F.embedding(ids, w)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if fs.get_model_parallel_world_size() == 1:
            rows = self.held(ids)
            return rows.add_(0.0) if self.reproducible else rows  # as in a sum with the others' zeros: no -0.0 is left
        outside = (ids < self.vocab_start_index) | (ids >= self.vocab_end_index)
        local = (ids - self.vocab_start_index).masked_fill(outside, 0)
        return reduce(self.held(local).masked_fill(outside[:, None], 0))

    def lay(self, program: Program, y: torch.Tensor) -> None:
        """Append it to a program, its reduction too: y's rows become those of the call's tokens."""
        n_held = self.vocab_end_index - self.vocab_start_index
        program.embed(self.weight, self.vocab_start_index, n_held, self.reproducible, y)
        if fs.get_model_parallel_world_size() == 1:
            return
        memory = shared.of(fs.get_model_parallel_group())
        if memory is not None:
            program.shared_sum(y, memory.address, memory.rank, memory.lost)
        else:
            program.call(lambda n: _reduce(y[:n]))
