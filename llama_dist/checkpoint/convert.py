"""Any readable checkpoint to Meta's or Hugging Face's format, in a stream: memory stays near one piece of a tensor."""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from llama_dist.checkpoint.hf_writer import MAX_SHARD_BYTES, hf_config, write_hf
from llama_dist.checkpoint.meta_writer import check_meta, write_meta
from llama_dist.checkpoint.reader import Reader
from llama_dist.checkpoint.writers import DTYPE_NAMES, dtype_of
from llama_dist.config import ModelConfig
from llama_dist.errors import CheckpointError, ConfigError

Format = Literal["meta", "hf"]


def check_convert(config: ModelConfig, out: Path, fmt: Format, mp_size: int = 1) -> None:
    """Everything that can be refused before a byte is read or written; ConfigError says what to do instead.

    `out` must be a directory that is empty or not there; the format must have words for the model; `mp_size`, for
    Meta's, must cut it evenly.
    """
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ConfigError(f"{out} is not a directory; name one that is empty or not there yet")
    if out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty; name a directory that is empty or not there yet")
    if fmt == "meta":
        check_meta(config, mp_size)
    else:
        hf_config(config, torch.float32)


def convert(
    reader: Reader,
    out: Path,
    fmt: Format,
    mp_size: int = 1,
    dtype: torch.dtype | None = None,
    tokenizer_files: Sequence[Path] = (),
    *,
    made_files: Mapping[str, bytes] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: bool = False,
) -> None:
    """Write the checkpoint behind `reader` to the new directory `out`.

    `fmt` "meta": `mp_size` files consolidated.NN.pth and params.json, tied embeddings written out; "hf": safetensors
    of at most `max_shard_bytes` bytes each, config.json and generation_config.json. `dtype` None keeps what is stored;
    quantised tensors become float32. `tokenizer_files` are copied along, `made_files` written by their names.
    `progress` shows a bar on a terminal.

    The directory appears under its name only when it is whole: it is made beside it as `.NAME.partial-PID`.
    Raises ConfigError for what cannot be asked, CheckpointError for what cannot be read or written.
    """
    out = Path(os.path.abspath(out))
    check_convert(reader.config, out, fmt, mp_size)
    if dtype is not None and dtype not in DTYPE_NAMES:
        raise ConfigError(f"--dtype is {dtype}, must be one of {', '.join(DTYPE_NAMES.values())}")
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _check_room(reader, out.parent, fmt, dtype)
        partial.mkdir()
        try:
            _write(reader, partial, fmt, mp_size, dtype, max_shard_bytes, progress)
            for file in tokenizer_files:
                if (partial / file.name).exists():
                    raise ConfigError(
                        f"{file} cannot be copied along: the converted checkpoint has its own {file.name}"
                    )
                shutil.copyfile(file, partial / file.name)
            for name, data in (made_files or {}).items():
                with open(partial / name, "xb") as made:
                    made.write(data)
            os.replace(partial, out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    except OSError as error:
        where = error.filename or partial
        raise CheckpointError(f"cannot write {out}: {where}: {error.strerror or error}") from error


def _check_room(reader: Reader, folder: Path, fmt: Format, dtype: torch.dtype | None) -> None:
    sizes = {
        name: math.prod(info.shape) * dtype_of(reader, name, dtype).itemsize for name, info in reader.tensors.items()
    }
    need = sum(sizes.values())
    if fmt == "meta" and reader.config.tied_embeddings:
        need += sizes["tok_embeddings.weight"]
    free = shutil.disk_usage(folder).free
    if need > free:
        raise CheckpointError(
            f"{folder} has {free / 1e9:.1f} GB free, the converted checkpoint needs {need / 1e9:.1f} GB"
        )


def _write(
    reader: Reader,
    folder: Path,
    fmt: Format,
    mp_size: int,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
    progress: bool,
) -> None:
    total = sum(math.prod(info.shape) for info in reader.tensors.values())
    quiet = not (progress and sys.stderr.isatty())
    with tqdm(total=total, unit="", unit_scale=True, desc="converting", disable=quiet, file=sys.stderr) as bar:
        if fmt == "meta":
            write_meta(reader, folder, mp_size, dtype, bar.update)
        else:
            write_hf(reader, folder, dtype, bar.update, max_shard_bytes)
