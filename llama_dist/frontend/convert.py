"""`convert`: a checkpoint in another format, with the tokenizer's files beside it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch

from llama_dist.checkpoint.convert import Format, check_convert, convert
from llama_dist.checkpoint.open import open_checkpoint
from llama_dist.checkpoint.reader import Reader
from llama_dist.errors import CheckpointError
from llama_dist.frontend.options import ConvertOptions
from llama_dist.frontend.output import note
from llama_dist.frontend.sizes import show_bytes
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
    files = tokenizer_files(options)

    def work() -> int:
        began = time.monotonic()
        try:
            convert(reader, out, fmt, mp_size, dtype, files, progress=True)
        finally:
            reader.close()
        size = sum(file.stat().st_size for file in out.iterdir())
        note(f"{out}: {show_bytes(size)} in {time.monotonic() - began:.1f} s")
        if not files:
            note(missing_tokenizer(reader))
        return 0

    return work


def tokenizer_files(options: ConvertOptions) -> list[Path]:
    """The tokenizer's file and those beside it that say more about it; empty where the checkpoint has none."""
    if options.run.tokenizer_path is not None:
        found: Path | None = Path(options.run.tokenizer_path)
        if found is not None and found.is_dir():
            found = find_tokenizer(found)
        if found is None or not found.is_file():
            raise CheckpointError(f"no tokenizer at {options.run.tokenizer_path}; check --tokenizer_path")
    else:
        folder = Path(options.run.ckpt_dir)
        found = find_tokenizer(folder) if folder.is_dir() else None
    if found is None:
        return []
    names = SIDECARS if options.format == "hf" else (*SIDECARS, GENERATION)
    return [found, *(path for name in names if (path := found.parent / name).is_file())]


def missing_tokenizer(reader: Reader) -> str:
    where = "lies inside the GGUF and was not written" if reader.metadata else "was not found and not copied"
    return f"the tokenizer {where}; put its file into the new directory, or give --tokenizer_path when you run it"
