"""The schemes by which weights are packed, as data, and the bytes they take. No torch.

A weight is held as a whole number, a code. 32 neighbours along K are a group and share a scale of 8 bits, with 4-bit
codes also a zero point of 8 bits, in sixteenths of a step; a row has a float32 factor for each unit:

    int8: factor * scale * code, code -127 to 127            33 bytes for 32 weights
    int4: factor * scale * (code - zero / 16), code 0 to 15  18 bytes for 32 weights

Groups do not straddle units: a unit is filled up with zeros to whole groups. So the numbers of a unit are the same on
any number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

GROUP = 32  # weights along K that share a scale
BLOCK = 16  # rows that lie together, so that one load takes a part of each


@dataclass(frozen=True)
class Scheme:
    """`bits` of a code; `scale_bytes` a group of one row."""

    name: str
    bits: int
    scale_bytes: int

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes of a group of one row."""
        return GROUP * self.bits // 8


SCHEMES: Mapping[str, Scheme] = {s.name: s for s in (Scheme("int8", 8, 1), Scheme("int4", 4, 2))}


def n_blocks(rows: int) -> int:
    return -(-rows // BLOCK)


def groups_of(unit: int) -> int:
    """Groups that a unit of so many columns takes."""
    return -(-unit // GROUP)


def packed_bytes(scheme: Scheme, rows: int, unit: int, n_units: int) -> int:
    """Bytes of [rows, n_units * unit] packed weights. Example: int8, [32, 64] in one unit: 2 * 16 * (2 * 33 + 4)."""
    row = n_units * (groups_of(unit) * (scheme.code_bytes + scheme.scale_bytes) + 4)
    return n_blocks(rows) * BLOCK * row
