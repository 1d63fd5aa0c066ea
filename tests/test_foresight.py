"""Passes begun before the host has seen their tokens change no answer, whatever becomes of them."""

from __future__ import annotations

import pytest
import torch

from llama_dist.engine.draws import Drawing
from llama_dist.engine.foresight import next_tokens
from llama_dist.kernels.told import Told
from tests.conftest import Saver
from tests.engine_jobs import Run
from tests.foresight_jobs import a_fault, answers, without_waiting
from tests.spmd import run_ranks
from tests.test_engine import CASE, RUNS, some_requests

pytestmark = pytest.mark.spmd
GREEDY = {"max_tokens": 12, "temperature": 0.0}
CASES = [(name, "program") for name in RUNS]
CASES += [(name, way) for name in ("seven", "small cache") for way in ("layers", "recordings")]


@pytest.mark.parametrize(("name", "way"), CASES)
def test_no_answer_changes(checkpoint: Saver, name: str, way: str) -> None:
    folder, asked = str(checkpoint(CASE, "hf")), some_requests(120)
    [(plain, none)] = run_ranks(1, answers, folder, asked, RUNS[name], way, False)
    [(rows, counts)] = run_ranks(1, answers, folder, asked, RUNS[name], way, True)
    assert rows == plain and not none  # logprobs too, to the last bit
    assert counts["whole"] > 1, "nothing was foreseen"
    if name.startswith(("one", "seven", "small")):
        assert counts.get("none", 0) + counts.get("part", 0) > 5, "no answer ended unforeseen, no token was another"


@pytest.mark.gpu
@pytest.mark.parametrize("name", RUNS)
def test_no_answer_changes_on_a_gpu(checkpoint: Saver, name: str) -> None:
    folder, asked = str(checkpoint(CASE, "hf")), some_requests(120)
    run = Run({**RUNS[name].options, "device": "cuda", "dtype": "bfloat16", "reproducible": True}, RUNS[name].pages)
    [(plain, none)] = run_ranks(1, answers, folder, asked, run, "as it is", False)
    [(rows, counts)] = run_ranks(1, answers, folder, asked, run, "as it is", True)
    assert rows == plain and not none
    assert counts["whole"] > 1, "nothing was foreseen"


@pytest.mark.gpu
def test_a_gpu_is_waited_for_only_where_its_tokens_are_taken(checkpoint: Saver) -> None:
    asked = [(ids, {**params, "logprobs": False, "echo": False}) for ids, params in some_requests(60)]
    asked += [
        ([30 + i], {"max_tokens": 9, "temperature": 0.0, "min_tokens": 4, "bad_words": ((40,),)}) for i in range(9)
    ]
    run = Run({"device": "cuda", "dtype": "bfloat16", "reproducible": True, "max_batch_size": 8})
    [(before, after)] = run_ranks(1, without_waiting, str(checkpoint(CASE, "hf")), asked, run)
    assert before == after


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_foresee_alike(checkpoint: Saver, world: int, drawn: bool) -> None:
    """Which tokens are too close to tell may differ from rank to rank, so drawn ones are seen first."""
    folder, run = str(checkpoint(CASE, "hf")), RUNS["small cache, chunks, shared"]
    asked = [(ids, params if drawn else GREEDY) for ids, params in some_requests(60)]
    [(plain, _), *_] = run_ranks(world, answers, folder, asked, run, "program", False)
    ranks = run_ranks(world, answers, folder, asked, run, "program", True)
    assert all(r == ranks[0] for r in ranks)
    assert ranks[0][0] == plain and (drawn or ranks[0][1]["whole"] > 20)


@pytest.mark.parametrize(("stage", "rank"), [("the embedding", 0), ("layer 1, attention", 1)])
def test_a_row_that_is_not_finite_fails_alone(checkpoint: Saver, stage: str, rank: int) -> None:
    ranks = run_ranks(2, a_fault, str(checkpoint(CASE, "hf")), stage, rank)
    assert ranks[0] == ranks[1]
    found = ranks[0]
    assert stage in found["faulty"][0][4] and f"rank {rank}" in found["faulty"][0][4]
    assert found["faulty"][1:] == found["healthy"][1:]
    assert found["after"] == found["healthy"][0]


def test_tokens_go_from_pass_to_pass_on_the_device() -> None:
    likeliest, some, all_of_them = torch.tensor([5, -1, 7, 8]), torch.tensor([-1, 30]), torch.tensor([1, 2, 3, 4])
    nothing, two = Drawing(0, []), Drawing(2, [([1], Told(some[1:])), ([0], Told(some[:1]))])
    assert next_tokens(likeliest, nothing, [], [0, 1, 2, 3]).tolist() == [5, 0, 7, 8]
    assert next_tokens(likeliest, nothing, [], [0, 3]).tolist() == [5, 8]
    assert next_tokens(likeliest, two, [1, 2], [0, 2, 3]).tolist() == [5, 30, 8]
    assert likeliest.tolist() == [5, -1, 7, 8]
    four = Drawing(4, [([0, 1, 2, 3], Told(all_of_them))])
    assert next_tokens(likeliest, four, [0, 1, 2, 3], [1, 2]).tolist() == [2, 3]
    assert two.wait() == [-1, 30]
