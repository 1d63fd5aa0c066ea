"""A packed weight: its numbers or codes, scales and factors, in the order in which the product reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from llama_dist.quant.scheme import BFLOAT16, BLOCK, FLOAT32, GROUP, Scheme, groups_of, n_blocks

EXACT = {torch.bfloat16: BFLOAT16, torch.float32: FLOAT32}


@dataclass(frozen=True, eq=False)
class Packed:
    """W [rows, n_units * unit], in blocks of 16 rows, the last one filled up with zeros.

    codes uint8 [blocks, groups, bytes], laid out as kernels/src/groups.h says, or panels.cpp of exact schemes; scales
    uint8 [blocks, groups, 16], of int4 with zero points behind: [blocks, groups, 32]; factors float32
    [blocks, n_units, 16]. Exact schemes have none: [..., 0].
    """

    scheme: Scheme
    rows: int
    unit: int
    codes: torch.Tensor
    scales: torch.Tensor
    factors: torch.Tensor

    @property
    def n_units(self) -> int:
        return self.factors.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.n_units * self.unit

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def parts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.codes, self.scales, self.factors

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.parts)

    @property
    def numbers(self) -> torch.Tensor:
        """Of an exact scheme, the weights as they lie, a view: [blocks, pairs, 16, 2] bfloat16 or [blocks, k, 16]."""
        blocks, k = len(self.codes), self.n_units * groups_of(self.unit) * GROUP
        if self.scheme == BFLOAT16:
            return self.codes.view(torch.bfloat16).view(blocks, k // 2, BLOCK, 2)
        return self.codes.view(torch.float32).view(blocks, k, BLOCK)

    @property
    def padded_rows(self) -> int:
        return len(self.codes) * BLOCK

    def blocks(self, start: int, stop: int) -> Packed:
        """Rows 16 * start up to 16 * stop, a view."""
        rows = max(0, min(self.rows, stop * BLOCK) - start * BLOCK)
        return Packed(self.scheme, rows, self.unit, *(t[start:stop] for t in self.parts))

    def units(self, start: int, stop: int) -> Packed:
        """The columns of units `start` up to `stop`, a view."""
        each = groups_of(self.unit)
        groups = slice(start * each, stop * each)
        return replace(
            self, codes=self.codes[:, groups], scales=self.scales[:, groups], factors=self.factors[:, start:stop]
        )


def empty(scheme: Scheme, rows: int, unit: int, n_units: int, device: torch.device) -> Packed:
    """Room for a weight; its numbers are not set."""
    blocks, groups = n_blocks(rows), n_units * groups_of(unit)
    codes, scales = (
        torch.empty(blocks, groups, BLOCK * n, dtype=torch.uint8, device=device)
        for n in (scheme.code_bytes, scheme.scale_bytes)
    )
    factors = torch.empty(blocks, n_units, BLOCK * scheme.factor_bytes // 4, dtype=torch.float32, device=device)
    return Packed(scheme, rows, unit, codes, scales, factors)


def together(parts: Sequence[Packed]) -> tuple[Packed, list[Packed]]:
    """Room for several weights of the same columns, and views of it, one for each; zeros fill each one's last block."""
    first, blocks = parts[0], [len(p.codes) for p in parts]
    whole = empty(first.scheme, sum(blocks) * BLOCK, first.unit, first.n_units, first.device)
    views, at = [], 0
    for part, n in zip(parts, blocks, strict=True):
        views.append(replace(whole.blocks(at, at + n), rows=part.rows))
        at += n
    return whole, views
