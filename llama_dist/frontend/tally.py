"""What a job's ticks add up to, in memory that does not grow with ticks or requests."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from llama_dist.engine.stats import EngineStats
from llama_dist.frontend.histogram import LogHistogram
from llama_dist.frontend.series import INTERVAL, ZERO, Sample, Series, Stretch, between

RECENT = 10.0  # seconds that "now" means in a rate

NOTHING = EngineStats(0, 0, 0, 0, 0, 0, 0, 0, 0)


@dataclass(frozen=True)
class Finished:
    """A request that has its answer. `seconds`: from being handed to the engine to its end; `ok`: no error."""

    prompt_tokens: int
    new_tokens: int
    seconds: float
    ok: bool


class Tally:
    """Sums of ticks and requests since the job's start."""

    def __init__(self) -> None:
        self.stats = NOTHING
        self.done = 0
        """Requests that have their answer, failed ones too."""
        self.failed = 0
        self.prompt_tokens = 0
        """Of the requests that have their answer and are no failures; so too `new_tokens`."""
        self.new_tokens = 0
        self.running = 0
        """Sequences in the last tick's batch."""
        self.busiest = 0
        self.fullest = 0.0
        """The largest share of KV pages held."""
        self.latency = LogHistogram()
        """Seconds of each good request."""
        self.token_rate = LogHistogram()
        """New tokens a second of each good request that has some."""
        self.series = Series()
        self._recent: deque[Sample] = deque([ZERO])
        self._seconds = self._running = self._waiting = self._kv = 0.0

    def add(self, seconds: float, stats: EngineStats, finished: Sequence[Finished]) -> None:
        """Take in a tick that ended `seconds` after the start, and the requests that ended in it."""
        for request in finished:
            self.done += 1
            if not request.ok:
                self.failed += 1
                continue
            self.prompt_tokens += request.prompt_tokens
            self.new_tokens += request.new_tokens
            self.latency.add(request.seconds)
            if request.new_tokens and request.seconds > 0:
                self.token_rate.add(request.new_tokens / request.seconds)
        self.stats, self.running = stats, stats.running
        kv = self.kv
        passed = max(0.0, seconds - self._seconds)
        self._seconds += passed
        self._running += stats.running * passed
        self._waiting += stats.waiting * passed
        self._kv += kv * passed
        self.busiest = max(self.busiest, stats.running)
        if kv > self.fullest:
            self.fullest = kv
        if self._seconds - self._recent[-1].seconds >= INTERVAL:
            self._sample()

    def _sample(self) -> None:
        now, recent = self.now, self._recent
        self.series.add(now)
        recent.append(now)
        while len(recent) > 2 and recent[1].seconds <= now.seconds - RECENT:
            recent.popleft()

    @property
    def now(self) -> Sample:
        """The sums up to the last tick."""
        counts = self.stats.prompt_tokens, self.stats.new_tokens
        return Sample(self._seconds, *counts, self._running, self._waiting, self._kv)

    @property
    def kv(self) -> float:
        """Share of KV pages held now, 0 to 1."""
        return self.stats.pages_held / self.stats.pages_total if self.stats.pages_total else 0.0

    @property
    def lately(self) -> Stretch:
        """The means over the last RECENT seconds."""
        return between(self._recent[0], self.now)

    @property
    def overall(self) -> Stretch:
        return between(ZERO, self.now)

    def end(self) -> None:
        """No more ticks: the series reaches up to the last."""
        self.series.add(self.now, last=True)
