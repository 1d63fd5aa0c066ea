"""What a job's monitor reckons with: sums over time, percentiles in bounded memory, numbers for people."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from itertools import pairwise

import pytest

from llama_dist.frontend import histogram
from llama_dist.frontend.histogram import LogHistogram
from llama_dist.frontend.numbers import show_duration, show_number, show_share, show_short
from llama_dist.frontend.series import Sample, Series


def test_a_series_halved_again_and_again_keeps_its_sums() -> None:
    series, rng, now, new = Series(interval=0.25, capacity=64), random.Random(5), 0.0, 0
    area = 0.0
    for _ in range(20_000):
        step, tokens, running = rng.uniform(0.01, 0.9), rng.randrange(100), rng.randrange(9)
        now, new, area = now + step, new + tokens, area + running * step
        series.add(Sample(now, 0, new, area, 0.0, 0.0))
        assert len(series.samples) <= 64
    series.add(Sample(now + 1, 0, new, area, 0.0, 0.0), last=True)
    for at_most in (1, 7, 1000):
        course = series.stretches(at_most)
        assert len(course) <= at_most + 1
        assert (course[0].start, course[-1].end) == (0, now + 1)
        assert all(a.end == b.start for a, b in pairwise(course))
        assert sum(s.new_tokens * (s.end - s.start) for s in course) == pytest.approx(new)
        assert sum(s.running * (s.end - s.start) for s in course) == pytest.approx(area)


@pytest.mark.parametrize("seed", range(4))
def test_percentiles_are_within_the_stated_error(seed: int) -> None:
    rng = random.Random(seed)
    draws: list[Callable[[], float]] = [
        lambda: rng.lognormvariate(1, 2),
        lambda: rng.uniform(3, 3.5),
        lambda: rng.choice((0.02, 40.0)),
        lambda: rng.expovariate(1000),
    ]
    values, seen = [draws[seed]() for _ in range(rng.choice((1, 10, 3000)) + seed)], LogHistogram()
    for value in values:
        seen.add(value)
    values.sort()
    for percent in (0, 1, 10, 25, 50, 90, 99, 99.9, 100):
        exact = values[max(1, math.ceil(len(values) * percent / 100)) - 1]
        assert seen.percentile(percent) == pytest.approx(exact, rel=histogram.ERROR * 1.0001)
    assert (seen.least, seen.most) == (values[0], values[-1])


def test_percentiles_of_nothing_and_of_extremes() -> None:
    seen = LogHistogram()
    assert math.isnan(seen.percentile(50))
    assert seen.bars(10) == []
    for value in (0.0, 1e-30, 1e30):
        seen.add(value)
    assert seen.percentile(1) <= histogram.LEAST * histogram.GROWTH
    assert (seen.least, seen.percentile(100)) == (0.0, 1e30)


def test_bars_hold_every_value_once() -> None:
    rng, seen = random.Random(3), LogHistogram()
    values = [rng.lognormvariate(0, 1) for _ in range(2000)]
    for value in values:
        seen.add(value)
    for at_most in (1, 7, 50, 5000):
        bars = seen.bars(at_most)
        assert len(bars) <= at_most
        assert [count for _, _, count in bars] == [sum(a <= v < b for v in values) for a, b, _ in bars]
        assert sum(count for _, _, count in bars) == 2000


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (show_number(0.01234), "0.0123"),
        (show_number(1234.5), "1,234"),
        (show_number(99.96), "100"),
        (show_number(9.996), "10.0"),
        (show_number(0), "0"),
        (show_number(math.nan), "-"),
        (show_short(999.6), "1.0k"),
        (show_short(45_300), "45k"),
        (show_share(0.004), "0.4 %"),
        (show_share(0.00001), "<0.1 %"),
        (show_duration(59.97), "1:00"),
        (show_duration(3723), "1:02:03"),
        (show_duration(176523), "2 d 01:02:03"),
    ],
)
def test_numbers_for_people(shown: str, expected: str) -> None:
    assert shown == expected
