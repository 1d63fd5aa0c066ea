"""From a path to a Reader: which format lies there, found by the files themselves."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from llama_dist.checkpoint.files import File
from llama_dist.checkpoint.gguf import open_gguf
from llama_dist.checkpoint.meta import open_meta
from llama_dist.checkpoint.reader import Reader
from llama_dist.checkpoint.safetensors import INDEX, SINGLE, open_safetensors
from llama_dist.errors import CheckpointError, ConfigError

_HF = f"config.json with {SINGLE} or {INDEX} (Hugging Face)"
WANTED = f"consolidated.NN.pth with params.json (Meta), {_HF}, or one .gguf file"


def open_checkpoint(path: str | Path) -> Reader:
    """A Reader for a directory, or for a single .gguf file, with every header checked.

    Raises CheckpointError, one line, when nothing or several checkpoints are found, or when anything in the headers
    is missing, left over, mis-shaped, of a type that is not read, damaged or hostile. Close the reader when done.
    """
    try:
        opener, target = find_checkpoint(Path(path))
        return opener(target)
    except ConfigError as error:
        # ModelConfig's own checks: the numbers came from the checkpoint, not from a flag.
        raise CheckpointError(f"{path}: {error}") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {error.filename or path}: {error.strerror}") from None


def find_checkpoint(path: Path) -> tuple[Callable[[Path], Reader], Path]:
    """The function that opens what is at `path`, and what to give it; reads no more than a magic number."""
    if path.is_file():
        file = File(path)
        try:
            if file.size >= 4 and file.read(0, 4) == b"GGUF":
                return open_gguf, path
        finally:
            file.close()
        raise CheckpointError(f"{path} is not a GGUF file; for other formats give the directory: {WANTED}")
    if not path.is_dir():
        raise CheckpointError(f"no checkpoint at {path}: no such file or directory")
    names = sorted(entry.name for entry in path.iterdir())
    meta = [name for name in names if re.fullmatch(r"consolidated\.\d+\.pth", name)]
    hf = [name for name in names if name in (SINGLE, INDEX)]
    ggufs = [name for name in names if name.lower().endswith(".gguf")]
    if bool(meta) + bool(hf) + len(ggufs) > 1:
        found = ", ".join((meta[:1] + hf[:1] + ggufs)[:6])
        raise CheckpointError(f"{path} holds several checkpoints ({found}): keep one, or give the .gguf file itself")
    if ggufs:
        return open_gguf, path / ggufs[0]
    for found_files, opener, needs in ((meta, open_meta, "params.json"), (hf, open_safetensors, "config.json")):
        if found_files:
            if needs not in names:
                raise CheckpointError(f"{path} has {found_files[0]} but no {needs}: fetch it too")
            return opener, path
    if any(name.endswith(".bin") and "model" in name for name in names):
        raise CheckpointError(f"{path} has only .bin weights, which are not read: save the model as safetensors")
    raise CheckpointError(f"no checkpoint in {path}: it holds {_listing(names)}; looked for {WANTED}")


def _listing(names: list[str]) -> str:
    if not names:
        return "nothing"
    shown = ", ".join(repr(name)[1:-1][:60] for name in names[:4])
    return shown + (f" and {len(names) - 4} more" if len(names) > 4 else "")
