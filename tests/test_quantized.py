"""Packed weights: how near they come, and that a product with them is what its whole numbers say, row by row."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_dist.kernels import build, quantized
from llama_dist.kernels.tree import roots, total
from llama_dist.quant import pack as packing
from llama_dist.quant import product
from llama_dist.quant.pack import pack, pack_twin, unpack
from llama_dist.quant.packed import Packed, empty, together
from llama_dist.quant.scheme import FP8, GROUP, INT4, INT6, INT8, packed_bytes
from tests.kernel_cases import DTYPES, askew, need_kernels, same_bits, threads

CPU = torch.device("cpu")
SCHEMES = {"int8": INT8, "int6": INT6, "int4": INT4, "fp8": FP8}
MOST = {"int8": 4096, "int6": 4096, "int4": 2048, "fp8": 4096}
"""What a number of x is at most, in units of its group, as the kernel rounds it."""
SHAPES = ((48, 576, 1), (40, 72, 3), (17, 8, 9), (33, 192, 5), (1, 45, 1), (64, 64, 2))
"""Rows, columns of a unit, units."""
# Errors of normally distributed weights, as a share of their root mean square: measured, and a tenth more.
NEAR = {"int8": 0.0061, "int6": 0.0250, "int4": 0.0800, "fp8": 0.0290}


def some(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def hard(rows: int, columns: int) -> torch.Tensor:
    """Weights with zeros, outliers, tiny numbers and groups of one sign among them."""
    w = some(rows, columns)
    w[0, : columns // 2] = 0
    w[rows // 2, columns // 3] = 70
    w[rows // 3] *= 1e-33
    w[-1] = w[-1].abs() + 3
    return w


def packed(name: str, w: torch.Tensor, unit: int, n_units: int) -> Packed:
    into = empty(SCHEMES[name], len(w), unit, n_units, CPU)
    assert pack(into, w) is None
    return into


@pytest.mark.parametrize("name", SCHEMES)
def test_near_the_weights(name: str) -> None:
    w = some(64, 2048)
    held = packed(name, w, 2048, 1)
    error = ((unpack(held) - w).norm() / w.norm()).item()
    assert 0.8 * NEAR[name] < error < NEAR[name]
    assert (
        held.nbytes
        == packed_bytes(SCHEMES[name], 64, 2048, 1)
        < 64 * 2048 * {"int8": 1.04, "int6": 0.79, "int4": 0.57, "fp8": 1.002}[name]
    )


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize(("rows", "unit", "n_units"), SHAPES)
def test_no_weight_is_far(name: str, rows: int, unit: int, n_units: int) -> None:
    """Within a step of the weight's group, for outliers, tiny numbers, zeros; groups do not straddle units."""
    w = hard(rows, unit * n_units)
    held = packed(name, w, unit, n_units)
    pad = -unit % GROUP
    groups = torch.nn.functional.pad(w.view(rows, n_units, unit), (0, pad)).unflatten(2, (-1, GROUP))
    span = groups.clamp(min=0).amax(-1) - groups.clamp(max=0).amin(-1)
    if name == "fp8":  # half a step between two numbers of three bits, or below the least with a leading one
        step = torch.maximum(groups.abs() / 16, groups.abs().amax((2, 3), keepdim=True) / 448 / 1024) * (1 + 1e-6)
    else:
        steps = {"int8": 1 / 127, "int6": 1 / 31, "int4": 1.1 / 15}[name]
        step = (span * steps + span.amax(2, keepdim=True) / 127 / 255)[..., None].expand(groups.shape)
    off = torch.nn.functional.pad((unpack(held) - w).view(rows, n_units, unit), (0, pad)).unflatten(2, (-1, GROUP))
    assert (off.abs() <= step + 1e-30).all()
    assert not unpack(packed(name, 0 * w, unit, n_units)).any()


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize(("rows", "unit", "n_units"), SHAPES)
def test_both_ways_to_pack_give_the_same_bits(name: str, rows: int, unit: int, n_units: int) -> None:
    need_kernels()
    w = hard(rows, unit * n_units)
    twin = empty(SCHEMES[name], rows, unit, n_units, CPU)
    assert pack_twin(twin, w) is None
    for n in (1, 2):
        with threads(n):
            assert all(map(torch.equal, packed(name, w, unit, n_units).parts, twin.parts))


@pytest.mark.parametrize("name", SCHEMES)
def test_numbers_of_a_unit_are_its_own(name: str) -> None:
    """Rows in pieces, units by themselves, fewer columns than there is room for: the same numbers."""
    w = hard(40, 5 * 72)
    whole = packed(name, w, 72, 5)
    pieces = empty(SCHEMES[name], 40, 72, 5, CPU)
    for start in (0, 32):
        assert pack(pieces, w[start : start + 32], start) is None
    assert all(map(torch.equal, pieces.parts, whole.parts))
    some_units = packed(name, w[:, 144:288], 72, 2)
    assert all(map(torch.equal, some_units.parts, whole.units(2, 4).parts))
    short = packed(name, w[:, :100], 72, 5)
    assert torch.equal(unpack(short)[:, :72], unpack(whole)[:, :72]) and not unpack(short)[:, 144:].any()


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -3e30])
def test_what_cannot_be_packed_is_found(name: str, bad: float) -> None:
    w = some(50, 64)
    w[37, 5] = bad
    assert pack(empty(SCHEMES[name], 50, 64, 1, CPU), w) == 32
    assert pack_twin(empty(SCHEMES[name], 50, 64, 1, CPU), w) == 32


@pytest.mark.parametrize("way", ["C++", "torch"])
def test_every_small_float_is_packed_as_itself(way: str) -> None:
    """And read as what torch takes its bits for; numbers between two go to the nearer, from the middle to the even."""
    need_kernels()
    codes = torch.arange(128, dtype=torch.uint8)[:-1]  # the last is no number
    numbers = codes.view(torch.float8_e4m3fn).double()
    middles = (numbers[1:] + numbers[:-1]) / 2
    asked = torch.cat((numbers, middles, middles * (1 - 2**-20), middles * (1 + 2**-20))).float()
    wanted = torch.cat(
        (numbers, torch.where(torch.arange(126) % 2 == 0, numbers[:-1], numbers[1:]), numbers[:-1], numbers[1:])
    )
    for sign in (1, -1):
        row = torch.cat((asked * sign, torch.tensor([448.0])))[None]
        into = empty(FP8, 1, row.shape[1], 1, CPU)
        assert (pack if way == "C++" else pack_twin)(into, row) is None
        assert into.factors[0, 0, 0] == 1
        assert torch.equal(unpack(into)[0, :-1].double(), wanted * sign)
        unit_matrix = torch.eye(row.shape[1])
        for m in (1, 13):  # direct, and widened
            assert torch.equal(product.linear(unit_matrix[:m], into)[:, 0].double(), wanted[:m] * sign)


def rounded(x: torch.Tensor, unit: int, name: str) -> torch.Tensor:
    """What the kernel takes x for, in float64: whole numbers for each group of 32 numbers of a unit."""
    if name == "fp8":
        return x.double()
    m, n_units = len(x), x.shape[1] // unit
    groups = torch.nn.functional.pad(x.float().view(m, n_units, unit), (0, -unit % GROUP)).unflatten(2, (-1, GROUP))
    largest = groups.double().abs().amax(-1, keepdim=True)
    step = 2 ** largest.log2().floor() * 2 / MOST[name]
    codes = torch.where(largest > 0, groups.double() / step, 0).round()
    return (codes * step).flatten(2)[..., :unit].reshape(m, -1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize(("rows", "unit", "n_units"), SHAPES)
def test_product_is_that_of_its_numbers(name: str, rows: int, unit: int, n_units: int, dtype: torch.dtype) -> None:
    need_kernels()
    held = packed(name, hard(rows, unit * n_units), unit, n_units)
    x, bias = some(70, unit * n_units, 1).to(dtype), some(1, rows, 2)[0].to(dtype)
    exact = rounded(x, unit, name) @ unpack(held, torch.float64).T
    size = rounded(x, unit, name).abs() @ unpack(held, torch.float64).abs().T
    for m in (1, 2, 3, 5, 32, 70):
        sums = product.unit_sums(x[:m], held, 3)
        assert len(sums) == len(roots(3, n_units))
        assert ((sums.sum(0).double() - exact[:m]).abs() <= 1e-6 * size[:m]).all()
        y = product.linear(x[:m], held, bias)
        limit = 1e-6 * size[:m] + (exact[:m] + bias).abs() * torch.finfo(dtype).eps
        assert y.dtype == dtype and ((y.double() - exact[:m] - bias.double()).abs() <= limit).all()
        off = product.linear_twin(x[:m], held, bias).double() - exact[:m] - bias.double()
        steps = (
            x[:m].float().abs().amax(1, keepdim=True).double() / MOST[name] * unpack(held, torch.float64).abs().sum(1)
        )
        slack = (size[:m] + exact[:m].abs() + bias.abs()) * torch.finfo(dtype).eps
        assert (off.abs() <= steps + slack).all(), "the twin is further off than rounding x explains"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_a_row_keeps_its_bits(name: str, dtype: torch.dtype) -> None:
    """Beside other rows and columns, on more threads, at another address, with its units shared by two ranks."""
    need_kernels()
    w = hard(200, 5 * 72)
    held = packed(name, w, 72, 5)
    x = some(70, 360, 1).to(dtype)
    y, sums = product.linear(x, held), total(roots(0, 5), list(product.unit_sums(x, held, 0)))
    for start, stop in ((0, 1), (69, 70), (3, 5), (4, 7), (1, 64), (6, 70)):
        assert same_bits(product.linear(x[start:stop], held), y[start:stop])
        assert same_bits(product.linear(askew(x[start:stop], 3), held), y[start:stop])
    for n in (1, 2, 3):
        with threads(n):
            assert same_bits(product.linear(x, held), y)
            assert same_bits(product.linear(x, held.blocks(3, 7)), y[:, 48:112])
    for at in (1, 2, 3, 4):
        left = product.unit_sums(x[:, : 72 * at], held.units(0, at), 0)
        right = product.unit_sums(x[:, 72 * at :], held.units(at, 5), at)
        nodes = roots(0, at) + roots(at, 5 - at)
        assert same_bits(total(nodes, [*left, *right]), sums)


@pytest.mark.parametrize("name", SCHEMES)
def test_very_many_rows_keep_their_bits(name: str) -> None:
    """Several blocks of rows, shared by threads in both ways."""
    need_kernels()
    held = packed(name, hard(100, 704), 704, 1)
    x = some(1100, 704, 1).bfloat16()
    few = torch.cat([product.linear(part, held) for part in x.split(5)])
    for n in (1, 2, 3):
        with threads(n):
            assert same_bits(product.linear(x, held), few)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "zero"), [("int8", 128), ("int6", 32), ("int4", 255 / 16)])
def test_the_largest_sums_are_exact(name: str, zero: float, dtype: torch.dtype) -> None:
    """All weights as far below zero as codes can say, all of x what becomes the largest whole number."""
    need_kernels()
    held = empty(SCHEMES[name], 16, GROUP, 1, CPU)
    for part, value in zip(held.parts, (0, 255, 1), strict=True):
        part.fill_(value)
    x = torch.full((40, GROUP), 2 - torch.finfo(dtype).eps, dtype=dtype)
    whole = rounded(x, GROUP, name)
    assert whole.max() > 1.99
    for m in (1, 4, 40):
        assert torch.equal(
            product.unit_sums(x[:m], held, 0)[0].double(),
            (whole[:m].sum(1) * -zero * 255).float().double()[:, None].expand(-1, 16),
        )


@pytest.mark.parametrize("name", SCHEMES)
def test_weights_that_lie_together(name: str) -> None:
    need_kernels()
    widths, w = (24, 7, 16), [some(n, 72, n) for n in (24, 7, 16)]
    whole, views = together([empty(SCHEMES[name], n, 72, 1, CPU) for n in widths])
    for view, part in zip(views, w, strict=True):
        pack(view, part)
    x = some(5, 72, 1)
    y = product.linear(x, whole)
    for at, view, part in zip((0, 32, 48), views, w, strict=True):
        assert same_bits(y[:, at : at + len(part)].contiguous(), product.linear(x, view))


@pytest.mark.parametrize("name", SCHEMES)
def test_broken_numbers_show(name: str) -> None:
    held = packed(name, some(20, 96), 96, 1)
    for m, dtype in ((3, torch.float32), (40, torch.bfloat16)):
        x = some(m, 96, 1).to(dtype)
        x[1, 40], x[2, 95] = float("nan"), float("inf")
        y = product.linear(x, held)
        assert y[0].isfinite().all() and not y[1:3].isfinite().any() and y[3:].isfinite().all()
        assert (product.linear(torch.zeros(m, 96, dtype=dtype), held) == 0).all()


NEEDS = {0: {"fma"}, 1: {"avx2", "fma"}, 2: {"avx512f", "avx512bw", "avx512vl", "avx512dq"}}


def test_all_ways_give_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four plain vectors, AVX2, AVX-512 and that without products of bytes, where they are; with AMX or without."""
    need_kernels()
    words = set(Path("/proc/cpuinfo").read_text().split())
    ways = [(f"-DLANES={way}",) for way, needed in NEEDS.items() if needed <= words]
    ways += [("-mno-avx512vnni",)] if "avx512_vnni" in words else []
    usual, cxx = everything(), build.compiler()
    assert cxx is not None and len(ways) > 1
    for i, flags in enumerate(ways):
        path = tmp_path / f"{i}.so"
        build.compile_to(path, cxx, [build.SOURCES / f"{name}.cpp" for name in ("quantized", "panels", "pack")], *flags)
        use(build.open_library(path), monkeypatch)
        assert all(map(torch.equal, everything(), usual)), flags


def use(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((quantized, "llama_dist_quantized"), (packing, "llama_dist_pack")):
        call, known = getattr(library, name), getattr(build.library(), name)
        call.argtypes, call.restype = known.argtypes, known.restype

        def compiled(call: Any = call) -> Any:
            return call

        monkeypatch.setattr(module, "_compiled", compiled)


def everything() -> list[torch.Tensor]:
    found = []
    for name in SCHEMES:
        for rows, unit, n_units in SHAPES:
            held = packed(name, hard(rows, unit * n_units), unit, n_units)
            found += held.parts
            for dtype in DTYPES:
                for m in (7, 45):
                    x = some(m, unit * n_units, 1)
                    x[::3] *= torch.logspace(-33, 29, x.shape[1])  # groups that count as zero, and the largest
                    x[2, : unit // 2] = 0
                    found += [product.linear(x.to(dtype), held), product.unit_sums(x.to(dtype), held, 2)]
    return found
