"""The engine on a tiny model: however requests are batched, chunked, preempted or cached, each gets the same tokens."""

from __future__ import annotations

import random
from typing import Any

import pytest

from llama_dist.request import SamplingParams
from tests.conftest import Saver
from tests.engine_jobs import Run, faulty_row, pages_with, serve_some, timeline, whole_run
from tests.spmd import run_ranks

pytestmark = pytest.mark.spmd
CASE = "llama-gqa"
STOPS = [(), ("e", "a"), ("t",), ("th", "of a", "o"), ("zzzz",), ("i", "n")]


def some_requests(n: int, seed: int = 0) -> list[tuple[list[int], dict[str, Any]]]:
    """Mixed lengths, seeds, penalties, filters and stop strings; many share a beginning."""
    rng = random.Random(seed)
    header = [rng.randrange(20, 290) for _ in range(40)]
    out = []
    for i in range(n):
        prompt = header[: rng.choice([0, 0, 17, 40])] + [rng.randrange(20, 290) for _ in range(rng.randint(1, 30))]
        params: dict[str, Any] = {"max_tokens": rng.choice([1, 4, 12, 24]), "temperature": rng.choice([0.0, 0.7, 1.3])}
        params["top_p"] = rng.choice([1.0, 0.9, 0.5])
        params["stop"] = rng.choice(STOPS)
        if i % 3 == 0:
            params |= {"presence_penalty": 0.7, "frequency_penalty": -0.4, "repetition_penalty": 1.2}
        if i % 4 == 0:
            params |= {"top_k": 20, "min_p": 0.02, "logit_bias": ((50, 3.0), (60, -100.0))}
        if i % 5 == 0:
            params |= {"seed": i, "min_tokens": 1, "ignore_eos": True}
        if i % 6 == 0:
            params |= {"logprobs": True, "top_logprobs": 3, "echo": True}
        out.append((prompt, params))
    return out


@pytest.fixture(scope="module")
def alone(checkpoint: Saver) -> list[tuple[Any, ...]]:
    """Each of 200 requests by itself, nothing shared, nothing chunked."""
    run = Run({"max_batch_size": 1, "prefix_caching": False})
    return run_ranks(1, whole_run, str(checkpoint(CASE, "hf")), some_requests(200), run)[0][0]


PAGES_FOR = 96 // 16  # of the longest sequence
RUNS = {
    "one at a time, cached": Run({"max_batch_size": 1}),
    "seven": Run({"max_batch_size": 7}),
    "sixty-four": Run({"max_batch_size": 64}),
    "chunks of eight": Run({"max_batch_size": 8, "max_batch_tokens": 8}),
    "small cache": Run({"max_batch_size": 16, "prefix_caching": False}, pages=PAGES_FOR + 4),
    "small cache, chunks, shared": Run({"max_batch_size": 16, "max_batch_tokens": 24}, pages=PAGES_FOR + 6),
}


@pytest.mark.parametrize("name", RUNS)
def test_company_does_not_change_an_answer(checkpoint: Saver, alone: list[tuple[Any, ...]], name: str) -> None:
    got, stats = run_ranks(1, whole_run, str(checkpoint(CASE, "hf")), some_requests(200), RUNS[name])[0]
    for mine, one in zip(got, alone, strict=True):
        assert mine[:3] == one[:3]  # tokens, why it ended, where the text is cut
        assert mine[3] == pytest.approx(one[3], abs=1e-4)
    assert stats["pages_held"] == 0, "pages were not given back"
    if "small" in name:
        assert stats["preemptions"] > 0, "the cache was not small enough to preempt anyone"
    if RUNS[name].options.get("prefix_caching", True):
        assert stats["cached_tokens"] > 1000, "nothing was found in the prefix cache"


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_give_the_same(checkpoint: Saver, alone: list[tuple[Any, ...]], world: int) -> None:
    run = Run({"max_batch_size": 16, "max_batch_tokens": 64}, pages=PAGES_FOR + 12)
    ranks = run_ranks(world, whole_run, str(checkpoint(CASE, "hf")), some_requests(60), run)
    assert all(r == ranks[0] for r in ranks)
    assert [row[:3] for row in ranks[0][0]] == [row[:3] for row in alone[:60]]


def test_the_requests_are_mixed(alone: list[tuple[Any, ...]]) -> None:
    reasons = [row[1] for row in alone]
    assert reasons.count("stop") > 20 and reasons.count("length") > 20
    assert sum(row[2] is not None for row in alone) > 10, "no stop string was ever met"


def test_an_ended_sequence_makes_room_at_once(checkpoint: Saver) -> None:
    """Two slots, a short and a long answer, one waiting: it starts in the tick after the short one ends."""
    ticks = run_ranks(1, timeline, str(checkpoint(CASE, "hf")), [3, 12, 5])[0]
    assert [t for t, ids in enumerate(ticks) if "0" in ids] == [0, 1, 2]
    assert [t for t, ids in enumerate(ticks) if "2" in ids] == [3, 4, 5, 6, 7]
    assert [t for t, ids in enumerate(ticks) if "1" in ids] == list(range(12))


@pytest.mark.parametrize("world", [1, 2])
def test_requests_cancels_and_stops_from_the_inbox(checkpoint: Saver, world: int) -> None:
    ranks = run_ranks(world, serve_some, str(checkpoint(CASE, "hf")))
    done = ranks[0]
    assert done["a"] == ("length", 6) and done["c"] == ("length", 6)
    assert done["b"][0] == "cancelled" and 0 < done["b"][1] < 60
    assert done["d"][0] == "cancelled", "a stop with cancel drops what is queued or running"
    assert ranks[1:] == [{}] * (world - 1), "an outbox was called off the first rank"


@pytest.mark.parametrize(
    ("world", "stage", "rank", "quantization"),
    # token 77 of 293 is in the first of three parts of the vocabulary
    [
        (1, "layer 1, feed-forward", 0, None),
        (2, "layer 0, attention", 1, None),
        (3, "the embedding", 0, None),
        (2, "layer 1, feed-forward", 1, "int4"),
        (3, "layer 0, attention", 2, "int8"),  # which has two of eight heads, the others three
    ],
)
def test_a_row_that_breaks_fails_alone_and_says_where(
    checkpoint: Saver, world: int, stage: str, rank: int, quantization: str | None
) -> None:
    ranks = run_ranks(world, faulty_row, str(checkpoint(CASE, "hf")), stage, rank, quantization)
    assert all(r == ranks[0] for r in ranks)
    broken, *sound = ranks[0]["faulty"]
    assert broken[1] == "error"
    assert broken[4] == f"request 0: its numbers became NaN or infinite in {stage}, on rank {rank}"
    assert sound == ranks[0]["healthy"][1:], "its neighbours changed"
    assert ranks[0]["short"] == [("error", broken[4]), ("length", None)]
    assert [row[1] for row in ranks[0]["scores"]] == ["error", "length"], "a score of broken numbers was reported"
    assert ranks[0]["after"] == ranks[0]["healthy"][0], "the broken pages were found again"


def test_the_smallest_rank_sizes_the_cache_of_all(checkpoint: Saver) -> None:
    folder = str(checkpoint(CASE, "hf"))
    page = 2 * 2 * 1 * 16 * 8 * 4  # k and v, layers, KV heads of a rank, tokens, head_dim, float32
    assert run_ranks(2, pages_with, folder, [50 * page, 20 * page + 7], {}) == [20, 20]
    assert run_ranks(2, pages_with, folder, [10**9, 10**9], {"kv_cache_memory": 9 * page}) == [9, 9]
    assert run_ranks(1, pages_with, folder, [10**9], {"max_batch_size": 3}) == [2 * 3 * PAGES_FOR], (
        "more than is of use"
    )
    refused = run_ranks(2, pages_with, folder, [50 * page, 5 * page], {})
    assert refused[0] == refused[1]
    assert "rank 1 has room for 80 tokens of cache, less than --max_seq_len 96" in str(refused[0])


def test_defaults_are_metas() -> None:
    assert (SamplingParams().temperature, SamplingParams().top_p) == (0.6, 0.9)
