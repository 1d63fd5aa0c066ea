"""The three ways of having sixteen lanes (AVX-512, AVX2, four plain vectors) give the same bits."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_dist.kernels import attention, build, draw, scores, small
from tests.kernel_cases import DTYPES, arguments, instructions, need_kernels, same_bits, text

NEEDS = {0: {"fma"}, 1: {"avx2", "fma"}, 2: {"avx512f", "avx512bw", "avx512vl", "avx512dq"}}
"""What a processor must have to run a way; way 0 is compiled for this processor too, with its fused multiplication."""


def _can() -> list[int]:
    words = set(Path("/proc/cpuinfo").read_text().split()) if Path("/proc/cpuinfo").exists() else set()
    return [way for way, needed in NEEDS.items() if needed <= words]


@pytest.fixture(scope="module")
def ways(tmp_path_factory: pytest.TempPathFactory) -> list[ctypes.CDLL]:
    need_kernels()
    cxx = build.compiler()
    assert cxx is not None
    if len(_can()) < 2:
        pytest.skip("this processor has one way only")
    folder = tmp_path_factory.mktemp("lanes")
    sources = [build.SOURCES / f"{name}.cpp" for name in ("attention", "draw", "scores", "small")]
    for way in _can():  # without instructions for bfloat16, whose sums are others
        build.compile_to(folder / f"{way}.so", cxx, sources, f"-DLANES={way}", "-DDOTS=0")
    return [build.open_library(folder / f"{way}.so") for way in _can()]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[ctypes.CDLL], None]:
    """Have the wrappers call another library."""

    def switch(library: ctypes.CDLL) -> None:
        for module, name, wrapped in (
            (attention, "_compiled", "attend"),
            (draw, "_compiled", "draw"),
            (scores, "_compiled", "scores"),
            (small, "_norm", "rms_norm"),
            (small, "_rope", "rope_write"),
            (small, "_silu", "silu_mul"),
        ):
            usual: Any = build.library()
            call = getattr(library, f"llama_dist_{wrapped}")
            call.argtypes = getattr(usual, f"llama_dist_{wrapped}").argtypes
            monkeypatch.setattr(module, name, lambda call=call: call)

    for getter in (attention._compiled, draw._compiled, scores._compiled, small._norm, small._rope, small._silu):
        getter()
    return switch


def everything(dtype: torch.dtype, head_dim: int) -> list[torch.Tensor]:
    noise = torch.Generator().manual_seed(head_dim)
    it = text(600, 6, 3, head_dim, dtype)
    args = arguments([(it, 0, 45), (it, 590, 600), (it, 7, 8)], (0, 1, 1, 2, 2, 2), compiled=True)
    x, y = (torch.randn(9, 11 * head_dim, generator=noise).to(dtype) * 9 for _ in range(2))
    x[0, :4] = torch.tensor([float("nan"), -100.0, 100.0, float("inf")]).to(dtype)
    gate = small.silu_mul(x, y).nan_to_num(3)
    norms = small.add_rms_norm(x[1:], y[1:], y[0], 1e-5)
    q, k, v = (
        part.clone().unflatten(1, (-1, head_dim)) for part in x[1:].split([5 * head_dim, 3 * head_dim, 3 * head_dim], 1)
    )
    cache = torch.zeros(2, 3, 16, head_dim, dtype=dtype)
    angles = torch.randn(8, head_dim // 2, generator=noise)
    small.rope_write(q, k, v, angles.cos(), angles.sin(), *cache, torch.arange(8))
    return [attention.attend(*args), attention.attend(*args, 30), gate, *norms, q, cache]


@pytest.mark.parametrize("head_dim", [20, 64, 80, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_ways_give_the_same_bits(
    dtype: torch.dtype, head_dim: int, ways: list[ctypes.CDLL], use: Callable[[ctypes.CDLL], None]
) -> None:
    found = [] if instructions() in ("avx512_bf16", "amx") else [everything(dtype, head_dim)]  # these have their own
    for library in ways:
        use(library)
        found.append(everything(dtype, head_dim))
        for a, b in zip(found[-1], found[0], strict=True):
            assert same_bits(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_ways_draw_and_score_alike(
    dtype: torch.dtype, ways: list[ctypes.CDLL], use: Callable[[ctypes.CDLL], None]
) -> None:
    torch.manual_seed(5)
    cuts = [(1.0, 1.0, 0, 0.0), (0.6, 0.9, 0, 0.0), (0.7, 0.8, 20, 0.0), (1.5, 1.0, 0, 0.05)]
    rows = (torch.randn(12, 5003) * 2).to(dtype)
    wanted = [draw.Draw(row, 77 * i, *cuts[i % len(cuts)]) for i, row in enumerate(rows)]
    usual, scored = draw.draw(wanted), scores.scores(rows, range(12), [5] * 12)
    assert min(usual) >= 0
    for library in ways:
        use(library)
        assert draw.draw(wanted) == usual
        assert scores.scores(rows, range(12), [5] * 12) == scored
