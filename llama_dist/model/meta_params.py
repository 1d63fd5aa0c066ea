"""params.json of Meta's Llama 1, 2 and 3 releases to a ModelConfig."""

from __future__ import annotations

import logging
from typing import Any

from llama_dist.config import ModelConfig, RopeScaling
from llama_dist.errors import CheckpointError
from llama_dist.model.fields import MAX_LAYERS, Fields, short

log = logging.getLogger("llama_dist")

_KNOWN = {
    "dim",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "vocab_size",
    "multiple_of",
    "ffn_dim_multiplier",
    "norm_eps",
    "rope_theta",
    "use_scaled_rope",
}
_REFUSED = ("quantization_args", "lora_args", "vision_model", "moe", "moe_args")
_REFUSED_ABOVE_0 = ("vision_chunk_size", "vision_num_cross_attention_layers")
_FACTOR_32 = {(2048, 16), (3072, 28)}
"""(dim, n_layers) of Llama 3.2 1B and 3B: their model card gives factor 32, params.json gives none."""


def feed_forward_dim(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """The hidden width of Meta's FeedForward: two thirds of 4 x dim, scaled, rounded up to a multiple.

    Example: dim 4096, multiple_of 1024, multiplier 1.3 (Llama 3 8B): 10922 -> 14198 -> 14336.
    """
    hidden = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    return multiple_of * ((hidden + multiple_of - 1) // multiple_of)


def meta_vocab_size(params: dict[str, Any]) -> int | None:
    """`vocab_size` of params.json; None where it says -1 or nothing: the tokenizer, and so the embedding, decides."""
    value = Fields("params.json", params).integer("vocab_size", None, low=-1)
    return value if value is not None and value > 0 else None


def parse_meta_params(params: dict[str, Any], vocab_size: int) -> ModelConfig:
    """A ModelConfig from params.json; `vocab_size` is the embedding's, checked against the file by the reader.

    `max_position` is not in the file: 131072 with scaled rotary embedding (3.1 on), 8192 at Llama 3's rope_theta,
    else 4096. Fields this does not know are named in the log and ignored; quantised, LoRA, vision and
    mixture-of-experts checkpoints are refused.
    """
    fields = Fields("params.json", params)
    for key in _REFUSED:
        if params.get(key):
            raise CheckpointError(f"params.json: {key} is set ({short(params[key])}), which is not supported")
    for key in _REFUSED_ABOVE_0:
        if fields.integer(key, 0, low=-1) > 0:
            raise CheckpointError(f"params.json: {key} is {params[key]}, vision models are not supported")
    unknown = sorted(set(params) - _KNOWN - set(_REFUSED) - set(_REFUSED_ABOVE_0))
    if unknown:
        log.info("params.json: ignored %s", ", ".join(short(key) for key in unknown[:8]))
    dim, n_layers = fields.integer("dim", high=2**20), fields.integer("n_layers", high=MAX_LAYERS)
    n_heads = fields.integer("n_heads")
    if dim % n_heads:
        raise CheckpointError(f"params.json: dim {dim} is not a multiple of n_heads {n_heads}")
    theta = fields.number("rope_theta", 10000.0)
    scaled = fields.flag("use_scaled_rope", False)
    factor = 32.0 if (dim, n_layers) in _FACTOR_32 else 8.0
    multiplier = fields.number("ffn_dim_multiplier", None)
    if multiplier is not None and multiplier > 1024:
        raise CheckpointError(f"params.json: ffn_dim_multiplier is {multiplier}, must be at most 1024")
    return ModelConfig(
        family="llama",
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=fields.integer("n_kv_heads", n_heads),
        head_dim=dim // n_heads,
        hidden_dim=feed_forward_dim(dim, fields.integer("multiple_of", 256), multiplier),
        vocab_size=vocab_size,
        norm_eps=fields.number("norm_eps", 1e-5),
        rope_theta=theta,
        rope_scaling=RopeScaling("llama3", factor) if scaled else None,
        max_position=131072 if scaled else 8192 if theta == 500000.0 else 4096,
    )
