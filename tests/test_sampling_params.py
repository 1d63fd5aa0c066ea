"""Every sampling parameter against a plain reference, and its documented range."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_dist.engine.logits import shape
from llama_dist.engine.sampler import HEAD, candidates
from llama_dist.errors import RequestError
from llama_dist.request import Completion, Request, SamplingParams

VOCAB = 12
token = st.integers(0, VOCAB - 1)
tokens = st.lists(token, max_size=8)


def plain_shape(
    logits: list[float], p: SamplingParams, prompt: list[int], answer: list[int], stops: set[int]
) -> list[float]:
    """Token by token, as the documentation of SamplingParams has it."""
    out = []
    for i, x in enumerate(logits):
        if i in prompt or i in answer:
            x = x / p.repetition_penalty if x > 0 else x * p.repetition_penalty
        if i in answer:
            x -= p.presence_penalty + p.frequency_penalty * answer.count(i)
        x += sum(bias for t, bias in p.logit_bias if t == i)
        if p.allowed_token_ids is not None and i not in p.allowed_token_ids:
            x = -math.inf
        for *start, last in p.bad_words:
            if last == i and (prompt + answer)[len(prompt + answer) - len(start) :] == start:
                x = -math.inf
        if i in stops and len(answer) < p.min_tokens:
            x = -math.inf
        out.append(x)
    return out


@given(
    st.lists(st.floats(-5, 5, width=32), min_size=VOCAB, max_size=VOCAB),
    st.fixed_dictionaries(
        {
            "presence_penalty": st.sampled_from([0.0, 0.5, -2.0]),
            "frequency_penalty": st.sampled_from([0.0, 0.3, 2.0]),
            "repetition_penalty": st.sampled_from([1.0, 1.3, 0.5]),
            "logit_bias": st.lists(st.tuples(token, st.floats(-100, 100)), max_size=3).map(tuple),
            "allowed_token_ids": st.none() | st.lists(token, min_size=1).map(tuple),
            "bad_words": st.lists(st.lists(token, min_size=1, max_size=3).map(tuple), max_size=3).map(tuple),
            "min_tokens": st.integers(0, 6),
        }
    ),
    tokens.filter(bool),
    tokens,
    st.sets(token, max_size=2),
)
@settings(max_examples=400)
def test_penalties_biases_and_bans(
    logits: list[float], options: dict[str, Any], prompt: list[int], answer: list[int], stops: set[int]
) -> None:
    params = SamplingParams(**options)
    want = plain_shape(logits, params, prompt, answer, stops)
    row = torch.tensor(logits)
    if all(x == -math.inf for x in want):
        with pytest.raises(RequestError, match="no token may be drawn"):
            shape(row, params, prompt, answer, stops)
        return
    assert shape(row, params, prompt, answer, stops).tolist() == pytest.approx(want, abs=1e-4)
    assert row.tolist() == pytest.approx(logits), "the model's own logits were changed"


def plain_candidates(scaled: list[float], top_k: int, top_p: float, min_p: float) -> list[int]:
    order = sorted(range(len(scaled)), key=lambda i: (-scaled[i], i))
    if top_k:
        order = order[:top_k]
    weights = [math.exp(scaled[i] - max(scaled)) for i in order]
    kept, before = [], 0.0
    for i, w in zip(order, weights, strict=True):
        if top_p < 1 and before > top_p:
            break
        kept.append(i)
        before += w / sum(weights)
    return sorted(i for i in kept if math.exp(scaled[i] - max(scaled)) >= min_p)


@pytest.mark.parametrize("size", [5, 200, HEAD + 300])
@pytest.mark.parametrize("top_k", [0, 1, 3, 50, HEAD + 100])
@pytest.mark.parametrize(
    ("top_p", "min_p"), [(1.0, 0.0), (0.83, 0.0), (1.0, 0.11), (0.61, 0.04), (0.0, 0.0), (1.0, 1.0)]
)
def test_top_k_top_p_and_min_p(size: int, top_k: int, top_p: float, min_p: float) -> None:
    torch.manual_seed(size + top_k)
    scaled = (torch.randn(size, dtype=torch.float64) * 3).round(decimals=1)  # with ties
    assert candidates(scaled, top_k, top_p, min_p).tolist() == plain_candidates(scaled.tolist(), top_k, top_p, min_p)


BAD: list[tuple[str, Any]] = [
    ("temperature", -0.1),
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("top_p", 1.1),
    ("top_p", -0.1),
    ("top_p", math.nan),
    ("max_tokens", -1),
    ("min_tokens", -1),
    ("top_k", -1),
    ("min_p", 1.5),
    ("presence_penalty", 2.1),
    ("frequency_penalty", -2.1),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", 1e-40),
    ("temperature", 1e-320),
    ("max_tokens", 10**400),
    ("min_tokens", 10**400),
    ("top_k", 10**400),
    ("repetition_penalty", 11.0),
    ("logit_bias", ((3, 101.0),)),
    ("seed", -1),
    ("seed", 2**63),
    ("stop", ("",)),
    ("stop", tuple("abcdefghijklmnopq")),
    ("top_logprobs", 21),
    ("allowed_token_ids", ()),
    ("bad_words", ((),)),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_out_of_range_names_the_field(name: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{name: value})
    assert caught.value.field == name and name in str(caught.value) and "\n" not in str(caught.value)


def test_min_tokens_beyond_max_tokens_is_refused() -> None:
    with pytest.raises(RequestError, match="min_tokens is 5, must be at most max_tokens 4"):
        SamplingParams(max_tokens=4, min_tokens=5)


def test_requests_and_completions_survive_json() -> None:
    import json

    params = SamplingParams(
        logit_bias=((3, 1.5),), stop=("a", "b"), bad_words=((1, 2), (3,)), allowed_token_ids=(1, 2), seed=7
    )
    request = Request("x", (1, 2, 3), params)
    assert Request.from_json(json.loads(json.dumps(request.to_json()))) == request
    done = Completion("x", (4, 5), (-0.5, -1.25), "stop", (((4, -0.5), (7, -2.0)), ()), None, 3, 16, None)
    assert Completion.from_json(json.loads(json.dumps(done.to_json()))) == done
