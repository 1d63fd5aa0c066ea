"""The same tokens and logprobs as transformers and Meta's own code, for every family, flag, format and world size."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TypeVar

import pytest

from tests import reference, tiny, tiny_tokenizer
from tests.conftest import Saver
from tests.jobs import Answer, Ask, answers
from tests.spmd import run_ranks

NEW = 16
Wanted = tuple[list[int], list[float]]
T = TypeVar("T")
PROMPTS = [
    [5, 250, 17, 99, 31, 7, 7, 120, 64, 200, 43, 18, 77, 140, 59, 33, 71, 98, 211, 44, 60],
    [42],
    [201, 13, 88, 5, 90],
]
TOLERANCE = 1e-4  # of a logprob, float32
WORLDS = [1, 2, 3, 4, pytest.param(5, marks=pytest.mark.slow), pytest.param(7, marks=pytest.mark.slow)]


def assert_same(got: Answer, want: Wanted, what: str) -> None:
    assert got[0] == want[0], what
    assert got[1] == pytest.approx(want[1], abs=TOLERANCE), what


def some(cases: list[T], world: int) -> list[T]:
    """All cases; on more ranks than there are cores to run them, every third, another third for each world."""
    return cases if world <= 4 else cases[world % 3 :: 3]


@functools.lru_cache
def wanted(name: str) -> list[Wanted]:
    stop = {tiny_tokenizer.EOS, tiny_tokenizer.IM_END}
    return [reference.hf_greedy(name, ids, NEW, stop) for ids in PROMPTS]


@pytest.mark.spmd
@pytest.mark.parametrize("world", WORLDS)
def test_every_family_as_transformers(checkpoint: Saver, world: int) -> None:
    forms = {name: "hf5" if i % 2 else "hf" for i, name in enumerate(some(list(tiny.CASES), world))}
    asks = [Ask(str(checkpoint(name, form)), PROMPTS, NEW) for name, form in forms.items()]
    by_rank = run_ranks(world, answers, asks, timeout=240)
    assert all(ranks == by_rank[0] for ranks in by_rank), "ranks returned different answers"
    for name, got in zip(forms, by_rank[0], strict=True):
        for mine, want in zip(got, wanted(name), strict=True):
            assert_same(mine, want, f"{name} on {world}")


META_CASES = [name for name, case in tiny.CASES.items() if case.meta]


def forms_of(name: str) -> list[str]:
    case = tiny.CASES[name]
    metas = [f"meta{n}" for n in case.meta] + [f"meta{n}-llama2" for n in case.meta if n > 1]
    return [*metas, "hf", *(["gguf-F32"] if case.gguf else [])]


@pytest.mark.spmd
@pytest.mark.parametrize("world", WORLDS)
def test_every_format_as_metas_code(checkpoint: Saver, meta_answers: dict[str, list[Wanted]], world: int) -> None:
    cases = some([(name, form) for name in META_CASES for form in forms_of(name)], world)
    # Meta's code knows no stop ids: a stop of ours must be where its answer has one
    asks = [
        Ask(
            str(checkpoint(name, form)),
            PROMPTS,
            NEW,
            {"tokenizer_path": str(checkpoint(name, "hf") / "tokenizer.json")},
        )
        for name, form in cases
    ]
    got = run_ranks(world, answers, asks, timeout=240)[0]
    for (name, form), rows in zip(cases, got, strict=True):
        for mine, want in zip(rows, meta_answers[name], strict=True):
            n = len(mine[0])
            assert n == len(want[0]) if mine[2] == "length" else n < len(want[0])
            assert_same(mine, (want[0][:n], want[1][:n]), f"{name} as {form} on {world}")


@pytest.fixture(scope="module")
def meta_answers(checkpoint: Saver) -> dict[str, list[Wanted]]:
    return {name: reference.meta_greedy(Path(checkpoint(name, "meta1")), PROMPTS, NEW) for name in META_CASES}
