"""`convert`: a checkpoint in another format, with the tokenizer's files beside it: a GGUF's own are made."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch

from llama_dist.checkpoint.convert import Format, check_convert, convert
from llama_dist.checkpoint.gguf_header import read_metadata
from llama_dist.checkpoint.open import open_checkpoint
from llama_dist.checkpoint.reader import Reader
from llama_dist.config import ModelConfig
from llama_dist.engine.session import read_tokenizer
from llama_dist.errors import CheckpointError
from llama_dist.frontend.options import ConvertOptions
from llama_dist.frontend.output import note
from llama_dist.frontend.sizes import show_bytes
from llama_dist.text import export
from llama_dist.text.base import Tokenizer
from llama_dist.text.load import find_tokenizer

SIDECARS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
GENERATION = "generation_config.json"  # the writer of safetensors makes its own


def prepare(options: ConvertOptions) -> Callable[[], int]:
    """Read the headers and check that they can be written; the work comes back. Raises Config- or CheckpointError."""
    fmt, out = cast(Format, options.format), Path(options.out_dir)
    reader = open_checkpoint(options.run.ckpt_dir)
    mp_size = options.run.model_parallel_size or 1
    check_convert(reader.config, out, fmt, mp_size)
    dtype = None if options.run.dtype == "auto" else getattr(torch, options.run.dtype)
    tokenizer, missing = checked_tokenizer(options, reader)
    files, metadata = tokenizer_files(options, reader)
    made: dict[str, bytes] = {}
    if tokenizer is not None and metadata:
        made = export.tokenizer_files(metadata)
        if fmt == "meta":
            made[GENERATION] = generation_config(tokenizer)
    if tokenizer is not None and fmt == "hf":
        reader.config = with_ids(reader.config, tokenizer, whole=bool(made))

    def work() -> int:
        began = time.monotonic()
        try:
            convert(reader, out, fmt, mp_size, dtype, files, made_files=made, progress=True)
        finally:
            reader.close()
        size = sum(file.stat().st_size for file in out.iterdir())
        note(f"{out}: {show_bytes(size)} in {time.monotonic() - began:.1f} s")
        if not files and not made:
            note(f"no tokenizer was written: {missing}")
        return 0

    return work


def checked_tokenizer(options: ConvertOptions, reader: Reader) -> tuple[Tokenizer | None, str]:
    """The tokenizer, or None and why: weights can be converted without, but not with a --tokenizer_path that is bad."""
    try:
        return read_tokenizer(options.run, reader), ""
    except CheckpointError as error:
        if options.run.tokenizer_path is not None:
            raise
        return None, str(error)


def tokenizer_files(options: ConvertOptions, reader: Reader) -> tuple[list[Path], Mapping[str, Any]]:
    """The tokenizer's file and those beside it that say more about it; or else the GGUF metadata to make them of."""
    given = options.run.tokenizer_path
    folder = Path(options.run.ckpt_dir if given is None else given)
    metadata = reader.metadata if given is None else read_metadata(folder)
    found = folder if given is not None and folder.is_file() else find_tokenizer(folder) if folder.is_dir() else None
    if found is None or (given is not None and metadata is not None):
        return [], metadata or {}
    names = SIDECARS if options.format == "hf" else (*SIDECARS, GENERATION)
    return [found, *(path for name in names if (path := found.parent / name).is_file())], {}


def with_ids(config: ModelConfig, tokenizer: Tokenizer, whole: bool) -> ModelConfig:
    """`config` with the tokenizer's bos and stop ids where it has none of its own; `whole`: stop ids of both."""
    stops = {i for i in tokenizer.stop_ids if i < config.vocab_size}
    if whole or not config.eos_ids:
        config = dataclasses.replace(config, eos_ids=tuple(sorted(stops.union(config.eos_ids))))
    bos = tokenizer.bos_id
    if config.bos_id is None and bos is not None and bos < config.vocab_size:
        config = dataclasses.replace(config, bos_id=bos)
    return config


def generation_config(tokenizer: Tokenizer) -> bytes:
    """Stop ids for a directory whose other files have no word for them."""
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": sorted(tokenizer.stop_ids)}
    return (json.dumps({key: value for key, value in ids.items() if value is not None}, indent=2) + "\n").encode()
