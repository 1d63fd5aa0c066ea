"""config.json of Hugging Face, as transformers 4 and 5 write it, to a ModelConfig."""

from __future__ import annotations

import logging
from typing import Any

from llama_dist.config import ModelConfig, RopeScaling
from llama_dist.errors import CheckpointError
from llama_dist.model.families import Family, family_of_hf
from llama_dist.model.fields import MAX_LAYERS, Fields, short

log = logging.getLogger("llama_dist")

_UNSUPPORTED = ("num_experts", "num_local_experts", "n_routed_experts", "no_rope_layers")


def parse_hf_config(config: dict[str, Any], generation: dict[str, Any] | None = None) -> ModelConfig:
    """A ModelConfig from the contents of config.json and, where there is one, generation_config.json.

    Shapes must be given; any other key that is absent takes the default of transformers' config class for the
    architecture. Raises CheckpointError naming the key, or the architecture, that cannot be run.
    """
    fields = Fields("config.json", config)
    family = family_of_hf(_architectures(fields), fields.text("model_type", None))
    _refuse_what_changes_the_maths(fields)
    n_layers = fields.integer("num_hidden_layers", high=MAX_LAYERS)
    n_heads = fields.integer("num_attention_heads")
    dim = fields.integer("hidden_size")
    head_dim = fields.integer("head_dim", family.head_dim)
    theta, scaling = _rope(fields, family)
    window, layers = _sliding(fields, family, n_layers)
    eos = fields.ids("eos_token_id", () if "eos_token_id" in config else family.eos_ids)
    if generation is not None:
        eos += Fields("generation_config.json", generation).ids("eos_token_id")
    # An absent key means the class's number; null means one KV head a query head (transformers' __post_init__).
    kv_default = n_heads if "num_key_value_heads" in config else family.kv_heads or n_heads
    return ModelConfig(
        family=family.name,
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=fields.integer("num_key_value_heads", kv_default),
        head_dim=dim // n_heads if head_dim is None else head_dim,
        hidden_dim=fields.integer("intermediate_size"),
        vocab_size=fields.integer("vocab_size"),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position=fields.integer("max_position_embeddings", family.max_position),
        tied_embeddings=fields.flag("tie_word_embeddings", False),
        attention_bias=_flag(fields, family.attention_bias),
        attention_out_bias=_flag(fields, family.attention_out_bias),
        mlp_bias=_flag(fields, family.mlp_bias),
        qk_norm=family.qk_norm,
        sliding_window=window,
        sliding_layers=layers,
        bos_id=fields.integer("bos_token_id", None if "bos_token_id" in config else family.bos_id, low=0),
        eos_ids=tuple(sorted(set(eos))),
    )


def _architectures(fields: Fields) -> list[str]:
    value = fields.values.get("architectures")
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise CheckpointError(f"config.json: architectures is {short(value)}, must be a list of strings")
    return value


def _flag(fields: Fields, rule: bool | str) -> bool:
    return rule if isinstance(rule, bool) else fields.flag(rule, False)


def _refuse_what_changes_the_maths(fields: Fields) -> None:
    if fields.values.get("quantization_config") is not None:
        method = fields.table("quantization_config").values.get("quant_method")
        raise CheckpointError(
            f"config.json: quantization_config ({short(method)}) is not supported; use the plain checkpoint or a GGUF"
        )
    for key in _UNSUPPORTED:
        if fields.values.get(key):
            raise CheckpointError(f"config.json: {key} is {short(fields.values[key])}, which is not supported")
    if fields.text("hidden_act", "silu") not in ("silu", "swish"):
        raise CheckpointError(
            f"config.json: hidden_act {short(fields.values['hidden_act'])} is not supported, only silu"
        )


def _rope(fields: Fields, family: Family) -> tuple[float, RopeScaling | None]:
    """Base and scaling. `rope_scaling` (transformers 4) goes before `rope_parameters` (5), as in transformers 5."""
    max_position = fields.integer("max_position_embeddings", family.max_position)
    table = fields.table("rope_scaling", None)
    if table is None or not table.values:
        table = fields.table("rope_parameters", Fields("config.json", {}))
    theta = table.number("rope_theta", fields.number("rope_theta", 10000.0))
    for source in (table, fields):
        if source.number("partial_rotary_factor", 1.0) != 1.0:
            raise CheckpointError(f"{source.source}: partial_rotary_factor other than 1 is not supported")
    kind = table.text("rope_type", table.text("type", "default"))
    if kind == "default":
        nested = [key for key, value in table.values.items() if isinstance(value, dict)]
        if nested:
            raise CheckpointError(
                f"{table.source}: rotary parameters per layer type ({nested[0][:40]}) are not supported"
            )
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", table.number("factor"))
    if kind == "dynamic":
        return theta, RopeScaling("dynamic", table.number("factor"), original_max_position=max_position)
    if kind == "llama3":
        low, high = table.number("low_freq_factor"), table.number("high_freq_factor")
        if not low < high:
            raise CheckpointError(f"{table.source}: high_freq_factor {high} must be above low_freq_factor {low}")
        inside = table.integer("original_max_position_embeddings", max_position)
        original = fields.integer("original_max_position_embeddings", inside)
        return theta, RopeScaling("llama3", table.number("factor"), low, high, original)
    raise CheckpointError(
        f"{table.source}: rotary type {short(kind)} is not supported; supported: default, llama3, linear, dynamic"
    )


def _sliding(fields: Fields, family: Family, n_layers: int) -> tuple[int | None, tuple[int, ...]]:
    """The window in keys, the query's own included, and the layers it holds in."""
    if family.sliding == "no":
        return None, ()
    window = fields.integer("sliding_window", None if "sliding_window" in fields.values else family.window)
    if family.sliding == "all":
        if fields.values.get("layer_types") is not None:
            log.info("config.json: layer_types is ignored, all layers of a %s share one kind of attention", family.name)
        return window, tuple(range(n_layers)) if window is not None else ()
    if not fields.flag("use_sliding_window", False):
        window = None
    kinds = fields.values.get("layer_types")
    if kinds is None:
        first = fields.integer("max_window_layers", 28, low=0)
        layers = tuple(range(first, n_layers)) if window is not None else ()
    else:
        if not isinstance(kinds, list) or len(kinds) != n_layers:
            raise CheckpointError(f"config.json: layer_types is {short(kinds)}, must be a list of {n_layers} strings")
        for kind in kinds:
            if kind not in ("full_attention", "sliding_attention"):
                raise CheckpointError(f"config.json: layer_types has {short(kind)}, which is not supported")
        layers = tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention")
        if layers and window is None:
            raise CheckpointError("config.json: layer_types names sliding layers, but sliding_window is off")
    return (window, layers) if layers else (None, ())
