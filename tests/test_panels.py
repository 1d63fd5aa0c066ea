"""The product with weights in panels: near a float64 one, its units summed in the tree, each entry's bits its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from llama_dist.kernels import build, quantized
from llama_dist.kernels.tree import total
from llama_dist.quant import pack as packing
from llama_dist.quant import product
from llama_dist.quant.pack import pack, rows, unpack
from llama_dist.quant.packed import EXACT, Packed, empty, together
from tests.kernel_cases import (
    DTYPES,
    askew,
    compiled_apart,
    instructions,
    need_kernels,
    same_bits,
    threads,
    totals_of_runs,
)

CPU = torch.device("cpu")
SHAPES = (
    (1, 1, 1),
    (2, 17, 33),
    (3, 35, 64),
    (4, 16, 100),
    (7, 130, 576),
    (13, 6, 513),
    (70, 64, 1100),
    (520, 40, 600),
    (100, 50, 576),
    (150, 35, 2304),
    (50, 200, 640),
    (600, 70, 1024),
    (33, 70, 1024),
)
"""Rows, columns, and what is summed. Many rows are taken by up to four panels of sixteen columns, by slices of them."""
NEEDS = {0: {"fma"}, 1: {"avx2", "fma"}, 2: {"avx512f", "avx512bw", "avx512vl", "avx512dq"}}


@pytest.fixture(autouse=True)
def _kernels() -> None:
    need_kernels()


def draws(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def laid(w: torch.Tensor, n_units: int = 1) -> Packed:
    found = empty(EXACT[w.dtype], len(w), w.shape[1] // n_units, n_units, CPU)
    assert pack(found, w) is None
    return found


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_near_float64(dtype: torch.dtype, m: int, n: int, k: int) -> None:
    x, w, bias = draws(m, k, dtype=dtype), draws(n, k, dtype=dtype, seed=1), draws(n, dtype=dtype, seed=2)
    true = x.double() @ w.double().T
    (sums,) = product.unit_sums(x, laid(w), 0)
    size = x.double().abs() @ w.double().abs().T + 1
    assert float(((sums.double() - true).abs() / size).max()) < 1e-6
    assert same_bits(product.linear(x, laid(w)), sums.to(dtype))
    assert same_bits(product.linear(x, laid(w), bias), (sums + bias.float()).to(dtype))


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_entry_depends_on_its_row_and_column_alone(dtype: torch.dtype, m: int, n: int, k: int) -> None:
    x, w = draws(m, k, dtype=dtype), draws(n, k, dtype=dtype, seed=1)
    held = laid(w)
    whole = product.linear(x, held)
    for count in (1, 2, 3):
        with threads(count):
            assert same_bits(product.linear(askew(x, 3), held), whole)
    for first in range(0, m, 1 + m // 7):
        for some in (1, 2, 3, 4, 6, 7, 12, 13, 40):
            assert same_bits(product.linear(x[first : first + some], held), whole[first : first + some]), (first, some)
    for first in range(0, n, 5):
        for some in (1, 3, 16, 33):
            part = slice(first, first + some)
            assert same_bits(product.linear(x, laid(w[part])), whole[:, part]), part


@pytest.mark.parametrize(("unit", "n_units"), [(1, 9), (64, 9), (192, 8), (37, 5), (700, 3), (1200, 2), (40, 37)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_units_are_summed_in_the_tree(dtype: torch.dtype, unit: int, n_units: int) -> None:
    w = draws(75, unit * n_units, dtype=dtype, seed=1)  # two panels and more for each thread
    held = laid(w, n_units)
    for m in (1, 2, 6, 30, 70):
        x = draws(m, unit * n_units, dtype=dtype)
        alone = [product.unit_sums(a, laid(b), 0)[0] for a, b in zip(x.split(unit, 1), w.split(unit, 1), strict=True)]
        true = total([(0, i) for i in range(n_units)], alone)

        def sums(first: int, stop: int, x: torch.Tensor = x) -> torch.Tensor:
            return product.unit_sums(x[:, first * unit : stop * unit], held.units(first, stop), first)

        for parts, whole in totals_of_runs(n_units, sums):
            assert same_bits(whole, true), (m, parts)
        once = product.linear(x, held)
        for i in (0, m // 2, m - 1):
            assert same_bits(once[i : i + 1], product.linear(x[i : i + 1], held)), (m, i)
        near = (x.double() @ w.double().T).to(dtype)
        torch.testing.assert_close(once, near, rtol=2**-7 if dtype == torch.bfloat16 else 1e-4, atol=1e-2)


@pytest.mark.parametrize(("n", "unit", "n_units"), [(1, 1, 1), (16, 32, 1), (35, 37, 5), (50, 100, 2)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_come_back(
    dtype: torch.dtype, n: int, unit: int, n_units: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = draws(n, unit * n_units, dtype=dtype)
    held = laid(w, n_units)
    assert torch.equal(unpack(held, dtype), w)
    if n_units == 1:
        ids = torch.tensor([n - 1, 0, n // 2])
        assert torch.equal(rows(held, ids), w[ids])
    monkeypatch.setattr(packing, "_lay", lambda: None)
    assert torch.equal(laid(w, n_units).codes, held.codes)


def test_weights_that_lie_together() -> None:
    widths, w = (24, 7, 16), [draws(n, 72, dtype=torch.bfloat16, seed=n) for n in (24, 7, 16)]
    whole, views = together([empty(EXACT[torch.bfloat16], n, 72, 1, CPU) for n in widths])
    for view, part in zip(views, w, strict=True):
        pack(view, part)
    x = draws(5, 72, dtype=torch.bfloat16)
    y = product.linear(x, whole)
    for at, part in zip((0, 32, 48), w, strict=True):
        assert same_bits(y[:, at : at + len(part)].contiguous(), product.linear(x, laid(part)))


def test_broken_numbers_stay_in_their_rows() -> None:
    held, x = laid(draws(20, 96, dtype=torch.float32)), draws(30, 96, dtype=torch.float32, seed=1)
    x[1, 40], x[2, 95] = float("nan"), float("inf")
    y = product.linear(x, held)
    broken = torch.zeros(30, dtype=torch.bool)
    broken[1:3] = True
    assert y[~broken].isfinite().all() and not y[broken].isfinite().any()


def test_all_ways_give_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four plain vectors, AVX2 and AVX-512, where the processor has them, multiply and add in one order."""
    words = set(Path("/proc/cpuinfo").read_text().split())
    ways = [way for way, needed in NEEDS.items() if needed <= words]
    usual = everything() if instructions() in PLAIN else None
    assert len(ways) > 1
    for way in ways:
        monkeypatch.setattr(quantized, "_compiled", compiled(tmp_path / f"{way}.so", f"-DLANES={way}", "-DDOTS=0"))
        usual = usual or everything()
        assert all(map(same_bits, everything(), usual)), way


def test_amx_has_its_bits_without_its_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As AVX-512 gives them where a process may not use AMX."""
    if instructions() != "amx":
        pytest.skip("needs a processor with AMX")
    usual = everything()
    monkeypatch.setattr(quantized, "_compiled", compiled(tmp_path / "pairs.so", "-DTILES=0"))
    assert all(map(same_bits, everything(), usual))


def test_the_order_of_a_sum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of bfloat16, whose products are exact: as panels.cpp and dots.h say."""
    x, w = draws(5, 600, dtype=torch.bfloat16), draws(37, 600, dtype=torch.bfloat16, seed=1)
    held, usual = laid(w), instructions()
    products = F.pad(x.float()[:, None] * w.float(), (0, 8))  # [5, 37, whole groups]
    assert same_bits(product.unit_sums(x, held, 0)[0], in_order(products, usual)), usual
    if usual == "amx":
        monkeypatch.setattr(quantized, "_compiled", compiled(tmp_path / "dots.so", "-DDOTS=1"))
        assert same_bits(product.unit_sums(x, held, 0)[0], in_order(products, "avx512_bf16"))


def in_order(products: torch.Tensor, name: str) -> torch.Tensor:
    """The sum over the last dimension by such a processor's instructions."""
    if name == "avx512_bf16":
        return chain(products.unflatten(2, (-1, 2)).flip(3).flatten(2))  # of a pair the second comes first
    if name == "amx":
        blocks = products.unflatten(2, (-1, 16, 2))  # even and odd places
        return chain(chain(blocks.transpose(3, 4)).sum(3))
    return chain(torch.stack([chain(part) for part in products.split(256, 2)], 2))


def chain(numbers: torch.Tensor) -> torch.Tensor:
    """The sum over the last dimension, one after another, from zero."""
    total = torch.zeros(numbers.shape[:-1])
    for one in numbers.unbind(-1):
        total = total + one
    return total


PLAIN = build.INSTRUCTIONS[:2]


def compiled(path: Path, *flags: str) -> Callable[[], Any]:
    return compiled_apart(path, quantized._compiled(), ("quantized", "panels"), *flags)


def everything() -> list[torch.Tensor]:
    found = []
    for dtype in DTYPES:
        for m, n, k in SHAPES:
            x, w = draws(m, k, dtype=dtype), draws(n, k, dtype=dtype, seed=1)
            found += [product.linear(x, laid(w)), product.unit_sums(x, laid(w, 1 if k % 3 else 3), 2)]
    return found
