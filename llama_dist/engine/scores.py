"""Logprobs: natural logs of the unscaled model distribution, without temperature and filters."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llama_dist.kernels import scores as kernels

Score = tuple[float, list[tuple[int, float]]]
"""A token's logprob, and (id, logprob) of the likeliest."""


def scores_of(logits: torch.Tensor, tokens: Sequence[int], tops: Sequence[int]) -> list[Score]:
    """Of each row [n, vocab] its token's logprob and so many likeliest ones, likeliest first, ties by rising id."""
    if kernels.compiled_for(logits):
        return kernels.scores(logits, tokens, tops)
    return [score_twin(row.float(), token, top) for row, token, top in zip(logits, tokens, tops, strict=True)]


def score_twin(row: torch.Tensor, token: int, top: int) -> Score:
    """`scores_of` a row [vocab], float32, in torch's operations."""
    logprobs = _log_softmax(row)
    if not top:
        return float(logprobs[token]), []
    top = min(top, len(row))
    ids = (row >= row.topk(top).values[-1]).nonzero()[:, 0]  # rising; more than `top` where the last ones tie
    ids = ids[row[ids].sort(descending=True, stable=True).indices[:top]]
    return float(logprobs[token]), list(zip(ids.tolist(), logprobs[ids].tolist(), strict=True))


def _log_softmax(row: torch.Tensor) -> torch.Tensor:
    # On a GPU the order of its sum depends on where in memory a row begins: it is moved.
    return (row.clone() if row.device.type == "cuda" else row).log_softmax(0)
