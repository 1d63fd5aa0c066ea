"""How cost grows with the work. Pure functions of what was timed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

STEEPEST = 1.1  # seconds may grow by this power of the work, for what noise there is


@dataclass(frozen=True)
class Point:
    """`x`: the size. `work` in any unit, the same along a series. `rate`: what is reported, a second."""

    x: float
    work: float
    seconds: float
    rate: float


@dataclass(frozen=True)
class Series:
    """`name`: what was timed; `axis`: what grew; `unit`: of the rate; `note`: why it ends where it does."""

    name: str
    axis: str
    unit: str
    points: tuple[Point, ...]
    note: str = ""

    @property
    def exponent(self) -> float | None:
        return exponent([point.work for point in self.points], [point.seconds for point in self.points])

    @property
    def steep(self) -> bool:
        """Whether its cost grows faster than its work."""
        return self.exponent is not None and self.exponent > STEEPEST

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "axis": self.axis,
            "unit": self.unit,
            "points": [dict(vars(point)) for point in self.points],
            "exponent": self.exponent,
            "steep": self.steep,
            "note": self.note,
        }


def medians(rounds: Sequence[Series]) -> Series:
    """Rounds of a series as one: each size by the median of its seconds; the rest is the longest round's."""
    found: dict[float, list[Point]] = {}
    for series in rounds:
        for point in series.points:
            found.setdefault(point.x, []).append(point)
    points = []
    for same in found.values():
        seconds = statistics.median(point.seconds for point in same)
        points.append(replace(same[0], seconds=seconds, rate=same[0].rate * same[0].seconds / seconds))
    return replace(max(rounds, key=lambda series: len(series.points)), points=tuple(points))


def exponent(work: Sequence[float], seconds: Sequence[float]) -> float | None:
    """The power of the work that the seconds grow by, fitted over the larger half of the sizes; None below three.

    The smaller half may be what a start costs, beside which a steep rise does not show.
    """
    pairs = sorted(zip(work, seconds, strict=True))
    if len(pairs) < 3:
        return None
    pairs = pairs[min(len(pairs) // 2, len(pairs) - 3) :]
    xs, ys = [math.log(w) for w, _ in pairs], [math.log(s) for _, s in pairs]
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((a - x) ** 2 for a in xs)
    if spread == 0:
        return None
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / spread
