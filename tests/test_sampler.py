"""The sampler against plain references: noise, nucleus, temperature, and the distribution it draws from."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_dist.engine.sampler import (
    GOLDEN,
    HEAD,
    derive_seed,
    gumbel,
    mix,
    nucleus,
    sample,
    sample_top_p,
)
from llama_dist.request import SamplingParams


def plain_gumbel(seed: int, position: int, token: int) -> float:
    """The noise in plain Python integers."""
    key = mix(mix(seed + GOLDEN) + GOLDEN * (position + 1))
    bits = mix((token + 1) * GOLDEN + key) >> 11
    return -math.log(-math.log((bits + 0.5) * 2.0**-53))


def plain_nucleus(probs: list[float], top_p: float) -> list[int]:
    """Walk the tokens from the likeliest; a token stays while the mass before it is at most top_p."""
    kept, before = [], 0.0
    for token in sorted(range(len(probs)), key=lambda i: (-probs[i], i)):
        if before > top_p:
            break
        kept.append(token)
        before += probs[token]
    return kept


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**20))
@settings(max_examples=50)
def test_noise_is_the_plain_hash(seed: int, position: int) -> None:
    ids = torch.tensor([0, 1, 2, 31999, 128255])
    got = gumbel(seed, position, ids).tolist()
    assert got == pytest.approx([plain_gumbel(seed, position, int(i)) for i in ids], rel=1e-12)


def test_noise_of_a_token_does_not_depend_on_its_company() -> None:
    ids = torch.arange(1000)
    whole = gumbel(7, 3, ids)
    assert torch.equal(whole[torch.tensor([5, 999, 17])], gumbel(7, 3, torch.tensor([5, 999, 17])))
    assert not torch.equal(whole, gumbel(7, 4, ids)) and not torch.equal(whole, gumbel(8, 3, ids))


@given(st.integers(0, 10**6), st.sampled_from([5, 300, HEAD + 500]), st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.999]))
@settings(max_examples=60)
def test_nucleus_is_the_plain_rule(seed: int, size: int, top_p: float) -> None:
    torch.manual_seed(seed)
    # coarse logits make many ties, also across the border of the head that is looked at first
    scaled = (torch.randn(size, dtype=torch.float64) * random.Random(seed).choice([0.5, 2, 8])).round(decimals=1)
    probs = torch.softmax(scaled, -1).tolist()
    got = nucleus(scaled, top_p).tolist()
    want = plain_nucleus(probs, top_p)
    # sums in another order may move the border by one token where the mass is within rounding of top_p
    shorter, longer = sorted((got, want), key=len)
    assert longer[: len(shorter)] == shorter
    if len(longer) > len(shorter):
        assert sum(probs[i] for i in shorter) == pytest.approx(top_p, abs=1e-9)


def test_nucleus_keeps_the_token_that_reaches_p_and_no_more() -> None:
    scaled = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64).log()
    assert nucleus(scaled, 0.0).tolist() == [0]
    assert nucleus(scaled, 0.49).tolist() == [0]
    assert nucleus(scaled, 0.6).tolist() == [0, 1]
    assert nucleus(scaled, 0.8).tolist() == [0, 1, 2]  # 3 ties with 2; the lower id goes first
    assert nucleus(scaled, 0.9).tolist() == [0, 1, 2, 3]


def test_a_flat_distribution_is_cut_by_id() -> None:
    assert nucleus(torch.zeros(4 * HEAD, dtype=torch.float64), 0.5).tolist() == list(range(2 * HEAD + 1))


def test_greedy_takes_the_first_of_equals() -> None:
    assert sample(torch.tensor([1.0, 3.0, 3.0, 2.0]), SamplingParams(temperature=0.0), 1, 1) == 1


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9), (1.5, 0.5), (0.3, 1.0), (2.0, 0.95)])
def test_distribution_by_chi_square(temperature: float, top_p: float) -> None:
    torch.manual_seed(0)
    logits, draws = torch.randn(24) * 2, 6_000
    probs = torch.softmax(logits.double() / temperature, -1)
    kept = plain_nucleus(probs.tolist(), top_p)
    want = {i: float(probs[i]) / float(probs[kept].sum()) * draws for i in kept}
    # one token for each of many positions of one sequence, as in use
    got = torch.tensor([sample_top_p(logits, temperature, top_p, 11, p) for p in range(draws)]).bincount(minlength=24)
    assert set(got.nonzero()[:, 0].tolist()) <= set(kept)
    cells = [(int(got[i]), want[i]) for i in kept if want[i] >= 5]
    chi2 = sum((g - w) ** 2 / w for g, w in cells)
    freedom = max(1, len(cells) - 1)
    # mean + 5 sigma: fails by chance about once in a million, and by a wrong temperature or cut always
    assert chi2 < freedom + 5 * math.sqrt(2 * freedom), f"chi2 {chi2:.1f} with {freedom} degrees of freedom"


def test_chi_square_notices_a_wrong_temperature() -> None:
    torch.manual_seed(0)
    logits, draws = torch.randn(24) * 2, 6_000
    want = torch.softmax(logits.double() / 0.9, -1) * draws
    got = torch.tensor([sample_top_p(logits, 1.0, 1.0, 11, p) for p in range(draws)]).bincount(minlength=24)
    assert float(((got - want) ** 2 / want).sum()) > 23 + 5 * math.sqrt(46)


def test_seeds_of_requests_differ_and_stay() -> None:
    seeds = {derive_seed(1, f"{call}/{i}") for call in range(20) for i in range(50)}
    assert len(seeds) == 1000
    assert derive_seed(1, "1/0") == derive_seed(1, "1/0") != derive_seed(2, "1/0")
    assert all(0 <= s < 2**63 for s in seeds)
