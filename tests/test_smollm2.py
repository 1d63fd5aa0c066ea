"""The real SmolLM2-135M-Instruct: the text transformers gives for the same weights, at several world sizes."""

from __future__ import annotations

import pytest

from tests import assets, reference
from tests.jobs import Ask, answers, chat_ids
from tests.spmd import run_ranks

NEW = 64
QUESTIONS = ["Explain gravity to a child.", "Tell me a story about a dragon."]


@pytest.fixture(scope="module")
def expected() -> list[tuple[list[int], list[int], list[float]]]:
    """(prompt, prompt and answer, logprobs) of each question, by transformers on the dequantised weights."""
    found = []
    for ids in chat_ids(str(assets.smollm2_gguf()), QUESTIONS):
        tokens, logprobs = reference.hf_greedy(assets.smollm2_hf(), ids, NEW, stop={2})
        found.append((ids, tokens, logprobs))
    return found


@pytest.mark.spmd
@pytest.mark.parametrize("world", [1, 2, 3])
def test_greedy_text_as_transformers(expected: list[tuple[list[int], list[int], list[float]]], world: int) -> None:
    ask = Ask(str(assets.smollm2_gguf()), [ids for ids, _, _ in expected], NEW, {"max_seq_len": 256})
    assert sum(len(tokens) == len(ids) + NEW for ids, tokens, _ in expected) >= 2, "answers too short to prove much"
    got = run_ranks(world, answers, [ask], timeout=240)[0][0]
    for mine, (_, tokens, logprobs) in zip(got, expected, strict=True):
        assert mine[0] == tokens
        assert mine[1] == pytest.approx(logprobs, abs=1e-3)
