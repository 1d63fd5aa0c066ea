"""What a GPU does for a row, or for a few, in Triton: products of one row, rotation, drawing; beside their twins."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from llama_dist.engine.draws import begin, draw_all
from llama_dist.engine.sampler import Wanted
from llama_dist.kernels import small, triton_here
from llama_dist.kernels.draw import UNSURE
from llama_dist.parallel import layers
from llama_dist.request import SamplingParams
from tests.kernel_cases import askew, same_bits
from tests.test_draws import CUTS, check, defined
from tests.triton_cases import DEVICES, DTYPES, running_on


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from running_on(request.param)


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 2048), (5, 2049), (3, 5000)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_product_of_one_row(device: str, dtype: torch.dtype, n: int, k: int) -> None:
    from llama_dist.kernels import triton_single

    x, w, bias = (draws(*shape, seed=i).to(device, dtype) for i, shape in enumerate([(1, k), (2 * n, k), (2 * n,)]))
    true = x.double() @ w.double().T
    size = x.double().abs() @ w.double().abs().T + 1
    bound = size * (4e-6 + torch.finfo(dtype).eps)
    assert ((triton_single.linear(x, w).double() - true).abs() < bound).all()
    assert ((triton_single.linear(x, askew(w, 5), bias).double() - true - bias.double()).abs() < bound + 0.1).all()
    a, b = triton_single.linear(x, w).chunk(2, 1)
    torch.testing.assert_close(triton_single.gated(x, w), F.silu(a) * b, rtol=4 * torch.finfo(dtype).eps, atol=1e-3)


def test_layers_take_it_for_one_row_without_a_promise(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from llama_dist.kernels import triton_single

    monkeypatch.setattr(triton_here, "serves", lambda x: True)
    x, w = draws(2, 64).to(device), draws(6, 64, seed=1).to(device)
    assert same_bits(layers.product(x[:1], w, None, False), triton_single.linear(x[:1], w))
    monkeypatch.setattr(triton_single, "linear", None)
    torch.testing.assert_close(layers.product(x, w, None, False), F.linear(x, w))
    torch.testing.assert_close(layers.product(x[:1], w, None, True), F.linear(x[:1], w))


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(9, 3, 64), (1, 1, 6), (17, 9, 20)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotation_is_the_twin_s(device: str, dtype: torch.dtype, heads: int, kv_heads: int, size: int) -> None:
    from llama_dist.kernels import triton_rope

    n, slots = 5, torch.tensor([3, 47, 0, 16, 30])
    fused = draws(n, (heads + 2 * kv_heads) * size + 3).to(dtype)
    cos, sin = draws(n, 1, size // 2, seed=1), draws(n, 1, size // 2, seed=2)
    found = []
    for write, where in ((small.rope_write_twin, device), (triton_rope.rope_write, device)):
        rows, cache = fused.to(where), torch.zeros(2, kv_heads, 48, size, dtype=dtype, device=where)
        parts = rows[:, :-3].unflatten(1, (-1, size)).split((heads, kv_heads, kv_heads), 1)
        write(*parts, cos.to(where), sin.to(where), cache[0], cache[1], slots.to(where))
        found.append((rows.cpu(), cache.cpu()))
    # What k was does not matter: only the cache has it rotated.
    assert same_bits(found[0][0][:, : heads * size], found[1][0][:, : heads * size])
    assert same_bits(found[0][1], found[1][1]) and found[0][1].any()


def test_a_slot_outside_the_cache_is_passed_over(device: str) -> None:
    from llama_dist.kernels import triton_rope

    q, k, v = (draws(2, 1, 8, seed=i).to(device) for i in range(3))
    angles, cache = torch.ones(2, 1, 4, device=device), torch.zeros(2, 1, 16, 8, device=device)
    triton_rope.rope_write(q, k, v, angles, angles, cache[0], cache[1], torch.tensor([-1, 16], device=device))
    assert not cache.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_likeliest_of_a_row_is_the_first_of_equals(device: str, dtype: torch.dtype) -> None:
    from llama_dist.kernels import triton_likeliest

    for vocab in (1, 2047, 2048, 5000):
        rows = (draws(9, vocab) * 3).to(dtype)
        rows[1] = 0
        rows[2, vocab // 2 :] = rows[2].max() + 1
        for i, bad in enumerate((float("nan"), float("inf"), float("-inf"))):
            rows[3 + i, vocab // 3] = bad
        wide = torch.cat([rows, rows.new_full((9, 3), 99.0)], dim=1)[:, :vocab].to(device)
        right = [-1 if 3 <= i < 6 else int((row == row.max()).nonzero()[0]) for i, row in enumerate(rows)]
        assert triton_likeliest.likeliest(wide).tolist() == right
    assert triton_likeliest.likeliest(rows[:0].to(device)).tolist() == []


def tokens(wanted: list[Wanted]) -> list[int]:
    return begin(wanted)()


@pytest.mark.parametrize(("dtype", "spread"), [(torch.bfloat16, 3.0), (torch.float32, 0.3)], ids=str)
def test_drawing_is_the_sampler_s(
    device: str, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, spread: float
) -> None:
    from llama_dist.engine import draws as module

    by_kernel = []
    real = module.begin_triton
    monkeypatch.setattr(module, "begin_triton", lambda wanted: (by_kernel.extend(wanted), real(wanted))[1])
    vocab, cuts = (4999, CUTS[:4]) if device == "cpu" else (128_256, CUTS)
    rows = (draws(len(cuts), vocab) * spread).to(device, dtype)
    wanted = [
        Wanted(row, SamplingParams(**cut), seed, 5 + seed)  # type: ignore[arg-type]
        for seed in range(1 if device == "cpu" else 16)
        for row, cut in zip(rows, cuts, strict=True)
    ]
    if device == "cpu":
        assert check(lambda w: real(w).tolist(), [w for w in wanted if not w.params.top_k]) == 0  # type: ignore[arg-type]
        return
    assert check(tokens, wanted) <= len(wanted) // 40  # type: ignore[arg-type]
    assert len(by_kernel) == sum(not w.params.top_k for w in wanted)
    assert draw_all(wanted) == defined(wanted)


def test_drawing_from_rows_that_lie_apart_with_bans_and_ties(device: str) -> None:
    from llama_dist.engine.draws import begin_triton

    row = torch.zeros(3000, device=device)
    row[5:] = float("-inf")
    far = draws(3000, seed=3).to(device)
    sharp = torch.full((3000,), -50.0, device=device)
    sharp[2999] = 50
    nothing = torch.full((3000,), float("nan"), device=device)
    cases = [(row, 1.0), (far, 0.5), (sharp, 0.9), (row, 0.3)]
    wanted = [Wanted(x, SamplingParams(temperature=0.8, top_p=p), 7, i) for i, (x, p) in enumerate(cases)]
    found = begin_triton([*wanted, Wanted(nothing, SamplingParams(temperature=1.0), 1, 1)]).tolist()
    assert found[4] == UNSURE and found[2] == 2999
    for token, right in zip(found, defined(wanted), strict=False):
        assert token in (right, UNSURE)


@pytest.mark.gpu
def test_rows_of_both_kinds_on_a_gpu() -> None:
    """Greedy, drawn by the kernel and by torch, shaped ones in float32 beside them."""
    logits = (draws(6, 5000) * 3).to("cuda", torch.bfloat16)
    rows = [*logits[:4], logits[4].float(), logits[5].float()]
    cuts = [CUTS[1], CUTS[2], {"temperature": 0.0}, CUTS[5], CUTS[1], {"temperature": 0.0}]
    wanted = [Wanted(row, SamplingParams(**cut), 3, i) for i, (row, cut) in enumerate(zip(rows, cuts, strict=True))]  # type: ignore[arg-type]
    assert draw_all(wanted) == defined(wanted)
