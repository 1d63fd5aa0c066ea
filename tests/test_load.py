"""Loading: every rank holds its own slices and zeros, no more than planned, and little beside while it loads."""

from __future__ import annotations

import pytest
import torch

from llama_dist.quant.product import panels
from tests import assets
from tests.conftest import Saver
from tests.jobs import bytes_held, load_peak
from tests.spmd import run_ranks

pytestmark = pytest.mark.spmd
MIB = 2**20
LARGEST = 49152 * 576 * 4  # SmolLM2's embedding, decoded to float32


@pytest.mark.parametrize("world", [1, 2, 3])
def test_peak_memory_of_a_rank(world: int) -> None:
    """The real model from its GGUF, decoded to float32: shard + one tensor + 300 MB over the interpreter with torch."""
    for peak, held in run_ranks(world, load_peak, str(assets.smollm2_gguf())):
        assert held > 135e6 * 4 / world * 0.9, "the shard is too small to be one"
        assert peak <= held + LARGEST + 300e6, f"peak {peak / MIB:.0f} MiB for a shard of {held / MIB:.0f} MiB"


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_peak_memory_while_packing(quantization: str) -> None:
    """Packed weights beside the float32 table that rows are looked up in, and pieces: never the model in float32."""
    [(peak, held)] = run_ranks(1, load_peak, str(assets.smollm2_gguf()), quantization)
    assert held < LARGEST + 135e6 * {"int8": 1.05, "int4": 0.65}[quantization]
    assert peak <= held + 300e6, f"peak {peak / MIB:.0f} MiB for a shard of {held / MIB:.0f} MiB"


@pytest.mark.parametrize(
    ("world", "quantization"), [(1, None), (2, None), (5, None), (1, "int8"), (3, "int4"), (2, "fp8")]
)
@pytest.mark.parametrize("case", ["llama-9-3", "llama-attention-bias", "llama-mlp-bias", "qwen3", "llama-tied"])
def test_a_rank_holds_what_the_planner_says(checkpoint: Saver, case: str, world: int, quantization: str | None) -> None:
    from llama_dist.checkpoint.open import open_checkpoint
    from llama_dist.engine.plan import kv_bytes_per_token, rank_weight_bytes
    from llama_dist.parallel.units import cut_model, units_for

    folder = checkpoint(case, "hf")
    config = open_checkpoint(folder).config
    units = cut_model(config.n_heads, config.n_kv_heads, config.hidden_dim, config.vocab_size, units_for(world, None))
    ranks = run_ranks(world, bytes_held, str(folder), quantization)
    assert [r["weights"] for r in ranks] == rank_weight_bytes(
        config, units, world, 4, quantization, panels(torch.float32, torch.device("cpu")) is not None
    )
    assert all(r["cache"] == r["cache_tokens"] * kv_bytes_per_token(config, units, world, 4) for r in ranks)
