"""The families of models that run, as data: a family is one row, the tensor names of each format one table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llama_dist.config import ModelConfig
from llama_dist.errors import CheckpointError


@dataclass(frozen=True)
class Family:
    """One architecture. A flag given as a string is the config.json key that decides; a bool decides by itself.

    Defaults are those of the architecture's own config class in Hugging Face `transformers` 5, taken where the key is
    absent. `sliding`: "no" layer slides whatever the config says, "all" slide once `sliding_window` is a number, or
    "listed": those of `layer_types`, else from `max_window_layers` on, if `use_sliding_window`.
    `gguf` is the name in GGUF's `general.architecture`, `gguf_pairs` whether that format stores rows of q and k with
    the two dimensions of a rotary pair side by side (as llama.cpp's converter does for `llama`).
    """

    name: str
    architecture: str
    model_type: str
    gguf: str | None = None
    gguf_pairs: bool = False
    attention_bias: bool | str = False
    attention_out_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    sliding: Literal["no", "all", "listed"] = "no"
    window: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    max_position: int = 2048
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()


FAMILIES = (
    Family(
        "llama",
        "LlamaForCausalLM",
        "llama",
        gguf="llama",
        gguf_pairs=True,
        attention_bias="attention_bias",
        attention_out_bias="attention_bias",
        mlp_bias="mlp_bias",
        bos_id=1,
        eos_ids=(2,),
    ),
    Family(
        "mistral",
        "MistralForCausalLM",
        "mistral",
        sliding="all",
        window=4096,
        kv_heads=8,
        max_position=131072,
        bos_id=1,
        eos_ids=(2,),
    ),
    Family(
        "qwen2",
        "Qwen2ForCausalLM",
        "qwen2",
        gguf="qwen2",
        attention_bias=True,
        sliding="listed",
        window=4096,
        kv_heads=32,
        max_position=32768,
    ),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        "qwen3",
        gguf="qwen3",
        attention_bias="attention_bias",
        attention_out_bias="attention_bias",
        qk_norm=True,
        sliding="listed",
        window=4096,
        kv_heads=32,
        head_dim=128,
        max_position=32768,
    ),
)

_LAYER_NAMES = (
    # logical (Meta's), Hugging Face, GGUF
    ("attention.wq", "self_attn.q_proj", "attn_q"),
    ("attention.wk", "self_attn.k_proj", "attn_k"),
    ("attention.wv", "self_attn.v_proj", "attn_v"),
    ("attention.wo", "self_attn.o_proj", "attn_output"),
    ("attention.q_norm", "self_attn.q_norm", "attn_q_norm"),
    ("attention.k_norm", "self_attn.k_norm", "attn_k_norm"),
    ("feed_forward.w1", "mlp.gate_proj", "ffn_gate"),
    ("feed_forward.w2", "mlp.down_proj", "ffn_down"),
    ("feed_forward.w3", "mlp.up_proj", "ffn_up"),
    ("attention_norm", "input_layernorm", "attn_norm"),
    ("ffn_norm", "post_attention_layernorm", "ffn_norm"),
)
_TOP_NAMES = (
    ("tok_embeddings", "model.embed_tokens", "token_embd"),
    ("norm", "model.norm", "output_norm"),
    ("output", "lm_head", "output"),
)
_HF_LAYER = {row[0]: row[1] for row in _LAYER_NAMES}
_HF_TOP = {row[0]: row[1] for row in _TOP_NAMES}
_GGUF_LAYER = {row[0]: row[2] for row in _LAYER_NAMES}
_GGUF_TOP = {row[0]: row[2] for row in _TOP_NAMES}


def _rename(name: str, top: dict[str, str], layer: dict[str, str], prefix: str) -> str:
    stem, kind = name.rsplit(".", 1)
    if stem in top:
        return f"{top[stem]}.{kind}"
    _, number, rest = stem.split(".", 2)
    return f"{prefix}.{number}.{layer[rest]}.{kind}"


def hf_name(name: str) -> str:
    """The Hugging Face name of a logical tensor: `layers.3.attention.wq.weight` ->
    `model.layers.3.self_attn.q_proj.weight`."""
    return _rename(name, _HF_TOP, _HF_LAYER, "model.layers")


def gguf_name(name: str) -> str:
    """The GGUF name of a logical tensor: `layers.3.attention.wq.weight` -> `blk.3.attn_q.weight`."""
    return _rename(name, _GGUF_TOP, _GGUF_LAYER, "blk")


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every logical tensor of a model and its shape, [out, in] for matrices, in the order of the forward pass.

    Example: 3 KV heads of 64 in a model of dim 576 make `layers.0.attention.wk.weight` (192, 576).
    """
    c = config
    q, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    linear = [
        ("attention.wq", q, c.dim, c.attention_bias),
        ("attention.wk", kv, c.dim, c.attention_bias),
        ("attention.wv", kv, c.dim, c.attention_bias),
        ("attention.wo", c.dim, q, c.attention_out_bias),
        ("feed_forward.w1", c.hidden_dim, c.dim, c.mlp_bias),
        ("feed_forward.w2", c.dim, c.hidden_dim, c.mlp_bias),
        ("feed_forward.w3", c.hidden_dim, c.dim, c.mlp_bias),
    ]
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (c.vocab_size, c.dim)}
    for i in range(c.n_layers):
        shapes[f"layers.{i}.attention_norm.weight"] = (c.dim,)
        for name, rows, columns, bias in linear:
            if name == "feed_forward.w1":
                shapes[f"layers.{i}.ffn_norm.weight"] = (c.dim,)
            shapes[f"layers.{i}.{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"layers.{i}.{name}.bias"] = (rows,)
        if c.qk_norm:
            shapes[f"layers.{i}.attention.q_norm.weight"] = (c.head_dim,)
            shapes[f"layers.{i}.attention.k_norm.weight"] = (c.head_dim,)
    shapes["norm.weight"] = (c.dim,)
    if not c.tied_embeddings:
        shapes["output.weight"] = (c.vocab_size, c.dim)
    return shapes


def rotary_rows(name: str) -> bool:
    """Whether the rows of a logical tensor are dimensions of rotated heads: wq, wk, their biases, q_norm and k_norm."""
    return name.rsplit(".", 1)[0].endswith((".wq", ".wk", ".q_norm", ".k_norm"))


def family_of_hf(architectures: list[str], model_type: str | None) -> Family:
    """The row for what config.json names; CheckpointError names an architecture that has none."""
    for family in FAMILIES:
        if architectures == [family.architecture] or (not architectures and model_type == family.model_type):
            return family
    found = ", ".join(architectures) or model_type or "none"
    known = ", ".join(f.architecture for f in FAMILIES)
    raise CheckpointError(f"config.json: architecture {found[:80]!r} is not supported; supported: {known}")


def family_of_gguf(architecture: str) -> Family:
    """The row for GGUF's `general.architecture`; CheckpointError names one that has none."""
    for family in FAMILIES:
        if family.gguf == architecture:
            return family
    known = ", ".join(f.gguf for f in FAMILIES if f.gguf)
    raise CheckpointError(f"GGUF: architecture {architecture[:80]!r} is not supported; supported: {known}")
