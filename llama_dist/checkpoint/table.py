"""The Reader of every format: a table that says where the parts of each logical tensor lie.

Formats differ only in how they find that table: one part or several cut along one dimension (Meta's files), and rows
of rotated heads with their pairs side by side or half a head apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from llama_dist.checkpoint.files import File
from llama_dist.checkpoint.reader import TensorInfo
from llama_dist.checkpoint.stored import Stored, as_matrix, read_rectangle
from llama_dist.config import ModelConfig

JOINED_BYTES = 16 * 2**20
"""Most bytes of a piece that is put together from others: up to three buffers of its size live at once."""


@dataclass(frozen=True)
class Logical:
    """One logical tensor: parts in order along `dim`; `pairs` is the head size if rows pair neighbours, else None."""

    shape: tuple[int, ...]
    parts: tuple[Stored, ...]
    dim: int = 0
    pairs: int | None = None

    @property
    def info(self) -> TensorInfo:
        encoding = self.parts[0].encoding
        assert encoding is not None
        return TensorInfo(self.shape, encoding.dtype, sum(part.n_bytes for part in self.parts))

    def rectangle(self, row0: int, row1: int, col0: int, col1: int) -> Iterator[torch.Tensor]:
        """Rows and columns as the contract orders them, in pieces of whole rows."""
        if row0 >= row1 or col0 >= col1:
            return
        if self.pairs is not None:
            yield from self._halves(row0, row1, col0, col1, self.pairs)
        elif self.dim == 0 or len(self.parts) == 1:
            yield from self._stacked(row0, row1, col0, col1)
        else:
            yield from self._abreast(row0, row1, col0, col1)

    def _stacked(self, row0: int, row1: int, col0: int, col1: int) -> Iterator[torch.Tensor]:
        top = 0
        for part in self.parts:
            rows = as_matrix(part.shape)[0]
            start, stop = max(row0 - top, 0), min(row1 - top, rows)
            if start < stop:
                yield from read_rectangle(part, start, stop, col0, col1)
            top += rows

    def _abreast(self, row0: int, row1: int, col0: int, col1: int) -> Iterator[torch.Tensor]:
        out, step = self._buffer(row1 - row0, col1 - col0, 1)
        for start in range(row0, row1, step):
            n = min(step, row1 - start)
            left = 0
            for part in self.parts:
                columns = as_matrix(part.shape)[1]
                first, last = max(col0 - left, 0), min(col1 - left, columns)
                if first < last:
                    to = out[:n, left + first - col0 : left + last - col0]
                    _fill(to, read_rectangle(part, start, start + n, first, last))
                left += columns
            yield out[:n]

    def _halves(self, row0: int, row1: int, col0: int, col1: int, head: int) -> Iterator[torch.Tensor]:
        """Row 2i + s of a stored head is row i + s * head / 2 of the logical one: read heads whole, trim the ends."""
        begin, end = row0 // head * head, -(-row1 // head) * head
        out, step = self._buffer(end - begin, col1 - col0, head)
        for start in range(begin, end, step):
            n = min(step, end - start)
            _fill(out[:n], self._stacked(start, start + n, col0, col1))
            heads = out[:n].view(n // head, head // 2, 2, -1).transpose(1, 2).reshape(n, -1)
            yield heads[max(row0 - start, 0) : min(row1, start + n) - start]

    def _buffer(self, rows: int, columns: int, unit: int) -> tuple[torch.Tensor, int]:
        """Room for a piece of a multiple of `unit` rows, and how many rows that is."""
        dtype = self.info.dtype
        fits = JOINED_BYTES // (columns * dtype.itemsize * unit) * unit
        step = min(max(fits, unit), rows)
        return torch.empty(step, columns, dtype=dtype), step


def _fill(out: torch.Tensor, pieces: Iterator[torch.Tensor]) -> None:
    done = 0
    for piece in pieces:
        out[done : done + len(piece)] = piece
        done += len(piece)
    assert done == len(out)


@dataclass
class TableReader:
    """A Reader over a table of logical tensors. `metadata` is GGUF's, empty for other formats."""

    format: str
    config: ModelConfig
    logical: Mapping[str, Logical]
    files: Sequence[File]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, TensorInfo] = field(init=False)
    storage: Mapping[str, int] = field(init=False)

    def __post_init__(self) -> None:
        self.tensors = {name: tensor.info for name, tensor in self.logical.items()}
        self.storage = dict(Counter(tensor.parts[0].kind for tensor in self.logical.values()))

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Iterator[torch.Tensor]:
        """See `Reader.read`; an unknown name is a KeyError, a range outside the tensor an IndexError."""
        tensor = self.logical[name]
        if not 0 <= dim < len(tensor.shape):
            raise IndexError(f"{name} has {len(tensor.shape)} dimensions, dim is {dim}")
        stop = tensor.shape[dim] if stop is None else stop
        if not 0 <= start <= stop <= tensor.shape[dim]:
            raise IndexError(f"[{start}, {stop}) is outside dim {dim} of {name}, which has {tensor.shape[dim]}")
        rows, columns = as_matrix(tensor.shape)
        box = (start, stop, 0, columns) if dim == 0 else (0, rows, start, stop)
        for piece in tensor.rectangle(*box):
            yield piece.view(-1) if len(tensor.shape) == 1 else piece

    def close(self) -> None:
        for file in self.files:
            file.close()
