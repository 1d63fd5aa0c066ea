"""What the writers of all formats share: tensors as a stream of bytes in the dtype that is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from llama_dist.checkpoint.reader import Reader
from llama_dist.errors import CheckpointError

DTYPE_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
Advance = Callable[[int], object]
"""Called with the number of values just written: what a progress bar wants."""


def cast_pieces(reader: Reader, name: str, dtype: torch.dtype | None) -> Iterator[torch.Tensor]:
    """A whole logical tensor in pieces of rows, as `dtype` (None: as stored). Copy a piece before the next is asked.

    Raises CheckpointError where a finite value does not fit float16.
    """
    for piece in reader.read(name):
        out = piece if dtype is None else piece.to(dtype)
        if dtype is torch.float16 and piece.dtype is not dtype and not torch.equal(out.isfinite(), piece.isfinite()):
            raise CheckpointError(f"tensor {name} has values that float16 cannot hold; use --dtype bfloat16 or float32")
        yield out


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The values row by row, without a copy where they lie so already."""
    return tensor.contiguous().view(torch.uint8).numpy().data.cast("B")


def dtype_of(reader: Reader, name: str, dtype: torch.dtype | None) -> torch.dtype:
    """What a tensor is written as."""
    return reader.tensors[name].dtype if dtype is None else dtype
