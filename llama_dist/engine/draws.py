"""A token for each of several rows: those of `sampler.sample`, by faster ways that leave to it what is close."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from llama_dist.engine.device_draws import draw_rows
from llama_dist.engine.sampler import Wanted, noise_key, sample
from llama_dist.kernels import triton_here
from llama_dist.kernels.draw import UNSURE, Draw, draw
from llama_dist.kernels.told import Told

Way = Callable[[Sequence[Wanted]], torch.Tensor]
"""From rows to their tokens, int64 [n] on the device, without waiting for it."""


@dataclass(frozen=True)
class Drawing:
    """Tokens of `n` rows on their way, in parts: of which rows each is, and the tokens."""

    n: int
    parts: list[tuple[list[int], Told]]

    def wait(self) -> list[int]:
        """The tokens, UNSURE where they are left to the sampler."""
        found = {i: token for rows, told in self.parts for i, token in zip(rows, told.tolist(), strict=True)}
        return [found[i] for i in range(self.n)]


def draw_all(wanted: Sequence[Wanted]) -> list[int]:
    """The token of each; all rows are of one length and on one device."""
    return [settle(w, token) for w, token in zip(wanted, begin(wanted).wait(), strict=True)]


def settle(wanted: Wanted, token: int) -> int:
    """A token from a Drawing, or the sampler's where it is left to that."""
    return sample(wanted.row.float(), *wanted[1:]) if token == UNSURE else token


def begin(wanted: Sequence[Wanted]) -> Drawing:
    """Have a GPU draw a token for each while the host goes on; on a CPU they are drawn here."""
    if wanted and wanted[0].row.device.type == "cpu":
        return Drawing(len(wanted), [([*range(len(wanted))], Told(torch.tensor(compiled_draw(wanted))))])
    groups: dict[tuple[Way, torch.dtype], list[int]] = {}
    for i, w in enumerate(wanted):
        groups.setdefault((_way(w), w.row.dtype), []).append(i)
    return Drawing(len(wanted), [(some, Told(way([wanted[i] for i in some]))) for (way, _), some in groups.items()])


def _way(wanted: Wanted) -> Way:
    if wanted.params.temperature == 0:
        return greatest
    filtered = 0 < wanted.params.top_k < len(wanted.row)
    return draw_rows if filtered or not triton_here.serves(wanted.row) else begin_triton


def greatest(wanted: Sequence[Wanted]) -> torch.Tensor:
    """The likeliest token of each, int64 [n] on the device: what temperature 0 draws."""
    return torch.stack([w.row for w in wanted]).argmax(1)


def begin_triton(wanted: Sequence[Wanted]) -> torch.Tensor:
    """A token for each in Triton, int64 [n] on the device, of rows of one dtype without top_k; UNSURE where close."""
    from llama_dist.kernels import triton_draw

    return triton_draw.begin(packed(wanted))


def packed(wanted: Sequence[Wanted]) -> list[Draw]:
    """As the kernels take them."""
    return [
        Draw(w.row, noise_key(w.seed, w.position), w.params.temperature, w.params.top_p, w.params.top_k, w.params.min_p)
        for w in wanted
    ]


def compiled_draw(wanted: Sequence[Wanted]) -> list[int]:
    """Tokens in C++; UNSURE where it is close, or there is no C++ for it."""
    return draw(packed(wanted))
