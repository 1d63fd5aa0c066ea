"""The product of rows in C++: near a float64 one, its units summed in the tree, each entry's bits its own."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from llama_dist.kernels import linear
from llama_dist.kernels.tree import total
from tests.kernel_cases import DTYPES, askew, need_kernels, same_bits, threads, totals_of_runs

SHAPES = ((1, 1, 1), (2, 17, 33), (3, 5, 64), (4, 16, 100), (7, 35, 576), (33, 6, 513), (70, 64, 1100))
"""Rows, columns, and what is summed."""


@pytest.fixture(autouse=True)
def _kernels() -> None:
    need_kernels()


def draws(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_near_float64(dtype: torch.dtype, m: int, n: int, k: int) -> None:
    x, w, bias = draws(m, k, dtype=dtype), draws(n, k, dtype=dtype, seed=1), draws(n, dtype=dtype, seed=2)
    true = x.double() @ w.double().T + bias.double()
    found = linear.linear(x, w, bias, torch.float32)
    assert found.dtype == torch.float32
    size = x.double().abs() @ w.double().abs().T + 1
    assert float(((found.double() - true).abs() / size).max()) < 2e-6
    assert same_bits(linear.linear(x, w, bias), found.to(dtype))


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_entry_depends_on_its_row_and_column_alone(dtype: torch.dtype, m: int, n: int, k: int) -> None:
    x, w = draws(m, k, dtype=dtype), draws(n, k, dtype=dtype, seed=1)
    whole = linear.linear(x, w)
    with threads(2):
        assert same_bits(linear.linear(askew(x, 3), askew(w, 5)), whole)
    for first in range(0, m, 3):
        for rows in (1, 2, 3, 4, 9):
            assert same_bits(linear.linear(x[first : first + rows], w), whole[first : first + rows])
    for first, columns in product(range(0, n, 5), (1, 3, 16, 21)):
        part = slice(first, first + columns)
        assert same_bits(linear.linear(x, w[part]), whole[:, part])


@pytest.mark.parametrize(("unit", "n_units"), [(1, 9), (64, 9), (192, 8), (37, 5), (700, 3)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_units_are_summed_in_the_tree(dtype: torch.dtype, unit: int, n_units: int) -> None:
    x, w = draws(6, unit * n_units, dtype=dtype), draws(19, unit * n_units, dtype=dtype, seed=1)
    cuts = list(zip(torch.split(x, unit, 1), torch.split(w, unit, 1), strict=True))
    alone = [linear.linear(a.contiguous(), b.contiguous(), dtype=torch.float32) for a, b in cuts]
    true = total([(0, i) for i in range(n_units)], alone)

    def sums(first: int, stop: int) -> torch.Tensor:
        columns = slice(first * unit, stop * unit)
        return linear.unit_sums(x[:, columns], w[:, columns], unit, first)

    for parts, whole in totals_of_runs(n_units, sums):
        assert same_bits(whole, true), parts
