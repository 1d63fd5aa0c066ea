"""Tokens of many rows on a GPU, in torch's operations: those that `sampler.sample` gives, without waiting.

For rows with top_k, and where Triton does not serve: else kernels/triton_draw.py draws, in the same way.

Of a row the greatest with noise is found first. Filters keep the likeliest tokens up to some place: if it is kept it is
drawn, else only tokens likelier than it are in question. Sums are taken in another order than the sampler's, which may
change from call to call: where one is too close to tell the row is left to the sampler.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llama_dist.engine.sampler import Wanted, gumbel_of, noise_key, signed
from llama_dist.kernels.draw import CLOSE, MOST_K, ROUNDS, SMALLEST, UNSURE
from llama_dist.kernels.told import sent

NUMBERS = 1 << 20  # logits at once, which bounds what is allocated beside them


def draw_rows(wanted: Sequence[Wanted]) -> torch.Tensor:
    """A token for each, int64 [n] on the rows' device; UNSURE where it is close.

    Rows are of one length and on one device, at temperatures above 0.
    """
    at_once = max(1, NUMBERS // len(wanted[0].row))
    return torch.cat([_few(wanted[i : i + at_once]) for i in range(0, len(wanted), at_once)])


def _few(wanted: Sequence[Wanted]) -> torch.Tensor:
    """[n] of int64 on the rows' device."""
    rows = torch.stack([w.row.float() for w in wanted]).double()  # [n, vocab]
    vocab, device = rows.shape[1], rows.device

    def column(values: list[float]) -> torch.Tensor:
        return sent(torch.tensor(values, dtype=torch.float64), device)[:, None]

    params = [w.params for w in wanted]
    keys = sent(torch.tensor([[signed(noise_key(w.seed, w.position))] for w in wanted]), device)
    ids, temperature = torch.arange(vocab, device=device), column([p.temperature for p in params])
    scaled = rows / temperature
    noisy = scaled + gumbel_of(keys, ids)
    ks = [p.top_k if 0 < p.top_k < vocab else vocab for p in params]
    if all(k == vocab and p.top_p >= 1 and p.min_p <= 0 for k, p in zip(ks, params, strict=True)):
        best, sure = _greatest(noisy)
        return torch.where(sure, best, UNSURE)[:, 0]
    # 2 and -1 are what no mass and no weight is near.
    top_p, min_p = column([p.top_p if p.top_p < 1 else 2 for p in params]), column([p.min_p or -1 for p in params])
    k = column([float(k) for k in ks])
    weights = torch.exp(scaled - scaled.amax(1, keepdim=True))
    whole, least = _kept(weights, ks)
    noisy = noisy.masked_fill(weights < torch.maximum(least, min_p - CLOSE), float("-inf"))
    found = torch.full_like(keys, UNSURE)
    # Rows that have no token yet and may get one.
    may = sent(torch.tensor([[k == vocab or k <= MOST_K] for k in ks]), device)
    for _ in range(ROUNDS):
        best, sure = _greatest(noisy)
        logit, weight = rows.gather(1, best), weights.gather(1, best)
        before = (rows > logit) | ((rows == logit) & (ids < best))
        count, mass = before.sum(1, keepdim=True), (weights * before).sum(1, keepdim=True) / whole
        first = count == 0
        close = ((mass - top_p).abs() < CLOSE) | ((weight - min_p).abs() < CLOSE)
        close |= logit.abs() < SMALLEST * temperature
        kept = first | ((count < k) & (mass < top_p) & (weight > min_p))
        may &= sure & (first | ~close)
        found = torch.where(may & kept, best, found)
        may &= ~kept
        noisy = noisy.masked_fill(~before, float("-inf"))
    return found[:, 0]


def _greatest(noisy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each row the greatest's place, and whether the next is far enough below it; both [n, 1]."""
    values, places = noisy.topk(min(2, noisy.shape[1]))
    sure = values[:, :1] - values[:, 1:] > CLOSE + 1e-15 * values[:, :1].abs()
    return places[:, :1], sure if sure.shape[1] else torch.ones_like(places, dtype=torch.bool)


def _kept(weights: torch.Tensor, ks: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of the k greatest weights, and the least of them; both [n, 1]."""
    whole, least = weights.sum(1, keepdim=True), torch.zeros_like(weights[:, :1])
    most = max((k for k in ks if k < weights.shape[1] and k <= MOST_K), default=0)
    if not most:
        return whole, least
    greatest = weights.topk(most).values
    last = sent(torch.tensor([[min(k, most) - 1] for k in ks]), weights.device)
    few = sent(torch.tensor([[k <= most] for k in ks]), weights.device)
    return (
        torch.where(few, greatest.cumsum(1).gather(1, last), whole),
        torch.where(few, greatest.gather(1, last), least),
    )
