"""The small operations in C++: close to torch's or equal to them, and each row's bits its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from llama_dist.kernels import small
from llama_dist.kernels.attention import laid_out
from tests.kernel_cases import DTYPES, askew, need_kernels, same_bits, threads

EPS = 1e-5
DIMS = (2, 16, 20, 576, 2049)


@pytest.fixture(autouse=True)
def _kernels() -> None:
    need_kernels()


def draws(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def steps(found: torch.Tensor, true: torch.Tensor) -> float:
    """The greatest distance of found from true (float64), in units in the last place of found's type."""
    near = true.to(found.dtype)
    unit = (torch.nextafter(near.abs(), near.new_tensor(float("inf"))) - near.abs()).double()
    return float(((found.double() - true).abs() / unit).max())


def rows_of(name: str, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if name == "rms_norm":
        return small.rms_norm(x, weight, EPS)
    if name == "add_rms_norm":
        return torch.cat(small.add_rms_norm(x, y, weight, EPS), dim=1)
    return small.silu_mul(x, y)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_are_the_twins(dtype: torch.dtype, dim: int) -> None:
    x, y, weight = draws(33, dim, dtype=dtype), draws(33, dim, dtype=dtype, seed=1), draws(dim, dtype=dtype, seed=2)
    # Two roundings to the type, each of which a last digit of the float32 mean may turn.
    close = {"rtol": 2**-6, "atol": 0} if dtype == torch.bfloat16 else {"rtol": 1e-6, "atol": 0}
    torch.testing.assert_close(small.rms_norm(x, weight, EPS), small.rms_norm_twin(x, weight, EPS), **close)
    total, out = small.add_rms_norm(x, y, weight, EPS)
    assert same_bits(total, x + y)
    assert same_bits(out, small.rms_norm(x + y, weight, EPS))


def test_the_norm_is_exact_to_a_few_units() -> None:
    x, weight = draws(50, 2049, dtype=torch.float32) * 7, draws(2049, dtype=torch.float32, seed=1)
    wide = x.double()
    true = wide / (wide.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
    assert steps(small.rms_norm(x, weight, EPS), true) < 4


def test_silu_is_exact_to_three_units() -> None:
    x = torch.cat([torch.linspace(-88.3, 100, 200_001), draws(100_000, dtype=torch.float32) * 3])[None]
    found = small.silu_mul(x, torch.ones_like(x))
    assert steps(found, F.silu(x.double())) < 3
    tail = torch.linspace(-3e38, -88.3, 1001)[None]
    assert (small.silu_mul(tail, torch.ones_like(tail)) <= 0).all()
    assert (small.silu_mul(tail, torch.ones_like(tail)) > -1e-36).all()
    odd = torch.tensor([[float("nan"), float("inf"), 0.0, -0.0, 1e30]])
    assert torch.equal(small.silu_mul(odd, torch.ones_like(odd)).nan_to_num(5), F.silu(odd).nan_to_num(5))


def test_silu_of_every_bfloat16() -> None:
    """Whatever it is computed by, it is the nearest or, seldom, the one beside it."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)[None]
    found, true = small.silu_mul(x, torch.ones_like(x)), F.silu(x.double())
    assert torch.equal(found.isnan(), true.isnan())
    counts = true.isfinite() & (true.abs() > 2.0**-119)
    assert steps(found[counts], true[counts]) < 0.51
    assert (found[~counts & true.isfinite()].abs() <= 2.0**-119).all()
    assert (found[true.isinf()] == float("inf")).all()


def test_the_gate_rounds_silu_first() -> None:
    a, b = draws(9, 1000, dtype=torch.bfloat16), draws(9, 1000, dtype=torch.bfloat16, seed=1)
    once = (F.silu(a.float()) * b.float()).bfloat16()
    found = small.silu_mul(a, b)
    assert not torch.equal(found, once)
    torch.testing.assert_close(found, small.silu_mul_twin(a, b), rtol=2**-6, atol=0)
    assert (found != small.silu_mul_twin(a, b)).float().mean() < 0.01


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm", "silu_mul"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_of_a_row_are_its_own(dtype: torch.dtype, name: str, dim: int) -> None:
    x, y, weight = draws(40, dim, dtype=dtype), draws(40, dim, dtype=dtype, seed=1), draws(dim, dtype=dtype, seed=2)
    whole = rows_of(name, x, y, weight)
    for first, last, n_threads, offset in ((0, 1, 1, 1), (39, 40, 2, 3), (7, 24, 3, 8), (0, 40, 2, 5)):
        with threads(n_threads):
            part = rows_of(name, askew(x[first:last], offset), askew(y[first:last], 2), askew(weight, offset))
        assert same_bits(part, whole[first:last])
    fused = torch.cat([x, y], dim=1)
    assert same_bits(rows_of(name, fused[:, :dim], fused[:, dim:], weight), whole)


Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def cut(fused: torch.Tensor, heads: int, kv_heads: int, head_dim: int) -> Heads:
    """q, k and v as columns of one product."""
    q, k, v = fused.split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], dim=1)
    return q.unflatten(1, (heads, -1)), k.unflatten(1, (kv_heads, -1)), v.unflatten(1, (kv_heads, -1))


Write = Callable[..., None]


def written(
    write: Write, fused: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, slots: torch.Tensor, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The product after q was rotated in it [n, numbers]; the cache [2, 2, 64, head_dim], NaN where nothing went."""
    fused = fused.clone()
    cache = fused.new_full((2, 2, 64, head_dim), float("nan"))
    write(*cut(fused, 6, 2, head_dim), cos, sin, *cache, slots)
    if write is small.rope_write_twin:
        cache = torch.stack((laid_out(cache[0]), cache[1]))
    return fused, cache


@pytest.mark.parametrize("head_dim", [2, 20, 64, 80, 96, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotation_and_cache_are_the_twins_bits(dtype: torch.dtype, head_dim: int) -> None:
    fused = draws(37, 10 * head_dim, dtype=dtype)
    angles = draws(37, head_dim // 2, dtype=torch.float32, seed=1)
    cos, sin = angles.cos(), angles.sin()
    slots = torch.randperm(64, generator=torch.Generator().manual_seed(0))[:37]
    product, cache = written(small.rope_write_twin, fused, cos, sin, slots, head_dim)
    assert not torch.equal(product, fused)
    with threads(2):
        found = written(small.rope_write, fused, cos[:, None], sin[:, None], slots, head_dim)
    assert same_bits(found[0], product)
    assert same_bits(found[1].nan_to_num(9), cache.nan_to_num(9))
    for i in (0, 36):  # alone
        row = slice(i, i + 1)
        one = written(
            small.rope_write, askew(fused[row], 3), askew(cos[row], 1), askew(sin[row], 1), slots[row], head_dim
        )
        assert same_bits(one[0], product[row])
        written_here = ~one[1].isnan()
        assert written_here.sum() == 4 * head_dim
        assert same_bits(one[1][written_here], cache[written_here])


@pytest.mark.parametrize("slot", [-1, 64])
def test_a_slot_outside_the_cache_is_an_error(slot: int) -> None:
    angles = torch.zeros(1, 8)
    with pytest.raises(IndexError, match=f"slot {slot} of token 0: the cache has 64"):
        written(small.rope_write, torch.zeros(1, 160), angles, angles, torch.tensor([slot]), 16)


def test_half_precision_is_the_twins() -> None:
    x, y = draws(5, 64, dtype=torch.float16), draws(5, 64, dtype=torch.float16, seed=1)
    assert not small.compiled_for(x)
    assert torch.equal(small.silu_mul(x, y), F.silu(x) * y)
    assert torch.equal(small.add_rms_norm(x, y, y[0], EPS)[1], small.rms_norm_twin(x + y, y[0], EPS))
