"""Tiny random checkpoints of every family and flag, the same on every run, and how to save them in every format.

A case is a Hugging Face config plus seeded float32 weights. Biases and norm weights are random too: a forgotten one
shows. Sizes are odd on purpose (293 words, 150 hidden), except where Meta's format must divide them.
"""

from __future__ import annotations

import functools
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import safetensors.torch
import torch

from tests import tiny_tokenizer

VOCAB = tiny_tokenizer.N_WORDS  # 293, a prime
META_VOCAB = tiny_tokenizer.N_TIKTOKEN_WORDS  # 544

_ROPE_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # Small, so that all three parts of the rule meet some frequency within a short prompt.
    "original_max_position_embeddings": 32,
}
_META_ROPE = _ROPE_LLAMA3 | {"original_max_position_embeddings": 8192}


@dataclass(frozen=True)
class Case:
    """One tiny model. `options` are entries of config.json as transformers 4 writes it, over `_BASE`."""

    name: str
    model_type: str
    options: Mapping[str, Any] = field(default_factory=dict)
    meta: tuple[int, ...] = ()
    """The numbers of files Meta's format can cut this model into; empty: the format cannot express it."""
    gguf: bool = True

    @property
    def config(self) -> dict[str, Any]:
        """config.json as transformers 4 writes it."""
        return {
            "model_type": self.model_type,
            "architectures": [_ARCHITECTURES[self.model_type]],
            **_BASE,
            **self.options,
        }

    @property
    def head_dim(self) -> int:
        return int(self.config.get("head_dim") or self.config["hidden_size"] // self.config["num_attention_heads"])

    @property
    def tied(self) -> bool:
        return bool(self.config["tie_word_embeddings"])


_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_BASE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 150,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "bos_token_id": tiny_tokenizer.BOS,
    "eos_token_id": tiny_tokenizer.EOS,
}
_META_SHAPES = {"vocab_size": META_VOCAB, "intermediate_size": 152}

CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("llama-mha", "llama", {"num_attention_heads": 4, "num_key_value_heads": 4}, meta=(1,)),
        Case("llama-gqa", "llama", meta=(1,)),
        Case(
            "llama-9-3",
            "llama",
            {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3},
            meta=(1,),
        ),
        Case("llama-head-dim", "llama", {"num_attention_heads": 4, "head_dim": 20}),
        Case("llama-attention-bias", "llama", {"attention_bias": True}),
        Case("llama-mlp-bias", "llama", {"mlp_bias": True}),
        Case("llama-tied", "llama", {"tie_word_embeddings": True}),
        Case("llama-rope-llama3", "llama", {"rope_scaling": _ROPE_LLAMA3}),
        Case("llama-rope-linear", "llama", {"rope_scaling": {"type": "linear", "factor": 3.0}}),
        Case(
            "llama-rope-dynamic",
            "llama",
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 24},
            gguf=False,
        ),
        Case("llama-meta", "llama", {"num_key_value_heads": 4, **_META_SHAPES}, meta=(1, 2, 4)),
        Case("llama-meta-repeat", "llama", _META_SHAPES, meta=(1, 2)),
        Case(
            "llama-meta-scaled",
            "llama",
            # A long wavelength needs a large base: with 4 pairs a head the last one turns once in 100,000s of tokens.
            {
                "num_key_value_heads": 4,
                **_META_SHAPES,
                "max_position_embeddings": 131072,
                "rope_theta": 500000.0,
                "rope_scaling": _META_ROPE,
            },
            meta=(1, 2, 4),
        ),
        Case(
            "mistral-window",
            "mistral",
            {"sliding_window": 8, "num_hidden_layers": 3, "rms_norm_eps": 1e-6},
            gguf=False,
        ),
        Case("mistral-full", "mistral", {"sliding_window": None, "head_dim": 16}),
        Case("qwen2", "qwen2", {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 1}),
        Case("qwen2-tied", "qwen2", {"tie_word_embeddings": True, "rope_theta": 1000000.0}),
        Case(
            "qwen2-window",
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "num_hidden_layers": 3},
            gguf=False,
        ),
        Case("qwen3", "qwen3", {"head_dim": 16, "rope_theta": 1000000.0, "attention_bias": False}),
        Case(
            "smollm2",
            "llama",
            {
                "hidden_size": 72,
                "num_attention_heads": 9,
                "num_key_value_heads": 3,
                "tie_word_embeddings": True,
                "rope_theta": 100000.0,
            },
        ),
    )
}


def rope_kind(case: Case) -> str | None:
    """The rule of `rope_scaling`; releases of transformers before 4.45 called the key `type`."""
    scaling = case.config["rope_scaling"]
    return (scaling.get("rope_type") or scaling["type"]) if scaling else None


def hf_names(case: Case) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor as Hugging Face stores it."""
    c = case.config
    dim, hidden, d = c["hidden_size"], c["intermediate_size"], case.head_dim
    q, kv = c["num_attention_heads"] * d, c["num_key_value_heads"] * d
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c["vocab_size"], dim)}
    for n in range(c["num_hidden_layers"]):
        p = f"model.layers.{n}."
        linear = {
            "self_attn.q_proj": (q, dim),
            "self_attn.k_proj": (kv, dim),
            "self_attn.v_proj": (kv, dim),
            "self_attn.o_proj": (dim, q),
            "mlp.gate_proj": (hidden, dim),
            "mlp.up_proj": (hidden, dim),
            "mlp.down_proj": (dim, hidden),
        }
        biased = set(linear) & {
            name
            for name in linear
            if (name.startswith("self_attn") and c.get("attention_bias"))
            or (name.startswith("mlp") and c.get("mlp_bias"))
            or (case.model_type == "qwen2" and name[-6:] in ("q_proj", "k_proj", "v_proj"))
        }
        shapes |= {f"{p}{name}.weight": shape for name, shape in linear.items()}
        shapes |= {f"{p}{name}.bias": (linear[name][0],) for name in sorted(biased)}
        shapes |= {f"{p}{norm}.weight": (dim,) for norm in ("input_layernorm", "post_attention_layernorm")}
        if case.model_type == "qwen3":
            shapes |= {f"{p}self_attn.{norm}.weight": (d,) for norm in ("q_norm", "k_norm")}
    shapes["model.norm.weight"] = (dim,)
    if not case.tied:
        shapes["lm_head.weight"] = (c["vocab_size"], dim)
    return shapes


@functools.cache
def _weights(name: str) -> dict[str, torch.Tensor]:
    case = CASES[name]
    noise = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    out = {}
    for key, shape in hf_names(case).items():
        value = torch.randn(shape, generator=noise)
        if key.endswith("norm.weight"):
            value = 1 + 0.3 * value
        elif key.endswith(".bias"):
            value = 0.3 * value
        else:
            # Twice the usual spread: answers then have clear favourites, so rounding cannot swap two tokens.
            value = value * 2 / shape[1] ** 0.5
        out[key] = value
    return out


def weights(case: Case, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Fresh copies of the weights by their Hugging Face names."""
    return {key: value.clone().to(dtype) for key, value in _weights(case.name).items()}


def config_json(case: Case, dtype: torch.dtype = torch.float32, style: int = 4) -> dict[str, Any]:
    """config.json as transformers 4 (`rope_theta`, `rope_scaling`) or 5 (`rope_parameters`) writes it."""
    dtype_name = str(dtype).removeprefix("torch.")
    config = dict(case.config)
    if style == 4:
        return config | {"torch_dtype": dtype_name, "transformers_version": "4.51.0"}
    theta, scaling = config.pop("rope_theta"), config.pop("rope_scaling")
    rope = {"rope_theta": theta, "rope_type": rope_kind(case) or "default", **(scaling or {})}
    rope.pop("type", None)
    return config | {"rope_parameters": rope, "dtype": dtype_name, "transformers_version": "5.0.0"}


def save_hf(case: Case, folder: Path, dtype: torch.dtype = torch.float32, shards: int = 1, style: int = 4) -> Path:
    """A Hugging Face directory: config.json, safetensors in one file or several with an index, tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = weights(case, dtype)
    (folder / "config.json").write_text(json.dumps(config_json(case, dtype, style), indent=2))
    tiny_tokenizer.save_hf(folder)
    if shards == 1:
        safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    index: dict[str, str] = {}
    names = list(tensors)
    for n in range(shards):
        file = f"model-{n + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[n::shards]}
        safetensors.torch.save_file(part, folder / file, {"format": "pt"})
        index |= dict.fromkeys(part, file)
    total = sum(t.nbytes for t in tensors.values())
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}, indent=2)
    (folder / "model.safetensors.index.json").write_text(text)
    return folder


def pair_neighbours(x: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of q or k from Hugging Face's order (i pairs with i + head_dim / 2) to Meta's (2i pairs with 2i + 1)."""
    order = [half * head_dim // 2 + i for i in range(head_dim // 2) for half in (0, 1)]
    return x.unflatten(0, (-1, head_dim))[:, order].flatten(0, 1).contiguous()


_META_NAMES = {
    "self_attn.q_proj": ("attention.wq", 0),
    "self_attn.k_proj": ("attention.wk", 0),
    "self_attn.v_proj": ("attention.wv", 0),
    "self_attn.o_proj": ("attention.wo", 1),
    "mlp.gate_proj": ("feed_forward.w1", 0),
    "mlp.down_proj": ("feed_forward.w2", 1),
    "mlp.up_proj": ("feed_forward.w3", 0),
    "input_layernorm": ("attention_norm", None),
    "post_attention_layernorm": ("ffn_norm", None),
}


def meta_state(case: Case, dtype: torch.dtype = torch.float32) -> dict[str, tuple[torch.Tensor, int | None]]:
    """Meta's names to whole tensors and the dimension they are cut along (None: every file has all of it)."""
    out: dict[str, tuple[torch.Tensor, int | None]] = {}
    for key, value in weights(case, dtype).items():
        if key.startswith("model.layers."):
            _, _, layer, rest = key.split(".", 3)
            module, kind = rest.rsplit(".", 1)
            name, cut = _META_NAMES[module]
            if name in ("attention.wq", "attention.wk"):
                value = pair_neighbours(value, case.head_dim)
            out[f"layers.{layer}.{name}.{kind}"] = (value, cut)
        elif key == "model.norm.weight":
            out["norm.weight"] = (value, None)
        else:
            out["output.weight" if key == "lm_head.weight" else "tok_embeddings.weight"] = (value, 0)
    return out


def params_json(case: Case) -> dict[str, Any]:
    """Meta's params.json. Its rule gives hidden = multiple_of * ceil(int(f * int(8 dim / 3)) / multiple_of)."""
    c = case.config
    multiple = c["intermediate_size"] // 2
    params = {
        "dim": c["hidden_size"],
        "n_layers": c["num_hidden_layers"],
        "n_heads": c["num_attention_heads"],
        "n_kv_heads": c["num_key_value_heads"],
        "vocab_size": c["vocab_size"],
        "multiple_of": multiple,
        "ffn_dim_multiplier": 1.5 * multiple / int(8 * c["hidden_size"] / 3),
        "norm_eps": c["rms_norm_eps"],
        "rope_theta": c["rope_theta"],
    }
    return params | ({"use_scaled_rope": True} if c["rope_scaling"] else {})


def save_meta(
    case: Case, folder: Path, mp_size: int = 1, llama2_embedding: bool = False, dtype: torch.dtype = torch.float32
) -> Path:
    """Meta's consolidated.NN.pth and params.json, and a tiktoken-format tokenizer.model where the words fit.

    `llama2_embedding` cuts the embedding along its width and adds `rope.freqs`, as Llama 2's files do.
    """
    if mp_size not in case.meta:
        raise ValueError(f"{case.name} has no Meta form with {mp_size} files, only {case.meta}")
    folder.mkdir(parents=True, exist_ok=True)
    state = meta_state(case, dtype)
    for rank in range(mp_size):
        part: dict[str, torch.Tensor] = {}
        for name, (value, cut) in state.items():
            dim = 1 if llama2_embedding and name == "tok_embeddings.weight" else cut
            part[name] = value if dim is None else value.chunk(mp_size, dim)[rank].clone()
        if llama2_embedding:
            d = case.head_dim
            part["rope.freqs"] = (1.0 / case.config["rope_theta"] ** (torch.arange(0, d, 2) / d)).to(dtype)
        torch.save(part, folder / f"consolidated.{rank:02d}.pth")
    (folder / "params.json").write_text(json.dumps(params_json(case)))
    if case.config["vocab_size"] == META_VOCAB:
        tiny_tokenizer.save_tiktoken(folder / "tokenizer.model")
    return folder


_GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.down_proj": "ffn_down",
    "mlp.up_proj": "ffn_up",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_GGUF_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_state(case: Case) -> dict[str, torch.Tensor]:
    """GGUF names to float32 tensors; q and k of the `llama` architecture pair neighbours, as llama.cpp stores them."""
    out: dict[str, torch.Tensor] = {}
    for key, value in weights(case).items():
        module, kind = key.rsplit(".", 1)
        if module in _GGUF_TOP:
            out[f"{_GGUF_TOP[module]}.{kind}"] = value
            continue
        _, _, layer, name = module.split(".", 3)
        if case.model_type in ("llama", "mistral") and name in ("self_attn.q_proj", "self_attn.k_proj"):
            value = pair_neighbours(value, case.head_dim)
        out[f"blk.{layer}.{_GGUF_NAMES[name]}.{kind}"] = value
    if rope_kind(case) == "llama3":
        out["rope_freqs.weight"] = _llama3_divisors(case)
    return out


def _llama3_divisors(case: Case) -> torch.Tensor:
    """What llama.cpp divides each frequency by: Llama 3.1's rule as a table, float32 of head_dim / 2."""
    scaling, d = case.config["rope_scaling"], case.head_dim
    low, high, old = (scaling[k] for k in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"))
    out = []
    for i in range(0, d, 2):
        wavelength = 2 * torch.pi * case.config["rope_theta"] ** (i / d)
        if wavelength < old / high:
            out.append(1.0)
        elif wavelength > old / low:
            out.append(scaling["factor"])
        else:
            smooth = (old / wavelength - low) / (high - low)
            out.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return torch.tensor(out, dtype=torch.float32)


def save_gguf(case: Case, path: Path, dtype: str = "F32") -> Path:
    """One GGUF file with its tokenizer. `dtype` names a GGML type; a row that its blocks do not fit stays F16.

    Norms, biases and rope_freqs are always F32.
    """
    if not case.gguf:
        raise ValueError(f"{case.name} has no GGUF form")
    c = case.config
    arch = "llama" if case.model_type == "mistral" else case.model_type
    path.parent.mkdir(parents=True, exist_ok=True)
    out = gguf.GGUFWriter(path, arch)
    out.add_name(case.name)
    out.add_block_count(c["num_hidden_layers"])
    out.add_context_length(c["max_position_embeddings"])
    out.add_embedding_length(c["hidden_size"])
    out.add_feed_forward_length(c["intermediate_size"])
    out.add_head_count(c["num_attention_heads"])
    out.add_head_count_kv(c["num_key_value_heads"])
    out.add_rope_freq_base(c["rope_theta"])
    out.add_layer_norm_rms_eps(c["rms_norm_eps"])
    out.add_vocab_size(c["vocab_size"])
    out.add_rope_dimension_count(case.head_dim)
    if case.head_dim * c["num_attention_heads"] != c["hidden_size"]:
        out.add_key_length(case.head_dim)
        out.add_value_length(case.head_dim)
    if rope_kind(case) == "linear":
        out.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        out.add_rope_scaling_factor(c["rope_scaling"]["factor"])
    tiny_tokenizer.add_to_gguf(out, c["vocab_size"])
    wanted = gguf.GGMLQuantizationType[dtype]
    for name, tensor in gguf_state(case).items():
        kind = gguf.GGMLQuantizationType.F32 if tensor.ndim == 1 else wanted
        if tensor.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            kind = gguf.GGMLQuantizationType.F16
        out.add_tensor(name, gguf.quantize(tensor.numpy(), kind), raw_dtype=kind)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path
