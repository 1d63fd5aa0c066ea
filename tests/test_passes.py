"""Several passes of a few rows in one call change no answer, whatever becomes of the rows in between."""

from __future__ import annotations

import math
import types
from typing import Any

import pytest
import torch

from llama_dist.config import ModelConfig
from llama_dist.engine.calls import MOST_PASSES, Calls
from llama_dist.engine.session import calls_of
from llama_dist.frontend.bench import work
from llama_dist.quant.scheme import QUANTIZATIONS
from tests.conftest import Saver
from tests.engine_jobs import Run
from tests.kernel_cases import need_kernels
from tests.passes_jobs import answers, apart, cancelled, lost_in_a_call, one_by_one_and_in_row, serves
from tests.spmd import run_ranks
from tests.test_engine import CASE, RUNS, some_requests

spmd = pytest.mark.spmd
CASES = {**RUNS, "float32": Run({"max_batch_size": 5, "dtype": "float32"})}
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
            params = {**params, "temperature": 0.8, "top_k": 270}  # left to the sampler
        if i % 29 == 10:
            params = {**params, "prompt_logprobs": True}
        out.append((ids, params))
    return out


@spmd
@pytest.mark.parametrize("kinds", [1, len(DRAWN)], ids=["likeliest", "drawn"])
@pytest.mark.parametrize("name", CASES)
def test_no_answer_changes(checkpoint: Saver, name: str, kinds: int) -> None:
    need_kernels()
    folder, asked = str(checkpoint(CASE, "hf")), plain_requests(200, kinds)
    [(plain, none, one_by_one)] = run_ranks(1, answers, folder, asked, CASES[name], 1)
    [(rows, counts, ticks)] = run_ranks(1, answers, folder, asked, CASES[name], 5)
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


MODELS: dict[str, dict[str, Any]] = {
    "llama-gqa": {},
    "llama-9-3": {"dtype": "float32"},
    "qwen2-window": {},
    "llama-meta": {"quantization": "int8"},
}


@spmd
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_passes_in_a_call_are_passes(checkpoint: Saver, name: str, world: int) -> None:
    """Tokens, and every number of the cache, through pages that lie anywhere and end at different passes."""
    need_kernels()
    ranks = run_ranks(world, one_by_one_and_in_row, str(checkpoint(name, "hf")), 3, 20, MODELS[name])
    for found in ranks:
        one, (of_row, of_one) = found["one"], found["caches"]
        assert len(one) == 20 and found["row"] == one == ranks[0]["one"]
        assert of_row == of_one
        ends = next(i for i, some in enumerate(one) if one[4][0] in some) + 1
        assert found["ended"] == one[:ends] and ends <= 5
        assert found["refused"] == "20 passes, pages laid for 19"
        if "bad" in found:
            bad = next(i for i, some in enumerate(one) if found["bad"] in some) + 1  # the pass that computes it
            last = [
                -1 if before == found["bad"] else token for before, token in zip(one[bad - 1], one[bad], strict=True)
            ]
            assert found["broken"] == [*one[:bad], last]


@spmd
def test_which_models_do_several_passes(checkpoint: Saver) -> None:
    need_kernels()
    for name, options, serving in (
        ("llama-gqa", {}, True),
        ("llama-rope-dynamic", {}, False),
        ("llama-gqa", {"dtype": "float16"}, False),
    ):
        [found] = run_ranks(1, serves, str(checkpoint(name, "hf")), options)
        assert found == [serving, serving, False], (name, options)


@spmd
@pytest.mark.parametrize("late", [0, 1])
def test_a_rank_lost_in_a_call_is_named(checkpoint: Saver, late: int) -> None:
    need_kernels()
    ranks = run_ranks(2, lost_in_a_call, str(checkpoint("llama-gqa", "hf")), 12.0, late)
    kind, said, took = ranks.pop(1 - late)
    assert kind == "PeerLost" and f"rank {late} did not come within 12 s" in said
    assert 11.9 < took < 18
    assert ranks == [("", "", 0)]


@spmd
def test_ranks_that_share_no_memory_take_one_pass_a_call(checkpoint: Saver) -> None:
    need_kernels()
    folder, prompts = str(checkpoint(CASE, "hf")), plain_requests(24, 1)
    run = CASES["float32"]
    [(alone, _, _)] = run_ranks(1, answers, folder, prompts, run, 1)
    assert run_ranks(2, apart, folder, prompts, run) == [(alone, False)] * 2


def test_a_call_is_short() -> None:
    small = ModelConfig("llama", 576, 30, 9, 3, 64, 1536, 49152, 1e-5, tied_embeddings=True)
    large = ModelConfig("llama", 2048, 16, 32, 8, 64, 8192, 128256, 1e-5, tied_embeddings=True)
    tiny = ModelConfig("llama", 64, 2, 4, 2, 16, 128, 256, 1e-5)
    bf16, f32 = torch.bfloat16, torch.float32

    def most(config: ModelConfig, rows: int = 1, tokens: int = 100, dtype: torch.dtype = bf16, by: str = "") -> int:
        return calls_of(config, dtype, QUANTIZATIONS[by] if by else None).passes(rows, tokens)

    assert [most(config) for config in (tiny, small, large)] == [MOST_PASSES, 5, 1]
    assert [most(small, by=by) for by in ("int4", "int8")] == [MOST_PASSES, MOST_PASSES] and most(small, dtype=f32) == 2
    assert [most(small, rows) for rows in (8, 9, 17, 64)] == [5, 2, 1, 1]
    assert [most(small, 8, tokens) for tokens in (1000, 8 * 1000, 8 * 4000)] == [5, 3, 1]
    assert Calls().passes(1, 1) == 1


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
    world = types.SimpleNamespace(device=torch.device("cpu"))
    player = work.Player(types.SimpleNamespace(engine=engine, world=world))  # type: ignore[arg-type]
    for n in (8, 9, 13, 8, 31):
        assert player.steps(n) == pytest.approx(2.0 * n)
    while engine.ahead < passes - 1:
        player.steps(1)
    assert passes == 1 or math.isnan(player.steps(passes - 1))
