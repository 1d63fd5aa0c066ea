"""`inspect`: what a checkpoint is, from its headers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from llama_dist.checkpoint.open import open_checkpoint
from llama_dist.checkpoint.reader import Reader
from llama_dist.config import DTYPES, ModelConfig
from llama_dist.engine.session import pick_dtype, read_tokenizer
from llama_dist.errors import CheckpointError, ConfigError
from llama_dist.frontend.options import InspectOptions
from llama_dist.frontend.output import Output
from llama_dist.frontend.sizes import show_bytes
from llama_dist.text.base import Tokenizer
from llama_dist.text.chat import pick_chat_format


def prepare(options: InspectOptions) -> Callable[[], int]:
    """Read the headers; showing them comes back. Raises CheckpointError, or ConfigError for a chat format."""
    reader = open_checkpoint(options.run.ckpt_dir)
    try:
        facts = describe(reader, options)
    finally:
        reader.close()
    return lambda: show(facts, options.json)


def describe(reader: Reader, options: InspectOptions) -> dict[str, Any]:
    """Everything `inspect` tells, as JSON values. A tokenizer that is not there is told, not refused."""
    config, tensors = reader.config, reader.tensors
    parameters = sum(math.prod(info.shape) for info in tensors.values())
    auto = str(pick_dtype(options.run, reader, torch.device("cpu"))).removeprefix("torch.")
    return {
        "checkpoint": options.run.ckpt_dir,
        "format": reader.format,
        "config": asdict(config),
        "parameters": parameters,
        "bytes": sum(info.file_bytes for info in tensors.values()),
        "tensors": len(tensors),
        "storage": dict(reader.storage),
        "shapes": shapes(reader),
        "dtypes": list(DTYPES),
        "auto_dtype": auto,
        "tokenizer": tokenizer_facts(reader, options),
    }


def shapes(reader: Reader) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors, layers written once: `layers.*.attention.wq.weight`."""
    found: dict[str, tuple[int, ...]] = {}
    for name, info in reader.tensors.items():
        parts = name.split(".")
        found[".".join("*" if part.isdecimal() else part for part in parts)] = info.shape
    return found


def tokenizer_facts(reader: Reader, options: InspectOptions) -> dict[str, Any] | None:
    """The tokenizer and the chat format; None where the checkpoint comes without one and none is named."""
    try:
        tokenizer = read_tokenizer(options.run, reader)
    except CheckpointError:
        if options.run.tokenizer_path is not None:
            raise
        return None
    return {
        "kind": tokenizer.kind,
        "words": tokenizer.n_words,
        "add_bos": tokenizer.add_bos,
        "bos": _word(tokenizer, tokenizer.bos_id),
        "eos": _word(tokenizer, tokenizer.eos_id),
        "stop_ids": sorted(tokenizer.stop_ids | frozenset(reader.config.eos_ids)),
        "special": dict(sorted(tokenizer.special.items(), key=lambda item: item[1])),
        "chat_format": chat_format(tokenizer, reader.config, options),
        "chat_template": tokenizer.chat_template is not None,
    }


def chat_format(tokenizer: Tokenizer, config: ModelConfig, options: InspectOptions) -> str | None:
    """The format `chat` would use, None where none fits."""
    try:
        return pick_chat_format(tokenizer, config.family, options.run.chat_format)
    except ConfigError:
        if options.run.chat_format is not None:
            raise
        return None


def _word(tokenizer: Tokenizer, i: int | None) -> dict[str, Any] | None:
    if i is None:
        return None
    return {"id": i, "text": next((text for text, known in tokenizer.special.items() if known == i), None)}


def show(facts: dict[str, Any], as_json: bool) -> int:
    """Write the facts to stdout."""
    output = Output()
    output.write(json.dumps(facts, ensure_ascii=False) + "\n" if as_json else text_of(facts))
    return output.exit_code


def text_of(facts: dict[str, Any]) -> str:
    """The facts for a reader: a name and a value a line."""
    config = facts["config"]
    rows = [
        ("checkpoint", facts["checkpoint"]),
        ("format", facts["format"]),
        ("family", config["family"]),
        ("parameters", f"{facts['parameters']:,}" + (", embeddings tied" if config["tied_embeddings"] else "")),
        ("on disk", f"{show_bytes(facts['bytes'])} in {facts['tensors']} tensors"),
        ("stored as", ", ".join(f"{n} x {kind}" for kind, n in facts["storage"].items())),
        ("--dtype", f"{', '.join(facts['dtypes'])}; auto is {facts['auto_dtype']} on a CPU"),
        ("layers", f"{config['n_layers']}, dim {config['dim']}, feed-forward {config['hidden_dim']}"),
        ("heads", f"{config['n_heads']} of {config['head_dim']}, {config['n_kv_heads']} KV heads"),
        ("vocabulary", f"{config['vocab_size']:,}"),
        ("context", f"{config['max_position']:,} tokens"),
        ("rope", _rope(config)),
        *_sliding(config),
        *_tokenizer_rows(facts["tokenizer"]),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    longest = max(len(name) for name in facts["shapes"])
    lines += ["", "tensors", *(f"  {name:<{longest}}  {list(shape)}" for name, shape in facts["shapes"].items())]
    return "\n".join(lines) + "\n"


def _rope(config: dict[str, Any]) -> str:
    scaling = config["rope_scaling"]
    text = f"theta {config['rope_theta']:g}"
    if scaling is None:
        return text + ", no scaling"
    return f"{text}, {scaling['kind']} scaling by {scaling['factor']:g} from {scaling['original_max_position']} tokens"


def _sliding(config: dict[str, Any]) -> list[tuple[str, str]]:
    if config["sliding_window"] is None or not config["sliding_layers"]:
        return []
    n = len(config["sliding_layers"])
    return [("sliding window", f"{config['sliding_window']:,} tokens in {n} of {config['n_layers']} layers")]


def _tokenizer_rows(facts: dict[str, Any] | None) -> list[tuple[str, str]]:
    if facts is None:
        return [("tokenizer", "none here; give --tokenizer_path")]
    special = [f"{text!r} {i}" for text, i in facts["special"].items()]
    more = f" and {len(special) - 12} more" if len(special) > 12 else ""
    return [
        ("tokenizer", f"{facts['kind']}, {facts['words']:,} words"),
        ("stop ids", ", ".join(map(str, facts["stop_ids"])) or "none"),
        ("special tokens", (", ".join(special[:12]) or "none") + more),
        ("chat format", facts["chat_format"] or "none fits; give --chat_format"),
    ]
