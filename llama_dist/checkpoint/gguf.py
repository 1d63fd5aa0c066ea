"""GGUF files with a Llama-like architecture. Tokenizer and chat template are read from `metadata` by the caller."""

from __future__ import annotations

from pathlib import Path

from llama_dist.checkpoint.check import check_shape, check_type, match_whole, name_some
from llama_dist.checkpoint.files import File
from llama_dist.checkpoint.gguf_header import READABLE, read_gguf_header
from llama_dist.checkpoint.stored import read_rectangle
from llama_dist.checkpoint.table import TableReader
from llama_dist.errors import CheckpointError
from llama_dist.model.families import family_of_gguf, gguf_name
from llama_dist.model.gguf_config import parse_gguf_config, with_rope_factors

ROPE_FREQS = "rope_freqs.weight"


def open_gguf(path: Path) -> TableReader:
    """The Reader of one GGUF file, its header checked whole; CheckpointError names what is wrong."""
    file = File(path)
    try:
        header = read_gguf_header(file)
        found = dict(header.tensors)
        embedding = gguf_name("tok_embeddings.weight")
        # Checked first, so that an architecture of another kind is named, not a tensor it lacks.
        family = family_of_gguf(str(header.metadata.get("general.architecture")))
        if embedding not in found or len(found[embedding].shape) != 2:
            raise CheckpointError(f"{path}: no matrix {embedding} among {len(found)} tensors: {name_some(found)}")
        config = parse_gguf_config(header.metadata, found, found[embedding].shape[0])
        factors = found.pop(ROPE_FREQS, None)
        if factors is not None:
            check_type(str(path), ROPE_FREQS, factors, "F32")
            check_shape(str(path), ROPE_FREQS, factors.shape, (config.head_dim // 2,))
            pieces = read_rectangle(factors, 0, factors.shape[0], 0, 1)
            config = with_rope_factors(config, [float(x) for piece in pieces for x in piece.view(-1)])
        logical = match_whole(str(path), config, found, gguf_name, pairs=family.gguf_pairs, allowed=READABLE)
        return TableReader("gguf", config, logical, [file], header.metadata)
    except BaseException:
        file.close()
        raise
