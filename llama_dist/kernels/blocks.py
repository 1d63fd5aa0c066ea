"""Blocks of GGUF files to floats: by C++, or the `gguf` package, with the same bits."""

from __future__ import annotations

import functools
from ctypes import c_int, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any

import torch

from llama_dist.kernels import build


@dataclass(frozen=True)
class BlockKind:
    """A quantised type of GGUF: its number in files, how many numbers a block has, and in how many bytes."""

    number: int
    numbers: int
    n_bytes: int


KINDS = {
    "Q4_0": BlockKind(2, 32, 18),
    "Q4_1": BlockKind(3, 32, 20),
    "Q5_0": BlockKind(6, 32, 22),
    "Q5_1": BlockKind(7, 32, 24),
    "Q8_0": BlockKind(8, 32, 34),
    "Q2_K": BlockKind(10, 256, 84),
    "Q3_K": BlockKind(11, 256, 110),
    "Q4_K": BlockKind(12, 256, 144),
    "Q5_K": BlockKind(13, 256, 176),
    "Q6_K": BlockKind(14, 256, 210),
}


@functools.cache
def _compiled() -> Any:
    return build.function("blocks", c_int, c_void_p, c_int64, c_void_p, c_int)


def decode(raw: torch.Tensor, kind: BlockKind) -> torch.Tensor:
    """Rows of whole blocks, uint8 [rows, bytes] and packed -> float32 [rows, numbers]."""
    assert raw.is_contiguous() and raw.shape[1] % kind.n_bytes == 0, (raw.shape, raw.stride(), kind)
    if _compiled() is None:
        return decode_twin(raw, kind)
    blocks = raw.shape[1] // kind.n_bytes
    out = torch.empty(len(raw), blocks * kind.numbers)
    unknown = _compiled()(kind.number, raw.data_ptr(), len(raw) * blocks, out.data_ptr(), torch.get_num_threads())
    assert not unknown, kind
    return out


def decode_twin(raw: torch.Tensor, kind: BlockKind) -> torch.Tensor:
    """`decode` by the `gguf` package: a hundred million numbers a second."""
    import gguf  # which nothing else waits for

    numbers = gguf.quants.dequantize(raw.numpy(), gguf.GGMLQuantizationType(kind.number))
    return torch.from_numpy(numbers).view(len(raw), -1)
