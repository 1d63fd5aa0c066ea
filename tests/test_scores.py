"""Logprobs in C++ and in torch's operations: of the model's own distribution, with ties by id."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from llama_dist.engine.scores import Score, scores_of, scores_twin
from tests.kernel_cases import DTYPES, need_kernels

Ways = Callable[[torch.Tensor, list[int], list[int]], list[Score]]


@pytest.fixture(params=[scores_of, scores_twin], ids=["C++", "torch"])
def ways(request: pytest.FixtureRequest) -> Ways:
    if request.param is scores_of:
        need_kernels()
    way: Ways = request.param
    return way


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 7, 16, 33, 4099])
def test_they_are_of_the_plain_distribution(ways: Ways, dtype: torch.dtype, vocab: int) -> None:
    torch.manual_seed(vocab)
    logits = (torch.randn(6, vocab) * 4).round(decimals=1).to(dtype)  # with ties
    tokens, tops = [i * 31 % vocab for i in range(6)], [0, 1, 5, 20, 3, 0]
    want = torch.log_softmax(logits.double(), -1)
    for i, (own, likeliest) in enumerate(ways(logits, tokens, tops)):
        assert own == pytest.approx(float(want[i, tokens[i]]), abs=2e-6)
        ids = sorted(range(vocab), key=lambda t: (-float(logits[i, t]), t))[: tops[i]]
        assert [t for t, _ in likeliest] == ids
        assert [x for _, x in likeliest] == pytest.approx(want[i, ids].tolist(), abs=2e-6)


def test_a_token_among_the_likeliest_has_one_logprob(ways: Ways) -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 5000).bfloat16()
    token = int(logits[0].argmax())
    [(own, [(first, value), _])] = ways(logits, [token], [2])
    assert first == token and value == own


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_the_same_bits_among_others(dtype: torch.dtype) -> None:
    need_kernels()
    torch.manual_seed(1)
    wide = torch.randn(9, 40_003).to(dtype)
    logits, tokens, tops = wide[:, 2:40_000], [*range(9)], [4] * 9
    together = scores_of(logits, tokens, tops)
    assert together == [scores_of(logits[i : i + 1].clone(), [i], [4])[0] for i in range(9)]


def test_far_logits_do_not_overflow(ways: Ways) -> None:
    [(own, [(first, best)])] = ways(torch.tensor([[1e4, -1e4, 0.0]]), [1], [1])
    assert own == -2e4 and (first, best) == (0, 0.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_scores_as_a_cpu_does() -> None:
    torch.manual_seed(2)
    logits, tokens, tops = (torch.randn(8, 128_256) * 3).bfloat16(), [*range(8)], [0, 1, 5, 20, 0, 3, 5, 5]
    for (own, likeliest), (want, wanted) in zip(
        scores_of(logits.cuda(), tokens, tops), scores_twin(logits, tokens, tops), strict=True
    ):
        assert own == pytest.approx(want, abs=1e-5)
        assert [i for i, _ in likeliest] == [i for i, _ in wanted]
        assert [x for _, x in likeliest] == pytest.approx([x for _, x in wanted], abs=1e-5)
