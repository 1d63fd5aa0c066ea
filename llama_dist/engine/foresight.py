"""A pass begun before the host has seen the tokens that it goes on from, so that a GPU does not wait for the host.

They go from one pass to the next on the device. Where the host then finds that an answer has ended, or that a token is
another one, that row was computed for nothing: what it wrote lies where nobody reads, or is written again first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llama_dist.engine.draws import Drawing
from llama_dist.engine.scheduler import Work
from llama_dist.kernels.told import sent


@dataclass(frozen=True)
class Foreseen:
    """The pass of `works`, one token each, taken to be `tokens`; it left `hidden` [len(works), dim].

    The model has its logits at hand until the next pass.
    """

    works: Sequence[Work]
    tokens: Sequence[int]
    hidden: torch.Tensor

    def rows(self) -> list[int]:
        """The rows that are of use: their sequence goes on, and with this token."""
        return [
            row
            for row, (work, token) in enumerate(zip(self.works, self.tokens, strict=True))
            if work.start == work.sequence.cached and work.sequence.tokens[-1] == token
        ]


def next_tokens(likeliest: torch.Tensor, drawn: Drawing, rows: Sequence[int], going: Sequence[int]) -> torch.Tensor:
    """The tokens of those rows that go on, int64 [len(going)] on the device: the drawn ones, or the likeliest [n].

    `rows`: which row each of the drawn tokens is of. Where there is no token yet some other is in its place.
    """
    tokens, device = likeliest, likeliest.device
    for some, told in drawn.parts:
        at = [rows[i] for i in some]
        every = at == [*range(len(tokens))]
        tokens = told.there if every else tokens.index_copy(0, sent(torch.tensor(at), device), told.there)
    if len(going) < len(tokens):
        tokens = tokens[sent(torch.tensor(going), device)]
    return tokens.clamp_min(0)
