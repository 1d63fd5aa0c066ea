"""The metadata of a GGUF file to a ModelConfig (key names: ggml's docs/gguf.md)."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from llama_dist.config import ModelConfig, RopeScaling
from llama_dist.errors import CheckpointError
from llama_dist.model.families import family_of_gguf, gguf_name
from llama_dist.model.fields import MAX_LAYERS, Fields, short

log = logging.getLogger("llama_dist")

_STOP_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")


def parse_gguf_config(metadata: Mapping[str, Any], names: Collection[str], vocab_size: int) -> ModelConfig:
    """A ModelConfig from metadata, the tensors' names (biases and tying show in them) and the embedding's rows.

    Numbers stored as float32 are taken as the shortest decimal that gives them: 9.99999974e-06 is 1e-05.
    """
    fields = Fields("GGUF metadata", metadata)
    family = family_of_gguf(fields.text("general.architecture"))
    arch = str(family.gguf)
    if fields.integer("split.count", 1, low=0) > 1:
        raise CheckpointError(
            "GGUF: this file is one part of several (split.count); join them with llama-gguf-split --merge"
        )
    if fields.integer(f"{arch}.expert_count", 0, low=0) > 0:
        raise CheckpointError(f"GGUF: {arch}.expert_count is set, mixtures of experts are not supported")
    if f"{arch}.attention.sliding_window" in metadata:
        log.info("GGUF: ignored %s.attention.sliding_window, this architecture attends to everything", arch)
    dim, n_heads = fields.integer(f"{arch}.embedding_length"), fields.integer(f"{arch}.attention.head_count")
    head_dim = fields.integer(f"{arch}.attention.key_length", dim // n_heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if fields.integer(f"{arch}.{key}", head_dim) != head_dim:
            raise CheckpointError(f"GGUF: {arch}.{key} is {metadata[f'{arch}.{key}']}, not the head size {head_dim}")
    tokens = Fields("GGUF metadata", {k[15:]: v for k, v in metadata.items() if k.startswith("tokenizer.ggml.")})
    return ModelConfig(
        family=family.name,
        dim=dim,
        n_layers=fields.integer(f"{arch}.block_count", high=MAX_LAYERS),
        n_heads=n_heads,
        n_kv_heads=fields.integer(f"{arch}.attention.head_count_kv", n_heads),
        head_dim=head_dim,
        hidden_dim=fields.integer(f"{arch}.feed_forward_length"),
        vocab_size=vocab_size,
        norm_eps=shortest(fields.number(f"{arch}.attention.layer_norm_rms_epsilon")),
        rope_theta=shortest(fields.number(f"{arch}.rope.freq_base", 10000.0)),
        rope_scaling=_scaling(fields, arch),
        max_position=fields.integer(f"{arch}.context_length"),
        tied_embeddings=gguf_name("output.weight") not in names,
        attention_bias=_bias(family.attention_bias, "attention.wq", names),
        attention_out_bias=_bias(family.attention_out_bias, "attention.wo", names),
        mlp_bias=_bias(family.mlp_bias, "feed_forward.w1", names),
        qk_norm=family.qk_norm,
        bos_id=tokens.integer("bos_token_id", None, low=0),
        eos_ids=tuple(sorted({i for key in _STOP_KEYS for i in tokens.ids(key)})),
    )


def shortest(value: float) -> float:
    """The shortest decimal that rounds to the same float32."""
    return float(str(np.float32(value)))


def _bias(rule: bool | str, name: str, names: Collection[str]) -> bool:
    """GGUF has no key for biases: where the family leaves them open, the first layer shows them."""
    return rule if isinstance(rule, bool) else gguf_name(f"layers.0.{name}.bias") in names


def _scaling(fields: Fields, arch: str) -> RopeScaling | None:
    kind = fields.text(f"{arch}.rope.scaling.type", "none")
    old = fields.number(f"{arch}.rope.scale_linear", 1.0)
    if kind == "none":
        return RopeScaling("linear", old) if old != 1.0 else None
    if kind == "linear":
        return RopeScaling("linear", shortest(fields.number(f"{arch}.rope.scaling.factor", old)))
    raise CheckpointError(f"GGUF: rotary scaling {short(kind)} is not supported; supported: none, linear")


def with_rope_factors(config: ModelConfig, factors: Sequence[float]) -> ModelConfig:
    """`config` with the llama3 scaling that a GGUF's `rope_freqs.weight` spells out.

    `factors`, [head_dim / 2] float32, is what each rotary frequency is divided by: 1 for short wavelengths, the
    scaling factor for long ones, Llama 3.1's ramp between. The length the model was trained on first is not in the
    file: 8192 is tried, then other powers of two; two that give the same factors are the same model. The scaling
    factor is read off the longest wavelength, all others must follow; else CheckpointError.
    """
    if len(factors) != config.head_dim // 2 or not all(math.isfinite(f) and f >= 1 for f in factors):
        raise CheckpointError(f"GGUF: rope_freqs.weight must hold {config.head_dim // 2} factors of 1 or more")
    if all(f == 1 for f in factors):
        return config
    if config.rope_scaling is not None:
        raise CheckpointError("GGUF: both rope_freqs.weight and a rotary scaling are given, cannot tell how they join")
    for original in (8192, *(2**n for n in range(4, 21))):
        scaling = _solve(config, original, factors[-1])
        if scaling is not None and all(
            math.isclose(found, _factor(config, scaling, i), rel_tol=2e-5) for i, found in enumerate(factors)
        ):
            return dataclasses.replace(config, rope_scaling=scaling)
    raise CheckpointError(
        f"GGUF: rope_freqs.weight ({factors[0]:.6g} to {factors[-1]:.6g}) does not follow Llama 3.1's rule: "
        "this rotary scaling is not supported"
    )


def _smooth(config: ModelConfig, scaling: RopeScaling, i: int) -> float:
    """Where frequency i lies on the ramp: 0 for long wavelengths (scaled whole), 1 for short ones (left alone)."""
    turns = scaling.original_max_position * math.pow(config.rope_theta, -2 * i / config.head_dim) / (2 * math.pi)
    return min(max((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor), 0.0), 1.0)


def _factor(config: ModelConfig, scaling: RopeScaling, i: int) -> float:
    smooth = _smooth(config, scaling, i)
    return 1 / ((1 - smooth) / scaling.factor + smooth)


def _solve(config: ModelConfig, original: int, last: float) -> RopeScaling | None:
    """The scaling under which the longest wavelength's frequency is divided by `last`; None where none does."""
    scaling = RopeScaling("llama3", 1.0, original_max_position=original)
    smooth = _smooth(config, scaling, config.head_dim // 2 - 1)
    rest = 1 / last - smooth
    if smooth >= 1 or rest <= 0:
        return None
    factor = (1 - smooth) / rest
    # Solved from a float32 on the ramp, 8 comes out as 8.0000012.
    return dataclasses.replace(scaling, factor=round(factor, 3))
