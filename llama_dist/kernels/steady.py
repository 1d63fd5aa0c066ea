"""Functions of single numbers whose bits do not depend on where in a tensor a number stands.

torch computes long runs of exp, log, sin or cos by vector instructions and the few numbers left at a run's end by the
C library, whose last bit may differ; where a run ends depends on the tensor's size and on the number of threads. So
numbers go in pieces that are not shared between threads and end with a whole vector.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

WHOLE = 64  # numbers: a multiple of every vector's length
PIECE = 16384  # numbers: torch shares 32768 and more between its threads


def steady(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """`function`, which treats every number alone, of x of any shape. On a GPU all numbers go one way anyway."""
    if x.device.type != "cpu":
        return function(x)
    flat = x.flatten()
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % WHOLE))
    parts = [function(piece) for piece in padded.split(PIECE)]  # type: ignore[no-untyped-call]
    done = torch.cat(parts) if len(parts) > 1 else parts[0]
    return done[: len(flat)].view(x.shape)
