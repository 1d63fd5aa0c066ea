"""Tensors as they lie in files, and how a rectangle of one is read piece by piece."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from llama_dist.checkpoint.files import File
from llama_dist.kernels.blocks import BlockKind, decode

PIECE_BYTES = 4 * 2**20
"""Most bytes a piece has, and most that are read for it: few enough to stay in the cache until they are used."""
DECODED_BYTES = 2 * 2**20
"""The same for quantised pieces, as floats."""
SMALL_ROW = 16 * 2**10
"""Rows up to this many bytes are read whole: one large read beats many of less than a few pages."""


@dataclass(frozen=True)
class Encoding:
    """How values become bytes: `block` values of a row take `block_bytes`; `read` gives `dtype`.

    `blocks` is how GGUF packs them where they must be decoded; plain values have none.
    """

    name: str
    dtype: torch.dtype
    block: int
    block_bytes: int
    blocks: BlockKind | None = None

    def row_bytes(self, columns: int) -> int:
        return columns // self.block * self.block_bytes


F32 = Encoding("F32", torch.float32, 1, 4)
F16 = Encoding("F16", torch.float16, 1, 2)
BF16 = Encoding("BF16", torch.bfloat16, 1, 2)


@dataclass(frozen=True)
class Stored:
    """A row-major tensor in a file. `kind` is what the file calls its type; `encoding` None: a type we do not read."""

    file: File
    offset: int
    shape: tuple[int, ...]
    kind: str
    encoding: Encoding | None

    @property
    def n_bytes(self) -> int:
        assert self.encoding is not None
        return self.encoding.row_bytes(math.prod(self.shape))


def as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a shape: a vector is a column, so that its entries are rows like those of a matrix."""
    return (shape[0], 1) if len(shape) == 1 else (shape[0], shape[1])


def read_rectangle(stored: Stored, row0: int, row1: int, col0: int, col1: int) -> Iterator[torch.Tensor]:
    """Rows [row0, row1) and columns [col0, col1) in pieces of whole rows, (rows, col1 - col0), in order.

    A piece is a view of one buffer that the next step overwrites. Of rows above 16 KiB only the blocks asked for are
    read, unless they are more than half of the row.
    """
    encoding = stored.encoding
    assert encoding is not None
    columns = as_matrix(stored.shape)[1]
    whole = encoding.row_bytes(columns)
    block0, block1 = col0 // encoding.block, -(-col1 // encoding.block)
    read0, width = block0 * encoding.block_bytes, (block1 - block0) * encoding.block_bytes
    if whole <= SMALL_ROW or 2 * width >= whole:
        block0, read0, width = 0, 0, whole
    values = width // encoding.block_bytes * encoding.block
    limit = PIECE_BYTES // width if encoding.blocks is None else DECODED_BYTES // (4 * values)
    step = min(max(1, limit), row1 - row0)
    if step <= 0 or col0 >= col1:
        return
    buffer = torch.empty(step, width, dtype=torch.uint8)
    memory = buffer.numpy().data.cast("B")
    first = col0 - block0 * encoding.block
    for start in range(row0, row1, step):
        n = min(step, row1 - start)
        if width == whole:
            stored.file.read_into(memory[: n * width], stored.offset + start * whole)
        else:
            for i in range(n):
                stored.file.read_into(memory[i * width : (i + 1) * width], stored.offset + (start + i) * whole + read0)
        yield _decode(buffer[:n], encoding, values)[:, first : first + col1 - col0]


def _decode(raw: torch.Tensor, encoding: Encoding, columns: int) -> torch.Tensor:
    """Bytes (rows, n) to values (rows, columns)."""
    if encoding.blocks is None:
        return raw.view(encoding.dtype).view(-1, columns)
    return decode(raw, encoding.blocks).view(-1, columns)
