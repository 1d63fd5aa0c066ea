"""Logprobs of rows of logits in C++, all rows in one call."""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from ctypes import c_char_p, c_int, c_int64, c_void_p
from typing import Any

import torch

from llama_dist.kernels import build

DTYPES = (torch.bfloat16, torch.float32)
SCORE = struct.Struct("=qqqq")  # as in scores.cpp


@functools.cache
def _compiled() -> Any:
    results = (c_void_p, c_void_p, c_void_p)
    return build.function("scores", c_char_p, c_int64, c_int64, c_int64, *results, c_int)


def compiled_for(logits: torch.Tensor) -> bool:
    """Whether C++ computes such rows."""
    return logits.device.type == "cpu" and logits.dtype in DTYPES and _compiled() is not None


def scores(
    logits: torch.Tensor, tokens: Sequence[int], tops: Sequence[int]
) -> list[tuple[float, list[tuple[int, float]]]]:
    """Of each row [m, vocab] its token's logprob, and the (id, logprob) of so many likeliest, ties by rising id."""
    m, vocab = logits.shape
    assert m == len(tokens) == len(tops) and logits.stride(1) == 1, "a token and a number for each row"
    assert all(0 <= token < vocab for token in tokens), f"tokens {tokens} of {vocab}"
    bf16, step = logits.dtype == torch.bfloat16, logits.stride(0) * logits.itemsize
    packed = b"".join(
        SCORE.pack(logits.data_ptr() + i * step, bf16, token, top)
        for i, (token, top) in enumerate(zip(tokens, tops, strict=True))
    )
    most = max(tops, default=0)
    of_token, ids, of_tops = torch.empty(m), torch.empty(m, most, dtype=torch.int64), torch.empty(m, most)
    results = (of_token.data_ptr(), ids.data_ptr(), of_tops.data_ptr())
    _compiled()(packed, m, vocab, most, *results, torch.get_num_threads())
    rows = zip(of_token.tolist(), ids.tolist(), of_tops.tolist(), (min(top, vocab) for top in tops), strict=True)
    return [(own, [*zip(some[:n], values[:n], strict=True)]) for own, some, values, n in rows]
