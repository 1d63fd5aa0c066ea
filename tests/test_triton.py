"""Products, norms and the gate in Triton: near a float64 one, and each entry's bits its own.

By Triton's interpreter where there is no GPU: that sees masks, orders and addresses, but no tensor core.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from llama_dist.engine import numerics
from llama_dist.kernels import linear, small, triton_here
from llama_dist.kernels.tree import total
from tests.kernel_cases import askew, same_bits, totals_of_runs
from tests.triton_cases import DEVICES, DTYPES, need_triton, running_on

EPS = 1e-5
KERNELS = Path(triton_here.__file__).parent
SHAPES = ((1, 1, 1), (3, 70, 33), (70, 5, 100), (130, 66, 192))
"""Rows, columns, and what is summed."""


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from running_on(request.param)


def draws(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def products() -> Any:
    from llama_dist.kernels import triton_linear

    return triton_linear


def rows() -> Any:
    from llama_dist.kernels import triton_rows

    return triton_rows


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_near_float64(device: str, dtype: torch.dtype, m: int, n: int, k: int) -> None:
    x, w, bias = (draws(*shape, dtype=dtype, device=device, seed=i) for i, shape in enumerate([(m, k), (n, k), (n,)]))
    true = x.double() @ w.double().T + bias.double()
    found = products().linear(x, w, bias, torch.float32)
    assert found.dtype == torch.float32
    size = x.double().abs() @ w.double().abs().T + 1
    assert float(((found.double() - true).abs() / size).max()) < 4e-6
    assert same_bits(products().linear(x, w, bias), found.to(dtype))


def check_entries(device: str, dtype: torch.dtype, m: int, n: int, k: int) -> None:
    x, w = draws(m, k, dtype=dtype, device=device), draws(n, k, dtype=dtype, device=device, seed=1)
    whole = products().linear(x, w)
    wide = torch.cat([x, x.new_full((m, 3), float("nan"))], dim=1)
    assert same_bits(products().linear(wide[:, :k], askew(w, 5)), whole)
    for first, last in ((0, 1), (m - 1, m), (m // 3, m // 3 + 2), (m // 2, m)):
        assert same_bits(products().linear(x[first:last], w), whole[first:last]), (first, last)
    for first, last in ((0, 1), (n // 3, n), (n // 2, n // 2 + 3)):
        assert same_bits(products().linear(x, w[first:last]), whole[:, first:last]), (first, last)
    x[m // 2] = float("nan")
    hurt = products().linear(x, w)
    assert hurt[m // 2].isnan().all()
    others = [i for i in range(m) if i != m // 2]
    assert same_bits(hurt[others], whole[others])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiles_of_all_sizes_give_the_same_bits(
    device: str, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    x, w = draws(150, 200, dtype=dtype, device=device), draws(140, 200, dtype=dtype, device=device, seed=1)
    assert products().tiles_agree(x, w)
    real = products()._run

    def turned(x: torch.Tensor, w: torch.Tensor, bias: Any, y: torch.Tensor, unit: int, tile: Any) -> torch.Tensor:
        large = tile == products().LARGE
        return real(x.flip(1), w.flip(1), bias, y, unit, tile) if large else real(x, w, bias, y, unit, tile)

    monkeypatch.setattr(products(), "_run", turned)
    assert products().tiles_agree(x, w) == (dtype == torch.float32)


def test_tiles_go_by_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    need_triton("cpu" if not torch.cuda.is_available() else "cuda")
    one, bf16 = products(), torch.empty(0, dtype=torch.bfloat16)
    found = [one.tile_for(bf16, *shape) for shape in ((1, 4096, 1), (64, 28672, 1), (65, 4096, 1), (512, 4096, 1))]
    assert found == [one.NARROW, one.SQUARE, one.NARROW, one.LARGE]
    assert one.tile_for(torch.empty(0), 512, 4096, 1) == one.OF_FLOAT32
    monkeypatch.setattr(one, "_agree", lambda *how: False)
    like = SimpleNamespace(dtype=torch.bfloat16, device=torch.device("cuda", 0))
    assert [one.tile_for(like, *shape) for shape in ((1, 4096, 1), (512, 4096, 1))] == [one.SQUARE] * 2
    monkeypatch.undo()
    monkeypatch.setattr(one, "tiles_agree", None)
    assert not one._agree.__wrapped__(torch.device("cpu"), torch.bfloat16)


@pytest.mark.parametrize(("m", "n", "k"), SHAPES[2:])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_entry_depends_on_its_row_and_column_alone(device: str, dtype: torch.dtype, m: int, n: int, k: int) -> None:
    check_entries(device, dtype, m, n, k)


def check_units(device: str, dtype: torch.dtype, unit: int, n_units: int) -> None:
    x = draws(70, unit * n_units, dtype=dtype, device=device)
    w = draws(19, unit * n_units, dtype=dtype, device=device, seed=1)
    cuts = list(zip(torch.split(x, unit, 1), torch.split(w, unit, 1), strict=True))
    alone = [products().linear(a.contiguous(), b.contiguous(), dtype=torch.float32) for a, b in cuts]
    true = total([(0, i) for i in range(n_units)], alone)

    def sums(first: int, stop: int) -> torch.Tensor:
        columns = slice(first * unit, stop * unit)
        found: torch.Tensor = products().unit_sums(x[:, columns], w[:, columns], unit, first)
        return found

    for parts, whole in totals_of_runs(n_units, sums):
        assert same_bits(whole, true), parts


@pytest.mark.parametrize(("unit", "n_units"), [(1, 9), (96, 8), (37, 5)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_units_are_summed_in_the_tree(device: str, dtype: torch.dtype, unit: int, n_units: int) -> None:
    check_units(device, dtype, unit, n_units)


def test_units_of_many_rows_go_in_steps(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = (draws(150, 24, dtype=torch.float32, device=device, seed=i) for i in range(2))
    whole = products().unit_sums(x, w, 8, 1)
    assert whole.shape == (2, 150, 150)
    monkeypatch.setattr(products(), "SCRATCH", 1)
    assert same_bits(products().unit_sums(x, w, 8, 1), whole)


def test_no_units_and_no_rows_are_no_sums(device: str) -> None:
    x, w = draws(4, 16, dtype=torch.float32, device=device), draws(5, 16, dtype=torch.float32, device=device)
    assert products().unit_sums(x[:, :0], w[:, :0], 8, 2).shape == (0, 4, 5)
    assert products().unit_sums(x[:0], w, 8, 0).shape == (1, 0, 5)
    assert products().linear(x[:0], w).shape == (0, 5)
    assert rows().rms_norm(x[:0], x[0], EPS).shape == rows().silu_mul(x[:0], x[:0]).shape == (0, 16)


BROKEN = ("the order along K", "the order of units", "the number of rows in a norm")


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_is_found(device: str, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    real, norm = products()._run, rows().rms_norm

    def turned(x: torch.Tensor, w: torch.Tensor, bias: Any, y: torch.Tensor, unit: int) -> torch.Tensor:
        few = len(x) < 16 and len(y) == 1  # as a library may split K where there are few rows
        return real(x.flip(1), w.flip(1), bias, y, unit) if few else real(x, w, bias, y, unit)

    def few_first(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        if len(x) > 8:
            return norm(x, weight, eps)
        return small.rms_norm_twin(x.cpu(), weight.cpu(), eps).to(x.device)

    def one_by_one(x: torch.Tensor, w: torch.Tensor, unit: int, first: int) -> torch.Tensor:
        parts = zip(torch.split(x, unit, 1), torch.split(w, unit, 1), strict=True)
        return torch.stack([sum(products().linear(a, b, dtype=torch.float32) for a, b in parts)])

    if what == "the order along K":
        monkeypatch.setattr(products(), "_run", turned)
        with pytest.raises(AssertionError):
            check_entries(device, torch.float32, *SHAPES[2])
    elif what == "the order of units":
        monkeypatch.setattr(products(), "unit_sums", one_by_one)
        with pytest.raises(AssertionError, match=r"^1"):
            check_units(device, torch.float32, 96, 8)
    else:
        monkeypatch.setattr(rows(), "rms_norm", few_first)
        with pytest.raises(AssertionError):
            check_rows(device, "rms_norm", torch.float32, 2049)


@pytest.mark.parametrize("device", ["cpu"], indirect=True, ids=["interpreted"])
def test_a_number_beside_the_tensors_is_found(device: str) -> None:
    x, w = (draws(3, 16, dtype=torch.float32, device=device, seed=i) for i in range(2))
    with pytest.raises(Exception, match="lie outside the tensors"):
        products()._run(x, w, None, torch.empty(1, 4, 3), 16)  # a row more than x has


def apply(name: str, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if name == "rms_norm":
        return rows().rms_norm(x, weight, EPS)  # type: ignore[no-any-return]
    if name == "add_rms_norm":
        return torch.cat(rows().add_rms_norm(x, y, weight, EPS), dim=1)
    return rows().silu_mul(x, y)  # type: ignore[no-any-return]


def check_rows(device: str, name: str, dtype: torch.dtype, dim: int) -> None:
    x, y = (draws(20, dim, dtype=dtype, device=device, seed=i) for i in range(2))
    weight = draws(dim, dtype=dtype, device=device, seed=2)
    whole = apply(name, x, y, weight)
    for first, last, offset in ((0, 1, 1), (19, 20, 3), (7, 12, 8)):
        part = apply(name, askew(x[first:last], offset), askew(y[first:last], 2), askew(weight, offset))
        assert same_bits(part, whole[first:last])
    fused = torch.cat([x, y], dim=1)
    assert same_bits(apply(name, fused[:, :dim], fused[:, dim:], weight), whole)


@pytest.mark.parametrize("dim", [2, 576, 2049])
@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm", "silu_mul"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_of_a_row_are_its_own(device: str, dtype: torch.dtype, name: str, dim: int) -> None:
    check_rows(device, name, dtype, dim)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_and_gate_are_the_twins(device: str, dtype: torch.dtype) -> None:
    x, y = (draws(9, 576, dtype=dtype, device=device, seed=i) for i in range(2))
    weight = draws(576, dtype=dtype, device=device, seed=2)
    step = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2**-21}[dtype]
    close = {"rtol": 2 * step, "atol": step / 100}  # two roundings to the type
    torch.testing.assert_close(rows().rms_norm(x, weight, EPS), small.rms_norm_twin(x, weight, EPS), **close)
    both, out = rows().add_rms_norm(x, y, weight, EPS)
    assert same_bits(both, x + y)
    assert same_bits(out, rows().rms_norm(x + y, weight, EPS))
    torch.testing.assert_close(rows().silu_mul(x, y), small.silu_mul_twin(x, y), **close)
    ends = torch.tensor([[-1e4, -89.0, 0.0, 89.0, 1e4, float("nan")]], dtype=dtype, device=device)
    found = rows().silu_mul(ends, torch.ones_like(ends))
    torch.testing.assert_close(found, F.silu(ends), rtol=step, atol=1e-30, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gpu_is_served(dtype: torch.dtype) -> None:
    x, w = (draws(20, 64, dtype=dtype, device="cuda", seed=i) for i in range(2))
    assert triton_here.serves(x)
    assert same_bits(linear.linear(x, w), products().linear(x, w))
    assert "Triton kernels" in numerics.numeric_mode(dtype, None, x.device, 8)


def _cuda_model() -> Any:
    weight = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16)
    return SimpleNamespace(norm=SimpleNamespace(weight=weight))


def test_without_triton_cuda_makes_no_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_here, "_works", lambda device, dtype: False)
    found = numerics.find_unsteady(_cuda_model())
    assert found is not None and "without Triton" in found


def test_a_missing_or_wrong_triton_does_not_serve(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    caplog.set_level("INFO")
    works = triton_here._works.__wrapped__
    name = "llama_dist.kernels.triton_linear"
    monkeypatch.setitem(sys.modules, name, None)
    assert not works(torch.device("cpu"), torch.float32)
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(linear=lambda x, w: x * 2))
    assert not works(torch.device("cpu"), torch.float32)
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(linear=lambda x, w: x @ w))
    assert works(torch.device("cpu"), torch.float32)
    assert [record.message[:66] for record in caplog.records] == [
        "computing with torch's own operations: Triton does not serve: impo",
        "computing with torch's own operations: Triton does not serve: its ",
    ]


COMPILE = """
import re, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from llama_dist.kernels import (
    triton_attention, triton_draw, triton_likeliest, triton_linear, triton_packed, triton_packed_single, triton_rope,
    triton_rows, triton_single, triton_unpack,
)

def made(kernel, arch, constants, aligned, n_warps):
    pointers = ("a", "b", "x", "y", "w", "q", "keys", "values", "out", "bias", "weight", "total")
    lists = ("tables", "starts", "lengths", "readers")
    kinds = dict.fromkeys(pointers, "*bf16") | dict.fromkeys(lists, "*i32") | {"scale": "fp32", "eps": "fp32"}
    kinds |= {"codes": "*i32", "scales": "*u8", "factors": "*fp32"}
    kinds |= {"k": "*bf16", "v": "*bf16", "cos": "*fp32", "sin": "*fp32", "slots": "*i64", "logits": "*bf16"}
    kinds |= dict.fromkeys(("numbers", "found"), "*i64") | {"sums": "*fp32"}
    kinds |= dict.fromkeys(("mass", "before", "after"), "*fp64")
    kinds |= {"greatest": "*fp32", "places": "*i32", "state": "*fp64", "next_state": "*fp64"}
    names = kernel.arg_names
    constants = {**constants, "AHEAD": arch >= 90}
    signature = {name: "constexpr" if name in constants else kinds.get(name, "i32") for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": n_warps, "num_stages": 2, "enable_fp_fusion": True, "launch_pdl": arch >= 90}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options).asm["ptx"]

tiles = [
    {"HAS_BIAS": True, "ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth}
    for tile in (triton_linear.SQUARE, triton_linear.NARROW, triton_linear.LARGE)
]
packed = {"HAS_BIAS": True, "TILE": triton_linear.TILE, "BLOCK": 16}
schemes = [
    {"BITS": n, "FLOATS": floats, "WORDS": triton_packed.WORDS[n]}
    for n, floats in ((8, False), (6, False), (4, False), (8, True))
]
all_of = {"N_UNITS": 8, "UNIT": 512, "UNIT_WORDS": 128, "BLOCK": 16}
one = {**all_of, "HAS_BIAS": True}
row = {"HAS_BIAS": False, "K": 4096, "DEPTH": triton_single.DEPTH, "AT_ONCE": 3}
draw = {"N_PARAMS": triton_draw.N_PARAMS, "N_PARTS": triton_draw.N_PARTS, "N_STATE": triton_draw.N_STATE}
draw |= {"CHUNK": triton_draw.CHUNK, "CHUNKS": 64, "CLOSE": 1e-9, "SMALLEST": 1e-6, "UNSURE": -1}
spans = {"SIZE": 64, "WIDTH": 64, "PAGE": 16, "ROWS": 64, "KEYS": 32, "SECTION": 512, "LISTED": 128, "TILES": 1}
for arch, tensor_core in ((80, "mma.sync.aligned.m16n8k16"), (90, "wgmma.mma_async.sync.aligned.m64n")):
    texts = [
        *(made(triton_linear._tiles, arch, tile, ("x", "w", "y", "unit", "x_stride"), 4) for tile in tiles),
        *(
            made(triton_attention._spans, arch, {**spans, "ALONE": alone, "PARTS": parts}, ("q", "keys", "values"), 4)
            for alone, parts in ((False, False), (True, False), (True, True))
        ),
        *(
            made(triton_packed._blocks, arch, {**packed, **scheme}, ("x", "codes", "x_stride"), 4) for scheme in schemes
        ),
        *(made(triton_packed_single._row, arch, {**one, **scheme, "WORDS": 256}, ("x",), 16) for scheme in schemes),
        *(made(triton_unpack._unpack, arch, {**all_of, **scheme, "WORDS": 64}, (), 4) for scheme in schemes),
        made(triton_attention._together, arch, {"SIZE": 64, "WIDTH": 64, "SECTION": 512}, (), 2),
        made(triton_rows._norm, arch, {"ADD": True, "WIDTH": 1024}, (), 4),
        made(triton_rows._gate, arch, {"BLOCK": 1024}, (), 4),
        *(made(triton_single._row, arch, {**row, "GATED": gated}, ("x", "w", "w_stride"), 4) for gated in (0, 1)),
        made(triton_rope._rotate, arch, {"HALF": 64, "WIDTH": 64, "HEADS": triton_rope.HEADS}, ("cache_stride",), 4),
        made(triton_likeliest._chunks, arch, {"CHUNK": triton_likeliest.CHUNK}, (), 4),
        made(triton_likeliest._rows, arch, {"CHUNKS": 64}, (), 1),
        made(triton_draw._masses, arch, {"N_PARAMS": triton_draw.N_PARAMS, "CHUNK": triton_draw.CHUNK}, (), 8),
        *(made(triton_draw._round, arch, {**draw, "KIND": kind}, (), 8) for kind in range(4)),
    ]
    assert all(tensor_core in text for text in texts[:10]), arch
    assert not any(re.search(r"\\b(atom|red)\\.", text) for text in texts), arch  # sums that come in any order
print("compiled")
"""


def test_no_argument_has_a_name_that_triton_takes_for_itself() -> None:
    """What wraps a kernel has variables of its own beside its arguments; the interpreter does without."""
    need_triton("cpu" if not torch.cuda.is_available() else "cuda")
    modules = [importlib.import_module(f"llama_dist.kernels.{path.stem}") for path in KERNELS.glob("triton_*.py")]
    kernels = {name: value for module in modules for name, value in vars(module).items() if hasattr(value, "arg_names")}
    assert len(kernels) >= 12
    for name, kernel in kernels.items():
        assert not {"params", "specialization", "options", "backend"} & {*kernel.arg_names}, name


@pytest.mark.slow
def test_they_compile_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    need_triton("cpu" if not torch.cuda.is_available() else "cuda")
    root = Path(__file__).resolve().parent.parent
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stdout) == (0, "compiled\n"), done.stderr[-2000:]
