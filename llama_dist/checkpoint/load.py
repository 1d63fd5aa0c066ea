"""Filling this rank's parameters from a checkpoint: its own slices only, one piece at a time."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from tqdm import tqdm

from llama_dist.checkpoint.reader import Reader
from llama_dist.errors import CheckpointError
from llama_dist.kernels.touch import touch
from llama_dist.model.transformer import Transformer
from llama_dist.parallel.layers import Placement
from llama_dist.quant.pack import pack
from llama_dist.quant.packed import Packed
from llama_dist.quant.scheme import BLOCK

NUMBERS = 1 << 22  # of a weight that are packed at a time


def fill(param: torch.Tensor, reader: Reader, name: str, place: Placement) -> None:
    """Copy the placed part of logical tensor `name` into `param`, then zeros where the units run out."""
    stop = reader.tensors[name].shape[place.dim] if place.stop is None else place.stop
    width = stop - place.start
    param.narrow(place.dim, width, param.shape[place.dim] - width).zero_()
    if width == 0:
        return
    target, row = param.narrow(place.dim, 0, width), 0
    for piece in reader.read(name, place.dim, place.start, stop):
        target[row : row + len(piece)].copy_(piece)
        row += len(piece)
    assert row == len(target), f"{name}: {row} rows read, {len(target)} expected"


def fill_packed(weight: Packed, reader: Reader, name: str, place: Placement) -> None:
    """`fill` for a packed weight. CheckpointError where a number of it cannot be packed."""
    dtype = weight.numbers.dtype if weight.scheme.exact else torch.float32
    stop = reader.tensors[name].shape[place.dim] if place.stop is None else place.stop
    columns = stop - place.start if place.dim == 1 else weight.shape[1]
    done, waiting = 0, torch.empty(0, columns, dtype=dtype)
    step = max(1, NUMBERS // max(1, columns) // BLOCK) * BLOCK
    for part in weight.parts:
        touch(part)

    def put(rows: torch.Tensor) -> None:
        nonlocal done
        for part in torch.split(rows, step):
            wrong = pack(weight, part, done)
            if wrong is not None:
                first = done + wrong + (place.start if place.dim == 0 else 0)
                raise CheckpointError(
                    f"{name} has a NaN or a number beyond 1e30 in rows {first} to {first + BLOCK - 1}, "
                    f"which cannot be packed in {weight.scheme.bits} bits; leave --quantization out"
                )
            done += len(part)

    for piece in reader.read(name, place.dim, place.start, stop):
        rows = torch.cat((waiting, piece.to(dtype))) if len(waiting) else piece
        whole = len(rows) // BLOCK * BLOCK
        put(rows[:whole])
        waiting = rows[whole:].to(dtype).clone()
    if len(waiting):
        put(waiting)
    for part in weight.blocks(-(-done // BLOCK), len(weight.codes)).parts:
        part.zero_()


@torch.no_grad()
def load(
    model: Transformer, reader: Reader, progress: bool = False, halted: Callable[[], bool] = lambda: False
) -> None:
    """Fill every weight of `model`, unless `halted`, asked before each, says that it is not wanted any more.

    `progress` shows a bar on stderr where that is a terminal.
    """
    weights = model.weights()
    total = sum(weight.nbytes for weight, _ in weights.values())
    quiet = not (progress and sys.stderr.isatty())
    with tqdm(total=total, unit="B", unit_scale=True, desc="loading", disable=quiet, file=sys.stderr) as bar:
        for name, (weight, place) in weights.items():
            if halted():
                return
            if isinstance(weight, Packed):
                tied = name not in reader.tensors  # the output, which is the embedding
                fill_packed(weight, reader, "tok_embeddings.weight" if tied else name, place)
            else:
                fill(weight, reader, name, place)
            bar.update(weight.nbytes)
