"""What test_passes.py runs on every rank: several passes of a few rows in one call."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from typing import Any

import torch

from llama_dist.engine import engine as engine_module
from llama_dist.engine import sampler
from llama_dist.engine.calls import Calls
from llama_dist.engine.foresight import Pass
from llama_dist.errors import LlamaDistError
from llama_dist.model.cache import PAGE_SIZE, Laid, Span, lay
from llama_dist.parallel import shared
from llama_dist.quant.packed import Packed
from llama_dist.request import Request, SamplingParams
from tests.engine_jobs import Prompts, Row, Run, answer_all, engine_for
from tests.foresight_jobs import count
from tests.jobs import Ask, open_for


def answers(folder: str, prompts: Prompts, run: Run, most: int) -> tuple[list[Row], dict[str, int], int]:
    """Rows, of what use the passes of a call were, and the ticks that it took."""
    engine = engine_for(folder, run)
    engine.calls, counts, sample = Calls(most), count(Pass), sampler.sample

    def left(*args: Any) -> int:
        counts["left"] += 1
        return sample(*args)

    sampler.sample = left
    engine_module.MOST_K = 10**6  # so that a call comes to rows that C++ does not draw from
    rows = answer_all(engine, prompts)
    assert engine.ahead == 0 and engine.scheduler.table.n_held == 0
    return rows, dict(counts), engine.ticks


def cancelled(folder: str, most: int, after: int) -> tuple[list[tuple[str, tuple[int, ...]]], int, int]:
    """Three answers, the second dropped after some ticks when one more comes; how many passes were ahead then."""
    engine = engine_for(folder, Run())
    engine.calls = Calls(most)
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


def one_by_one_and_in_row(folder: str, n: int, passes: int, options: dict[str, Any]) -> dict[str, Any]:
    """The tokens and the cache that passes leave, one by one and in one call, from positions where pages end.

    Then a call with a stop id, one without pages, and one that comes to a token whose row is not finite.
    """
    session = open_for(Ask(folder, [], 0, options))
    torch.set_num_threads(2)
    engine, device = session.engine, session.world.device
    model, cache = engine.model, engine.cache
    starts, first = [PAGE_SIZE * i + 13 - i for i in range(n)], [40 + i for i in range(n)]
    spans = [[8 * i + j for j in (5, 2, 7, 0)] for i in range(n)]

    def laid(done: int, tokens: Sequence[int], ahead: int = 0) -> Laid:
        rows = [(Span(spans[i], starts[i] + done, 1, 1), [tokens[i]]) for i in range(n)]
        return lay(rows, device, ahead)

    def fill() -> None:
        for layer in cache.layers:
            layer.copy_(torch.linspace(-1, 1, layer.numel()).view(layer.shape))

    def in_row(stops: Sequence[int], ahead: int = passes - 1) -> list[list[int]]:
        fill()
        return model.run_on(laid(0, first, ahead), cache, passes, stops)

    row = in_row([])
    of_row = [_digest(layer) for layer in cache.layers]
    fill()
    one = [first]
    for i in range(passes):
        greatest = model.greatest(model(laid(i, one[-1]), cache, True))
        assert greatest is not None
        one.append(greatest)
    of_one = [_digest(layer) for layer in cache.layers]
    found: dict[str, Any] = {"row": row, "one": one[1:], "caches": (of_row, of_one), "ended": in_row(one[5][:1])}
    try:
        in_row([], ahead=passes - 2)
        found["refused"] = ""
    except AssertionError as err:
        found["refused"] = str(err)
    weight, start = model.tok_embeddings.weight, model.tok_embeddings.vocab_start_index
    if not isinstance(weight, Packed):
        seen = [set(row) for row in one]
        bad = next(one[i][0] for i in range(2, passes) if not any(one[i][0] in some for some in seen[:i]))
        found["bad"] = bad
        with torch.no_grad():
            if 0 <= bad - start < len(weight):
                weight[bad - start] = float("nan")
        found["broken"] = in_row([])
    return found


def lost_in_a_call(folder: str, timeout: float, late: int) -> tuple[str, str, float]:
    """What is raised in a call of eight passes of which rank `late` takes part in three, and how long that takes."""
    session = open_for(Ask(folder, [], 0, {"timeout": timeout}))
    world, model, cache = session.world, session.engine.model, session.engine.cache
    passes = 3 if world.rank == late else 8
    laid = lay([(Span([i], 4, 1, 1), [40 + i]) for i in range(3)], world.device, passes - 1)
    world.watch.detach()  # that one ends before another means nothing here
    began = time.monotonic()
    try:
        found = model.run_on(laid, cache, passes, [])
    except LlamaDistError as err:
        took = time.monotonic() - began
        return type(err).__name__, str(err), took
    assert world.rank == late and len(found) == passes, (world.rank, found)
    time.sleep(timeout + 1)
    return "", "", 0


def apart(folder: str, prompts: Prompts, run: Run) -> tuple[list[Row], bool]:
    """Rows of an engine that may do several passes in a call but for what ranks share, and whether it does."""
    if os.environ["RANK"] == "0":
        shared._make = lambda size, name: -1
    engine = engine_for(folder, run)
    engine.calls = Calls(8)
    return answer_all(engine, prompts), engine.model.goes_on(1, engine.cache)


def serves(folder: str, options: dict[str, Any]) -> list[bool]:
    """Whether the model does several passes of so many rows in a call."""
    engine = open_for(Ask(folder, [], 0, options)).engine
    return [engine.model.goes_on(rows, engine.cache) for rows in (1, 64, 65)]


def _digest(layer: torch.Tensor) -> str:
    return hashlib.blake2b(layer.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
