"""Hugging Face directories: config.json and model.safetensors, or several files and their index.

The header is parsed here (8 bytes little-endian length, JSON, data; https://github.com/huggingface/safetensors): the
library maps files, so their pages count as a rank's memory, and it does not bound what a header may claim.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import re
from collections.abc import Container
from pathlib import Path
from typing import Any

import torch

from llama_dist.checkpoint.check import check_names, match_whole, name_some
from llama_dist.checkpoint.files import MAX_JSON, File, parse_json, read_json
from llama_dist.checkpoint.stored import BF16, F16, F32, Stored, read_rectangle
from llama_dist.checkpoint.table import TableReader
from llama_dist.config import ModelConfig
from llama_dist.errors import CheckpointError
from llama_dist.model.families import hf_name
from llama_dist.model.fields import short
from llama_dist.model.hf_config import parse_hf_config

log = logging.getLogger("llama_dist")

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_ENCODINGS = {"F32": F32, "F16": F16, "BF16": BF16}
_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32}
_BITS |= {"C64": 64, "F64": 64, "I64": 64, "U64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4}
_INV_FREQ = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
"""Rotary frequencies that old versions of transformers saved; they follow from the config."""


def open_safetensors(directory: Path) -> TableReader:
    """The Reader of a Hugging Face directory, its headers checked whole; CheckpointError names what is wrong."""
    generation = directory / "generation_config.json"
    config = parse_hf_config(
        read_json(directory / "config.json"), read_json(generation) if generation.is_file() else None
    )
    files: list[File] = []
    try:
        found = _read_headers(directory, files)
        found = {name: stored for name, stored in found.items() if not _INV_FREQ.search(name)}
        config = _settle_tied(config, found)
        return TableReader("safetensors", config, match_whole(str(directory), config, found, hf_name), files)
    except BaseException:
        for file in files:
            file.close()
        raise


def _read_headers(directory: Path, files: list[File]) -> dict[str, Stored]:
    if (directory / SINGLE).is_file():
        files.append(File(directory / SINGLE))
        return read_header(files[0])
    weight_map, total = _read_index(directory / INDEX)
    found: dict[str, Stored] = {}
    for name in dict.fromkeys(weight_map.values()):
        files.append(File(directory / name))
        header = read_header(files[-1])
        listed = [tensor for tensor, file in weight_map.items() if file == name]
        check_names(str(directory / name), listed, header, by=INDEX)
        found |= header
    size = sum(s.n_bytes for s in found.values() if s.encoding is not None)
    if total is not None and total != size:
        log.info("%s: total_size says %s, the files hold %d bytes of tensors", INDEX, short(total), size)
    return found


def _read_index(path: Path) -> tuple[dict[str, str], Any]:
    index = read_json(path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map is {short(weight_map)}, must map tensor names to files")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*\.safetensors", file):
            raise CheckpointError(
                f"{path}: tensor {name_some([name])} is said to be in {short(file)}, "
                "must be a .safetensors file of the same directory"
            )
    metadata = index.get("metadata")
    return weight_map, metadata.get("total_size") if isinstance(metadata, dict) else None


def read_header(file: File) -> dict[str, Stored]:
    """Every tensor of one .safetensors file; offsets must lie in the file, not overlap and fit shape and type."""
    length = int.from_bytes(file.read(0, 8), "little")
    if length > min(MAX_JSON, file.size - 8):
        raise CheckpointError(
            f"{file.path}: the header claims {length} bytes of a file of {file.size} (at most {MAX_JSON}): "
            "not a safetensors file, or truncated"
        )
    header = parse_json(file.read(8, length), f"{file.path}: header")
    header.pop("__metadata__", None)
    begin, room = 8 + length, file.size - 8 - length
    found, spans = {}, []
    for name, entry in header.items():
        where = f"{file.path}: tensor {name_some([name])}"
        kind, shape, start, stop = _entry(where, entry)
        bits = _BITS.get(kind)
        if bits is not None and math.prod(shape) * bits != (stop - start) * 8:
            raise CheckpointError(f"{where}: {kind} of shape {shape} does not take the {stop - start} bytes it claims")
        if stop > room:
            raise CheckpointError(f"{where} ends {stop - room} bytes after the file: truncated, fetch it again")
        found[name] = Stored(file, begin + start, tuple(shape), kind, _ENCODINGS.get(kind))
        spans.append((start, stop, name))
    spans.sort()
    for (_, stop, one), (start, _, other) in itertools.pairwise(spans):
        if start < stop:
            raise CheckpointError(f"{file.path}: tensors {name_some([one, other])} overlap")
    return found


def _entry(where: str, entry: Any) -> tuple[str, list[int], int, int]:
    if isinstance(entry, dict):
        kind: Any = entry.get("dtype")
        shape: Any = entry.get("shape")
        offsets: Any = entry.get("data_offsets")
        well_formed = _sizes(shape, range(9)) and _sizes(offsets, [2])
        if isinstance(kind, str) and well_formed and offsets[0] <= offsets[1]:
            return kind[:20], shape, offsets[0], offsets[1]
    raise CheckpointError(f"{where}: {short(entry)} is not a dtype, a shape and two data_offsets")


def _sizes(value: Any, lengths: Container[int]) -> bool:
    return (
        isinstance(value, list)
        and len(value) in lengths
        and all(type(item) is int and 0 <= item < 2**63 for item in value)
    )


def _settle_tied(config: ModelConfig, found: dict[str, Stored]) -> ModelConfig:
    """With tied embeddings a stored copy of the output matrix is left out, as long as it is a copy."""
    embedding, output = (found.get(hf_name(name)) for name in ("tok_embeddings.weight", "output.weight"))
    if not config.tied_embeddings or output is None:
        return config
    if embedding is not None and not _look_alike(embedding, output):
        # transformers 5 unties them too: the matrices are what was trained, the flag is a line of text.
        log.warning("config.json ties the embeddings, but lm_head.weight differs from them: not tied")
        return dataclasses.replace(config, tied_embeddings=False)
    del found[hf_name("output.weight")]
    return config


def _look_alike(one: Stored, other: Stored, samples: int = 16) -> bool:
    """Whether two matrices of one shape and type agree in rows spread over them."""
    if one.encoding is None or (one.shape, one.kind) != (other.shape, other.kind) or len(one.shape) != 2:
        return True  # whatever is wrong with the shapes is said by the check of all tensors
    rows, columns = one.shape
    for row in {i * (rows - 1) // (samples - 1) for i in range(samples)}:
        pair = [next(read_rectangle(stored, row, row + 1, 0, columns)) for stored in (one, other)]
        if not torch.equal(*pair):
            return False
    return True
