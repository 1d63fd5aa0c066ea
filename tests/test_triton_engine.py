"""The engine on the Triton kernels: the same bits on any number of ranks, in any batch, in any chunks."""

from __future__ import annotations

import pytest

from tests import tiny
from tests.conftest import Saver
from tests.reproducible_jobs import WAYS, prompts
from tests.spmd import run_ranks
from tests.triton_cases import need_triton
from tests.triton_jobs import every_way

pytestmark = pytest.mark.spmd


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "dtype", "quantization"),
    [("llama-9-3", "bfloat16", None), ("mistral-window", "float32", None), ("llama-gqa", "bfloat16", "int4")],
)
def test_interpreted_in_any_world_and_any_batch(
    checkpoint: Saver, case: str, dtype: str, quantization: str | None
) -> None:
    need_triton("cpu")
    asked = [(ids[:11], {**params, "max_tokens": 3}) for ids, params in prompts(3, tiny.VOCAB)]
    rest = (str(checkpoint(case, "hf")), "cpu", dtype)
    env = {"TRITON_INTERPRET": "1"}
    [(alone, mode)] = run_ranks(1, every_way, *rest, ["alone"], asked, quantization, env=env, timeout=300)
    assert "Triton kernels" in mode and len(alone["alone"]) == 3
    for found, _ in run_ranks(3, every_way, *rest, ["in chunks"], asked, quantization, env=env, timeout=300):
        assert found["in chunks"] == alone["alone"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    ("case", "quantization"),
    [
        ("llama-9-3", None),
        ("llama-9-3", "int8"),
        ("llama-head-dim", "int4"),
        ("llama-tied", "fp8"),
        ("mistral-window", None),
        ("qwen3", None),
    ],
)
def test_compiled_in_any_batch(checkpoint: Saver, case: str, dtype: str, quantization: str | None) -> None:
    asked, folder = prompts(12, tiny.VOCAB), str(checkpoint(case, "hf"))
    [(found, mode)] = run_ranks(1, every_way, folder, "cuda", dtype, list(WAYS), asked, quantization)
    assert "Triton kernels" in mode
    assert all(found[way] == found["alone"] for way in WAYS)
