"""Hugging Face's format: config.json, generation_config.json and safetensors files with their index.

config.json has `rope_theta` and `rope_scaling` at the top, which transformers 4 and 5 both read. A safetensors file is
8 bytes of header length, the header as JSON, and the tensors back to back
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llama_dist.checkpoint.reader import Reader
from llama_dist.checkpoint.writers import DTYPE_NAMES, Advance, cast_pieces, dtype_of, raw_bytes
from llama_dist.config import ModelConfig
from llama_dist.errors import ConfigError
from llama_dist.model.families import FAMILIES, Family, hf_name, tensor_shapes
from llama_dist.model.hf_config import parse_hf_config

MAX_SHARD_BYTES = 5 * 10**9
_KINDS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its logical name, what it is written as and the bytes that takes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def hf_config(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The contents of config.json; ConfigError names what the family's config class cannot say."""
    c = config
    family = next(row for row in FAMILIES if row.name == c.family)
    out: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "hidden_size": c.dim,
        "intermediate_size": c.hidden_dim,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.n_kv_heads,
        "head_dim": c.head_dim,
        "vocab_size": c.vocab_size,
        "max_position_embeddings": c.max_position,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "rope_scaling": _rope_scaling(c),
        "tie_word_embeddings": c.tied_embeddings,
        "hidden_act": "silu",
        "bos_token_id": c.bos_id,
        "eos_token_id": _ids(c.eos_ids),
        "torch_dtype": DTYPE_NAMES[dtype],
    }
    for flag in ("attention_bias", "attention_out_bias", "mlp_bias"):
        key = getattr(family, flag)
        if isinstance(key, str):
            out[key] = getattr(c, flag)
    out |= _sliding(c, family)
    heard = parse_hf_config(out)
    for field in dataclasses.fields(ModelConfig):
        value = getattr(c, field.name)
        if getattr(heard, field.name) != value:
            raise ConfigError(f"--format hf: {family.architecture} cannot express {field.name} {value}")
    return out


def _ids(ids: tuple[int, ...]) -> int | list[int] | None:
    return None if not ids else ids[0] if len(ids) == 1 else list(ids)


def _rope_scaling(config: ModelConfig) -> dict[str, Any] | None:
    scaling = config.rope_scaling
    if scaling is None:
        return None
    out: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        out["low_freq_factor"] = scaling.low_freq_factor
        out["high_freq_factor"] = scaling.high_freq_factor
        out["original_max_position_embeddings"] = scaling.original_max_position
    return out


def _sliding(config: ModelConfig, family: Family) -> dict[str, Any]:
    """`layer_types` is what newer versions go by, `max_window_layers` what older ones know."""
    if family.sliding == "no":
        return {}
    if family.sliding == "all":
        return {"sliding_window": config.sliding_window}
    layers = set(config.sliding_layers)
    return {
        "use_sliding_window": bool(layers),
        "sliding_window": config.sliding_window,
        "max_window_layers": min(layers, default=config.n_layers),
        "layer_types": ["sliding_attention" if n in layers else "full_attention" for n in range(config.n_layers)],
    }


def plan_files(reader: Reader, dtype: torch.dtype | None, max_shard_bytes: int) -> list[list[Entry]]:
    """Tensors in the order of the forward pass, a new file wherever the next would pass `max_shard_bytes`."""
    files: list[list[Entry]] = [[]]
    size = 0
    for name, shape in tensor_shapes(reader.config).items():
        entry = Entry(name, shape, dtype_of(reader, name, dtype))
        if files[-1] and size + entry.n_bytes > max_shard_bytes:
            files.append([])
            size = 0
        files[-1].append(entry)
        size += entry.n_bytes
    return files


def write_hf(
    reader: Reader, folder: Path, dtype: torch.dtype | None, advance: Advance, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """The whole directory but for the tokenizer. A tensor above `max_shard_bytes` has a file of its own."""
    config = reader.config
    files = plan_files(reader, dtype, max_shard_bytes)
    _dump(folder / "config.json", hf_config(config, files[0][0].dtype))
    ids = {"bos_token_id": config.bos_id, "eos_token_id": _ids(config.eos_ids)}
    _dump(folder / "generation_config.json", {key: value for key, value in ids.items() if value is not None})
    weight_map: dict[str, str] = {}
    for n, entries in enumerate(files):
        single = len(files) == 1
        file = "model.safetensors" if single else f"model-{n + 1:05d}-of-{len(files):05d}.safetensors"
        _write_file(reader, folder / file, entries, dtype, advance)
        weight_map |= {hf_name(entry.name): file for entry in entries}
    if len(files) > 1:
        total = sum(entry.n_bytes for entries in files for entry in entries)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        _dump(folder / "model.safetensors.index.json", index)


def _dump(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _write_file(reader: Reader, path: Path, entries: list[Entry], dtype: torch.dtype | None, advance: Advance) -> None:
    # Wide types first: every tensor then begins at a multiple of its own item size.
    entries = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        begin, end = end, end + entry.n_bytes
        kind = _KINDS[entry.dtype]
        header[hf_name(entry.name)] = {"dtype": kind, "shape": entry.shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as out:
        out.write(len(text).to_bytes(8, "little"))
        out.write(text)
        for entry in entries:
            for piece in cast_pieces(reader, entry.name, dtype):
                out.write(raw_bytes(piece))
                advance(piece.numel())
