"""How many passes of a few rows are one call, on a CPU: few enough that an arrival does not wait for it long."""

from __future__ import annotations

from dataclasses import dataclass

FEW = 8  # rows of a pass that takes little longer than the weights are read, but on slow processors
MOST_BYTES = 3 << 29  # that are read in a call: 50 ms where memory is read at 32 GB/s, of one sequence
MOST_PASSES = 8


@dataclass(frozen=True)
class Calls:
    """What a pass reads: `weight_bytes` of weights, and `token_bytes` of each token's keys and values.

    Both are the whole model's, so that all its ranks go on for as many passes. `most` passes are a call, or fewer.
    """

    most: int = 1
    weight_bytes: int = 0
    token_bytes: int = 0

    def passes(self, rows: int, tokens: int) -> int:
        """How many passes of so many rows, whose sequences have `tokens` tokens in all; at least 1."""
        read = -(-rows // FEW) * self.weight_bytes + tokens * self.token_bytes
        return max(1, min(self.most, MOST_BYTES // max(1, read)))
