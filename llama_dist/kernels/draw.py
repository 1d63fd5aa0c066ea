"""The tokens drawn of rows of logits, in C++: what engine/sampler.py defines, many times faster."""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from ctypes import c_char_p, c_int, c_int64, c_void_p
from typing import Any, NamedTuple

import torch

from llama_dist.kernels import build

DTYPES = (torch.bfloat16, torch.float32)
UNSURE = -1  # in a token's place
CLOSE = 1e-9  # of noisy logits and masses on a GPU
SMALLEST = 1e-6  # of |logit / temperature|: of smaller ones two may differ and be as likely
MOST_K = 256  # of top_k; for more the sampler decides
ROUNDS = 6  # candidates a row is tried with on a GPU before it is left to the sampler
DRAW = struct.Struct("=qqqQddd")  # as in draw.h


class Draw(NamedTuple):
    """What is drawn of a row [vocab]; `key` is the noise's (unsigned, 64 bits), the others are as in SamplingParams."""

    row: torch.Tensor
    key: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float


@functools.cache
def _compiled() -> Any:
    return build.function("draw", c_char_p, c_int64, c_int64, c_void_p, c_int)


def draw(draws: Sequence[Draw]) -> list[int]:
    """The token of each; UNSURE where rounding might decide, or C++ cannot: `sampler.sample_top_p` decides there."""
    first = draws[0].row
    if first.device.type != "cpu" or _compiled() is None or any(d.row.dtype not in DTYPES for d in draws):
        return [UNSURE] * len(draws)
    packed = bytearray()
    for row, key, temperature, top_p, top_k, min_p in draws:
        assert row.shape == first.shape and row.is_contiguous(), "rows of one length, each in one piece"
        packed += DRAW.pack(row.data_ptr(), row.dtype == torch.bfloat16, top_k, key, temperature, top_p, min_p)
    found = torch.empty(len(draws), dtype=torch.int64)
    _compiled()(bytes(packed), len(draws), len(first), found.data_ptr(), torch.get_num_threads())
    return found.tolist()
