"""The binary tree over units in which sums are taken, whoever holds which unit. No torch.

Example: 9 units on 2 ranks. Rank 0 holds 0 to 4, whose largest whole subtrees are 0-3 and 4; rank 1 holds 5 to 8, with
5, 6-7 and 8. All ranks then add ((0-3) + ((4 + 5) + (6-7))) + 8, the sum that one rank takes alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

Node = tuple[int, int]
"""(level, index at that level): unit u is (0, u), units 2 i and 2 i + 1 are (1, i)."""


T = TypeVar("T", bound=Any)  # what can be added


def roots(first: int, n: int) -> list[Node]:
    """The largest subtrees that units first ... first + n - 1 fill, in order."""
    found: list[Node] = []
    at, stop = first, first + n
    while at < stop:
        level = 0
        while at % 2 ** (level + 1) == 0 and at + 2 ** (level + 1) <= stop:
            level += 1
        found.append((level, at >> level))
        at += 2**level
    return found


def merge(nodes: Sequence[Node], values: Sequence[T]) -> tuple[list[Node], list[T]]:
    """Add neighbours whose parent is whole, until there are none; both in the order of units."""
    to: list[Node] = []
    sums: list[T] = []
    for (level, index), value in zip(nodes, values, strict=True):
        while to and index % 2 == 1 and to[-1] == (level, index - 1):
            to.pop()
            value = sums.pop() + value
            level, index = level + 1, index // 2
        to.append((level, index))
        sums.append(value)
    return to, sums


def total(nodes: Sequence[Node], values: Sequence[T]) -> T:
    """The sum over all units, from 0 on; a node without a right sibling stands for its parent."""
    to, sums = merge(nodes, values)
    while len(to) > 1:
        (low, index), (high, _) = to[-1], to[-2]
        to[-1] = (high, index >> (high - low))
        to, sums = merge(to, sums)
    return sums[0]
