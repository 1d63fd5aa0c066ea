"""Finds a checkpoint's tokenizer and opens it, whatever its kind; the kind is read off the file's content."""

from __future__ import annotations

import os
from pathlib import Path

from llama_dist.errors import CheckpointError
from llama_dist.text.gguf_vocab import tokenizer_from_gguf
from llama_dist.text.hf_json import load_hf_json
from llama_dist.text.sidecar import read_bytes, read_sidecar
from llama_dist.text.spm import load_sentencepiece
from llama_dist.text.tiktoken_file import is_tiktoken, load_tiktoken
from llama_dist.text.tokenizer import PieceTokenizer

__all__ = ["find_tokenizer", "load_tokenizer", "tokenizer_from_gguf"]

_NAMES = ("tokenizer.json", "tokenizer.model")


def find_tokenizer(directory: str | os.PathLike[str]) -> Path | None:
    """The tokenizer file in a checkpoint directory: tokenizer.json, tokenizer.model or a tokenizer.model.v3."""
    folder = Path(directory)
    files = [folder / name for name in _NAMES]
    # Mistral numbers the versions of its files; the highest is the newest.
    files += sorted(folder.glob("tokenizer.model.v*"), reverse=True)
    return next((file for file in files if file.is_file()), None)


def load_tokenizer(path: str | os.PathLike[str]) -> PieceTokenizer:
    """The tokenizer in a file, or in the file that `find_tokenizer` finds in a directory.

    What other files beside it say about stop ids, `add_bos` and the chat template is taken along. CheckpointError if
    there is none, or it is damaged or of a kind that is not supported.
    """
    file: Path | None = Path(path)
    assert file is not None
    if file.is_dir():
        file = find_tokenizer(file)
        if file is None:
            raise CheckpointError(f"{path} holds neither {' nor '.join(_NAMES)}; give --tokenizer_path")
    elif not file.is_file():
        raise CheckpointError(f"tokenizer {path} does not exist; check --tokenizer_path")
    data = read_bytes(file)
    where = str(file)
    sidecar = read_sidecar(file.parent)
    head = data[:64].removeprefix(b"\xef\xbb\xbf").lstrip()
    if not head:
        raise CheckpointError(f"{where} is empty; fetch the file again")
    if head.startswith(b"GGUF"):
        raise CheckpointError(f"{where} is a GGUF, not a tokenizer file; give it as --ckpt_dir")
    if head.startswith((b"{", b"[")):
        return load_hf_json(data, where, sidecar)
    if is_tiktoken(data):
        return load_tiktoken(data, where, sidecar)
    return load_sentencepiece(data, where, sidecar)
