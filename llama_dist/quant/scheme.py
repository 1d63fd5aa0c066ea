"""The schemes by which weights are packed, as data, and the bytes they take. No torch.

A weight is held as a whole number, a code. 32 neighbours along K are a group and share a scale of 8 bits, with 4-bit
codes also a zero point of 8 bits, in sixteenths of a step; a row has a float32 factor for each unit:

    8 bits: factor * scale * (code - 128), code 1 to 255     33 bytes for 32 weights
    6 bits: factor * scale * (code - 32), code 1 to 63       25 bytes
    4 bits: factor * scale * (code - zero / 16), code 0 to 15   18 bytes

Or it is a float of 8 bits, a sign, four bits of exponent and three of mantissa (OCP 8-bit Floating Point, E4M3):

    8 bits: factor * e4m3(code)                      32 bytes

Weights of 16 or 32 bits are numbers as they are, bfloat16 or float32, laid out alike, without scales and factors.

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
    """`bits` of a code, one of the `floats` or a whole number; `scale_bytes` a group of a row; `factor_bytes` a unit.

    A unit here is that of one row.
    """

    bits: int
    scale_bytes: int
    factor_bytes: int = 4
    floats: bool = False

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes of a group of one row."""
        return GROUP * self.bits // 8

    @property
    def exact(self) -> bool:
        """Whether weights stay the numbers they were."""
        return self.bits >= 16

    @property
    def kind(self) -> int:
        """What C++ knows it by (kernels/src/team.h)."""
        return -self.bits if self.floats and not self.exact else self.bits


INT8, INT6, INT4 = Scheme(8, 1), Scheme(6, 1), Scheme(4, 2)
FP8 = Scheme(8, 0, floats=True)
BFLOAT16, FLOAT32 = Scheme(16, 0, 0, floats=True), Scheme(32, 0, 0, floats=True)


@dataclass(frozen=True)
class Quantization:
    """How the weights of the layers are packed, and those of the output head, which needs more care."""

    layers: Scheme
    output: Scheme


QUANTIZATIONS: Mapping[str, Quantization] = {
    "int8": Quantization(INT8, INT8),
    "int4": Quantization(INT4, INT6),
    "fp8": Quantization(FP8, INT8),
}


def n_blocks(rows: int) -> int:
    return -(-rows // BLOCK)


def groups_of(unit: int) -> int:
    """Groups that a unit of so many columns takes."""
    return -(-unit // GROUP)


def packed_bytes(scheme: Scheme, rows: int, unit: int, n_units: int) -> int:
    """Bytes of [rows, n_units * unit] packed weights. Example: INT8, [32, 64] in one unit: 2 * 16 * (2 * 33 + 4)."""
    row = n_units * (groups_of(unit) * (scheme.code_bytes + scheme.scale_bytes) + scheme.factor_bytes)
    return n_blocks(rows) * BLOCK * row
