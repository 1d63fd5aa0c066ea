"""Attention of one layer: projections cut by head units, rotation, cache, scaled dot products.

These are taken over the pages in C++ or Triton where one serves, else a sequence at a time in torch's operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import nn

from llama_dist.config import ModelConfig
from llama_dist.kernels import attention as pages
from llama_dist.kernels.attention import paged
from llama_dist.kernels.program import Program
from llama_dist.kernels.small import rope_write
from llama_dist.model.cache import Batch, KVCache
from llama_dist.model.norm import RMSNorm
from llama_dist.parallel.layers import ColumnParallelLinear, FusedColumns, Part, RowParallelLinear
from llama_dist.parallel.units import Cut, Slice, Units


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int, window: int | None, of_query: tuple[int, ...]
) -> torch.Tensor:
    """Causal attention of one sequence's newest queries over all its keys.

    q [heads, n, head_dim] at positions start ... start + n - 1; k, v [kv_heads, start + n, head_dim]; query head i
    reads KV head `of_query[i]`. With a window a query sees that many keys, itself the last. -> [heads, n, head_dim].
    """
    n, total = q.shape[1], k.shape[1]
    first = 0 if window is None else max(0, start - window + 1)  # the first key any of the queries sees
    k, v = k[:, first:], v[:, first:]
    mask = None
    if n > 1 and (start > 0 or (window is not None and window < total)):
        queries = torch.arange(start, total, device=q.device)[:, None]
        keys = torch.arange(first, total, device=q.device)
        mask = keys <= queries if window is None else (keys <= queries) & (keys > queries - window)
    causal = n > 1 and mask is None
    readers = len(of_query) // k.shape[0]
    if of_query == tuple(i // readers for i in range(k.shape[0] * readers)):
        out = F.scaled_dot_product_attention(
            q[None], k[None], v[None], mask, is_causal=causal, enable_gqa=k.shape[0] != q.shape[0]
        )
        return out[0]
    # A rank's run of heads may begin or end amid a KV head's readers: one call a KV head.
    parts = []
    for head, group in groupby(enumerate(of_query), key=lambda pair: pair[1]):
        mine = [i for i, _ in group]
        parts.append(
            F.scaled_dot_product_attention(
                q[None, mine[0] : mine[-1] + 1],
                k[None, head].expand(len(mine), -1, -1)[None],
                v[None, head].expand(len(mine), -1, -1)[None],
                mask,
                is_causal=causal,
            )[0]
        )
    return torch.cat(parts)


class Attention(nn.Module):
    """Grouped-query attention over this rank's query heads and the KV heads they read. x [n, dim] -> [n, dim]."""

    def __init__(self, config: ModelConfig, layer: int, units: Units, part: Part) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.window = config.sliding_window if layer in config.sliding_layers else None
        kv = units.kv_heads(part.rank, part.n_ranks)
        self.of_query = kv.of_query
        self.reads = torch.tensor(kv.of_query, dtype=torch.int32)
        rows = Cut(units.heads.size * config.head_dim, units.heads.unit * config.head_dim)
        mine = rows.of(part.rank, part.n_ranks)
        kv_rows = Slice(kv.start * config.head_dim, kv.stop * config.head_dim, kv.padded * config.head_dim)
        bias = config.attention_bias
        self.wq = ColumnParallelLinear(config.dim, mine, part, bias=bias)
        self.wk = ColumnParallelLinear(config.dim, kv_rows, part, bias=bias)
        self.wv = ColumnParallelLinear(config.dim, kv_rows, part, bias=bias)
        self.wqkv = FusedColumns(self.wq, self.wk, self.wv)
        self.wo = RowParallelLinear(rows, config.dim, part, bias=config.attention_out_bias)
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.norm_eps, part)
            self.k_norm = RMSNorm(config.head_dim, config.norm_eps, part)

    def _one(self, q: torch.Tensor, cache: KVCache, batch: Batch, i: int) -> torch.Tensor:
        k, v = cache.read(self.layer, batch, i)
        out = attend(q.transpose(0, 1), k, v, batch.spans[i].start, self.window, self.of_query)
        return out.transpose(0, 1).flatten(1)  # [length, heads * head_dim]

    def forward(self, x: torch.Tensor, batch: Batch, angles: Sequence[torch.Tensor], cache: KVCache) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in self.wqkv(x))  # [n, heads, head_dim]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        keys, values = cache.layers[self.layer]
        cos, sin = angles
        rope_write(q, k, v, cos, sin, keys, values, batch.slots)
        if paged(q):
            out = pages.attend(q, keys, values, batch.tables, batch.starts, batch.counts, self.reads, self.window or 0)
            return self.wo(out)  # type: ignore[no-any-return]
        lengths = [span.length for span in batch.spans]
        parts = [self._one(part, cache, batch, i) for i, part in enumerate(torch.split(q, lengths))]
        return self.wo(torch.cat(parts))  # type: ignore[no-any-return]

    def lay(self, program: Program, x: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Append it to a program over that cache, which is in the kernels' pages: x [most, dim] -> [most, dim]."""
        q, k, v = self.wqkv.lay(program, x, "qkv")
        if self.q_norm is not None and self.k_norm is not None:
            for part, norm in ((q, self.q_norm), (k, self.k_norm)):
                program.norm(part, norm.weight, norm.eps, part, groups=part.shape[1] // self.head_dim)
        keys, values = cache.layers[self.layer]
        program.rope(q, k, v, keys, values)
        out = program.rows("heads", q.shape[1])
        program.attend(q, keys, values, self.reads, self.window or 0, out)
        return self.wo.lay(program, out, "attention")
