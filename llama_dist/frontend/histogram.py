"""Percentiles of any number of positive values in a fixed amount of memory."""

from __future__ import annotations

import math
from itertools import pairwise

GROWTH = 1.02
"""Each bucket reaches 2 % further than the one below."""
ERROR = math.sqrt(GROWTH) - 1
"""A value is known to within 1 % of itself: a bucket's geometric middle against its edges."""
LEAST, MOST = 1e-6, 1e9
"""Values beyond count as these, so there are at most 1,745 buckets."""

_PER_LOG = 1 / math.log(GROWTH)


class LogHistogram:
    """Counts in buckets of equal width on a logarithmic scale. `least` and `most` are exact."""

    def __init__(self) -> None:
        self.count = 0
        self.least = math.inf
        self.most = -math.inf
        self._buckets: dict[int, int] = {}

    def add(self, value: float) -> None:
        """Count a value, 0 or more."""
        self.count += 1
        if value < self.least:
            self.least = value
        if value > self.most:
            self.most = value
        if not LEAST <= value <= MOST:
            value = LEAST if value < LEAST else MOST
        bucket = math.floor(math.log(value) * _PER_LOG)
        self._buckets[bucket] = self._buckets.get(bucket, 0) + 1

    def percentile(self, percent: float) -> float:
        """The smallest value that `percent` % of all do not exceed, within ERROR of itself; NaN where there is none.

        Of 1, 2, 3 and 4 the 50th is 2 and the 51st is 3.
        """
        if self.count == 0:
            return math.nan
        rank = max(1, math.ceil(self.count * percent / 100))
        if rank == self.count:
            return self.most
        seen = 0
        for bucket in sorted(self._buckets):
            seen += self._buckets[bucket]
            if seen >= rank:
                return min(max(math.exp((bucket + 0.5) / _PER_LOG), self.least), self.most)
        raise AssertionError(f"{self.count} values but {seen} in buckets")

    def bars(self, at_most: int) -> list[tuple[float, float, int]]:
        """The same as (from, to, count) in at most so many bars, neighbours joined alike; they cover the whole span."""
        if not self._buckets:
            return []
        low, high = min(self._buckets), max(self._buckets)
        width = math.ceil((high - low + 1) / at_most)
        counts = [0] * math.ceil((high - low + 1) / width)
        for bucket, count in self._buckets.items():
            counts[(bucket - low) // width] += count
        edges = [math.exp((low + i * width) / _PER_LOG) for i in range(len(counts) + 1)]
        return [(a, b, n) for (a, b), n in zip(pairwise(edges), counts, strict=True)]
