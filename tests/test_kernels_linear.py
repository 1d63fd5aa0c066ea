"""The product in C++: near a float64 one, its units summed in the tree, each entry's bits its own."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_dist.kernels import build, linear
from llama_dist.kernels.tree import roots, total
from tests.kernel_cases import DTYPES, askew, need_kernels, same_bits, threads

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
    for parts in (1, 2, 3, n_units):
        held: list[torch.Tensor] = []
        nodes = []
        for part in range(parts):
            first, stop = part * n_units // parts, (part + 1) * n_units // parts
            columns = slice(first * unit, stop * unit)
            held += list(linear.unit_sums(x[:, columns], w[:, columns], unit, first))
            nodes += roots(first, stop - first)
        assert same_bits(total(nodes, held), true), parts


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The product without AVX's instructions."""
    need_kernels()
    if not {"avx2", "fma"} <= set(Path("/proc/cpuinfo").read_text().split()):
        pytest.skip("this processor has no AVX2")
    cxx = build.compiler()
    assert cxx is not None
    target = tmp_path_factory.mktemp("linear") / "plain.so"
    build.compile_to(target, cxx, [build.SOURCES / "linear.cpp"], "-DLANES=0")
    return build.open_library(target)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_avx2_has_the_bits_of_plain_vectors(
    dtype: torch.dtype, plain: ctypes.CDLL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled anew, since the package's own may have AVX-512, whose sums have another order."""
    cxx = build.compiler()
    assert cxx is not None
    build.compile_to(tmp_path / "avx2.so", cxx, [build.SOURCES / "linear.cpp"], "-DLANES=1")
    usual: Any = linear._compiled()

    def using(library: ctypes.CDLL) -> Callable[..., Any]:
        call = library.llama_dist_linear
        call.argtypes = usual.argtypes
        return lambda: call

    for m, n, k in SHAPES:
        x, w = draws(m, k, dtype=dtype), draws(n, k, dtype=dtype, seed=1)
        unit = max(1, k // 5)
        whole = k // unit * unit
        found = []
        for library in (plain, build.open_library(tmp_path / "avx2.so")):
            monkeypatch.setattr(linear, "_compiled", using(library))
            found.append(linear.linear(x, w))
            found.append(linear.unit_sums(x[:, :whole], w[:, :whole], unit, 3))
        assert same_bits(found[0], found[2]) and same_bits(found[1], found[3]), (m, n, k)
