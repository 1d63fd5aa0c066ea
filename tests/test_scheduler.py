"""The scheduler and the page table, fuzzed in plain Python: whatever comes in, everything adds up and everyone ends."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass

import pytest

from llama_dist.engine.pages import PageTable, page_keys
from llama_dist.engine.scheduler import Scheduler, Sequence, Work
from llama_dist.request import Request, SamplingParams


@dataclass
class Limits:
    page_size: int
    n_pages: int
    max_batch_size: int
    max_batch_tokens: int
    max_seq_len: int
    prefix_caching: bool


def some_limits(rng: random.Random) -> Limits:
    page_size, max_seq_len, batch = rng.choice([1, 2, 4, 8]), rng.randint(2, 40), rng.randint(1, 6)
    least = -(-max_seq_len // page_size)
    return Limits(
        page_size,
        least + rng.choice([0, 1, 5, 40]),
        batch,
        batch + rng.choice([0, 1, 7, 64]),
        max_seq_len,
        rng.random() < 0.7,
    )


def make(limits: Limits) -> Scheduler:
    table = PageTable(limits.n_pages, limits.page_size)
    return Scheduler(table, limits.max_batch_size, limits.max_batch_tokens, limits.max_seq_len, limits.prefix_caching)


class World:
    """Requests, and a model that is a pure function of the tokens it is shown: what a page holds can be checked."""

    def __init__(self, limits: Limits) -> None:
        self.limits, self.scheduler = limits, make(limits)
        self.memory: dict[tuple[int, int], tuple[int, ...]] = {}  # (page, place): all tokens up to there
        self.started: list[int] = []
        self.ended: dict[str, list[int]] = {}
        self.foreseen: list[Work] = []
        self.found: deque[list[tuple[Work, int]]] = deque()
        self.in_row = self.cut_short = 0  # passes of calls of several, and calls that ended early
        self.right = self.partly = 0  # how often all of what was foreseen was of use, and how often some of it

    def known(self) -> list[Work]:
        """The next of several passes of one call that is of use; the engine's own rule."""
        while self.found:
            rows = self.found.popleft()
            if known := [w for w, token in rows if w.start == w.sequence.cached and w.sequence.tokens[-1] == token]:
                return known
        return []

    def go_on(self, batch: list[Work], most: int) -> None:
        """As the engine does before a call of several passes: all write where they are to be."""
        passes, tokens = self.scheduler.go_on(batch, most), [list(w.sequence.tokens) for w in batch]
        for i in range(passes if passes > 1 else 0):
            self.in_row += 1
            works = [Work(w.sequence, w.start + i, 1) for w in batch]
            self.found.append([(w, ids[-1]) for w, ids in zip(works, tokens, strict=True)])
            for work, ids in zip(works, tokens, strict=True):
                page, place = divmod(work.start, self.limits.page_size)
                self.memory[work.sequence.pages[page], place] = tuple(ids)
                ids.append(next_token(ids))
            if any(stops(ids) for ids in tokens):
                self.scheduler.went_on(i + 1)
                self.cut_short += i + 1 < passes
                break
            assert i == passes - 1 or all(len(ids) < w.sequence.limit for w, ids in zip(works, tokens, strict=True))

    def tick(self, most: int = 1) -> list[Work]:
        if known := self.known():
            return self.do(known, ahead=True)
        # as the engine does: what was begun ahead is taken first, by itself
        batch = [work for work in self.foreseen if work.start == work.sequence.cached]
        self.right += bool(batch) and batch == self.foreseen
        self.partly += bool(batch) and batch != self.foreseen
        if not batch:
            batch = self.scheduler.next_batch()
            self.go_on(batch, most)
            batch = self.known() or batch
        return self.do(batch, ahead=bool(self.found))

    def do(self, batch: list[Work], ahead: bool) -> list[Work]:
        self.scheduler.check()
        tokens = sum(w.length for w in batch)
        assert tokens <= self.limits.max_batch_tokens and len(batch) <= self.limits.max_batch_size
        assert batch or self.scheduler.idle, "requests wait and nothing is done"
        for work in batch:
            self.compute(work)
        drawing = [work for work in batch if work.last and len(work.sequence.tokens) < work.sequence.limit]
        for work in batch:
            if work not in drawing:
                self.finish_or_go_on(work)
        self.foreseen = [] if ahead else self.scheduler.foresee(drawing)
        self.scheduler.check()
        for work in self.foreseen:  # computed ahead, from what may turn out to be another token
            page, place = divmod(work.start, self.limits.page_size)
            self.memory[work.sequence.pages[page], place] = ()
        for work in drawing:
            self.finish_or_go_on(work)
        self.scheduler.check()
        return batch

    def compute(self, work: Work) -> None:
        s, size = work.sequence, self.limits.page_size
        if s.arrival not in self.started:
            self.started.append(s.arrival)
        for i in range(work.start, work.start + work.length):
            self.memory[s.pages[i // size], i % size] = tuple(s.tokens[: i + 1])
        for i in range(work.start + work.length):  # what it reads is its own, also in pages it shares
            assert self.memory[s.pages[i // size], i % size] == tuple(s.tokens[: i + 1])

    def finish_or_go_on(self, work: Work) -> None:
        s = work.sequence
        done = work.last and len(s.tokens) >= s.limit
        token = next_token(s.tokens) if work.last and not done else None
        self.scheduler.commit(work, token)
        if done or (token is not None and (len(s.tokens) >= s.limit or stops(s.tokens))):
            self.ended[s.request.id] = list(s.tokens)
            self.scheduler.finish(s)


def next_token(tokens: list[int]) -> int:
    return sum((i + 1) * t for i, t in enumerate(tokens)) % 3


def stops(tokens: list[int]) -> bool:
    return sum(tokens) % 6 == 5


def request(rng: random.Random, name: str, limits: Limits) -> Request:
    # few different tokens and common beginnings: many shared pages
    length = rng.randint(1, limits.max_seq_len)
    prompt = [0] * rng.randint(0, length) + [rng.randrange(2) for _ in range(length)]
    params = SamplingParams(max_tokens=rng.choice([None, 0, 1, rng.randint(0, 30)]), prompt_logprobs=rng.random() < 0.1)
    return Request(name, tuple(prompt[:length]), params)


def expected(request: Request, limits: Limits) -> list[int]:
    tokens, most = list(request.prompt), request.params.max_tokens
    end = limits.max_seq_len if most is None else min(limits.max_seq_len, len(tokens) + most)
    while len(tokens) < end:
        tokens.append(next_token(tokens))
        if stops(tokens):
            break
    return tokens


def trace(seed: int) -> tuple[World, int]:
    rng = random.Random(seed)
    limits = some_limits(rng)
    world, most = World(limits), rng.choice([1, 1, 3, 8])
    requests = [request(rng, f"r{i}", limits) for i in range(rng.randint(1, 12))]
    cancelled: set[str] = set()
    todo, ticks = list(requests), 0
    while todo or not world.scheduler.idle:
        while todo and rng.random() < 0.5:
            world.scheduler.add(todo.pop(0))
        if rng.random() < 0.03:
            victim = rng.choice(requests).id
            cancelled |= {s.request.id for s in world.scheduler.cancel([victim])}
        if not world.scheduler.idle:
            world.tick(most)
        ticks += 1
        assert ticks < 20_000, "does not end"
    assert world.scheduler.table.n_held == 0, "pages were not given back"
    for r in requests:
        assert r.id in world.ended or r.id in cancelled, f"{r.id} was never answered"
        if r.id in world.ended:
            assert world.ended[r.id] == expected(r, limits), "another text than alone"
    assert world.started == sorted(world.started), "someone overtook"
    return world, ticks


@pytest.mark.parametrize("block", range(10))
def test_random_traces(block: int) -> None:
    preempted = right = partly = in_row = cut_short = 0
    for seed in range(block * 1000, block * 1000 + 1000):
        world, _ = trace(seed)
        preempted += world.scheduler.n_preempted
        right, partly = right + world.right, partly + world.partly
        in_row, cut_short = in_row + world.in_row, cut_short + world.cut_short
    assert preempted > 100, "the traces never ran out of pages"
    assert right > 1000 and partly > 30, f"{right} ticks were foreseen, {partly} in part"
    assert in_row > 1000 and cut_short > 10, f"{in_row} passes were one call, {cut_short} of these ended early"


def test_two_ranks_decide_alike() -> None:
    def batches(seed: int) -> list[list[tuple[int, int, int, tuple[int, ...]]]]:
        rng = random.Random(seed)
        limits = some_limits(rng)
        world = World(limits)
        for i in range(8):
            world.scheduler.add(request(rng, f"r{i}", limits))
        out = []
        while not world.scheduler.idle:
            out.append([(w.sequence.arrival, w.start, w.length, tuple(w.sequence.pages)) for w in world.tick(4)])
        return out

    for seed in range(50):
        assert batches(seed) == batches(seed)


def lone(n_pages: int = 8, page_size: int = 4, **more: int) -> Scheduler:
    return make(Limits(page_size, n_pages, more.get("batch", 4), more.get("tokens", 64), 32, True))


def run_one(scheduler: Scheduler, prompt: list[int], new: int) -> Sequence:
    s = scheduler.add(Request(f"{prompt}", tuple(prompt), SamplingParams(max_tokens=new)))
    while s.limit > len(s.tokens):
        for work in scheduler.next_batch():
            scheduler.commit(work, 7 if work.last else None)
    scheduler.finish(s)
    return s


def test_a_second_prompt_finds_the_first_ones_pages() -> None:
    scheduler = lone()
    first = run_one(scheduler, list(range(10)), 2)
    assert first.hit == 0
    assert run_one(scheduler, list(range(10)), 2).hit == 8  # two pages of four; the last two tokens are its own
    assert run_one(scheduler, list(range(8)), 2).hit == 4  # of a prompt of whole pages the newest token is computed
    assert run_one(scheduler, [9, *range(1, 10)], 2).hit == 0


def test_pages_of_the_answer_are_found_too() -> None:
    scheduler = lone()
    first = run_one(scheduler, [1, 2, 3], 7)
    assert run_one(scheduler, [*first.tokens, 5, 6], 1).hit == 8


def test_the_newest_pays_when_pages_run_out() -> None:
    scheduler = lone(n_pages=8, batch=3)
    old, new = (scheduler.add(Request(n, tuple([i] * 12), SamplingParams(max_tokens=20))) for i, n in enumerate("ab"))
    while new.times_preempted == 0:
        for work in scheduler.next_batch():
            scheduler.commit(work, 1 if work.last else None)
        scheduler.check()
    assert old.times_preempted == 0 and scheduler.waiting[0] is new


def test_an_integrity_error_shows_what_does_not_add_up() -> None:
    table = PageTable(4, 2)
    page = table.take()
    with pytest.raises(AssertionError, match="held"):
        table.check([])
    table.check([[page]])
    table._blank.append(page)
    with pytest.raises(AssertionError, match=r"1 held \+ 4 blank \+ 0 cached = 5, not 4"):
        table.check([[page]])


def test_a_planted_fault_is_found() -> None:
    class Leaky(PageTable):
        def release(self, pages: list[int]) -> None:  # type: ignore[override]
            super().release(pages[1:])

    scheduler = lone()
    scheduler.table = Leaky(8, 4)
    run_one(scheduler, [1, 2, 3, 4, 5], 2)
    with pytest.raises(AssertionError):
        scheduler.check()


def test_keys_tell_pages_apart_by_all_that_came_before() -> None:
    assert page_keys([1, 2, 3, 4], 2)[1] != page_keys([9, 2, 3, 4], 2)[1]
    assert page_keys([1, 2, 3, 4, 5], 2) == page_keys([1, 2, 3, 4], 2)


def test_pages_of_passes_that_were_not_done_are_given_back() -> None:
    """Also where they are not, nobody's surplus pays for what another lacks."""
    scheduler = Scheduler(PageTable(3, 16), 2, 64, 48, False)
    for name, length in (("a", 10), ("b", 9)):
        scheduler.add(Request(name, (1,) * length, SamplingParams()))
    for work in scheduler.next_batch():
        scheduler.commit(work, 1)
    batch, (a, b) = scheduler.next_batch(), scheduler.running
    assert scheduler.go_on(batch, 8) == 7  # for the eighth each would need a page, and there is one
    assert (len(a.pages), len(b.pages), scheduler.table.n_free) == (2, 1, 0)
    assert scheduler.go_on(batch, 8) == 7 and scheduler.go_on(batch, 2) == 2
    assert (len(a.pages), len(b.pages)) == (2, 1)
    scheduler.went_on(2)
    assert (len(a.pages), len(b.pages), scheduler.table.n_free) == (1, 1, 1)
    scheduler.check()
