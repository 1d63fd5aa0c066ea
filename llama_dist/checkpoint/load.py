"""Filling this rank's parameters from a checkpoint: its own slices only, one piece at a time."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from tqdm import tqdm

from llama_dist.checkpoint.reader import Reader
from llama_dist.model.transformer import Transformer
from llama_dist.parallel.layers import Placement


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


@torch.no_grad()
def load(
    model: Transformer, reader: Reader, progress: bool = False, halted: Callable[[], bool] = lambda: False
) -> None:
    """Fill every parameter of `model`, unless `halted`, asked before each, says that it is not wanted any more.

    `progress` shows a bar on stderr where that is a terminal.
    """
    params = dict(model.named_parameters())  # a tied output is the embedding and is filled once
    places = model.placements()
    total = sum(p.nbytes for p in params.values())
    quiet = not (progress and sys.stderr.isatty())
    with tqdm(total=total, unit="B", unit_scale=True, desc="loading", disable=quiet, file=sys.stderr) as bar:
        for name, param in params.items():
            if halted():
                return
            fill(param, reader, name, places[name])
            bar.update(param.nbytes)
