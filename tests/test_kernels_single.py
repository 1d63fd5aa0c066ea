"""The likeliest token and the look-up of rows in C++: the same as torch's, at every border of sixteen lanes."""

from __future__ import annotations

import pytest
import torch

from llama_dist.kernels.single import likeliest, likeliest_twin
from llama_dist.quant.pack import pack, rows, rows_twin
from llama_dist.quant.packed import EXACT, empty
from tests.kernel_cases import DTYPES, need_kernels, same_bits


@pytest.fixture(autouse=True)
def _kernels() -> None:
    need_kernels()


def draws(m: int, n: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("n", [1, 15, 16, 17, 31, 32, 1000, 32003])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_the_first_of_the_greatest(n: int, dtype: torch.dtype) -> None:
    logits = draws(9, n, dtype, n)
    logits[1] = -3.5  # all alike
    logits[2] = logits[2].abs().neg() - 1  # zeros beyond the end are no numbers of it
    logits[3, n // 2 :] = logits[3].max() + 1
    logits[4, n - 1] = 99
    logits[5, 0] = logits[5, n - 1] = 99
    logits[6] = 0
    logits[6, n // 3] = -0.0
    found = likeliest(logits)
    assert found == likeliest_twin(logits) == logits.argmax(1).tolist()
    assert found[1] == 0 and found[3] == n // 2 and found[4] == n - 1 and found[5] == 0


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_with_a_number_that_is_not_finite_has_none(wrong: float, dtype: torch.dtype) -> None:
    for place in (0, 7, 16, 36, 39):
        logits = draws(3, 40, dtype)
        logits[1, place] = wrong
        found = likeliest(logits)
        assert found == likeliest_twin(logits) and found[1] == -1 and min(found[0], found[2]) >= 0


def test_rows_may_be_columns_of_wider_ones() -> None:
    wide = draws(5, 100, torch.float32)
    wide[:, 70:] = float("nan")
    assert likeliest(wide[:, :70]) == wide[:, :70].argmax(1).tolist()


@pytest.mark.parametrize("unit", [1, 31, 32, 33, 576])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_looked_up_in_their_panels(unit: int, dtype: torch.dtype) -> None:
    table = draws(37, unit, dtype)
    held = empty(EXACT[dtype], 37, unit, 1, torch.device("cpu"))
    pack(held, table)
    ids = torch.tensor([36, 0, 15, 16, 0])
    assert same_bits(rows(held, ids), table[ids]) and same_bits(rows_twin(held, ids), table[ids])
    with pytest.raises(IndexError, match="row 48 of 37"):
        rows(held, torch.tensor([3, 48]))
    with pytest.raises(IndexError, match="row -1 of 37"):
        rows(held, torch.tensor([-1]))
