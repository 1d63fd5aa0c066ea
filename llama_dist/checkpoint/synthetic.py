"""A checkpoint of random weights, made as they are read, on the device: for measuring a shape without its files."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from llama_dist.checkpoint.reader import TensorInfo
from llama_dist.checkpoint.stored import as_matrix
from llama_dist.config import ModelConfig
from llama_dist.model.families import tensor_shapes

POOL = 2**20  # random numbers that every row is cut from
STRIDE = 648_055  # entries of the pool between the beginnings of two rows, about its golden section, and odd
STD = 0.02
PIECE_BYTES = {"cpu": 2**21, "cuda": 2**26}  # small enough for a processor's cache, large enough for a GPU


class RandomReader:
    """A Reader of bfloat16 weights, normal with deviation 0.02; those of norms are 1.

    Row r of a matrix is a window of one pool of random numbers, whose place depends on the tensor's name and on r. So
    a slice has the same numbers whoever reads it, on any number of ranks, and reading costs little more than writing.
    """

    format = "random"

    def __init__(self, config: ModelConfig, seed: int, device: torch.device) -> None:
        self.config = config
        shapes = tensor_shapes(config)
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(shape, torch.bfloat16, 2 * shape[0] * as_matrix(shape)[1])
            for name, shape in shapes.items()
        }
        self.storage: Mapping[str, int] = {"random": len(shapes)}
        self.metadata: Mapping[str, Any] = {}
        self._seed, self._device = seed, device
        self._pool: torch.Tensor | None = None

    def _windows(self, width: int) -> torch.Tensor:
        """All runs of `width` numbers of the pool, one a row; a view."""
        if self._pool is None:
            widest = max(as_matrix(info.shape)[1] for info in self.tensors.values())
            generator = torch.Generator().manual_seed(self._seed)
            pool = torch.empty(POOL + widest).normal_(0.0, STD, generator=generator)
            self._pool = pool.to(torch.bfloat16).to(self._device)
        return self._pool.unfold(0, width, 1)

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Iterator[torch.Tensor]:
        """The range [start, stop) of `dim`, in pieces along dim 0; a piece is good until the next one is asked for."""
        shape = self.tensors[name].shape
        stop = shape[dim] if stop is None else stop
        rows, columns = (0, shape[0]), (0, as_matrix(shape)[1])
        if dim == 0:
            rows = (start, stop)
        else:
            columns = (start, stop)
        width = columns[1] - columns[0]
        if width == 0:
            return
        if name.endswith("norm.weight"):
            yield torch.ones(rows[1] - rows[0], dtype=torch.bfloat16, device=self._device)
            return
        windows, key = self._windows(width), zlib.crc32(name.encode())
        step = max(1, PIECE_BYTES[self._device.type] // (2 * width))
        buffer = torch.empty(min(step, rows[1] - rows[0]), width, dtype=torch.bfloat16, device=self._device)
        for first in range(*rows, step):
            last = min(first + step, rows[1])
            places = (torch.arange(first, last, device=self._device) * STRIDE + key) % POOL + columns[0]
            piece = torch.index_select(windows, 0, places, out=buffer[: last - first])
            yield piece if len(shape) > 1 else piece[:, 0]

    def close(self) -> None:
        self._pool = None
