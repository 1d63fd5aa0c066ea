"""Passes done before the host has put the tokens that they go on from to their answers.

A GPU is not to wait for the host: one pass is begun ahead, and tokens go to it on the device. On a CPU each pass leaves
the caches full of weights, and what the host does between two finds nothing of its own there: several passes are one
call, and what belongs between them is done after it, for all of them in a row. Where the host then finds that an answer
has ended, or that a token is another one, that row was computed for nothing: what it wrote lies where nobody reads, or
is written again first.
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
        """The rows that are of use."""
        return _of_use(self.works, self.tokens)


@dataclass(frozen=True)
class Pass:
    """A pass of `works`, one token each, `tokens`; `after` them come these, -1 where a row is not finite."""

    works: Sequence[Work]
    tokens: Sequence[int]
    after: Sequence[int]

    def rows(self) -> list[int]:
        """The rows that are of use."""
        return _of_use(self.works, self.tokens)


def _of_use(works: Sequence[Work], tokens: Sequence[int]) -> list[int]:
    """The rows whose sequence goes on, and with this token."""
    return [
        row
        for row, (work, token) in enumerate(zip(works, tokens, strict=True))
        if work.start == work.sequence.cached and work.sequence.tokens[-1] == token
    ]


def passes_in_row(batch: Sequence[Work], tokens: Sequence[Sequence[int]]) -> list[Pass]:
    """The passes of a batch of one token each: after each of them came these tokens, which the next one computed."""
    before = [work.sequence.tokens[-1] for work in batch]
    passes = []
    for i, after in enumerate(tokens):
        works = [Work(work.sequence, work.start + i, 1) for work in batch]
        passes.append(Pass(works, before, after))
        before = [*after]
    return passes


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
