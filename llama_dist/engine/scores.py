"""Logprobs: natural logs of the unscaled model distribution, without temperature and filters."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from llama_dist.kernels import scores as kernels

Score = tuple[float, list[tuple[int, float]]]
"""A token's logprob, and (id, logprob) of the likeliest."""


def scores_of(logits: torch.Tensor, tokens: Sequence[int], tops: Sequence[int]) -> list[Score]:
    """Of each row [n, vocab] its token's logprob and so many likeliest ones, likeliest first, ties by rising id."""
    if kernels.compiled_for(logits):
        return kernels.scores(logits, tokens, tops)
    return scores_twin(logits, tokens, tops)


def scores_twin(logits: torch.Tensor, tokens: Sequence[int], tops: Sequence[int]) -> list[Score]:
    """`scores_of` in torch's operations, which wait for the device three times, whatever the number of rows."""
    rows = [_log_softmax(row.float()) for row in logits]
    own = torch.stack([row[token] for row, token in zip(rows, tokens, strict=True)]).tolist()
    ids = [_likeliest(row, top) for row, top in zip(logits, tops, strict=True)]
    values = torch.cat([row[some] for row, some in zip(rows, ids, strict=True)]).tolist()
    pairs = iter(zip(torch.cat(ids).tolist(), values, strict=True))
    return [(x, [*itertools.islice(pairs, len(some))]) for x, some in zip(own, ids, strict=True)]


def _likeliest(row: torch.Tensor, top: int) -> torch.Tensor:
    """The ids of the `top` greatest of a row, ties by rising id."""
    top = min(top, len(row))
    if not top:
        return row.new_empty(0, dtype=torch.int64)
    if row.device.type == "cuda":  # it sorts sooner than it answers how many tie
        return row.sort(descending=True, stable=True).indices[:top]
    ids = (row >= row.topk(top).values[-1]).nonzero()[:, 0]  # rising; more than `top` where the last ones tie
    return ids[row[ids].sort(descending=True, stable=True).indices[:top]]


def _log_softmax(row: torch.Tensor) -> torch.Tensor:
    # On a GPU the order of its sum depends on where in memory a row begins: it is moved.
    return (row.clone() if row.device.type == "cuda" else row).log_softmax(0)
