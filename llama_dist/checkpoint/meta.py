"""Meta's checkpoints: consolidated.00.pth, 01, ... and params.json, one file for each rank they were saved from.

wq, wk, wv, w1, w3 and output are cut into rows, wo and w2 into columns, norms are in every file. tok_embeddings is cut
into columns up to Llama 2 and into rows from Llama 3 on; its shapes tell which. With more files than KV heads, as
Llama 3.1 405B in 16 files has, each KV head lies in several neighbouring files and is read from the first.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from llama_dist.checkpoint.check import check_names, check_shape, check_type, name_some
from llama_dist.checkpoint.files import File, read_json
from llama_dist.checkpoint.pth import read_pth_header
from llama_dist.checkpoint.stored import Stored
from llama_dist.checkpoint.table import Logical, TableReader
from llama_dist.config import ModelConfig
from llama_dist.errors import CheckpointError
from llama_dist.model.families import rotary_rows, tensor_shapes
from llama_dist.model.meta_params import meta_vocab_size, parse_meta_params

EMBEDDING = "tok_embeddings.weight"
_IGNORED = {"rope.freqs"}
"""Rotary frequencies that Llama 1 and 2 saved; they follow from params.json."""
_COLUMNS = (".wo.weight", ".w2.weight")
_WHOLE = ("norm.weight", "wo.bias", "w2.bias")


def open_meta(directory: Path) -> TableReader:
    """The Reader of a Meta directory, all headers checked; CheckpointError names what is wrong."""
    params = read_json(directory / "params.json")
    files: list[File] = []
    try:
        headers = []
        for path in _shards(directory):
            files.append(File(path))
            header = read_pth_header(files[-1])
            headers.append({name: stored for name, stored in header.items() if name not in _IGNORED})
        config = parse_meta_params(params, _vocab_size(directory, params, headers))
        shapes = tensor_shapes(config)
        for file, header in zip(files, headers, strict=True):
            check_names(str(file.path), shapes, header)
        logical = {
            name: _logical(name, shape, config, [header[name] for header in headers]) for name, shape in shapes.items()
        }
        return TableReader("meta", config, logical, files)
    except BaseException:
        for file in files:
            file.close()
        raise


def _shards(directory: Path) -> list[Path]:
    """consolidated.NN.pth in order, NN from 0 on without a gap."""
    numbers: dict[int, Path] = {}
    for path in sorted(directory.iterdir()):
        match = re.fullmatch(r"consolidated\.(\d{1,6})\.pth", path.name)
        if match:
            if int(match[1]) in numbers:
                raise CheckpointError(f"{path} and {numbers[int(match[1])].name} have one number: keep one of them")
            numbers[int(match[1])] = path
    missing = [n for n in range(max(numbers, default=0) + 1) if n not in numbers]
    if missing:
        names = name_some(f"consolidated.{n:02d}.pth" for n in missing[:64])
        raise CheckpointError(f"{directory}: {names} missing beside {len(numbers)} other files: fetch all of them")
    return [numbers[n] for n in range(len(numbers))]


def _vocab_size(directory: Path, params: dict[str, Any], headers: list[dict[str, Stored]]) -> int:
    """From params.json, else from the embedding: its rows, of all files together where they are cut into rows."""
    size = meta_vocab_size(params)
    if size is not None:
        return size
    shapes = [header[EMBEDDING].shape for header in headers if EMBEDDING in header]
    if len(shapes) != len(headers) or any(len(shape) != 2 for shape in shapes):
        raise CheckpointError(f"{directory}: {EMBEDDING} must be a matrix in every file: params.json has no vocab_size")
    if all(columns == params.get("dim") for _, columns in shapes):
        return sum(rows for rows, _ in shapes)
    return shapes[0][0]


def _logical(name: str, shape: tuple[int, ...], config: ModelConfig, parts: list[Stored]) -> Logical:
    for part in parts:
        check_type(str(part.file.path), name, part)
        if part.kind != parts[0].kind:
            raise CheckpointError(
                f"{part.file.path}: tensor {name} is {part.kind}, but {parts[0].kind} in {parts[0].file.name}"
            )
    pairs = config.head_dim if rotary_rows(name) else None
    if name.endswith(_WHOLE):
        for part in parts:
            check_shape(str(part.file.path), name, part.shape, shape)
        return Logical(shape, (parts[0],), pairs=pairs)
    dims = (0, 1) if name == EMBEDDING else (1,) if name.endswith(_COLUMNS) else (0,)
    for dim in dims:
        if _joined(parts, dim) == shape:
            return Logical(shape, tuple(parts), dim, pairs)
    if name.endswith((".wk.weight", ".wv.weight", ".wk.bias", ".wv.bias")):
        firsts = parts[:: max(1, len(parts) // config.n_kv_heads)]
        if len(parts) % config.n_kv_heads == 0 and len({p.shape for p in parts}) == 1 and _joined(firsts, 0) == shape:
            return Logical(shape, tuple(firsts), 0, pairs)
    found = ", ".join(str(list(part.shape)) for part in parts[:4]) + (", ..." if len(parts) > 4 else "")
    raise CheckpointError(
        f"{parts[0].file.path.parent}: tensor {name} has shape {found} in {len(parts)} file(s), params.json asks for "
        f"{list(shape)} in all, cut along dimension {' or '.join(map(str, dims))}"
    )


def _joined(parts: list[Stored], dim: int) -> tuple[int, ...] | None:
    """The shape of all parts put together along `dim`; None where they do not fit."""
    first = parts[0].shape
    others = {part.shape[:dim] + part.shape[dim + 1 :] for part in parts}
    if not dim < len(first) or len(others) != 1 or len({len(part.shape) for part in parts}) != 1:
        return None
    return (*first[:dim], sum(part.shape[dim] for part in parts), *first[dim + 1 :])
