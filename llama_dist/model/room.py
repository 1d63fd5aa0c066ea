"""One room for all weights of a model on the CPU, in large pages where the kernel gives them.

A step reads every weight once; with pages of 4 KiB it waits for their addresses too.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from llama_dist.model import ahead
from llama_dist.quant.packed import Packed

ALIGNED = 64  # bytes, a line of the cache
LEAST = 2**21  # bytes, one large page; smaller models stay where they are


def large_pages(size: int) -> torch.Tensor | None:
    """Zeros, uint8 [size], in large pages as far as the kernel has some; None where it knows none."""
    room = ahead.anonymous(size)
    return None if room is None else torch.frombuffer(room, dtype=torch.uint8)


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    """Every tensor of a weight or a bias, also those that are views of another."""
    for module in model.modules():
        for value in (getattr(module, "weight", None), getattr(module, "bias", None)):
            if isinstance(value, Packed):
                yield from value.parts
            elif value is not None:
                yield value


@torch.no_grad()
def move_together(model: nn.Module) -> None:
    """Give the weights of `model` one place. They become zeros: call it before they are set."""
    each_once = {id(t): t for t in _tensors(model)}  # tied weights are one
    tensors = [t for t in each_once.values() if t.device.type == "cpu" and t.numel()]
    places: dict[int, int] = {}
    size = 0
    for t in tensors:
        storage = t.untyped_storage()
        if storage.data_ptr() not in places:
            places[storage.data_ptr()] = size
            size += -(-storage.nbytes() // ALIGNED) * ALIGNED
    touched = ahead.take(size)  # also where nothing lies on the CPU: it ends the touching and gives the room back
    if size < LEAST:
        return
    room = large_pages(size) if touched is None else torch.frombuffer(touched, dtype=torch.uint8, count=size)
    if room is None:
        return
    storage = room.untyped_storage()
    for t in tensors:
        offset = places[t.untyped_storage().data_ptr()] // t.itemsize + t.storage_offset()
        t.set_(storage, offset, t.shape, t.stride())
