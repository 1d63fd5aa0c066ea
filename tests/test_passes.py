"""Several passes of a few rows in one call change no answer, whatever becomes of the rows in between."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch

from llama_dist.config import ModelConfig
from llama_dist.engine.session import MOST_PASSES, passes_in_a_call
from llama_dist.frontend.bench import work
from tests.conftest import Saver
from tests.engine_jobs import Run
from tests.kernel_cases import need_kernels
from tests.passes_jobs import answers, cancelled, one_by_one_and_in_row
from tests.spmd import run_ranks
from tests.test_engine import CASE, RUNS, some_requests

spmd = pytest.mark.spmd
TWO = {**RUNS, "float32": Run({"max_batch_size": 5, "dtype": "float32"})}


DRAWN: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.6},
    {"temperature": 1.1, "top_k": 20, "min_p": 0.01},
    {"temperature": 0.7, "top_p": 1.0, "seed": 5},
]


def plain_requests(n: int, kinds: int) -> list[tuple[list[int], dict[str, Any]]]:
    """Most ask for tokens alone, drawn in so many ways, and end by limits and stop ids; some ask for more."""
    out = []
    for i, (ids, params) in enumerate(some_requests(n)):
        if i % 17:
            ends = tuple(range(20 + i % 7, 290, 11)) if i % 3 else ()
            params = {"max_tokens": 1 + 7 * i % 23, "stop_token_ids": ends, **DRAWN[i % kinds]}
        if kinds > 1 and i % 23 == 3:
            params = {**params, "temperature": 0.8, "top_k": 270}  # of more than C++ draws from
        if i % 29 == 10:
            params = {**params, "prompt_logprobs": True}
        out.append((ids, params))
    return out


@spmd
@pytest.mark.parametrize("kinds", [1, len(DRAWN)], ids=["likeliest", "drawn"])
@pytest.mark.parametrize("name", TWO)
def test_no_answer_changes(checkpoint: Saver, name: str, kinds: int) -> None:
    need_kernels()
    folder, asked = str(checkpoint(CASE, "hf")), plain_requests(200, kinds)
    [(plain, none, one_by_one)] = run_ranks(1, answers, folder, asked, TWO[name], 1)
    [(rows, counts, ticks)] = run_ranks(1, answers, folder, asked, TWO[name], 5)
    assert rows == plain and not none
    if name not in ("sixty-four", "chunks of eight"):  # where few ticks are of few rows, and read no prompt
        assert counts["whole"] > 10 and counts.get("none", 0) == 0, counts
        assert (kinds == 1) == (counts.get("left", 0) == 0), "the sampler was not asked"
    assert ticks == one_by_one or "one at" not in name  # a tick is a token still


@spmd
@pytest.mark.parametrize("kinds", [1, len(DRAWN)], ids=["likeliest", "drawn"])
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_take_the_same_passes(checkpoint: Saver, world: int, kinds: int) -> None:
    need_kernels()
    folder, asked, run = str(checkpoint(CASE, "hf")), plain_requests(60, kinds), RUNS["small cache, chunks, shared"]
    [(plain, _, _), *_] = run_ranks(world, answers, folder, asked, run, 1)
    ranks = run_ranks(world, answers, folder, asked, run, 8)
    assert all(found == ranks[0] for found in ranks)
    assert ranks[0][0] == plain and ranks[0][1]["whole"] > 20


@spmd
@pytest.mark.parametrize("after", range(1, 8))
def test_what_is_ahead_of_a_dropped_answer_is_left(checkpoint: Saver, after: int) -> None:
    need_kernels()
    folder = str(checkpoint(CASE, "hf"))
    [(plain, none, _)] = run_ranks(1, cancelled, folder, 1, after)
    [(rows, ahead, held)] = run_ranks(1, cancelled, folder, 4, after)
    assert none == 0 and held == 0
    assert ahead == (1 - after) % 4  # the first tick reads the prompts
    assert rows == plain


@spmd
@pytest.mark.parametrize("world", [1, 2])
def test_passes_in_a_call_are_passes(checkpoint: Saver, world: int) -> None:
    """Tokens, and every number of the cache, through pages that lie anywhere and end at different passes."""
    need_kernels()
    for found in run_ranks(world, one_by_one_and_in_row, str(checkpoint(CASE, "hf")), 3, 20):
        one, row = found["one by one"], found["in a row"]
        assert len(one[0]) == 20 and one[0] == row[0]
        assert one[1] == row[1]
        tokens, stop = one[0], found["stop"]
        ends = next(i for i, some in enumerate(tokens) if stop in some) + 1
        assert ends < 20 and found["ended"] == tokens[:ends]
        assert found["refused"].startswith("span 0 has pages outside of what there is")
        assert found["served"] == [True, True, True, False]


def test_a_call_is_short() -> None:
    small = ModelConfig("llama", 576, 30, 9, 3, 64, 1536, 49152, 1e-5, tied_embeddings=True)
    large = ModelConfig("llama", 2048, 16, 32, 8, 64, 8192, 128256, 1e-5, tied_embeddings=True)
    tiny = ModelConfig("llama", 64, 2, 4, 2, 16, 128, 256, 1e-5)
    assert [passes_in_a_call(c, 16) for c in (tiny, small, large)] == [MOST_PASSES, 5, 1]
    assert [passes_in_a_call(small, bits) for bits in (6, 8, 32)] == [MOST_PASSES, MOST_PASSES, 2]


@pytest.mark.parametrize("passes", [1, 3, 8])
def test_bench_leaves_out_of_account_what_is_ahead(monkeypatch: pytest.MonkeyPatch, passes: int) -> None:
    """Passes of 2 s each, `passes` of them where none is left: a step takes 2 s, wherever it begins."""
    engine = types.SimpleNamespace(ahead=0, clock=0.0)

    def step() -> None:
        if engine.ahead == 0:
            engine.ahead, engine.clock = passes, engine.clock + 2.0 * passes
        engine.ahead -= 1

    engine.step = step
    monkeypatch.setattr(work.time, "perf_counter", lambda: engine.clock)
    player = work.Player(types.SimpleNamespace(engine=engine, world=types.SimpleNamespace(device=torch.device("cpu"))))  # type: ignore[arg-type]
    for n in (8, 9, 13, 8, 31):
        assert player.steps(n) == pytest.approx(2.0 * n)
