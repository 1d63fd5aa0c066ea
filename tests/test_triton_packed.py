"""The product with packed weights in Triton: that with the unpacked ones, each row's bits its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from llama_dist.kernels import triton_here
from llama_dist.kernels.tree import total
from llama_dist.quant import product
from llama_dist.quant.pack import pack, unpack
from llama_dist.quant.packed import Packed, empty
from llama_dist.quant.scheme import FP8, INT4, INT6, INT8, Scheme
from tests.kernel_cases import same_bits, totals_of_runs
from tests.triton_cases import DEVICES, DTYPES, running_on

SCHEMES = {"int8": INT8, "int6": INT6, "int4": INT4, "fp8": FP8}
SHAPES = ((1, 1, 1, 1), (3, 40, 72, 1), (70, 17, 33, 3), (5, 33, 64, 2))
"""Rows of x and of W, columns of a unit, units."""


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from running_on(request.param)


def triton() -> Any:
    from llama_dist.kernels import triton_packed

    return triton_packed


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def packed(scheme: Scheme, n: int, unit: int, n_units: int, device: str) -> Packed:
    w = draws(n, unit * n_units, seed=1)
    w[n // 2] += 1  # a row with a zero point of its own
    into = empty(scheme, n, unit, n_units, torch.device(device))
    assert pack(into, w) is None
    return into


@pytest.mark.parametrize(("m", "n", "unit", "n_units"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_as_with_unpacked_weights(
    device: str, name: str, dtype: torch.dtype, m: int, n: int, unit: int, n_units: int
) -> None:
    w = packed(SCHEMES[name], n, unit, n_units, device)
    x, bias = draws(m, unit * n_units).to(device, dtype), draws(n, seed=2).to(device, dtype)
    plain = unpack(w).to(dtype)
    unit_matrix = torch.eye(unit * n_units, dtype=dtype, device=device)
    assert torch.equal(triton().linear(unit_matrix, w), plain.T)
    true = x.double() @ plain.double().T + bias.double()
    size = x.double().abs() @ plain.double().abs().T + bias.double().abs() + 1
    found = triton().linear(x, w, bias)
    assert found.dtype == dtype
    assert float(((found.double() - true).abs() / size).max()) < 4e-6 + torch.finfo(dtype).eps


@pytest.mark.parametrize(("n", "unit", "n_units"), [(1, 1, 1), (40, 72, 1), (17, 33, 3), (19, 544, 2)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_one_row_few_rows_and_many_without_a_promise(
    device: str, monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype, n: int, unit: int, n_units: int
) -> None:
    """Three kernels beside that of the promise: for one row, in tiles of few, and cuBLAS's after unpacking."""
    from llama_dist.kernels import triton_packed_single, triton_unpack

    monkeypatch.setattr(triton_here, "serves", lambda x: True)
    monkeypatch.setattr(product.quantized, "compiled", lambda x: False)
    taken: list[str] = []

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, few=None: (
            taken.append(f"{name} {few}"),
            function(*args) if few is None else function(*args, few=few),
        )[1]

    for module, function in ((triton(), "linear"), (triton_packed_single, "linear"), (triton_unpack, "unpack")):
        name_of = module.__name__.rpartition(".")[2]
        monkeypatch.setattr(module, function, watched(name_of, getattr(module, function)))
    w = packed(SCHEMES[name], n, unit, n_units, device)
    assert torch.equal(triton_unpack.unpack(w, dtype), unpack(w).to(dtype))
    x, bias = draws(70, unit * n_units).to(device, dtype), draws(n, seed=2).to(device, dtype)
    plain = unpack(w).double()
    true = x.double() @ plain.T + bias.double()
    size = x.double().abs() @ plain.abs().T + bias.double().abs() + 1
    for m in (1, 3, 20, 70):
        found = product.linear(x[:m], w, bias, reproducible=False)
        assert found.shape == (m, n) and found.dtype == dtype
        assert float(((found.double() - true[:m]).abs() / size[:m]).max()) < 4e-6 + 2 * torch.finfo(dtype).eps, m
    ways = ["triton_packed_single None", "triton_packed True", "triton_packed False", "triton_unpack None"]
    assert taken[1:] == ways


@pytest.mark.parametrize("name", SCHEMES)
def test_a_row_s_bits_are_its_own(device: str, name: str) -> None:
    w, x = packed(SCHEMES[name], 40, 72, 2, device), draws(70, 144).to(device, torch.bfloat16)
    whole = triton().linear(x, w)
    for first, last in ((0, 1), (69, 70), (23, 25), (35, 70)):
        assert same_bits(triton().linear(x[first:last], w), whole[first:last]), (first, last)
    assert same_bits(triton().linear(x, w.blocks(1, 3)), whole[:, 16:])
    x[35] = float("nan")
    hurt = triton().linear(x, w)
    assert hurt[35].isnan().all()
    others = [i for i in range(70) if i != 35]
    assert same_bits(hurt[others], whole[others])


@pytest.mark.parametrize(("unit", "n_units"), [(1, 9), (96, 8), (37, 5)])
@pytest.mark.parametrize("name", SCHEMES)
def test_units_are_summed_in_the_tree(device: str, name: str, unit: int, n_units: int) -> None:
    w, x = packed(SCHEMES[name], 19, unit, n_units, device), draws(7, unit * n_units).to(device)
    alone = [triton().linear(part, w.units(i, i + 1)) for i, part in enumerate(torch.split(x, unit, 1))]
    true = total([(0, i) for i in range(n_units)], alone)

    def sums(first: int, stop: int) -> torch.Tensor:
        found: torch.Tensor = triton().unit_sums(x[:, first * unit : stop * unit], w.units(first, stop), first)
        return found

    for parts, whole in totals_of_runs(n_units, sums):
        assert same_bits(whole, true), parts


def test_it_serves_where_triton_does(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`quant.product` finds it, and unpacks no weight."""
    monkeypatch.setattr(triton_here, "serves", lambda x: True)
    monkeypatch.setattr(product.quantized, "compiled", lambda x: False)
    monkeypatch.setattr(product, "unpack", None)
    w, x = packed(INT8, 20, 40, 2, device), draws(3, 80).to(device)
    assert same_bits(product.linear(x, w), triton().linear(x, w))
    assert same_bits(product.unit_sums(x, w, 2), triton().unit_sums(x, w, 2))
