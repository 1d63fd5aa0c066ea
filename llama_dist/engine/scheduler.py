"""Which tokens are computed next. No torch, no clock, no sets: every rank of a replica decides alike.

First come, first served. Each tick, running sequences that only need their newest token computed go first; what is left
of the tick's token budget goes to prompts still being read, oldest first, then to waiting requests. When pages run out
the newest sequence gives its pages up and waits, ahead of all that came after it, to be computed again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from llama_dist.engine.pages import ROOT, Key, PageTable, page_key, page_keys
from llama_dist.request import Request


@dataclass(eq=False)
class Sequence:
    """A request on its way: its tokens so far, prompt first, and how many of them have keys and values in its pages."""

    request: Request
    arrival: int
    limit: int
    tokens: list[int]
    shareable: bool = True
    pages: list[int] = field(default_factory=list)
    cached: int = 0
    keys: list[Key] = field(default_factory=list)
    prospect: list[Key] | None = None
    """While it waits: the keys of its full pages, which others may hold already."""
    hit: int | None = None
    """Prompt tokens found computed when it was first admitted."""
    times_preempted: int = 0

    @property
    def missing(self) -> int:
        """Tokens to compute before the next one can be drawn."""
        return len(self.tokens) - self.cached

    @property
    def prompt_len(self) -> int:
        return len(self.request.prompt)


@dataclass(frozen=True)
class Work:
    """Compute tokens [start, start + length) of a sequence; `last`: they reach its newest token."""

    sequence: Sequence
    start: int
    length: int

    @property
    def last(self) -> bool:
        return self.start + self.length == len(self.sequence.tokens)


class Scheduler:
    """The queue, the running sequences and their pages."""

    def __init__(
        self, table: PageTable, max_batch_size: int, max_batch_tokens: int, max_seq_len: int, prefix_caching: bool
    ) -> None:
        assert max_batch_tokens >= max_batch_size, f"{max_batch_tokens} tokens a tick for {max_batch_size} sequences"
        assert table.n_pages >= table.pages_for(max_seq_len), f"{table.n_pages} pages hold less than one sequence"
        self.table = table
        self.max_batch_size, self.max_batch_tokens, self.max_seq_len = max_batch_size, max_batch_tokens, max_seq_len
        self.prefix_caching = prefix_caching
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # by arrival
        self.n_preempted = 0
        self._arrivals = 0

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    def add(self, request: Request) -> Sequence:
        """Queue a request that has been validated."""
        params = request.params
        limit = self.max_seq_len
        if params.max_tokens is not None:
            limit = min(limit, len(request.prompt) + params.max_tokens)
        # A prompt whose every position is scored must be computed whole, so it takes no pages from others.
        shareable = self.prefix_caching and not params.scores_prompt
        sequence = Sequence(request, self._arrivals, limit, list(request.prompt), shareable)
        self._arrivals += 1
        self.waiting.append(sequence)
        return sequence

    def cancel(self, ids: Iterable[str]) -> list[Sequence]:
        """Drop queued and running requests by id; those found."""
        wanted = frozenset(ids)
        gone = [s for s in [*self.running, *self.waiting] if s.request.id in wanted]
        for sequence in gone:
            self.finish(sequence)
        return gone

    def finish(self, sequence: Sequence) -> None:
        """A sequence has ended: its pages are free at once."""
        self._release(sequence)
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)

    def next_batch(self) -> list[Work]:
        """The tick's work, in order of arrival; empty only when idle."""
        budget = self.max_batch_tokens
        sizes: dict[int, int] = {}  # by arrival
        for sequence in list(self.running):  # newest tokens first, then prompts still being read
            if sequence.missing == 1 and self._grow(sequence, 1):
                sizes[sequence.arrival] = 1
                budget -= 1
        for sequence in list(self.running):
            if sequence.missing > 1 and budget > 0 and sequence in self.running:
                length = min(sequence.missing, budget)
                if self._grow(sequence, length):
                    sizes[sequence.arrival] = length
                    budget -= length
        while self.waiting and budget > 0 and self._admits(self.waiting[0]):
            sequence = self.waiting.popleft()
            self._admit(sequence)
            self.running.append(sequence)
            self.running.sort(key=lambda s: s.arrival)
            length = min(sequence.missing, budget)
            grown = self._grow(sequence, length)
            assert grown and sequence in self.running, "an admitted sequence found no pages"
            sizes[sequence.arrival] = length
            budget -= length
        # a sequence that was given work may have been preempted for an older one since
        return [Work(s, s.cached, sizes[s.arrival]) for s in self.running if s.arrival in sizes]

    def foresee(self, drawing: list[Work]) -> list[Work]:
        """The next tick's work, if no answer ends before its limit with the tokens that are being drawn after these.

        One token of each, not known yet, for which pages are taken here. Empty where the next tick is to do more.
        """
        going = [w.sequence for w in drawing if len(w.sequence.tokens) + 1 < w.sequence.limit]
        if [w.sequence for w in drawing] != self.running:
            return []
        if self.waiting and (len(going) < len(drawing) or self._admits(self.waiting[0])):
            return []
        needed = [max(0, self.table.pages_for(len(s.tokens) + 1) - len(s.pages)) for s in going]
        if sum(needed) > self.table.n_free:
            return []
        for sequence, n in zip(going, needed, strict=True):
            sequence.pages += [self.table.take() for _ in range(n)]
        return [Work(s, len(s.tokens), 1) for s in going]

    def go_on(self, batch: list[Work], most: int) -> int:
        """For how many passes, `most` or fewer, all that runs goes on by a token each while no answer is ended.

        None reaches its limit before the last of them, none who waits has a place, and pages for all are taken here.
        """
        if [work.sequence for work in batch] != self.running or any(w.length > 1 or not w.last for w in batch):
            return 1
        passes = min(most, *(s.limit - len(s.tokens) for s in self.running))
        if passes <= 1 or (self.waiting and self._admits(self.waiting[0])):
            return 1
        while sum(needed := self._needed(passes)) > self.table.n_free:
            passes -= 1
        for sequence, n in zip(self.running, needed, strict=True):
            sequence.pages += [self.table.take() for _ in range(n)]
        return passes

    def went_on(self, passes: int) -> None:
        """So many passes were done of those that `go_on` told: pages for the others are given back."""
        for sequence in self.running:
            held = self.table.pages_for(len(sequence.tokens) + passes - 1)
            self.table.release(sequence.pages[held:])
            del sequence.pages[held:]

    def commit(self, work: Work, token: int | None) -> None:
        """The work is computed; `token` was drawn after it, where it reached the newest one and the answer goes on."""
        sequence = work.sequence
        assert sequence.cached == work.start, f"computed from {work.start}, cached {sequence.cached}"
        sequence.cached += work.length
        if sequence.shareable:
            self._name_pages(sequence)
        if token is not None:
            assert work.last, "a token was drawn before the newest one was computed"
            sequence.tokens.append(token)

    def check(self) -> None:
        """Everything adds up: pages, order, bounds. For tests and fuzzing; the cost grows with the number of pages."""
        self.table.check([s.pages for s in self.running])
        assert all(not s.pages and s.cached == 0 for s in self.waiting), "a waiting sequence holds pages"
        arrivals = [s.arrival for s in self.running]
        assert arrivals == sorted(set(arrivals)), f"running out of order: {arrivals}"
        queue = [s.arrival for s in self.waiting]
        assert queue == sorted(set(queue)), f"waiting out of order: {queue}"
        assert not arrivals or not queue or arrivals[-1] < queue[0], f"{arrivals} run while {queue} wait"
        assert len(self.running) <= self.max_batch_size, f"{len(self.running)} run, {self.max_batch_size} may"
        for s in self.running:
            assert s.cached <= len(s.tokens) <= self.max_seq_len, f"{s.cached} cached of {len(s.tokens)} tokens"
            assert self.table.pages_for(s.cached) <= len(s.pages), f"{s.cached} tokens in {len(s.pages)} pages"

    def _shared(self, sequence: Sequence) -> list[int]:
        """Pages that a waiting sequence would share."""
        if not sequence.shareable:
            return []
        # The newest token is always computed: its hidden state is what the next is drawn from.
        if sequence.prospect is None:
            sequence.prospect = page_keys(sequence.tokens[:-1], self.table.page_size)
        return self.table.match(sequence.prospect)

    def _admits(self, sequence: Sequence) -> bool:
        """Whether it has a place, and all it holds and needs can be had without preempting anyone."""
        if len(self.running) >= self.max_batch_size:
            return False
        shared = self._shared(sequence)
        needed = self.table.pages_for(len(sequence.tokens)) - len(shared)
        return needed <= self.table.n_free - self.table.n_matched_free(shared)

    def _admit(self, sequence: Sequence) -> None:
        """Take a waiting sequence's shared pages."""
        shared = self._shared(sequence)
        sequence.keys = (sequence.prospect or [])[: len(shared)]
        sequence.prospect = None
        self.table.share(shared)
        sequence.pages = list(shared)
        sequence.cached = len(shared) * self.table.page_size
        if sequence.hit is None:
            sequence.hit = sequence.cached

    def _needed(self, passes: int) -> list[int]:
        """Pages that each running sequence lacks for so many passes of one token; for the first none lacks any."""
        return [max(0, self.table.pages_for(len(s.tokens) + passes - 1) - len(s.pages)) for s in self.running]

    def _grow(self, sequence: Sequence, length: int) -> bool:
        """Give a running sequence pages for its next `length` tokens, the newest ones paying for it. False: it paid."""
        needed = self.table.pages_for(sequence.cached + length) - len(sequence.pages)
        while needed > self.table.n_free:
            newest = self.running[-1]
            self._preempt(newest)
            if newest is sequence:
                return False
        sequence.pages += [self.table.take() for _ in range(needed)]
        return sequence in self.running

    def _preempt(self, sequence: Sequence) -> None:
        self._release(sequence)
        self.running.remove(sequence)
        self.waiting.appendleft(sequence)
        sequence.times_preempted += 1
        self.n_preempted += 1

    def _release(self, sequence: Sequence) -> None:
        self.table.release(sequence.pages)
        sequence.pages, sequence.keys, sequence.cached = [], [], 0

    def _name_pages(self, sequence: Sequence) -> None:
        size = self.table.page_size
        for i in range(len(sequence.keys), sequence.cached // size):
            parent = sequence.keys[-1] if sequence.keys else ROOT
            sequence.keys.append(page_key(parent, sequence.tokens[i * size : (i + 1) * size]))
            self.table.name(sequence.pages[i], sequence.keys[-1])
