"""How a job went over time, in bounded memory: running sums, of which any subset tells the exact means between."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

INTERVAL = 0.25  # seconds between two samples at first
CAPACITY = 1024  # samples; when they are reached every other one goes and the interval doubles


class Sample(NamedTuple):
    """Sums since the job's start, at `seconds`. The last three are integrals over time, such as sequence-seconds."""

    seconds: float
    prompt_tokens: int
    new_tokens: int
    running: float
    waiting: float
    kv: float


class Stretch(NamedTuple):
    """Means between two samples: tokens a second, sequences, and the share of KV pages held (0 to 1)."""

    start: float
    end: float
    prompt_tokens: float
    new_tokens: float
    running: float
    waiting: float
    kv: float


ZERO = Sample(0.0, 0, 0, 0.0, 0.0, 0.0)


def between(a: Sample, b: Sample) -> Stretch:
    """The means from `a` to the later `b`; zeros where no time has passed."""
    seconds = b.seconds - a.seconds
    means = [(y - x) / seconds if seconds > 0 else 0.0 for x, y in zip(a[1:], b[1:], strict=True)]
    return Stretch(a.seconds, b.seconds, *means)


class Series:
    """Samples at least `interval` seconds apart, which grows as the job gets longer."""

    def __init__(self, interval: float = INTERVAL, capacity: int = CAPACITY) -> None:
        self.interval = interval
        self.capacity = capacity
        self.samples: list[Sample] = [ZERO]

    def add(self, sample: Sample, last: bool = False) -> None:
        """Keep the sample if it is time for one, or if it is the job's last."""
        since = sample.seconds - self.samples[-1].seconds
        if since >= self.interval or (last and since > 0):
            self.samples.append(sample)
        if len(self.samples) > self.capacity:
            self.samples = self.samples[::2]
            self.interval *= 2

    def stretches(self, at_most: int) -> list[Stretch]:
        """Means over equal numbers of samples, in at most so many stretches without a gap between them."""
        step = max(1, -(-(len(self.samples) - 1) // at_most))
        kept: Sequence[Sample] = self.samples[::step]
        if kept[-1] is not self.samples[-1]:
            kept = [*kept, self.samples[-1]]
            if len(kept) > 2 and kept[-1].seconds - kept[-2].seconds < (kept[-2].seconds - kept[-3].seconds) / 2:
                kept = [*kept[:-2], kept[-1]]  # a sliver's mean would be mostly chance
        return [between(a, b) for a, b in pairwise(kept)]
