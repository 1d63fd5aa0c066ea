"""The real small model for transformers: its GGUF decoded to a float32 Hugging Face directory.

Written for this one file with the `gguf` package alone, so that it shares nothing with the readers it is compared to.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import safetensors.torch
import torch

_MODULES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_up": "mlp.up_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_TOP = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}


def _value(reader: gguf.GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    if field is None:
        raise ValueError(f"the GGUF has no {key}")
    return field.contents()


def _halves(x: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of q or k from neighbours in pairs (llama.cpp) to halves of a head (Hugging Face)."""
    return x.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2).contiguous()


def decode_to_hf(source: Path, folder: Path) -> None:
    """Writes config.json, model.safetensors (float32, tied embeddings) and the tokenizer's files into `folder`."""
    reader = gguf.GGUFReader(source)
    heads, dim = _value(reader, "llama.attention.head_count"), _value(reader, "llama.embedding_length")
    tensors: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        value = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        if tensor.name in _TOP:
            tensors[_TOP[tensor.name]] = value
            continue
        _, layer, module, kind = tensor.name.split(".")
        if module in ("attn_q", "attn_k"):
            value = _halves(value, dim // heads)
        tensors[f"model.layers.{layer}.{_MODULES[module]}.{kind}"] = value
    folder.mkdir(parents=True)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": dim,
        "intermediate_size": _value(reader, "llama.feed_forward_length"),
        "num_hidden_layers": _value(reader, "llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _value(reader, "llama.attention.head_count_kv"),
        "vocab_size": _value(reader, "llama.vocab_size"),
        "max_position_embeddings": _value(reader, "llama.context_length"),
        "rms_norm_eps": _value(reader, "llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": _value(reader, "llama.rope.freq_base"),
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "bos_token_id": _value(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": _value(reader, "tokenizer.ggml.eos_token_id"),
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    _write_tokenizer(reader, folder)


def _write_tokenizer(reader: gguf.GGUFReader, folder: Path) -> None:
    """tokenizer.json of SmolLM2: digits one by one, then GPT-2's byte-level BPE."""
    words, kinds = _value(reader, "tokenizer.ggml.tokens"), _value(reader, "tokenizer.ggml.token_type")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    control = [i for i, kind in enumerate(kinds) if kind == gguf.TokenType.CONTROL]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": words[i], **flags} for i in control],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {word: i for i, word in enumerate(words)},
            "merges": _value(reader, "tokenizer.ggml.merges"),
        },
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": words[_value(reader, "tokenizer.ggml.bos_token_id")],
        "eos_token": words[_value(reader, "tokenizer.ggml.eos_token_id")],
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "chat_template": _value(reader, "tokenizer.chat_template"),
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
