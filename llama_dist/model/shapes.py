"""Published models by their shapes alone, as their model cards and config.json files have them; `tiny` is our own."""

from __future__ import annotations

from collections.abc import Mapping

from llama_dist.config import ModelConfig, RopeScaling


def _llama32_rope() -> RopeScaling:
    return RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)


SHAPES: Mapping[str, ModelConfig] = {
    "tiny": ModelConfig("llama", 64, 2, 8, 2, 8, 160, 512, 1e-5, max_position=4096),
    "smollm2-135m": ModelConfig(
        "llama", 576, 30, 9, 3, 64, 1536, 49152, 1e-5, rope_theta=100_000.0, max_position=8192, tied_embeddings=True
    ),
    "tinyllama-1.1b": ModelConfig("llama", 2048, 22, 32, 4, 64, 5632, 32000, 1e-5, max_position=2048),
    "llama-2-7b": ModelConfig("llama", 4096, 32, 32, 32, 128, 11008, 32000, 1e-5, max_position=4096),
    "llama-3-8b": ModelConfig(
        "llama", 4096, 32, 32, 8, 128, 14336, 128256, 1e-5, rope_theta=500_000.0, max_position=8192
    ),
    "llama-3-70b": ModelConfig(
        "llama", 8192, 80, 64, 8, 128, 28672, 128256, 1e-5, rope_theta=500_000.0, max_position=8192
    ),
    "llama-3.2-1b": ModelConfig(
        "llama",
        2048,
        16,
        32,
        8,
        64,
        8192,
        128256,
        1e-5,
        rope_theta=500_000.0,
        rope_scaling=_llama32_rope(),
        max_position=131072,
        tied_embeddings=True,
    ),
    "llama-3.2-3b": ModelConfig(
        "llama",
        3072,
        28,
        24,
        8,
        128,
        8192,
        128256,
        1e-5,
        rope_theta=500_000.0,
        rope_scaling=_llama32_rope(),
        max_position=131072,
        tied_embeddings=True,
    ),
}
"""By name. The numbers: dim, n_layers, n_heads, n_kv_heads, head_dim, hidden_dim, vocab_size, norm_eps."""
