"""What test_passes.py runs on every rank: several passes of a few rows in one call."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch

from llama_dist.engine import sampler
from llama_dist.engine.engine import Engine
from llama_dist.engine.foresight import Found
from llama_dist.model.cache import PAGE_SIZE, Span, lay
from llama_dist.request import Request, SamplingParams
from tests.engine_jobs import Prompts, Row, Run, answer_all, engine_for
from tests.foresight_jobs import count
from tests.jobs import Ask, open_for


def answers(folder: str, prompts: Prompts, run: Run, most: int) -> tuple[list[Row], dict[str, int], int]:
    """Rows, of what use the passes of a call were, and the ticks that it took."""
    engine = engine_for(folder, run)
    engine.most_passes, counts, sample = most, count(Found), sampler.sample

    def left(*args: Any) -> int:
        counts["left"] += 1
        return sample(*args)

    sampler.sample = left
    rows = answer_all(engine, prompts)
    assert engine.ahead == 0 and engine.scheduler.table.n_held == 0
    return rows, dict(counts), engine.ticks


def cancelled(folder: str, most: int, after: int) -> tuple[list[tuple[str, tuple[int, ...]]], int, int]:
    """Three answers, the second dropped after some ticks when one more comes; how many passes were ahead then."""
    engine = engine_for(folder, Run())
    engine.most_passes = most
    greedy = SamplingParams(max_tokens=14, temperature=0, ignore_eos=True)
    for i in range(3):
        engine.add(Request(f"{i}", (30 + i, 40, 41 + i), greedy))
    done = {}
    for _ in range(after):
        engine.step()
    ahead = engine.ahead
    done.update((c.request_id, c.token_ids) for c in engine.cancel("1"))
    engine.add(Request("late", (90, 91), greedy))
    while not engine.idle:
        engine.scheduler.check()
        done.update((c.request_id, c.token_ids) for c in engine.step())
    return sorted(done.items()), ahead, engine.scheduler.table.n_held


def one_by_one_and_in_row(folder: str, n: int, passes: int) -> dict[str, Any]:
    """The tokens and the cache that passes leave, one by one and in one call, from positions where pages end."""
    session = open_for(Ask(folder, [], 0))
    engine, world = session.engine, session.world
    model, starts = engine.model, [PAGE_SIZE * i + 13 - i for i in range(n)]
    pages = [[8 * i + j for j in (5, 2, 7, 0)] for i in range(n)]
    first = [40 + i for i in range(n)]
    found: dict[str, Any] = {}
    for how in ("one by one", "in a row"):
        for layer in engine.cache.layers:
            layer.copy_(torch.linspace(-1, 1, layer.numel()).view(layer.shape))
        tokens, told = first, []
        if how == "in a row":
            told = model.run_on(_laid(pages, starts, first, world.device, passes - 1), engine.cache, passes, [])
        for i in range(passes if how == "one by one" else 0):
            laid = _laid(pages, [start + i for start in starts], tokens, world.device)
            greatest = model.greatest(model(laid, engine.cache, True))
            assert greatest is not None
            tokens = greatest
            told.append(tokens)
        found[how] = told, [_digest(layer) for layer in engine.cache.layers]
    stop = found["in a row"][0][1][0]
    ended = model.run_on(_laid(pages, starts, first, world.device, passes - 1), engine.cache, passes, [stop])
    try:
        model.run_on(_laid(pages, [PAGE_SIZE - 2] * n, first, world.device), engine.cache, passes, [])
        refused = ""
    except IndexError as err:
        refused = str(err)
    return {**found, "ended": ended, "stop": stop, "refused": refused, "served": served(engine)}


def served(engine: Engine) -> list[bool]:
    """Whether the model does several passes of so many rows."""
    return [engine.model.goes_on(n, engine.cache) for n in (1, 16, 2048, 2049)]


def _digest(layer: torch.Tensor) -> str:
    return hashlib.blake2b(layer.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def _laid(
    pages: Sequence[Sequence[int]], starts: Sequence[int], tokens: Sequence[int], device: Any, ahead: int = 0
) -> Any:
    rows = [(Span(p, start, 1, 1), [token]) for p, start, token in zip(pages, starts, tokens, strict=True)]
    return lay(rows, device, ahead)
